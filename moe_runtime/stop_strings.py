"""Stop strings in streamed text: they may span tokens, and no part of one is ever given out."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Passes text through until one of the stop strings is complete.

    The stop string that is completed first wins; of several completed by the same character, the
    longest. What comes out does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # end of the text so far that a stop string may begin with
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop string; nothing after a match."""
        if self.matched is not None:
            return ""
        text = self._held + text
        # (end, start, stop) of the first occurrence of each: the smallest is completed first.
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        safe = len(text) - self._length_held(text)
        self._held = text[safe:]
        return text[:safe]

    def finish(self) -> str:
        """The text held back, when no more comes."""
        text, self._held = self._held, ""
        return text

    def _length_held(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            tail = text[-length:]
            if any(stop.startswith(tail) for stop in self._stops):
                return length
        return 0


def check_stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """The `stop` argument as a tuple; raises ValueError unless it is text or a list of texts."""
    if stop is None:
        return ()
    stops = tuple(stop) if isinstance(stop, (list, tuple)) else (stop,)
    for text in stops:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop: expected a text or a list of texts, not empty, got {text!r}")
    return stops
