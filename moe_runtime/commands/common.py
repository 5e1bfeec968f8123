"""What the verbs share: options that mean the same everywhere, help by example, JSON output."""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

model_argument: Decorator = click.argument("model", metavar="MODEL")

revision_option: Decorator = click.option(
    "--revision", metavar="REV", help="Branch, tag or commit of a hub model; default: main."
)

device_option: Decorator = click.option(
    "--device",
    default="auto",
    show_default=True,
    metavar="DEVICE",
    help="auto, cpu, cuda or cuda:N.",
)

dense_format_option: Decorator = click.option(
    "--dense-format",
    default="as-published",
    show_default=True,
    metavar="FORMAT",
    help="as-published, or fp8: attention and head are packed while loading.",
)

json_option: Decorator = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)

# The value is read by cli.run from the arguments themselves: an error may come before parsing ends.
debug_option: Decorator = click.option(
    "--debug", is_flag=True, expose_value=False, help="Show the traceback of an error."
)


def verb(name: str, *, examples: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function; its docstring is the help text and `examples` end it.

    examples: one command line each line, as the user types it
    """
    listed = textwrap.indent(textwrap.dedent(examples).strip(), "  ")

    def decorate(function: Callable[..., Any]) -> click.Command:
        command = click.command(name, epilog=f"\b\nExamples:\n{listed}")
        return command(debug_option(function))

    return decorate


def print_json(value: Any) -> None:
    """One JSON document on stdout, readable and with stable key order."""
    click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=True, allow_nan=False))


def _finite(value: Any) -> Any:
    """Plain data with null for NaN and infinity, which JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def use_color() -> bool:
    """Whether colours may be used at all (no-color.org); click still asks for a terminal."""
    return not os.environ.get("NO_COLOR")
