"""DSML tool calls in a reply: read whatever the pieces, never raising, nothing lost."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime.dsml import CallBlocks, DsmlText, DsmlTokens, read_calls
from moe_runtime.harmony import ToolCall
from moe_runtime.output_text import Piece
from moe_runtime.thinking import ThinkTokens
from tests.moe_runtime.deepseek_tokenizer import deepseek_tokenizer

D = "\uff5cDSML\uff5c"


def invoke(name, **values):
    lines = [
        f'<{D}parameter name="{key}" string="{str(isinstance(value, str)).lower()}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{D}parameter>"
        for key, value in values.items()
    ]
    return f'<{D}invoke name="{name}">\n' + "\n".join(lines) + f"\n</{D}invoke>"


def block(*calls, name="tool_calls"):
    return f"<{D}{name}>\n" + "\n".join(calls) + f"\n</{D}{name}>"


WEATHER = invoke("weather", city="Bern", days=3, hourly=False, units=["C", "mm"])
CALL = ToolCall(
    "weather",
    '{"city": "Bern", "days": 3, "hourly": false, "units": ["C", "mm"]}',
    "functions.weather",
    "json",
)


def split(pieces):
    blocks = CallBlocks()
    given = "".join([blocks.push(piece) for piece in pieces])
    return given + blocks.finish(), blocks.calls


@pytest.mark.parametrize("name", ["tool_calls", "function_calls"])
def test_calls_and_text(name):
    text = f"I look it up.\n\n{block(WEATHER, invoke('now'), name=name)}"
    now = ToolCall("now", "{}", "functions.now", "json")
    for pieces in ([text], list(text), [text[:20], text[20:90], text[90:]]):
        assert split(pieces) == ("I look it up.", (CALL, now))


def test_text_after_a_block_and_a_second_block():
    text = f"a{block(WEATHER)}b\n\n{block(WEATHER)}\nc"
    assert split([text]) == ("ab\nc", (CALL, CALL))


@pytest.mark.parametrize(
    "text",
    ["1 < 2", "<", f"\n\n<{D}", f"<{D}tool", "a\n\n", f"{D} alone", f"<{D}tool_calls x", "\n\n<b>"],
)
def test_what_only_looks_like_a_block_is_text(text):
    assert split(list(text)) == (text, ())


def test_a_block_without_a_call_is_given_back():
    text = f"see\n\n<{D}tool_calls>\nnothing\n</{D}tool_calls> there"
    assert split(list(text)) == (text, ())


def test_an_unfinished_call_is_marked():
    text = f'<{D}tool_calls>\n{WEATHER}\n<{D}invoke name="f">\n' + (
        f'<{D}parameter name="x" string="true">done</{D}parameter>\n<{D}parameter name="y" str'
    )
    _, calls = split(list(text))
    assert calls == (CALL, ToolCall("f", '{"x": "done"}', "functions.f", "json", complete=False))


def test_values():
    """Text stays as it is, be it JSON or markup; JSON that is none becomes text."""
    text = f'<b a="1">\n</{D}other>'
    (call,) = read_calls(invoke("f", a=text, b="3", c={"d": None}))
    assert json.loads(call.arguments) == {"a": text, "b": "3", "c": {"d": None}}
    (call,) = read_calls(
        f'<{D}invoke name="f"><{D}parameter name="n" string="false">3 m</{D}parameter></{D}invoke>'
    )
    assert json.loads(call.arguments) == {"n": "3 m"}


MARKUP = st.sampled_from(
    [f"<{D}tool_calls>", f"</{D}tool_calls>", f'<{D}invoke name="f">', f"</{D}invoke>", "\n", "<",
     f'<{D}parameter name="x" string="true">', f"</{D}parameter>", D, "text", f"<{D}", '">'],
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.lists(MARKUP, max_size=25), st.randoms(use_true_random=False))
def test_any_text_in_any_pieces(words, random):
    text = "".join(words)
    whole = split([text])
    cuts = sorted(random.randrange(len(text) + 1) for _ in range(6))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(pieces) == whole
    if not whole[1]:
        assert whole[0] == text


def test_text_without_markup_is_kept():
    text = "a < b\n\n< c > d\n"
    assert split(list(text)) == (text, ())


@pytest.fixture(scope="module", params=[True, False], ids=["special markers", "plain markers"])
def tokenizer(request):
    return deepseek_tokenizer(markers_are_special=request.param)


def run(tokenizer, prompt, reply, stops=()):
    output = DsmlText(
        tokenizer,
        ThinkTokens.find(tokenizer),
        DsmlTokens.find(tokenizer),
        tokenizer.encode(prompt),
        stops,
    )
    pieces = [output.push(token) for token in tokenizer.encode(reply)] + [output.end(None)]
    return collected(pieces), output


def collected(pieces):
    return Piece("".join(p.text for p in pieces), "".join(p.reasoning for p in pieces))


def test_reasoning_answer_and_calls(tokenizer):
    reply = f"hm\n</think>\n\nI look.\n\n{block(WEATHER)}"
    piece, output = run(tokenizer, "q<think>", reply)
    assert (piece.reasoning, piece.text) == ("hm", "I look.")
    assert output.tool_calls == (CALL,)
    assert output.answer == "I look."


def test_a_block_ends_the_reasoning(tokenizer):
    """Models leave </think> out before a call (vLLM's issues have it)."""
    piece, output = run(tokenizer, "q<think>", f"hm\n\n{block(WEATHER)}")
    assert (piece.reasoning, piece.text) == ("hm", "")
    assert output.tool_calls == (CALL,)


def test_markers_inside_a_call_are_text(tokenizer):
    call = invoke("f", x="a</think>b" if not tokenizer.special_ids else "ab")
    _, output = run(tokenizer, "q</think>", block(call))
    assert json.loads(output.tool_calls[0].arguments)["x"].replace("</think>", "") == "ab"


def test_stop_strings_do_not_count_in_calls(tokenizer):
    piece, output = run(tokenizer, "q</think>", f"ok\n\n{block(WEATHER)}", stops=["Bern"])
    assert (piece.text, output.stopped) == ("ok", False)
    assert output.tool_calls == (CALL,)


def test_a_reply_without_calls(tokenizer):
    piece, output = run(tokenizer, "q</think>", "1 < 2\n\nand <b>\n")
    assert (piece.text, piece.reasoning, output.tool_calls) == ("1 < 2\n\nand <b>\n", "", ())


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 300), max_size=40), st.sampled_from(["q", "q<think>", "q</think>"]))
def test_any_ids(ids, prompt):
    tokenizer = deepseek_tokenizer(markers_are_special=False)
    output = DsmlText(
        tokenizer,
        ThinkTokens.find(tokenizer),
        DsmlTokens.find(tokenizer),
        tokenizer.encode(prompt),
        ["stop"],
    )
    for token in ids:
        output.push(token)
    output.end(1)
