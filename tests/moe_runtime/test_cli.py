"""The command line's promises: quick help, one-line errors, exit statuses, no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import click
import pytest

from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime import __version__, cli
from moe_runtime.commands.common import print_json, verb
from moe_runtime.errors import DoesNotFitError

ROOT = Path(__file__).parents[2]


def shell(code_or_args: list[str], **kwargs) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code_or_args], cwd=ROOT, text=True, capture_output=True, **kwargs
    )


@pytest.fixture
def raises(monkeypatch):
    """Make `moe-runtime doctor` a verb that raises what it is given, or calls it."""

    def install(action):
        @verb("doctor", examples="moe-runtime doctor")
        def command() -> None:
            """Fail."""
            if isinstance(action, BaseException):
                raise action
            action()

        module = types.SimpleNamespace(command=command)
        monkeypatch.setitem(sys.modules, "moe_runtime.commands.doctor", module)

    return install


@pytest.mark.parametrize(
    "code", ["import moe_runtime", "from moe_runtime import cli; cli.run(['--help'])"]
)
def test_torch_is_not_imported_for_nothing(code):
    heavy = "{'torch', 'triton', 'transformers', 'huggingface_hub', 'numpy'}"
    result = shell(["-c", f"import sys; {code}; print(sorted({heavy} & set(sys.modules)))"])
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_help_lists_every_verb_with_a_line_and_examples():
    result = shell(["-m", "moe_runtime", "--help"])
    assert result.returncode == 0
    for name, line in cli.VERBS.items():
        assert f"{name} " in result.stdout and line in result.stdout
    assert "Examples:\n    moe-runtime generate demo" in result.stdout
    assert shell(["-m", "moe_runtime"]).stdout == result.stdout
    version = shell(["-m", "moe_runtime", "--version"])
    assert version.stdout == f"moe-runtime {__version__}\n"


def test_verb_help_teaches_by_example():
    result = shell(["-m", "moe_runtime", "doctor", "--help"])
    assert result.returncode == 0
    assert "Examples:\n    moe-runtime doctor\n    moe-runtime doctor --json" in result.stdout
    assert "--debug" in result.stdout


@pytest.mark.parametrize(
    ("args", "message", "hint"),
    [
        (["talk"], "No such command 'talk'", "moe-runtime --help"),
        (["doctor", "--jsn"], "No such option", "moe-runtime doctor --help"),
        (["doctor", "demo", "extra"], "unexpected extra argument", "moe-runtime doctor --help"),
        (["--device", "cpu"], "No such option", "moe-runtime --help"),
    ],
)
def test_wrong_usage_is_status_2(args, message, hint, capsys):
    assert cli.run(args) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert not out
    assert first.startswith("error: ") and message in first
    assert second == f"hint: see: {hint}"


@pytest.mark.parametrize(
    ("error", "lines"),
    [
        (
            CheckpointError("config.json: D is\nmissing", hint="download\nagain"),
            ["error: config.json: D is missing", "hint: download again"],
        ),
        (CheckpointError("config.json is missing"), ["error: config.json is missing"]),
        (
            UnsupportedModelError("not supported: mamba", hint="supported: gpt_oss"),
            ["error: not supported: mamba", "hint: supported: gpt_oss"],
        ),
        (
            DoesNotFitError("needs 70 GB, has 16 GB", hint="device='cpu'"),
            ["error: needs 70 GB, has 16 GB", "hint: device='cpu'"],
        ),
        (ValueError("top_p must be above 0"), ["error: top_p must be above 0"]),
        (
            FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "prompt.txt"),
            ["error: prompt.txt: No such file or directory"],
        ),
        (OSError("disk went away"), ["error: disk went away"]),
        (MemoryError(), ["error: out of memory"]),
        (click.ClickException("no prompt"), ["error: no prompt"]),
    ],
)
def test_errors_are_one_line_and_status_1(error, lines, raises, capsys):
    raises(error)
    assert cli.run(["doctor"]) == 1
    out, err = capsys.readouterr()
    assert err.splitlines() == lines
    assert not out


def test_a_fault_of_ours_is_a_line_too(raises, capsys):
    raises(KeyError("layers.0"))
    assert cli.run(["doctor"]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert first == "error: KeyError: 'layers.0'"
    assert "--debug" in second


@pytest.mark.parametrize("args", [["--debug", "doctor"], ["doctor", "--debug"]])
def test_debug_shows_the_traceback(args, raises, capsys):
    raises(CheckpointError("damaged"))
    assert cli.run(args) == 1
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err and "CheckpointError: damaged" in err


def test_interruption_is_status_130(raises, capsys):
    raises(KeyboardInterrupt())
    assert cli.run(["doctor"]) == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_a_warning_is_a_note_on_stderr(raises, capsys):
    raises(lambda: warnings.warn("the hub does\nnot answer", stacklevel=1))
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr() == ("", "note: the hub does not answer\n")
    developer = "/site-packages/triton/knobs.py"
    raises(lambda: warnings.warn_explicit("set me", UserWarning, developer, 1))
    assert cli.run(["doctor"]) == 0
    assert capsys.readouterr() == ("", "")


def test_a_closed_pipe_is_quiet():
    code = (
        "import sys, types, click\n"
        "from moe_runtime import cli\n"
        "module = types.ModuleType('m')\n"
        "module.command = click.Command('doctor', callback=lambda: print('x' * {count}))\n"
        "sys.modules['moe_runtime.commands.doctor'] = module\n"
        "sys.argv = ['moe-runtime', 'doctor']\n"
        "cli.main()\n"
    )
    for count in (10, 1_000_000):  # below and above what a pipe holds
        script = code.format(count=count)
        read, write = os.pipe()
        os.close(read)
        with os.fdopen(write, "w") as closed:
            result = subprocess.run(
                [sys.executable, "-c", script], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE
            )
        assert result.stderr == b"" and result.returncode == 1


def test_colours_only_on_a_terminal_that_wants_them(raises, monkeypatch, capsys):
    raises(ValueError("no"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli.run(["doctor"])
    assert capsys.readouterr().err == "error: no\n"
    monkeypatch.setattr(click.utils, "should_strip_ansi", lambda stream, color: color is False)
    cli.run(["doctor"])
    assert "\x1b[31merror:" in capsys.readouterr().err
    monkeypatch.setenv("NO_COLOR", "1")
    cli.run(["doctor"])
    assert capsys.readouterr().err == "error: no\n"


def test_json_is_ascii_and_keeps_order(capsys):
    print_json({"b": "\u00e9", "a": 1})
    assert capsys.readouterr().out == '{\n  "b": "\\u00e9",\n  "a": 1\n}\n'
