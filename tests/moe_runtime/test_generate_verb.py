"""`moe-runtime generate`: what goes to stdout and what to stderr, prompts, options, JSON."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

from moe_runtime import cli
from moe_runtime.generation_config import GenerationDefaults
from moe_runtime.model import MoeModel
from tests.moe_runtime.text_helpers import FakeBackend, harmony_tokenizer, tiny_config

TOKENIZER = harmony_tokenizer()
VOCAB = 450


@pytest.fixture
def model(monkeypatch):
    """Replaces from_pretrained by a model that says `script`; notes its arguments."""
    opened = SimpleNamespace(
        script="The quick brown fox<|endoftext|>", backend=None, arguments=None
    )

    def from_pretrained(name, **arguments):
        opened.arguments = {"name": name, **arguments}
        ids = TOKENIZER.encode(opened.script)
        opened.backend = FakeBackend(ids, vocab_size=VOCAB)
        defaults = GenerationDefaults.read(
            {"eos_token_id": TOKENIZER.token_id("<|endoftext|>")},
            vocab_size=VOCAB,
            eos_token_ids=(),
        )
        return MoeModel(
            opened.backend, tiny_config(VOCAB), tokenizer=TOKENIZER, defaults=defaults, load_s=1.5
        )

    monkeypatch.setattr(MoeModel, "from_pretrained", from_pretrained)
    return opened


def prompt_sent(model):
    return TOKENIZER.decode(model.backend.requests[0][0], skip_special_tokens=False)


def test_text_to_stdout_and_times_to_stderr(model, capsys):
    assert cli.run(["generate", "some/model", "--prompt", "hello"]) == 0
    out, err = capsys.readouterr()
    assert out == "The quick brown fox\n"
    count = len(TOKENIZER.encode("The quick brown fox"))
    prompt = len(TOKENIZER.encode("hello"))
    assert err.startswith(f"{prompt} + {count} tokens (stop), loaded in 1.5 s, first token after ")
    assert err.count("\n") == 1
    assert model.arguments["name"] == "some/model"
    assert prompt_sent(model) == "hello"
    assert model.backend.closed


def test_demo_needs_no_prompt(model, capsys):
    assert cli.run(["generate", "demo"]) == 0
    out, err = capsys.readouterr()
    assert out == "The quick brown fox\n"
    assert err.startswith("prompt: It was a dark night")
    assert prompt_sent(model).startswith("It was a dark night")


PROMPTS = {
    "option": ["--prompt", "from here"],
    "short option": ["-p", "from here"],
    "file": ["--prompt-file", "FILE"],
    "dash": ["-"],
    "dash as prompt": ["--prompt", "-"],
    "dash as file": ["--prompt-file", "-"],
}


@pytest.mark.parametrize("args", PROMPTS.values(), ids=PROMPTS)
def test_where_the_prompt_comes_from(args, model, tmp_path, monkeypatch, capsys):
    (tmp_path / "FILE").write_text("from here")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from here")))
    assert cli.run(["generate", "some/model", *args]) == 0
    assert prompt_sent(model) == "from here"


USAGE_ERRORS = {
    "no prompt": ([], "no prompt: give --prompt TEXT, --prompt-file FILE or - for stdin"),
    "two prompts": (["--prompt", "a", "-"], "give one prompt"),
    "system without chat": (["-p", "a", "--system", "b"], "need --chat"),
    "logprobs without json": (["-p", "a", "--logprobs", "2"], "--logprobs needs --json"),
    "missing file": (["--prompt-file", "no-such-file"], "No such file"),
    "temperature": (["-p", "a", "--temperature", "-1"], "-1.0 is not in the range x>=0"),
    "top_p": (["-p", "a", "--top-p", "0"], "is not in the range"),
    "tokens": (["-p", "a", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
}


@pytest.mark.parametrize(("args", "error"), USAGE_ERRORS.values(), ids=USAGE_ERRORS)
def test_wrong_usage(args, error, model, capsys):
    assert cli.run(["generate", "some/model", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and error in err and err.startswith("error: ")
    assert model.arguments is None  # found before the model is opened


def test_a_bad_request_is_one_line(model, capsys):
    assert cli.run(["generate", "some/model", "--prompt", ""]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: the prompt is empty: give at least one token\n")
    assert model.backend.closed


def test_a_file_that_is_not_text(model, tmp_path, capsys):
    (tmp_path / "prompt").write_bytes(b"ab\xff")
    assert cli.run(["generate", "some/model", "--prompt-file", str(tmp_path / "prompt")]) == 1
    assert "byte 2 is not UTF-8 text" in capsys.readouterr().err


def test_every_option_reaches_the_request(model, capsys):
    args = (
        "--max-tokens 7 --temperature 0.5 --top-p 0.9 --top-k 40 --min-p 0.1 "
        "--repetition-penalty 1.2 --seed 11 --revision v1 --device cpu --backend reference "
        "--max-context 64 --dense-format fp8"
    )
    assert cli.run(["generate", "some/model", "-p", "hello", *args.split()]) == 0
    _, sampling, max_new_tokens, _ = model.backend.requests[0]
    assert max_new_tokens == 7
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 40)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.1, 1.2, 11)
    assert model.arguments == {
        "name": "some/model", "revision": "v1", "device": "cpu", "backend": "reference",
        "dense_format": "fp8", "max_context": 64,
    }  # fmt: skip


def test_stop_is_repeatable(model, capsys):
    assert cli.run(["generate", "m", "-p", "a", "--stop", "zzz", "--stop", " brown"]) == 0
    assert capsys.readouterr().out == "The quick\n"


def test_json(model, capsys):
    args = ["generate", "m", "-p", "hello", "--json", "--logprobs", "1", "--seed", "5"]
    assert cli.run(args) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["text"] == "The quick brown fox"
    assert data["token_ids"] == TOKENIZER.encode("The quick brown fox")
    assert (data["finish_reason"], data["seed"], data["tool_calls"]) == ("stop", 5, [])
    assert data["timings"]["load_s"] == 1.5
    assert data["logprobs"][1] == {
        "token_id": data["token_ids"][1], "logprob": -1.0, "top_logprobs": [[0, 0.0]],
    }  # fmt: skip
    assert cli.run(args[:5]) == 0
    assert "logprobs" not in json.loads(capsys.readouterr().out)


def test_chat_prints_the_reply_and_shows_reasoning_apart(model, capsys):
    model.script = (
        "<|channel|>analysis<|message|>They greet.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>Hello<|return|>"
    )
    args = ["--chat", "--system", "Be kind.", "--reasoning-effort", "low"]
    assert cli.run(["generate", "m", "-p", "hi", *args]) == 0
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert err.startswith("[reasoning]\nThey greet.\n\n")
    sent = prompt_sent(model)
    assert "Reasoning: low" in sent
    assert "<|start|>system<|message|>Be kind.<|end|>" in sent
    assert sent.endswith("<|start|>user<|message|>hi<|end|><|start|>assistant")


def test_text_that_ends_with_a_line_break_gets_no_other(model, capsys):
    model.script = "The end.\n<|endoftext|>"
    assert cli.run(["generate", "m", "-p", "a"]) == 0
    assert capsys.readouterr().out == "The end.\n"


def test_control_characters_reach_files_but_not_terminals(model, monkeypatch, capsys):
    """A model could write an escape sequence that a terminal obeys."""
    model.script = "a\x1b[2Jb\tc<|endoftext|>"
    assert cli.run(["generate", "m", "-p", "a"]) == 0
    assert capsys.readouterr().out == "a\x1b[2Jb\tc\n"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert cli.run(["generate", "m", "-p", "a"]) == 0
    assert capsys.readouterr().out == "a\ufffd[2Jb\tc\n"


def test_interruption(model, monkeypatch, capsys):
    """Ctrl-C: what was written stays, status 130, the model is closed."""
    play = FakeBackend.decode

    def interrupted(self, *args, **kwargs):
        self.fail_at = (2, KeyboardInterrupt())
        return play(self, *args, **kwargs)

    monkeypatch.setattr(FakeBackend, "decode", interrupted)
    assert cli.run(["generate", "m", "-p", "a"]) == 130
    out, err = capsys.readouterr()
    assert out.strip() and "The quick brown fox".startswith(out.strip())
    assert err.strip() == "interrupted"
    assert model.backend.closed and not model.backend.running
