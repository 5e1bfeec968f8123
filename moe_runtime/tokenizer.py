"""Text to token ids and back, from the checkpoint's own tokenizer.json.

`encode` reads control tokens (`<|start|>`) in a text as such, because a string prompt is taken as
it is; `allow_special=False` encodes their spelling as ordinary text instead. Messages of a chat go
through `apply_chat_template`, where only the template itself can write control tokens.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any, Protocol

import tokenizers

from loaders.errors import CheckpointError
from loaders.json_text import parse_json_object
from moe_runtime.chat_messages import Fence, plain_data, plain_messages
from moe_runtime.chat_template import ChatTemplate
from moe_runtime.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer

# Tokens of tokenizer_config.json that templates know by these names.
_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BAR = "\uff5c"  # full-width, in DeepSeek's control tokens
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


class ChatRenderer(Protocol):
    """What turns a chat into a prompt: a ChatTemplate, or code of a family without one."""

    @property
    def source(self) -> str:
        """The template's text, "" if there is none."""
        ...

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt's text; ValueError of one line for messages that it does not take."""
        ...


class Tokenizer:
    """A tokenizer with its chat template; made by `load_tokenizer` or `Tokenizer.from_json`."""

    def __init__(
        self,
        model: tokenizers.Tokenizer,
        *,
        chat_templates: Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
        chat_code: ChatRenderer | None = None,
        byte_level: bool = False,
        add_bos: bool = False,
    ) -> None:
        self._model = model
        self._encode_lock = threading.Lock()  # encode_special_tokens is a setting of the model
        self._chat_templates = dict(chat_templates or {})
        self._chat_code = chat_code  # for a checkpoint without templates
        self.named_tokens = dict(named_tokens or {})  # {"eos_token": "<|return|>", ...}
        self._byte_level = byte_level
        self._add_bos = add_bos
        added = model.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._special)
        # DeepSeek's <\uff5cUser\uff5c> and its like control a chat without being marked as special.
        self._markers = frozenset(
            token.content for token in added.values() if _BAR in token.content and not token.special
        )
        self.token_bytes = lru_cache(maxsize=None)(self._token_bytes)

    @classmethod
    def from_json(
        cls,
        tokenizer_json: str,
        *,
        chat_templates: Mapping[str, str] | None = None,
        named_tokens: Mapping[str, str] | None = None,
        chat_code: ChatRenderer | None = None,
        add_bos: bool = False,
    ) -> Tokenizer:
        """A tokenizer from the text of tokenizer.json; raises CheckpointError if it is broken.

        add_bos: whether texts that are not chats begin with bos_token (see bos_id)
        """
        try:
            model = tokenizers.Tokenizer.from_str(tokenizer_json)
            decoder = json.loads(model.decoder.__getstate__()) if model.decoder else None
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the Rust library is not an Exception
            raise CheckpointError(
                f"tokenizer.json cannot be read: {error}", hint="download the file again"
            ) from None
        # A file may ask for cutting or filling up to a length, which is for training.
        model.no_truncation()
        model.no_padding()
        return cls(
            model,
            chat_templates=chat_templates,
            named_tokens=named_tokens,
            chat_code=chat_code,
            add_bos=add_bos,
            byte_level=_is_byte_level(decoder),
        )

    @cached_property
    def num_ids(self) -> int:
        """One more than the largest token id."""
        return max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the checkpoint's chat template, if it has one."""
        return self._chat_templates.get("default")

    @property
    def bos_id(self) -> int | None:
        """The id that goes before a text; None if the checkpoint asks for none.

        Chats are not meant: a template writes it itself.
        """
        token = self.named_tokens.get("bos_token")
        return self.token_id(token) if self._add_bos and token is not None else None

    @property
    def renders_chats(self) -> bool:
        """Whether apply_chat_template works: there is a template, or code for the family."""
        return self.chat_template is not None or self._chat_code is not None

    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling, as `<|start|>`; None if there is none."""
        return self._model.token_to_id(token)

    def encode(
        self, text: str, *, add_special_tokens: bool = False, allow_special: bool = True
    ) -> list[int]:
        """Token ids of a text.

        add_special_tokens:  put the tokens around it that the tokenizer's own rule asks for (bos)
        allow_special:       read control tokens spelled in the text as such; False makes them
                             ordinary text
        """
        if not isinstance(text, str):
            raise ValueError(f"expected text to encode, got {type(text).__name__}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text holds half a surrogate pair at character {error.start}, "
                "which no encoding can represent"
            ) from None
        with self._encode_lock:
            self._model.encode_special_tokens = not allow_special
            try:
                ids = self._model.encode(text, add_special_tokens=add_special_tokens).ids
            finally:
                self._model.encode_special_tokens = False
        return list(ids)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know give nothing."""
        for token_id in token_ids:
            if not 0 <= token_id < 2**32:
                raise ValueError(f"expected token ids, got {token_id}")
        return self._model.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """A new incremental decoder; joined, its pieces equal `decode` of all ids."""
        skipped = self.special_ids if skip_special_tokens else frozenset()
        inner: Detokenizer
        if self._byte_level:
            inner = ByteDetokenizer(self.token_bytes)
        else:
            inner = WindowDetokenizer(
                lambda ids: self._model.decode(ids, skip_special_tokens=False), self._is_unsettled
            )
        return _Skipping(inner, skipped)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        template_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """Chat messages as a prompt: list of token ids, or the text if not `tokenize`.

        messages:              mappings with role and content (see chat_messages.plain_messages)
        tools:                 JSON schemas of functions the model may call
        add_generation_prompt: end with the header of the assistant's turn (transformers' default
                               is False)
        template_options:      further variables of the template: {"reasoning_effort": "low"}

        Control tokens spelled in messages, tools or options are encoded as ordinary text; the text
        form cannot show the difference. Raises ValueError for bad messages or no template.
        """
        template = self._template(with_tools=bool(tools))
        variables = {
            **plain_data(template_options or {}, "template_options"),
            "messages": plain_messages(messages),
            "tools": plain_data(list(tools), "tools") if tools else None,
        }
        settings = {
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self.named_tokens,
        }
        if not tokenize:
            return template.render(settings | variables)
        controls = [*self._special.values(), *self._markers]
        fence = Fence([variables, template.source], controls)
        pieces = fence.split(template.render(settings | fence.mark(variables)))
        return self._encode_pieces(pieces)

    def _template(self, *, with_tools: bool) -> ChatRenderer:
        source = self._chat_templates.get("tool_use") if with_tools else None
        source = source or self.chat_template
        if source is None and self._chat_code is not None:
            return self._chat_code
        if source is None:
            raise ValueError(
                "the checkpoint has no chat template: pass the prompt as text or token ids"
            )
        return _compiled(source)

    def _encode_pieces(self, pieces: Sequence[tuple[str, bool]]) -> list[int]:
        """Ids of a rendered chat; piece by piece, so that no control token spans two."""
        ids: list[int] = []
        for i, (text, allow_special) in enumerate(pieces):
            if text in self._markers and not allow_special:
                # Cut in two, because no setting makes such a token ordinary text.
                ids += self._encode_inside(text[:1], False) + self._encode_inside(text[1:], False)
                continue
            piece = self._encode_inside(text, allow_special) if i else self.encode(text)
            if i == 0 and not allow_special:
                piece = self.encode(text, allow_special=False)
            if not allow_special and not self.special_ids.isdisjoint(piece):
                raise ValueError(f"a message holds {text!r}, which has no other encoding")
            ids += piece
        return ids

    def _encode_inside(self, text: str, allow_special: bool) -> list[int]:
        """Ids of a text that follows another: no space is put before it (SentencePiece would)."""
        before = self.encode("\n")
        ids = self.encode("\n" + text, allow_special=allow_special)
        if ids[: len(before)] == before:
            return ids[len(before) :]
        return self.encode(text, allow_special=allow_special)

    def _token_bytes(self, token_id: int) -> bytes:
        token = self._model.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        try:
            return bytes(_BYTE_OF[character] for character in token)
        except KeyError:  # an added token is spelled as itself
            return token.encode("utf-8")

    def _is_unsettled(self, token_id: int) -> bool:
        """Byte tokens: a run of them is decoded as a whole; unknown ids do not interrupt it."""
        token = self._model.id_to_token(token_id)
        return token is None or _BYTE_TOKEN.fullmatch(token) is not None


class _Skipping:
    """A detokenizer that passes over some ids."""

    def __init__(self, inner: Detokenizer, skipped: frozenset[int]) -> None:
        self._inner = inner
        self._skipped = skipped

    def push(self, token_id: int) -> str:
        return "" if token_id in self._skipped else self._inner.push(token_id)

    def finish(self) -> str:
        return self._inner.finish()


class CheckpointFiles(Protocol):
    """What is needed of loaders.checkpoint.Checkpoint."""

    def file_text(self, name: str) -> str | None:
        """The text of one of the checkpoint's small files; None if there is none."""
        ...


def load_tokenizer(
    checkpoint: CheckpointFiles, vocab_size: int, *, chat_code: ChatRenderer | None = None
) -> Tokenizer | None:
    """The checkpoint's tokenizer; None if it has none (the model still works on token ids).

    vocab_size: V of the model; a tokenizer with larger ids is not this model's: CheckpointError
    chat_code:  renders chats where the checkpoint has no template
    """
    text = checkpoint.file_text("tokenizer.json")
    if text is None:
        return None
    config = _tokenizer_config(checkpoint.file_text("tokenizer_config.json"))
    tokenizer = Tokenizer.from_json(
        text,
        chat_templates=_chat_templates(checkpoint.file_text("chat_template.jinja"), config),
        named_tokens=_named_tokens(config),
        chat_code=chat_code,
        add_bos=config.get("add_bos_token") is True,
    )
    if tokenizer.num_ids > vocab_size:
        raise CheckpointError(
            f"tokenizer.json does not match the model: it has token ids up to "
            f"{tokenizer.num_ids - 1}, the model's vocabulary has {vocab_size} rows",
            hint="the file belongs to another model: download the checkpoint again",
        )
    return tokenizer


def _tokenizer_config(text: str | None) -> Mapping[str, Any]:
    if text is None:
        return {}
    return parse_json_object(text.encode("utf-8"), file="tokenizer_config.json")


def _chat_templates(file: str | None, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name: the file comes first, then one or several named ones in the config."""
    stored = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(stored, str):
        templates["default"] = stored
    for entry in stored if isinstance(stored, list) else []:
        named = isinstance(entry, dict) and isinstance(entry.get("name"), str)
        if named and isinstance(entry.get("template"), str):
            templates[entry["name"]] = entry["template"]
    if file is not None:
        templates["default"] = file
    return templates


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token and its like; each is a text or an object with its text as `content`."""
    found: dict[str, str] = {}
    for name in _NAMED_TOKENS:
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found


def _is_byte_level(decoder: Any) -> bool:
    """Whether a decoder does nothing but map the characters of tokens to bytes."""
    if not isinstance(decoder, dict):
        return False
    if decoder.get("type") == "Sequence":
        inner = decoder.get("decoders") or []
        return len(inner) == 1 and _is_byte_level(inner[0])
    return decoder.get("type") == "ByteLevel"


@lru_cache(maxsize=16)
def _compiled(source: str) -> ChatTemplate:
    return ChatTemplate(source)


def _byte_alphabet() -> dict[str, int]:
    """The byte of each character in byte-level tokens: printable bytes stand for themselves, the
    others, in order, for the characters from U+0100 on (the GPT-2 convention)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
