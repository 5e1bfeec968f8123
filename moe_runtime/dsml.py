"""DSML, the markup in which DeepSeek V4 (and V3.2) asks for tools, taken out of a reply.

    <|DSML|tool_calls>
    <|DSML|invoke name="NAME">
    <|DSML|parameter name="KEY" string="true">text as it is</|DSML|parameter>
    <|DSML|parameter name="KEY" string="false">JSON</|DSML|parameter>
    </|DSML|invoke>
    </|DSML|tool_calls>

with full-width bars. Any text is taken: a block without a call in it is given back as text, a call
that the output ends in is marked as incomplete.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe_runtime.deepseek_v4_chat import DSML
from moe_runtime.harmony import ToolCall
from moe_runtime.output_text import Piece
from moe_runtime.thinking import ThinkingText, ThinkTokens, TokenizerView

_BLOCKS = ("tool_calls", "function_calls")  # of V4 and of V3.2
_OPENINGS = tuple(f"<{DSML}{name}>" for name in _BLOCKS)
_CLOSING = re.compile(f"</{DSML}(?:{'|'.join(_BLOCKS)})>")
_INVOKE = re.compile(f'<{DSML}invoke name="([^"]*)">')
_INVOKE_END = f"</{DSML}invoke>"
_PARAMETER = re.compile(
    f'<{DSML}parameter name="([^"]*)" string="(true|false)">(.*?)</{DSML}parameter>', re.DOTALL
)


@dataclass(frozen=True)
class DsmlTokens:
    """The id of the token that all markup has."""

    dsml: int

    @classmethod
    def find(cls, tokenizer: TokenizerView) -> DsmlTokens | None:
        """The id by the token's name; None if the tokenizer lacks it."""
        dsml = tokenizer.token_id(DSML)
        return None if dsml is None else cls(dsml)


class CallBlocks:
    """Splits a growing text into what is read and the calls in its blocks."""

    def __init__(self) -> None:
        self.calls: tuple[ToolCall, ...] = ()
        self.num_blocks = 0  # begun so far
        self.in_block = False
        self._held = ""  # may begin an opening, or is the block that is read now

    def push(self, text: str) -> str:
        """The part of the text so far that is outside of blocks and not given yet."""
        self._held += text
        given = ""
        while True:
            if not self.in_block:
                before, opening = _split_at_opening(self._held)
                given += before
                self._held = self._held[len(before) :]
                if not opening:
                    return given
                self.in_block = True
                self.num_blocks += 1
            end = _CLOSING.search(self._held)
            if end is None:
                return given
            given += self._close(self._held[: end.end()])
            self._held = self._held[end.end() :]
            self.in_block = False

    def finish(self) -> str:
        """The text held back when the output ends; calls of an unfinished block are kept."""
        held, self._held = self._held, ""
        return self._close(held) if self.in_block else held

    def _close(self, block: str) -> str:
        calls = read_calls(block)
        self.calls += calls
        return "" if calls else block


def read_calls(block: str) -> tuple[ToolCall, ...]:
    """The calls in a block, whatever else it holds."""
    starts = list(_INVOKE.finditer(block))
    calls = []
    for i, start in enumerate(starts):
        end = starts[i + 1].start() if i + 1 < len(starts) else len(block)
        inside, closed, _ = block[start.end() : end].partition(_INVOKE_END)
        name = start[1]
        calls.append(
            ToolCall(name, _arguments(inside), f"functions.{name}", "json", complete=bool(closed))
        )
    return tuple(calls)


def _arguments(inside: str) -> str:
    """The parameters as the text of a JSON object; of two with one name the last counts."""
    found = {key: _value(text, kind == "true") for key, kind, text in _PARAMETER.findall(inside)}
    return json.dumps(found, ensure_ascii=False)


def _value(text: str, is_text: bool) -> object:
    """A value that should be JSON and is not stays the text it is."""
    if is_text:
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _split_at_opening(text: str) -> tuple[str, str]:
    """Text before a block, and from its opening on; line breaks before it belong to it.

    A text that may still become an opening is held back: the first part ends before it.
    """
    found = [at for at in (text.find(opening) for opening in _OPENINGS) if at >= 0]
    if found:
        at = min(found)
        return text[:at].rstrip("\n"), text[at:]
    return text[: _possible_opening(text)], ""


def _possible_opening(text: str) -> int:
    """Where an opening may have begun, with the line breaks before it; the length if nowhere."""
    bracket = text.rfind("<")
    begun = bracket >= 0 and any(o.startswith(text[bracket:]) for o in _OPENINGS)
    end = bracket if begun else len(text)
    return len(text[:end].rstrip("\n"))


class DsmlText(ThinkingText):
    """Output of a chat with a model that thinks and writes its calls in DSML.

    A block in the reasoning ends it: </think> before a call is sometimes left out.
    """

    def __init__(
        self,
        tokenizer: TokenizerView,
        tokens: ThinkTokens,
        dsml: DsmlTokens,
        prompt_ids: Sequence[int],
        stops: Sequence[str],
    ) -> None:
        super().__init__(tokenizer, tokens, prompt_ids, stops)
        self._dsml = dsml
        self._blocks = CallBlocks()

    def push(self, token_id: int) -> Piece:
        """See OutputText.push."""
        if token_id == self._dsml.dsml:
            text = self._detokenizer.push(token_id)
            # A tokenizer that counts it among its control tokens gives nothing for it.
            return self._piece(text if DSML in text else text + DSML)
        if self._blocks.in_block:
            return self._piece(self._detokenizer.push(token_id))
        return super().push(token_id)

    def end(self, stop_id: int | None) -> Piece:
        """See OutputText.end."""
        rest = self._flush()
        last = super().end(stop_id)
        return _joined(rest, last)

    def _turn(self, *, thinks: bool) -> Piece:
        return _joined(self._flush(), super()._turn(thinks=thinks))

    def _piece(self, text: str) -> Piece:
        begun = self._blocks.num_blocks
        piece = super()._piece(self._blocks.push(text))
        self.tool_calls = self._blocks.calls
        if self._thinks and self._blocks.num_blocks > begun:
            self._thinks, self._begun, self._line_breaks = False, False, ""
        return piece

    def _flush(self) -> Piece:
        """What is held back, as part of the text that is read now."""
        first = self._piece(self._detokenizer.finish())
        second = super()._piece(self._blocks.finish())
        self.tool_calls = self._blocks.calls
        return _joined(first, second)


def _joined(first: Piece, second: Piece) -> Piece:
    return Piece(
        first.text + second.text,
        first.reasoning + second.reasoning,
        second.channel or first.channel,
    )
