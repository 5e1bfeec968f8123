"""Replies that think first: reasoning apart from the answer, whatever the ids, prompts as rendered.

The template does what those of DeepSeek V3.1 and R1 do, with their tokens.
"""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_runtime import cli
from moe_runtime.deepseek_v32_chat import DeepseekV32Chat
from moe_runtime.model import MoeModel
from moe_runtime.output_text import Piece
from moe_runtime.thinking import ThinkingText, ThinkTokens
from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.text_helpers import (
    FakeBackend,
    byte_level_json,
    harmony_tokenizer,
    tiny_config,
)

BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
TEMPLATE = (
    """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "system" %}{{ message.content }}
{%- elif message.role == "user" %}{{ USER + message.content }}
{%- else %}{{ ASSISTANT + "</think>" + message.content + eos_token }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ ASSISTANT + ("<think>" if thinking else "</think>") }}{% endif %}
""".replace("USER", json.dumps(USER))
    .replace("ASSISTANT", json.dumps(ASSISTANT))
    .strip()
)


def make_tokenizer(markers_are_special):
    data = json.loads(byte_level_json())
    first = max(token["id"] for token in data["added_tokens"]) + 1
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] != "<think>"]
    for i, text in enumerate((BEGIN, END, USER, ASSISTANT, "<think>", "</think>")):
        special = "think" not in text or markers_are_special
        data["added_tokens"].append(
            {"id": first + i, "content": text, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": special}
        )  # fmt: skip
    return Tokenizer.from_json(
        json.dumps(data),
        chat_templates={"default": TEMPLATE},
        named_tokens={"bos_token": BEGIN, "eos_token": END},
    )


TOKENIZER = make_tokenizer(markers_are_special=True)
TOKENS = ThinkTokens.find(TOKENIZER)
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]


def read(text_or_ids, prompt="", stops=(), tokenizer=TOKENIZER):
    ids = tokenizer.encode(text_or_ids) if isinstance(text_or_ids, str) else text_or_ids
    output = ThinkingText(tokenizer, ThinkTokens.find(tokenizer), tokenizer.encode(prompt), stops)
    pieces = []
    for i in ids:
        pieces.append(output.push(i))
        if output.stopped:
            break
    pieces.append(output.end(None))
    joined = "".join(p.reasoning for p in pieces), "".join(p.text for p in pieces)
    assert joined[1] == output.answer
    return joined


def test_markers_are_found_by_name():
    assert (TOKENS.begin, TOKENS.end) == tuple(map(TOKENIZER.token_id, ("<think>", "</think>")))
    assert ThinkTokens.find(harmony_tokenizer()) is None  # it has no </think>


@pytest.mark.parametrize(
    ("prompt", "output", "reasoning", "answer"),
    [
        ("hi<think>", "Let me see.</think>It is blue.", "Let me see.", "It is blue."),
        ("hi<think>\n", "\nOne.\n\nTwo.\n</think>\n\nBlue.\n", "One.\n\nTwo.", "Blue.\n"),
        ("hi", "<think>\nOne.\n</think>\n\nBlue.", "One.", "Blue."),
        ("hi</think>", "It is blue.", "", "It is blue."),
        ("hi</think>", "</think>It is blue.", "", "It is blue."),
        ("hi", "It is blue.", "", "It is blue."),
        ("hi<think>", "Cut off", "Cut off", ""),
        ("hi<think>", "</think>Blue.", "", "Blue."),
        ("<think>old</think>answer then more", "It is blue.", "", "It is blue."),
    ],
)
@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_reasoning_and_answer(prompt, output, reasoning, answer, special):
    tokenizer = make_tokenizer(markers_are_special=special)
    assert read(output, prompt, tokenizer=tokenizer) == (reasoning, answer)


def test_stop_strings_count_in_the_answer_alone():
    assert read("a STOP b</think>c STOP d", "x<think>", stops=["STOP"]) == ("a STOP b", "c ")


def test_channels_are_named():
    output = ThinkingText(TOKENIZER, TOKENS, [TOKENS.begin], ())
    (letter,) = TOKENIZER.encode("a")
    assert output.push(letter) == Piece(reasoning="a", channel="analysis")
    output.push(TOKENS.end)
    assert output.push(letter) == Piece("a", channel="final")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["a", "b c", "\n", "\u4f60", "<think>", "</think>"]), max_size=12))
def test_no_text_is_lost_whatever_the_markers(parts):
    reasoning, answer = read([i for part in parts for i in TOKENIZER.encode(part)], "x<think>")
    words = "".join(parts).replace("<think>", "").replace("</think>", "").replace("\n", "")
    assert (reasoning + answer).replace("\n", "") == words


@pytest.mark.parametrize("thinking", [True, False])
def test_a_chat_through_the_template(thinking):
    reply = "Short waves scatter.</think>Scattering." if thinking else "Scattering."
    ids = TOKENIZER.encode(reply) + [TOKENIZER.token_id(END)]
    backend = FakeBackend(ids, vocab_size=1000)
    model = MoeModel(backend, tiny_config(1000), tokenizer=TOKENIZER)
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    made = model.generate(
        earlier + CHAT,
        template_options={"thinking": thinking},
        eos_token_ids=TOKENIZER.token_id(END),
    )
    prompt = TOKENIZER.decode(backend.requests[0][0], skip_special_tokens=False)
    opened = f"{BEGIN}{USER}Hi{ASSISTANT}</think>Hello{END}{USER}Why is the sky blue?{ASSISTANT}"
    assert prompt == opened + ("<think>" if thinking else "</think>")
    assert made.text == "Scattering."
    assert made.reasoning == ("Short waves scatter." if thinking else "")
    assert made.finish_reason == "stop"


@pytest.mark.parametrize(
    ("flag", "marker"), [("--thinking", "<think>"), ("--no-thinking", "</think>")]
)
def test_the_command_line_sets_it(monkeypatch, capsys, flag, marker):
    backend = FakeBackend([TOKENIZER.token_id(END)], vocab_size=1000)
    model = MoeModel(backend, tiny_config(1000), tokenizer=TOKENIZER)
    monkeypatch.setattr(MoeModel, "from_pretrained", lambda *args, **kwargs: model)
    assert cli.run(["generate", "m", "-p", "hi", "--chat", flag, "--max-new-tokens", "2"]) == 0
    sent = TOKENIZER.decode(backend.requests[0][0], skip_special_tokens=False)
    assert sent.endswith(ASSISTANT + marker)
    assert cli.run(["generate", "m", "-p", "hi", flag]) == 2
    assert "--thinking need --chat" in capsys.readouterr().err


def test_deepseek_v32_without_a_template():
    """As the vendor's code renders it."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Hello!", "thinking": "thinking..."},
        {"role": "user", "content": "1+1=?"},
    ]
    tokenizer = Tokenizer.from_json(byte_level_json(), chat_code=DeepseekV32Chat())
    rendered = tokenizer.apply_chat_template(
        messages, tokenize=False, template_options={"thinking": True}
    )
    assert rendered == (
        f"{BEGIN}You are a helpful assistant.{USER}hello{ASSISTANT}</think>Hello!{END}"
        f"{USER}1+1=?{ASSISTANT}<think>"
    )
    plain = tokenizer.apply_chat_template(messages, tokenize=False)
    assert plain == rendered.removesuffix("<think>") + "</think>"
    with pytest.raises(ValueError, match=r"tools are not supported for DeepSeek V3\.2"):
        tokenizer.apply_chat_template(messages, tools=[{"name": "f"}])
