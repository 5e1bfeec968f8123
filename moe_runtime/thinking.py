"""Replies that think first: <think> reasoning </think> answer, told apart by token id.

DeepSeek R1 begins a reply with <think>, or its prompt ends with it; V3.1's prompt ends with <think>
or, without thinking, with </think>. Other checkpoints with these two tokens do the same. Blank
lines around both texts belong to the markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from moe_runtime.detokenizer import Detokenizer
from moe_runtime.harmony import ToolCall
from moe_runtime.output_text import Piece
from moe_runtime.stop_strings import StopStrings

_PROMPT_END = 3  # tokens at a prompt's end among which a marker opens the reply


class TokenizerView(Protocol):
    """What is needed of a tokenizer."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental decoder."""
        ...


@dataclass(frozen=True)
class ThinkTokens:
    """Ids of the two markers in one tokenizer."""

    begin: int
    end: int

    @classmethod
    def find(cls, tokenizer: TokenizerView) -> ThinkTokens | None:
        """The ids by the tokens' names; None if the tokenizer lacks one."""
        begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        return None if begin is None or end is None else cls(begin, end)


class ThinkingText:
    """Output of a chat with a model that thinks: the reply is its text, reasoning is given apart.

    A marker counts where it can stand: <think> before everything else, </think> after reasoning or
    before everything else. Elsewhere it is text. Stop strings count in the reply alone.
    """

    tool_calls: tuple[ToolCall, ...] = ()

    def __init__(
        self,
        tokenizer: TokenizerView,
        tokens: ThinkTokens,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
    ) -> None:
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._stops = StopStrings(stops)
        self._thinks = _thinks_after(prompt_ids, tokens)
        self._detokenizer = tokenizer.detokenizer()
        self._begun = False  # whether the text that is read now has more than blank lines
        self._line_breaks = ""  # at the end of the reasoning so far
        self._answers: list[str] = []

    def push(self, token_id: int) -> Piece:
        """See OutputText.push."""
        if token_id == self._tokens.end and (self._thinks or not self._begun):
            return self._turn(thinks=False)
        if token_id == self._tokens.begin and not self._begun and not self._answers:
            return self._turn(thinks=True)
        return self._piece(self._detokenizer.push(token_id))

    def end(self, stop_id: int | None) -> Piece:
        """See OutputText.end."""
        rest = self._piece(self._detokenizer.finish())
        return Piece(rest.text + self._give(self._stops.finish()), rest.reasoning, rest.channel)

    @property
    def stopped(self) -> bool:
        """See OutputText.stopped."""
        return self._stops.matched is not None

    @property
    def answer(self) -> str:
        """See OutputText.answer."""
        return "".join(self._answers)

    def _turn(self, *, thinks: bool) -> Piece:
        """What is left of the text before a marker; the other one begins."""
        rest = self._piece(self._detokenizer.finish())
        self._thinks, self._begun, self._line_breaks = thinks, False, ""
        return rest

    def _piece(self, text: str) -> Piece:
        channel = "analysis" if self._thinks else "final"
        if not self._begun:
            text = text.lstrip("\n")
            self._begun = bool(text)
        if not self._thinks:
            return Piece(self._give(self._stops.push(text)), channel=channel)
        shown = (self._line_breaks + text).rstrip("\n")
        self._line_breaks = (self._line_breaks + text)[len(shown) :]
        return Piece(reasoning=shown, channel=channel)

    def _give(self, text: str) -> str:
        self._answers += [text] if text else []
        return text


def _thinks_after(prompt_ids: Sequence[int], tokens: ThinkTokens) -> bool:
    """Whether a prompt's last tokens begin the reasoning."""
    markers = [i for i in prompt_ids[-_PROMPT_END:] if i in (tokens.begin, tokens.end)]
    return markers[-1:] == [tokens.begin]
