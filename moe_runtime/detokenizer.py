"""Text from token ids one at a time: the pieces joined equal the one-shot decode of all ids.

A piece never ends inside a character. Two ways:

ByteDetokenizer    tokens are bytes (byte-level BPE): an incremental UTF-8 decoder holds back the
                   bytes of an unfinished character; invalid bytes become U+FFFD.
WindowDetokenizer  any other tokenizer: decodes a window of the last ids and gives what it grew by.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

_WINDOW = 32  # ids after which the window of a WindowDetokenizer moves on


class Detokenizer(Protocol):
    """Text of a growing list of ids."""

    def push(self, token_id: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        ...

    def finish(self) -> str:
        """The text held back; an unfinished character becomes U+FFFD."""
        ...


class ByteDetokenizer:
    """For tokenizers whose text is the joined bytes of their tokens."""

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes."""
        return self._utf8.decode(self._token_bytes(token_id))

    def finish(self) -> str:
        """U+FFFD if the bytes end inside a character, else nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class WindowDetokenizer:
    """For every other tokenizer; asks `decode` for the text of a window of ids.

    decode:    text of a list of ids; must not skip any of them
    unstable:  whether text may still change if more ids follow this one (a byte token: how a run
               of bytes decodes depends on its end)

    The window begins with ids whose text has been given already, so that what a decoder does at
    the start of a text (stripping a space) happens outside of the new part.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], unstable: Callable[[int], bool]
    ) -> None:
        self._decode = decode
        self._unstable = unstable
        self._ids: list[int] = []
        self._given = ""  # text of the window that was given already
        self._stable = 0  # ids of the window whose text was given

    def push(self, token_id: int) -> str:
        """What the window's text grew by, unless this token's text is not settled."""
        self._ids.append(token_id)
        if self._unstable(token_id):
            return ""
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        piece = self._grown(text)
        if self._stable > _WINDOW:
            self._move_window()
        self._stable = len(self._ids)
        return piece

    def finish(self) -> str:
        """The rest of the text."""
        piece = self._grown(self._decode(self._ids))
        self._ids, self._given, self._stable = [], "", 0
        return piece

    def _grown(self, text: str) -> str:
        # A decoder that rewrites text it gave earlier cannot be streamed: keep what was given.
        known = len(self._given) if text.startswith(self._given) else len(text)
        self._given = max(text, self._given, key=len)
        return text[known:]

    def _move_window(self) -> None:
        """Drop the ids before the last settled token, if the rest decodes to the same end."""
        kept = self._ids[self._stable - 1 :]
        text = self._decode(kept)
        if text and not text.endswith("\ufffd") and self._given.endswith(text):
            self._ids, self._given = kept, text
