"""`moe-runtime chat`: history, commands inside, interruption, input from a pipe."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from moe_runtime import cli
from moe_runtime.commands import chat
from moe_runtime.model import MoeModel
from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.text_helpers import (
    FakeBackend,
    byte_level_json,
    harmony_tokenizer,
    tiny_config,
)

TOKENIZER = harmony_tokenizer()
VOCAB = 450
REPLY = (
    "<|channel|>analysis<|message|>Hm {n}.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Answer {n}<|return|>"
)


class Answers(FakeBackend):
    """Says `script` with the number of the request put in."""

    template = REPLY

    def decode(self, *args, **kwargs):
        text = self.template.replace("{n}", str(len(self.requests) + 1))
        self.script = TOKENIZER.encode(text)
        return super().decode(*args, **kwargs)


@pytest.fixture
def talk(monkeypatch, capsys):
    """Runs `chat` on lines of input; what it printed, and the prompts that the model got."""
    state = SimpleNamespace(backend=Answers([], vocab_size=VOCAB, max_context=2000), status=None)
    state.tokenizer = TOKENIZER

    def from_pretrained(name, **arguments):
        return MoeModel(state.backend, tiny_config(VOCAB), tokenizer=state.tokenizer)

    monkeypatch.setattr(MoeModel, "from_pretrained", from_pretrained)

    def run(*lines, args=()):
        text = "".join(line + "\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        state.status = cli.run(["chat", "some/model", *args])
        state.out, state.err = capsys.readouterr()
        state.prompts = [
            TOKENIZER.decode(ids, skip_special_tokens=False).partition("<|end|>")[2]
            for ids, *_ in state.backend.requests
        ]
        return state

    state.run = run
    return state


USER = "<|start|>user<|message|>{}<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>{}<|end|>"
NEXT = "<|start|>assistant"


def test_history_without_old_reasoning(talk):
    talk.run("one", "two")
    assert talk.status == 0
    assert talk.out == "Answer 1\nAnswer 2\n"
    assert "[reasoning]\nHm 1.\n\n" in talk.err
    assert talk.prompts == [
        USER.format("one") + NEXT,
        USER.format("one") + FINAL.format("Answer 1") + USER.format("two") + NEXT,
    ]
    assert talk.backend.closed


def test_reset_forgets_and_system_stays(talk):
    talk.run("/system Be brief.", "one", "/reset", "two")
    system = "<|start|>system<|message|>Be brief.<|end|>"
    assert talk.prompts == [
        system + USER.format("one") + NEXT,
        system + USER.format("two") + NEXT,
    ]


def test_system_option_and_its_removal(talk):
    talk.run("one", "/system", "/reset", "two", args=["--system", "Be brief."])
    assert talk.prompts[0].startswith("<|start|>system<|message|>Be brief.<|end|>")
    assert talk.prompts[1] == USER.format("two") + NEXT


def test_save(talk, tmp_path):
    file = tmp_path / "talk.json"
    talk.run("/system S", "one", f"/save {file}")
    assert json.loads(file.read_text()) == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "Answer 1", "thinking": "Hm 1."},
    ]
    assert f"saved 3 messages in {file}" in talk.err


def test_save_that_fails_is_a_line(talk, tmp_path):
    talk.run("/save", f"/save {tmp_path}", "one")
    assert "/save needs a file name" in talk.err
    assert f"error: {tmp_path}: Is a directory" in talk.err
    assert talk.out == "Answer 1\n"


def test_quit_help_unknown_and_slash(talk):
    talk.run("/help", "/nonsense", "//etc", "", "/quit", "two")
    assert "/reset        forget" in talk.err
    assert "/nonsense: no such command" in talk.err
    assert talk.prompts == [USER.format("/etc") + NEXT]


def test_options_reach_the_request(talk):
    talk.run("one", args=["--max-new-tokens", "3", "--temperature", "0.5", "--seed", "4",
                          "--reasoning-effort", "high"])  # fmt: skip
    ids, sampling, max_new_tokens, _ = talk.backend.requests[0]
    assert (sampling.temperature, sampling.seed, max_new_tokens) == (0.5, 4, 3)
    assert "Reasoning: high" in TOKENIZER.decode(ids)


def test_ctrl_c_stops_the_answer_and_not_the_program(talk):
    """The part that came stays in the history."""
    header = len(TOKENIZER.encode(REPLY.partition("Answer")[0]))
    talk.backend.fail_at = (header + 2, KeyboardInterrupt())
    talk.run("one", "/nothing", "two")
    assert talk.status == 0
    shown = talk.out.splitlines()[0]
    assert shown and "Answer 1".startswith(shown)
    assert "(cancelled)" in talk.err
    assert FINAL.format(shown) in talk.prompts[1]
    assert not talk.backend.running


def test_an_answer_without_text_leaves_no_message(talk):
    talk.backend.template = "<|channel|>analysis<|message|>Hm.<|end|><|return|>"
    talk.run("one", "two")
    assert talk.prompts[1] == USER.format("two") + NEXT
    assert "no answer; the message was dropped" in talk.err


def test_a_tool_call_is_shown(talk):
    talk.backend.template = (
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>"
    )
    talk.run("one")
    assert "the model asks for the tool f with {}" in talk.err


def test_a_cut_answer_says_so(talk):
    talk.run("one", args=["--max-new-tokens", "2"])
    assert "cut off: --max-new-tokens" in talk.err


def test_a_message_that_is_too_long_is_a_line(talk):
    talk.run("one", "x " * 3000, "three")
    assert "tokens and the context holds 2000" in talk.err
    assert "hint: /reset" in talk.err
    assert talk.out == "Answer 1\nAnswer 2\n"
    assert talk.prompts[1].endswith(USER.format("three") + NEXT)


def test_a_model_without_a_template(talk):
    talk.tokenizer = Tokenizer.from_json(byte_level_json())
    talk.run("one")
    assert talk.status == 1
    assert talk.err.startswith("error: some/model has no chat template: use moe-runtime generate")
    assert talk.backend.closed


def test_input_on_a_terminal(monkeypatch, capsys):
    """Ctrl-C at the prompt leaves a hint, Ctrl-D leaves."""
    typed = iter(["one", KeyboardInterrupt(), "two", EOFError()])

    def read(prompt):
        assert prompt == "> "
        value = next(typed)
        if isinstance(value, BaseException):
            raise value
        return value

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", read)
    assert list(chat.input_lines()) == ["one", "two"]
    assert "/quit or Ctrl-D leaves" in capsys.readouterr().err


@pytest.mark.parametrize(("no_color", "dim"), [(None, True), ("1", False)])
def test_reasoning_is_dim_on_a_terminal(talk, monkeypatch, no_color, dim):
    if no_color:
        monkeypatch.setenv("NO_COLOR", no_color)
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    talk.run("one")
    expected = "\x1b[2m[reasoning]\nHm 1.\x1b[0m\n\n" if dim else "[reasoning]\nHm 1.\n\n"
    assert expected in talk.err
