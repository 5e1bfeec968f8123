"""The channel parser: well-formed output exactly, broken output without loss, nothing raises."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.harmony import HarmonyParser, HarmonyTokens, ToolCall
from tests.moe_runtime.text_helpers import HARMONY_TOKENS, harmony_tokenizer, plain_tokenizer

TOKENIZER = harmony_tokenizer()
TOKENS = HarmonyTokens.find(TOKENIZER)
PROMPT = TOKENIZER.encode("<|start|>user<|message|>hi<|end|><|start|>assistant")
CONTROL = HARMONY_TOKENS[:7]


def parse(text_or_ids, prompt=PROMPT):
    ids = TOKENIZER.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    parser = HarmonyParser(TOKENIZER, TOKENS, prompt)
    deltas = [parser.push(i) for i in ids] + [parser.finish()]
    return parser, [d for d in deltas if d.text]


def summary(text, prompt=PROMPT):
    parser, _ = parse(text, prompt)
    return [(m.kind, m.channel, m.text) for m in parser.messages if m.text]


def test_tokens_are_found_by_name():
    assert TOKENS.start == TOKENIZER.token_id("<|start|>")
    assert TOKENS.stop_ids == tuple(TOKENIZER.token_id(t) for t in ("<|return|>", "<|call|>"))
    assert HarmonyTokens.find(plain_tokenizer()) is None


def test_reasoning_then_answer():
    parser, deltas = parse(
        "<|channel|>analysis<|message|>The user says hi.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello, world<|return|>"
    )
    assert parser.text_of("reasoning") == "The user says hi."
    assert parser.text_of("answer") == "Hello, world"
    assert [m.complete for m in parser.messages] == [True, True]
    assert "".join(d.text for d in deltas if d.kind == "answer") == "Hello, world"
    assert {d.channel for d in deltas} == {"analysis", "final"}


CALL = ToolCall("weather", '{"city": "Oslo"}', "functions.weather", "json", True)
CALLS = {
    "recipient in the channel part": (
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
    ),
    "recipient in the role part": (
        " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>"
    ),
    "content type without its token": (
        "<|channel|>commentary to=functions.weather json<|message|>"
    ),
    "no space before the recipient": (
        "<|channel|>commentaryto=functions.weather <|constrain|>json<|message|>"
    ),
    "recipient after the content type": (
        "<|channel|>commentary <|constrain|>json to=functions.weather<|message|>"
    ),
    "no message token": "<|channel|>commentary to=functions.weather <|constrain|>json",
}


@pytest.mark.parametrize("header", CALLS.values(), ids=CALLS)
def test_tool_call(header):
    parser, _ = parse(header + '{"city": "Oslo"}<|call|>')
    assert parser.tool_calls == (CALL,)
    assert parser.text_of("answer", "preamble", "reasoning") == ""


def test_built_in_tool_on_the_analysis_channel():
    parser, _ = parse("<|channel|>analysis to=python code<|message|>print(1)<|call|>")
    assert parser.tool_calls == (ToolCall("python", "print(1)", "python", "code", True),)
    assert parser.text_of("reasoning") == ""


def test_a_tool_call_that_is_cut_off_says_so():
    parser, _ = parse("<|channel|>commentary to=functions.f <|constrain|>json<|message|>{")
    assert parser.tool_calls == (ToolCall("f", "{", "functions.f", "json", complete=False),)


def test_preamble_is_for_the_reader():
    assert summary(
        "<|channel|>commentary<|message|>I will look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.f<|message|>{}<|call|>"
    ) == [("preamble", "commentary", "I will look."), ("tool_call", "commentary", "{}")]


BROKEN = {
    "no structure": ("Hello, world", [("answer", None, "Hello, world")]),
    "no structure, several lines": ("\nhello\nworld", [("answer", None, "\nhello\nworld")]),
    "begins like a header": ("to be the end", [("answer", None, "to be the end")]),
    "spelled control token of another sort": (
        "hello<|endoftext|> world", [("answer", None, "hello world")],
    ),
    "message without a channel": ("<|message|>hello<|return|>", [("answer", None, "hello")]),
    "unknown channel": (
        "<|channel|>summary<|message|>hello<|return|>", [("answer", "summary", "hello")],
    ),
    "channel without a message token": (
        "<|channel|>final The end.<|return|>", [("answer", "final", " The end.")],
    ),
    "channel glued to its text": (
        "<|channel|>analysisThe user\nsays hi<|end|>",
        [("reasoning", "analysis", "The user\nsays hi")],
    ),
    "header that never ends": (
        "<|channel|>" + "hello world " * 40, [("answer", None, "hello world " * 40)],
    ),
    "end and start left out": (
        "<|channel|>analysis<|message|>hm<|channel|>final<|message|>hello",
        [("reasoning", "analysis", "hm"), ("answer", "final", "hello")],
    ),
    "end left out": (
        "<|channel|>analysis<|message|>hm<|start|>assistant<|channel|>final<|message|>hello",
        [("reasoning", "analysis", "hm"), ("answer", "final", "hello")],
    ),
    "start left out": (
        "<|channel|>analysis<|message|>hm<|end|>assistant<|channel|>final<|message|>hello",
        [("reasoning", "analysis", "hm"), ("answer", "final", "hello")],
    ),
    "text between messages": (
        "<|channel|>analysis<|message|>hm<|end|> hello world",
        [("reasoning", "analysis", "hm"), ("answer", None, " hello world")],
    ),
    "message token twice": (
        "<|channel|>final<|message|><|message|>hello<|constrain|> world",
        [("answer", "final", "hello world")],
    ),
    "channel twice": (
        "<|channel|>analysis<|channel|>final<|message|>hello", [("answer", "final", "hello")],
    ),
    "text instead of a role": (
        "<|end|><|start|>The quick fox<|return|>", [("answer", None, "The quick fox")],
    ),
    "a turn of the user": (
        "<|channel|>final<|message|>hello<|end|><|start|>user<|message|>world<|end|>",
        [("answer", "final", "hello"), ("other", None, "world")],
    ),
    "cut off in the channel's name": ("<|channel|>fin", []),
    "cut off in the recipient": ("<|channel|>commentary to=func", []),
    "header alone": ("<|channel|>final<|return|>", []),
    "nothing": ("", []),
}  # fmt: skip


@pytest.mark.parametrize(("text", "expected"), BROKEN.values(), ids=BROKEN)
def test_broken_output(text, expected):
    assert summary(text) == expected


def test_the_prompt_may_have_opened_the_message():
    prompt = TOKENIZER.encode("<|start|>assistant<|channel|>final<|message|>Sure: ")
    assert summary("hello<|return|>", prompt) == [("answer", "final", "hello")]


def test_a_prompt_that_ends_with_a_whole_message():
    prompt = TOKENIZER.encode("<|start|>user<|message|>hi<|end|>")
    whole = "<|start|>assistant<|channel|>final<|message|>hello<|return|>"
    assert summary(whole, prompt) == [("answer", "final", "hello")]


def test_text_comes_with_its_token():
    """Streaming: nothing waits for the end of a message."""
    parser = HarmonyParser(TOKENIZER, TOKENS, PROMPT)
    for i in TOKENIZER.encode("<|channel|>final<|message|>"):
        assert parser.push(i).text == ""
    assert [parser.push(i).text for i in TOKENIZER.encode("the end")] == [
        TOKENIZER.decode([i]) for i in TOKENIZER.encode("the end")
    ]


fragments = st.one_of(
    st.sampled_from(CONTROL),
    st.sampled_from(
        ["assistant", "user", "analysis", "final", "commentary", " to=functions.f", "json", " "]
    ),
    st.text("abc {}\n\u4f60", max_size=12),
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(
    st.lists(st.integers(0, 420), max_size=80),
    st.lists(fragments, max_size=20).map(lambda parts: TOKENIZER.encode("".join(parts))),
    st.permutations(TOKENIZER.encode(
        "<|channel|>analysis<|message|>a b<|end|><|start|>assistant<|channel|>final<|message|>c"
    )),
))  # fmt: skip
def test_never_raises_and_deltas_join_to_the_messages(ids):
    parser, deltas = parse(ids)
    joined = {}
    for delta in deltas:
        joined[delta.message] = joined.get(delta.message, "") + delta.text
    expected = {i: m.text for i, m in enumerate(parser.messages) if m.text}
    assert joined == expected
    assert parser.finish().text == ""


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["analysis", "final", "commentary"]),
            st.text("abc <|{}\n\u4f60", min_size=1, max_size=20),
        ),
        max_size=5,
    )
)
def test_well_formed_output_is_exact(messages):
    ids = []
    for i, (channel, text) in enumerate(messages):
        ids += TOKENIZER.encode(("<|start|>assistant" if i else "") + f"<|channel|>{channel}")
        ids += [TOKENS.message, *TOKENIZER.encode(text, allow_special=False), TOKENS.end]
    parser, _ = parse(ids)
    assert [(m.channel, m.text, m.complete) for m in parser.messages] == [
        (channel, text, True) for channel, text in messages
    ]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(TOKENIZER.encode("hello world, the end. quick")), max_size=30))
def test_text_without_structure_is_the_answer_whole(ids):
    assert parse(ids)[0].text_of("answer") == TOKENIZER.decode(ids)
