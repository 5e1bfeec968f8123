"""From new token ids to what the caller reads: plain text, or a reply taken apart by channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_runtime.detokenizer import Detokenizer
from moe_runtime.harmony import VISIBLE, HarmonyDelta, HarmonyParser, HarmonyTokens, ToolCall
from moe_runtime.stop_strings import StopStrings
from moe_runtime.tokenizer import Tokenizer

_BLANK_LINE = "\n\n"  # between messages of one sort


@dataclass(frozen=True)
class Piece:
    """What one token added."""

    text: str = ""
    reasoning: str = ""
    channel: str | None = None


class OutputText(Protocol):
    """Text of one generation as it grows."""

    def push(self, token_id: int) -> Piece:
        """The text that this token completes."""
        ...

    def end(self, stop_id: int | None) -> Piece:
        """The text held back; stop_id is the token that ended the output, if one did."""
        ...

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        ...

    @property
    def answer(self) -> str:
        """The text given so far without what a model says before it calls a tool."""
        ...

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """Functions asked for so far."""
        ...


class PlainText:
    """Output of a prompt without channels: all of it is the answer."""

    tool_calls: tuple[ToolCall, ...] = ()

    def __init__(self, detokenizer: Detokenizer, stops: Sequence[str]) -> None:
        self._detokenizer = detokenizer
        self._stops = StopStrings(stops)
        self._given: list[str] = []

    def push(self, token_id: int) -> Piece:
        """See OutputText.push."""
        return self._give(self._stops.push(self._detokenizer.push(token_id)))

    def end(self, stop_id: int | None) -> Piece:
        """See OutputText.end."""
        text = self._stops.push(self._detokenizer.finish())
        return self._give(text + self._stops.finish())

    @property
    def stopped(self) -> bool:
        """See OutputText.stopped."""
        return self._stops.matched is not None

    @property
    def answer(self) -> str:
        """See OutputText.answer."""
        return "".join(self._given)

    def _give(self, text: str) -> Piece:
        self._given.append(text)
        return Piece(text)


class ChannelText:
    """Output of a Harmony chat: the reply is its text, the reasoning is given apart.

    Messages of one sort are parted by a blank line. Stop strings count in the reply alone, each
    message of it for itself.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        tokens: HarmonyTokens,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
    ) -> None:
        self._parser = HarmonyParser(tokenizer, tokens, prompt_ids)
        self._stop_strings = tuple(stops)
        self._stops = StopStrings(stops)  # of the reply's message that is read now
        self._message = HarmonyDelta()  # the last text of the reply
        self._reasoning_message = -1
        self._answers: list[str] = []
        self._parted = ""  # goes before the next text of the reply
        self._replied = False

    def push(self, token_id: int) -> Piece:
        """See OutputText.push."""
        return self._piece(self._parser.push(token_id))

    def end(self, stop_id: int | None) -> Piece:
        """See OutputText.end."""
        first = self._piece(self._parser.push(stop_id)) if stop_id is not None else Piece()
        rest = self._piece(self._parser.finish())
        text = first.text + rest.text + self._give(self._stops.finish())
        return Piece(text, first.reasoning + rest.reasoning, first.channel or rest.channel)

    @property
    def stopped(self) -> bool:
        """See OutputText.stopped."""
        return self._stops.matched is not None

    @property
    def answer(self) -> str:
        """See OutputText.answer."""
        return "".join(self._answers)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """See OutputText.tool_calls."""
        return self._parser.tool_calls

    def _piece(self, delta: HarmonyDelta) -> Piece:
        channel = self._parser.channel
        if delta.kind == "reasoning" and delta.text:
            parted = "" if self._reasoning_message in (-1, delta.message) else _BLANK_LINE
            self._reasoning_message = delta.message
            return Piece(reasoning=parted + delta.text, channel=delta.channel)
        if delta.kind not in VISIBLE or not delta.text or self.stopped:
            return Piece(channel=channel)
        held = "" if delta.message == self._message.message else self._next_message()
        self._message = delta
        return Piece(held + self._give(self._stops.push(delta.text)), channel=delta.channel)

    def _next_message(self) -> str:
        """The rest of the last message of the reply; a new one begins."""
        held = self._give(self._stops.finish())
        self._stops = StopStrings(self._stop_strings)
        self._parted = _BLANK_LINE if self._replied else ""
        return held

    def _give(self, text: str) -> str:
        if not text:
            return ""
        if self._message.kind == "answer":
            self._answers.append((self._parted if self._answers else "") + text)
        text, self._parted, self._replied = self._parted + text, "", True
        return text
