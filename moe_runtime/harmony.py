"""Channel parser for Harmony, the chat format of GPT-OSS, over token ids.

    <|start|>assistant<|channel|>analysis<|message|>...<|end|>
    <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{}<|call|>
    <|start|>assistant<|channel|>final<|message|>...<|return|>

Control tokens are told apart by id, so a spelled `<|end|>` in a message is text. The parser takes
any sequence of ids: where a header is broken, missing or never ends, its words that are not part of
a header become text of the message, and output without any structure is one answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from moe_runtime.detokenizer import Detokenizer

Kind = Literal["answer", "preamble", "reasoning", "tool_call", "other"]
VISIBLE: tuple[Kind, ...] = ("answer", "preamble")  # what a chat shows as the reply

_LONGEST_HEADER = 128  # characters of one part; more is text without its <|message|>
_RECIPIENT = re.compile(r"to=(\S+)")
_CONTENT_TYPE = re.compile(r"\s*(?:json|code|text)\b")
_CHANNELS = ("analysis", "commentary", "final")
_NOT_A_TOOL = ("assistant", "user", "all")
_OTHER_ROLES = ("system", "developer", "user", "tool", "python", "browser")


class TokenizerView(Protocol):
    """What the parser needs of a tokenizer."""

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""
        ...

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental decoder."""
        ...


@dataclass(frozen=True)
class HarmonyTokens:
    """Ids of the control tokens in one tokenizer."""

    start: int
    channel: int
    message: int
    end: int
    return_: int | None
    call: int | None
    constrain: int | None

    @classmethod
    def find(cls, tokenizer: TokenizerView) -> HarmonyTokens | None:
        """The ids by the tokens' names; None if the tokenizer is not one for Harmony."""
        names = ("start", "channel", "message", "end")
        ids = [tokenizer.token_id(f"<|{name}|>") for name in names]
        start, channel, message, end = ids
        if start is None or channel is None or message is None or end is None:
            return None
        return cls(
            start,
            channel,
            message,
            end,
            return_=tokenizer.token_id("<|return|>"),
            call=tokenizer.token_id("<|call|>"),
            constrain=tokenizer.token_id("<|constrain|>"),
        )

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end the assistant's turn: an answer's end and a tool call."""
        return tuple(i for i in (self.return_, self.call) if i is not None)


@dataclass(frozen=True)
class ToolCall:
    """A function the model asks for."""

    name: str  # without "functions."
    arguments: str  # as the model wrote them, normally a JSON object
    recipient: str  # "functions.NAME", or a built-in tool: "python", "browser.search"
    content_type: str | None = None  # "json"
    complete: bool = True  # False when the output ended inside it


@dataclass
class HarmonyMessage:
    """One message of the output, complete or not."""

    role: str = "assistant"
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    text: str = ""
    complete: bool = False

    @property
    def kind(self) -> Kind:
        """What the message is for; unknown channels are for the reader."""
        if self.role in _OTHER_ROLES or "." in self.role:
            return "other"
        if self.recipient is not None and self.recipient not in _NOT_A_TOOL:
            return "tool_call"
        if self.channel == "analysis":
            return "reasoning"
        return "preamble" if self.channel == "commentary" else "answer"


@dataclass(frozen=True)
class HarmonyDelta:
    """Text that one token added to a message; `message` counts the messages of this output."""

    text: str = ""
    message: int = -1
    kind: Kind = "other"
    channel: str | None = None


_NOTHING = HarmonyDelta()


class HarmonyParser:
    """Takes token ids one by one; `messages` holds what was read so far.

    prompt_ids: the prompt that is being continued. Its last header decides where parsing begins:
                in a header after `<|start|>assistant`, in a message if the prompt opened one.
    """

    def __init__(
        self, tokenizer: TokenizerView, tokens: HarmonyTokens, prompt_ids: Sequence[int] = ()
    ) -> None:
        self.messages: list[HarmonyMessage] = []
        self._tokenizer = tokenizer
        self._part = "role"  # of the header: role, channel, constrain; or content
        self._started = False  # whether <|start|> opened this header
        self._header = {"role": "", "channel": "", "constrain": ""}
        self._run = tokenizer.detokenizer()  # of the text since the last control token
        self._actions = {
            tokens.start: self._on_start,
            tokens.channel: self._on_channel,
            tokens.message: self._on_message,
            tokens.end: self._on_end,
            tokens.return_: self._on_end,
            tokens.call: self._on_end,
            tokens.constrain: self._on_constrain,
        }
        self._continue(prompt_ids, tokens.start)

    def push(self, token_id: int) -> HarmonyDelta:
        """What this token adds; an empty delta for tokens of headers."""
        action = self._actions.get(token_id)
        if action is None:
            return self._on_text(self._run.push(token_id))
        last = self._end_run()
        changed = action()
        return last if last.text else changed

    def finish(self) -> HarmonyDelta:
        """The text held back at the end of the output."""
        last = self._end_run()
        closed = self._close(complete=False)
        return last if last.text else closed

    @property
    def channel(self) -> str | None:
        """The channel of the message that is being read; None in a header."""
        return self.messages[-1].channel if self._part == "content" else None

    def text_of(self, *kinds: Kind) -> str:
        """Texts of all messages of these kinds, with a blank line between."""
        return "\n\n".join(m.text for m in self.messages if m.kind in kinds and m.text)

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The functions asked for, in order."""
        return tuple(
            ToolCall(
                name=m.recipient.removeprefix("functions."),
                arguments=m.text,
                recipient=m.recipient,
                content_type=m.content_type,
                complete=m.complete,
            )
            for m in self.messages
            if m.kind == "tool_call" and m.recipient is not None
        )

    def _continue(self, prompt_ids: Sequence[int], start: int) -> None:
        ids = list(prompt_ids)
        if start not in ids:
            return
        for token_id in ids[len(ids) - 1 - ids[::-1].index(start) :]:
            self.push(token_id)
        self._end_run()
        self.messages = self.messages[-1:] if self._part == "content" else []
        for message in self.messages:  # its text so far belongs to the prompt
            message.text = ""

    def _end_run(self) -> HarmonyDelta:
        last = self._on_text(self._run.finish())
        self._run = self._tokenizer.detokenizer()
        return last

    def _on_text(self, text: str) -> HarmonyDelta:
        if not text:
            return _NOTHING
        if self._part == "content":
            return self._add(text)
        self._header[self._part] += text
        return _NOTHING if self._may_be_header() else self._open_broken()

    def _on_start(self) -> HarmonyDelta:
        closed = self._close(complete=False)
        self._started = True
        return closed

    def _on_channel(self) -> HarmonyDelta:
        closed = _NOTHING if self._part == "role" else self._close(complete=False)
        self._part = "channel"
        return closed

    def _on_constrain(self) -> HarmonyDelta:
        if self._part in ("role", "channel"):
            self._part = "constrain"
        return _NOTHING

    def _on_message(self) -> HarmonyDelta:
        if self._part != "content":
            self.messages.append(_message_of(self._header))
            self._part = "content"
        return _NOTHING

    def _on_end(self) -> HarmonyDelta:
        return self._close(complete=True)

    def _close(self, *, complete: bool) -> HarmonyDelta:
        """End the message or the header that is open; a header may leave text behind."""
        last = _NOTHING
        if self._part != "content":
            last = self._open_broken(keep_empty=False)
        if self._part == "content":
            self.messages[-1].complete = complete
        self._part = "role"
        self._started = False
        self._header = {"role": "", "channel": "", "constrain": ""}
        return last

    def _open_broken(self, *, keep_empty: bool = True) -> HarmonyDelta:
        """Begin a message from a header without <|message|>; words that are no header are text."""
        message, text = _broken_message(self._header, started=self._started)
        if not text.strip() and not keep_empty:
            return _NOTHING
        self.messages.append(message)
        self._part = "content"
        return self._add(text) if text else _NOTHING

    def _add(self, text: str) -> HarmonyDelta:
        message = self.messages[-1]
        message.text += text
        return HarmonyDelta(text, len(self.messages) - 1, message.kind, message.channel)

    def _may_be_header(self) -> bool:
        """Whether the text of the current part can still become a header's."""
        text = self._header[self._part]
        if len(text) > _LONGEST_HEADER or "\n" in text.strip():
            return False
        if self._part == "role":
            return _may_be_role(text, started=self._started)
        return self._part == "channel" or "{" not in text


def _may_be_role(text: str, *, started: bool) -> bool:
    """Whether text before any <|channel|> can be a role, or a role and `to=...`.

    Without a <|start|> before it, only `assistant` is taken for a role.
    """
    text = text.lstrip()
    if "assistant".startswith(text):
        return True
    if text.startswith("assistant"):
        rest = text.removeprefix("assistant")
    elif started:
        rest = text[len(text.split()[0]) :]
    else:
        return False
    return "to=".startswith(rest.lstrip()) or rest.lstrip().startswith("to=")


def _message_of(header: dict[str, str]) -> HarmonyMessage:
    """The message that a header announces."""
    recipient = _RECIPIENT.search(" ".join(header.values()))
    role, channel, constrain = (_RECIPIENT.sub("", part).split() for part in header.values())
    content_type = (constrain + channel[1:])[:1]
    return HarmonyMessage(
        role=role[0] if role else "assistant",
        channel=channel[0] if channel else None,
        recipient=recipient.group(1) if recipient else None,
        content_type=content_type[0] if content_type else None,
    )


def _broken_message(header: dict[str, str], *, started: bool) -> tuple[HarmonyMessage, str]:
    """The message of a header that lacks its <|message|>, and the text that the header hides."""
    message = HarmonyMessage()
    role, channel, constrain = header.values()
    role = _without_role(role, message, started=started)
    channel = _without_channel(channel, message)
    if found := _CONTENT_TYPE.match(constrain):
        message.content_type = found.group().strip()
        constrain = constrain[found.end() :]
    return message, role + channel + constrain


def _without_role(text: str, message: HarmonyMessage, *, started: bool) -> str:
    """What stays of a header's first part after the role and recipient have gone to the message."""
    bare = text.strip()
    if "assistant".startswith(bare):
        return ""
    word = bare.split()[0]
    if word.startswith("assistant"):
        return _without_recipient(text.lstrip().removeprefix("assistant"), message)
    if started and (word in _OTHER_ROLES or word.startswith("functions.")):
        message.role = word
        return _without_recipient(text.lstrip().removeprefix(word), message)
    return text


def _without_channel(text: str, message: HarmonyMessage) -> str:
    """What stays of a header's second part after channel, recipient and content type."""
    bare = text.strip()
    if any(name.startswith(bare) for name in _CHANNELS):
        message.channel = bare or None
        return ""
    for name in _CHANNELS:
        if bare.startswith(name):
            message.channel = name
            rest = _without_recipient(text.lstrip().removeprefix(name), message)
            found = _CONTENT_TYPE.match(rest) if message.recipient else None
            rest = rest[found.end() :] if found else rest
            return rest if rest.strip() else ""
    return text


def _without_recipient(text: str, message: HarmonyMessage) -> str:
    """The text after a leading `to=NAME`, whose name goes to the message."""
    found = _RECIPIENT.match(text.lstrip())
    if found is None:
        return text
    message.recipient = found.group(1)
    return text.lstrip()[found.end() :]
