"""Chat messages of the caller: checked, copied to plain data, and fenced against control tokens.

A message's text may contain the spelling of a control token (`<|end|>`), by accident or to forge a
system message. `Fence` puts two private characters around such spellings before the template runs;
after it, `Fence.split` tells the template's own control tokens from the caller's, which are then
encoded as ordinary text. Messages without such spellings are not touched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_PRIVATE_CHARACTERS = range(0xF0000, 0xFFFFE)  # Unicode gives them no meaning
_MAX_DEPTH = 64


def plain_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A checked copy of chat messages, made of plain JSON types.

    Each message is a mapping with a known `role` and a `content` of text, or of parts of type text
    (joined here), or None beside `tool_calls`. Reasoning given under any of its usual names is put
    under those that templates read. Raises ValueError naming the message.
    """
    if not messages:
        raise ValueError("the list of chat messages is empty")
    return [_plain_message(message, f"message {i}") for i, message in enumerate(messages)]


def plain_data(value: Any, where: str, *, depth: int = 0) -> Any:
    """A copy made of exact JSON types only; raises ValueError for any other object.

    Other objects would bring methods into the template that its sandbox knows nothing about.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where}: nested deeper than {_MAX_DEPTH} levels")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {
            str(key): plain_data(item, f"{where}: {key}", depth=depth + 1)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [plain_data(item, where, depth=depth + 1) for item in value]
    raise ValueError(f"{where}: expected text, numbers, lists or mappings, got {_kind(value)}")


def _plain_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where}: expected a mapping with role and content, got {_kind(message)}")
    plain = plain_data(message, where)
    if plain.get("role") not in ROLES:
        raise ValueError(
            f"{where}: role must be one of {', '.join(ROLES)}, got {plain.get('role')!r}"
        )
    plain["content"] = _text_content(plain.get("content"), where)
    if plain["content"] is None and not plain.get("tool_calls"):
        raise ValueError(f"{where}: content is missing")
    reasoning = next((plain[key] for key in _REASONING_KEYS if plain.get(key) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _text_content(content: Any, where: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"{where}: content must be text or a list of parts, got {_kind(content)}")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else _kind(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: content parts must be of type text, got {kind!r}")
    return "".join(part["text"] for part in content)


def _kind(value: Any) -> str:
    return type(value).__name__


class Fence:
    """Marks the caller's spellings of control tokens through one rendering of a template.

    seen:    everything the template sees, its own source included
    tokens:  spellings of the control tokens
    """

    def __init__(self, seen: Any, tokens: Iterable[str]) -> None:
        used = set().union(*map(set, _texts(seen)))
        free = (chr(code) for code in _PRIVATE_CHARACTERS if chr(code) not in used)
        self._open, self._close = next(free), next(free)
        spellings = sorted(tokens, key=len, reverse=True)  # the longest is matched first
        heads = {token[:length] for token in spellings for length in range(1, len(token))}
        self._tokens = re.compile("|".join(map(re.escape, spellings)) or "(?!)")
        self._head_at_end = re.compile(f"(?:{'|'.join(map(re.escape, heads)) or '(?!)'})\\Z")
        self._longest = max(map(len, spellings), default=0)

    def mark(self, data: Any) -> Any:
        """The same data with every spelling of a control token between the private characters.

        A text that ends with the beginning of a control token gets one private character there:
        the text that the template puts behind it might complete the token.
        """
        return _map_texts(data, self._mark_text)

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """The rendered text in pieces, each with whether its control tokens count as such."""
        fenced = re.compile(f"{self._open}({self._tokens.pattern}){self._close}")
        pieces: list[tuple[str, bool]] = []
        for i, part in enumerate(fenced.split(rendered)):
            from_caller = i % 2 == 1
            pieces += [(text, not from_caller) for text in self._without_strays(part) if text]
        return pieces

    def _mark_text(self, text: str) -> str:
        if text in ROLES:
            return text
        marked = self._tokens.sub(rf"{self._open}\g<0>{self._close}", text)
        return self._head_at_end.sub(rf"\g<0>{self._close}", marked)

    def _without_strays(self, text: str) -> list[str]:
        """The text without single private characters, cut only where they part a control token."""
        joined = [""]
        for part in re.split(f"[{self._open}{self._close}]", text):
            tail = joined[-1][-self._longest :]
            near = tail + part[: self._longest]
            crossing = (m.start() < len(tail) < m.end() for m in self._tokens.finditer(near))
            if any(crossing):
                joined.append(part)
            else:
                joined[-1] += part
        return joined


def _texts(data: Any) -> list[str]:
    found: list[str] = []

    def collect(text: str) -> str:
        found.append(text)
        return text

    _map_texts(data, collect)
    return found


def _map_texts(data: Any, change: Callable[[str], str]) -> Any:
    """A copy of plain data with every text changed, keys of mappings included."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, dict):
        return {change(key): _map_texts(value, change) for key, value in data.items()}
    if isinstance(data, list):
        return [_map_texts(item, change) for item in data]
    return data
