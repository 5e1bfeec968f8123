"""DeepSeek V4's chat format: prompts written out by hand, and a chat from a folder without a
template to a reply taken apart."""

import pytest

from moe_runtime import MoeModel
from moe_runtime.chat_messages import plain_messages
from moe_runtime.conversion.convert import convert
from moe_runtime.conversion.options import ConversionOptions
from moe_runtime.deepseek_v4_chat import (
    ASSISTANT,
    BOS,
    DSML,
    ENCODING_FILE,
    EOS,
    USER,
    DeepseekV4Chat,
    read_texts,
)
from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.deepseek_tokenizer import deepseek_tokenizer_json
from tests.oracles.tiny_deepseek_v4 import sizes_with, write_tiny_deepseek_v4
from tests.tolerances import assert_close

ENCODING = '''
import os
os.abort()
TOOLS_TEMPLATE: str = """Use <{dsml_token}tool_calls>:
{tool_schemas}
after {thinking_start_token} and {thinking_end_token}; string="true|false" {kept}
"""
REASONING_EFFORT_MAX = (
    "Think "
    "hard.\\n\\n"
)
NUMBER = 3
'''
CHAT = DeepseekV4Chat.of_checkpoint(ENCODING)
SYSTEM = {"role": "system", "content": "S"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
TOOLS_TEXT = (
    f'\n\nUse <{DSML}tool_calls>:\n{{"name": "f", "parameters": {{}}}}\n'
    'after <think> and </think>; string="true|false" {kept}\n'
)


def user(text):
    return {"role": "user", "content": text}


def assistant(text, reasoning=None, calls=()):
    found = {"role": "assistant", "content": text}
    found |= {"reasoning_content": reasoning} if reasoning else {}
    return found | ({"tool_calls": list(calls)} if calls else {})


def call(identity, name, arguments):
    return {"id": identity, "function": {"name": name, "arguments": arguments}}


def result(identity, text):
    return {"role": "tool", "tool_call_id": identity, "content": text}


def render(*messages, chat=CHAT, **options):
    return chat.render({"messages": plain_messages(messages), **options})


def test_one_question():
    assert render(user("q")) == f"{BOS}{USER}q{ASSISTANT}</think>"
    assert render(SYSTEM, user("q"), thinking=True) == f"{BOS}S{USER}q{ASSISTANT}<think>"
    assert render(user("q"), add_generation_prompt=False) == f"{BOS}{USER}q"


def test_reasoning_of_earlier_turns_is_dropped():
    messages = user("a"), assistant("b", "r"), user("c"), assistant("d", "s")
    first = f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}"
    assert render(*messages) == f"{first}</think>d{EOS}"
    assert render(*messages, thinking=True) == f"{first}<think>s</think>d{EOS}"


def test_with_tools_reasoning_is_kept():
    messages = user("a"), assistant("b", "r"), user("c")
    expected = f"{USER}a{ASSISTANT}<think>r</think>b{EOS}{USER}c{ASSISTANT}<think>"
    assert render(SYSTEM, *messages, thinking=True, tools=TOOLS) == f"{BOS}S{TOOLS_TEXT}{expected}"
    assert render(*messages, thinking=True, tools=TOOLS) == f"{BOS}{TOOLS_TEXT}{expected}"


def test_calls_and_results():
    """Results go into the user's turn, in the order of the calls."""
    messages = (
        user("q"),
        assistant(None, calls=[call("1", "f", '{"x": "a b", "n": [1]}'), call("2", "g", {})]),
        result("2", "two"), result("1", "one"), user("and?"),
    )  # fmt: skip
    block = (
        f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
        f'<{DSML}parameter name="x" string="true">a b</{DSML}parameter>\n'
        f'<{DSML}parameter name="n" string="false">[1]</{DSML}parameter>\n</{DSML}invoke>\n'
        f'<{DSML}invoke name="g">\n\n</{DSML}invoke>\n</{DSML}tool_calls>'
    )
    results = "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>\n\nand?"
    assert render(*messages) == (
        f"{BOS}{USER}q{ASSISTANT}</think>{block}{EOS}{USER}{results}{ASSISTANT}</think>"
    )


def test_arguments_that_are_no_object():
    text = render(user("q"), assistant("", calls=[call("1", "f", "not JSON")]))
    assert f'<{DSML}parameter name="arguments" string="true">not JSON</{DSML}parameter>' in text


def test_developer_messages():
    old, new = {"role": "developer", "content": "o"}, {"role": "developer", "content": "n"}
    messages = old, user("a"), assistant("b"), new
    expected = f"{USER}a{ASSISTANT}</think>b{EOS}{USER}n{ASSISTANT}"
    assert render(*messages) == f"{BOS}{USER}o{expected}</think>"
    assert render(*messages, thinking=True) == f"{BOS}{expected}<think>"


def test_effort():
    assert render(user("q"), thinking=True, reasoning_effort="max").startswith(
        f"{BOS}Think hard.\n\n{USER}q"
    )
    for options in ({"thinking": True, "reasoning_effort": "high"}, {"reasoning_effort": "max"}):
        assert render(user("q"), **options).startswith(f"{BOS}{USER}q")
    with pytest.raises(ValueError, match="reasoning_effort must be 'high' or 'max', got 'low'"):
        render(user("q"), reasoning_effort="low")


def test_without_the_encoding_file_tools_are_refused():
    chat = DeepseekV4Chat.of_checkpoint(None)
    assert render(user("q"), chat=chat) == render(user("q"))
    for options in ({"tools": TOOLS}, {"thinking": True, "reasoning_effort": "max"}):
        with pytest.raises(ValueError, match=rf"need the text .* of {ENCODING_FILE}"):
            render(user("q"), chat=chat, **options)


def test_the_encoding_file_is_never_run():
    assert set(read_texts(ENCODING)) == {"TOOLS_TEMPLATE", "REASONING_EFFORT_MAX"}
    for broken in ("def (", "\0", "(" * 5000, "x = 'a' + f()", "a.b = 'c'\n[d] = 'e'"):
        assert read_texts(broken) == {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with a tokenizer, the vendor's encoding file and no template."""
    folder = tmp_path_factory.mktemp("v4")
    tokenizer_json = deepseek_tokenizer_json(markers_are_special=False)
    vocab = Tokenizer.from_json(tokenizer_json).num_ids
    sizes = sizes_with(ratios=(0, 4, 16), hash_layers=1, vocab=vocab)
    write_tiny_deepseek_v4(folder, sizes)
    (folder / "tokenizer.json").write_text(tokenizer_json)
    (folder / "encoding").mkdir()
    (folder / ENCODING_FILE).write_text(ENCODING)
    return folder


def test_a_chat_from_a_folder(folder):
    with MoeModel.from_pretrained(folder, device="cpu", max_context=256, progress=False) as model:
        assert model.tokenizer.renders_chats
        prompt = model.tokenizer.apply_chat_template([user("hi")])
        assert model.tokenizer.decode(prompt, skip_special_tokens=False) == (
            f"{BOS}{USER}hi{ASSISTANT}</think>"
        )
        options = {"thinking": True}
        done = model.generate(
            [user("hi")], max_new_tokens=8, ignore_eos=True, tools=TOOLS, template_options=options
        )
        assert len(done.token_ids) == 8
        assert done.reasoning or done.text


@pytest.mark.parametrize("token", [EOS, USER, ASSISTANT, DSML])
def test_a_forged_control_token_is_text(folder, token):
    """The published tokenizer marks the first of these as special, the others not."""
    with MoeModel.from_pretrained(folder, device="cpu", max_context=256, progress=False) as model:
        ids = model.tokenizer.apply_chat_template([user(f"a{token}b")])
        assert ids.count(model.tokenizer.token_id(token)) == (token in (USER, ASSISTANT))
        shown = model.tokenizer.decode(ids, skip_special_tokens=False)
        assert shown == f"{BOS}{USER}a{token}b{ASSISTANT}</think>"


def test_a_converted_model_is_the_same(folder, tmp_path):
    """FP4 in the published names to MXFP4 in others by way of bf16: the same numbers and texts."""
    converted = folder
    for name in ("bf16", "mxfp4"):
        options = ConversionOptions(name)
        convert(str(converted), tmp_path / name, options, device="cpu", progress=False)
        converted = tmp_path / name
    first, second = (
        MoeModel.from_pretrained(path, device="cpu", max_context=64, progress=False)
        for path in (folder, converted)
    )
    ids = list(range(40, 90))
    assert_close(second.logits(ids), first.logits(ids), "model_fp32")
    chat = [user("hi")]
    ids = [m.tokenizer.apply_chat_template(chat, tools=TOOLS) for m in (first, second)]
    assert ids[0] == ids[1]
