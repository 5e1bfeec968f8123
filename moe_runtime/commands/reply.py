"""Printing a running request: its text to stdout, its reasoning and times to stderr."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, TextIO

import click

from moe_runtime.commands.common import use_color

if TYPE_CHECKING:
    from moe_runtime.generate import Generation, TextStream

# A model can write escape sequences; a terminal would obey them.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def print_reply(stream: TextStream) -> None:
    """Print chunks as they come, and a line break at the end if the text has none.

    Reasoning goes to stderr, dim on a terminal, with a line before it.
    """
    writer = _Writer()
    try:
        for chunk in stream:
            writer.reasoning(chunk.reasoning)
            writer.text(chunk.text)
    finally:
        writer.end()


def summary(generation: Generation) -> str:
    """The times of a request in one line."""
    timings = generation.timings
    count = len(generation.token_ids)
    parts = [f"{generation.prompt_tokens} + {count} tokens ({generation.finish_reason})"]
    if timings.load_s is not None:
        parts.append(f"loaded in {timings.load_s:.1f} s")
    if timings.first_token_s is not None:
        parts.append(f"first token after {timings.first_token_s:.2f} s")
    if timings.decode_tokens_per_s is not None:
        parts.append(f"{timings.decode_tokens_per_s:.1f} tokens/s")
    if timings.bandwidth_share is not None:
        parts.append(f"{100 * timings.bandwidth_share:.0f} % of read bandwidth")
    return ", ".join(parts)


class _Writer:
    """Keeps the two kinds of text on lines of their own."""

    def __init__(self) -> None:
        self._dim = sys.stderr.isatty() and use_color()
        self._in_reasoning = False
        self._last = "\n"  # character on stdout

    def reasoning(self, text: str) -> None:
        if not text:
            return
        if not self._in_reasoning:
            self._break_line()
            _write(sys.stderr, "\x1b[2m[reasoning]\n" if self._dim else "[reasoning]\n")
            self._in_reasoning = True
        _write(sys.stderr, _safe(text, sys.stderr))

    def text(self, text: str) -> None:
        if not text:
            return
        self._end_reasoning()
        _write(sys.stdout, _safe(text, sys.stdout))
        self._last = text[-1]

    def end(self) -> None:
        """Leave both streams at the beginning of a line."""
        self._end_reasoning()
        self._break_line()

    def _break_line(self) -> None:
        if self._last != "\n":
            _write(sys.stdout, "\n")
            self._last = "\n"

    def _end_reasoning(self) -> None:
        if self._in_reasoning:
            _write(sys.stderr, "\x1b[0m\n\n" if self._dim else "\n\n")
            self._in_reasoning = False


def _safe(text: str, stream: TextIO) -> str:
    """The text as it is for files and pipes; for a terminal, without control characters."""
    return _UNSAFE.sub("\ufffd", text) if stream.isatty() else text


def _write(stream: TextIO, text: str) -> None:
    stream.write(text)
    stream.flush()


def note(text: str) -> None:
    """A remark on stderr."""
    click.echo(text, err=True)
