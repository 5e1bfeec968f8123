"""The command line: `moe-runtime VERB ...`.

Each verb is a module in moe_runtime/commands with a click command named `command`. A verb is
imported when it is asked for, so that `--help` does not wait for torch.

Data goes to stdout; progress, notes and errors go to stderr. Exit status: 0 done, 1 the work
failed, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from loaders.errors import CheckpointError, UnsupportedModelError
from moe_runtime import __version__
from moe_runtime.commands.common import debug_option, use_color
from moe_runtime.errors import DoesNotFitError

VERBS = {
    "generate": "Continue a prompt and print the text as it comes.",
    "chat": "Talk with a model in the terminal.",
    "inspect": "Show what a checkpoint holds, from its headers alone.",
    "plan": "Say what a model takes and how fast it would be.",
    "convert": "Write a checkpoint in FP8 or FP4, tensor by tensor.",
    "verify": "Check a checkpoint, and compare it with its source.",
    "eval": "Measure perplexity, and KL to a second model.",
    "doctor": "Show what this machine has and what runs on it.",
    "bench": "Measure time to first token and decode speed.",
}

EXAMPLES = """\b
Examples:
  moe-runtime generate demo --prompt "It was a dark night"
  moe-runtime chat openai/gpt-oss-20b
  moe-runtime inspect openai/gpt-oss-120b
  moe-runtime VERB --help"""


class LazyVerbs(click.Group):
    """A group whose verbs are listed from a table and imported on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all verbs, in the table's order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The verb's command, imported now; None when there is no such verb."""
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"moe_runtime.commands.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of verbs in --help, written without importing any of them."""
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


@click.group("moe-runtime", cls=LazyVerbs, epilog=EXAMPLES, subcommand_metavar="VERB [ARGS]...")
@click.version_option(__version__, prog_name="moe-runtime", message="%(prog)s %(version)s")
@debug_option
def cli() -> None:
    """Batch-1, low-latency decoding of Mixture-of-Experts models in FP8 and FP4.

    MODEL is a Hugging Face hub id, a folder, or `demo` for the small checkpoint that comes
    with the package.
    """


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


def run(args: Sequence[str]) -> int:
    """Run one command line and return its exit status; every error becomes lines on stderr."""
    with warnings.catch_warnings():
        warnings.showwarning = _show_note
        try:
            status = _invoke(list(args) or ["--help"])
            sys.stdout.flush()
            return status
        except BrokenPipeError:
            # The reader went away (`| head`): the interpreter's last flush must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except click.UsageError as error:
            return _fail(error.format_message(), f"see: {_help_command(error)}", status=2)
        except (click.Abort, KeyboardInterrupt):
            click.echo("interrupted", err=True)
            return 130
        except Exception as error:  # the last door: nothing may reach the user as a traceback
            if "--debug" in args:
                traceback.print_exc()
                return 1
            return _fail(*describe(error), status=1)


def describe(error: Exception) -> tuple[str, str | None]:
    """What to tell the user about an error: one line, and a hint if there is one."""
    if isinstance(error, click.ClickException):
        return error.format_message(), None
    if isinstance(error, (CheckpointError, UnsupportedModelError, DoesNotFitError)):
        return error.message, error.hint
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror, None
    if isinstance(error, MemoryError):
        return str(error) or "out of memory", None
    if isinstance(error, (ValueError, NotImplementedError, OSError)) and str(error):
        return str(error), None
    return (
        f"{type(error).__name__}: {error}",
        "this looks like a fault of moe-runtime: add --debug for the traceback and report it",
    )


def _invoke(args: list[str]) -> int:
    """Click's own run, without its printing of errors; 0 unless the verb returns a status."""
    color = None if use_color() else False
    try:
        result = cli.main(args, prog_name="moe-runtime", standalone_mode=False, color=color)
    except SystemExit as stop:  # click ends a broken pipe so
        return stop.code if isinstance(stop.code, int) else 1
    return result if isinstance(result, int) else 0


def _fail(message: str, hint: str | None, *, status: int) -> int:
    color = None if use_color() else False
    label = click.style("error:", fg="red")
    click.echo(f"{label} {_one_line(message)}", err=True, color=color)
    if hint:
        click.echo(f"hint: {_one_line(hint)}", err=True, color=color)
    return status


def _help_command(error: click.UsageError) -> str:
    path = error.ctx.command_path if error.ctx else "moe-runtime"
    return f"{path} --help"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _show_note(message: Warning | str, category: type, filename: str, *_: Any, **__: Any) -> None:
    if "triton" in Path(filename).parts:  # Triton 3.9 tells kernel authors about its defaults
        return
    click.echo(f"note: {_one_line(str(message))}", err=True)
