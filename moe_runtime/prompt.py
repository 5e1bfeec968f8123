"""A caller's prompt (text, token ids or chat messages) as checked token ids."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moe_runtime.tokenizer import Tokenizer

Message = Mapping[str, Any]  # of a chat: role, content and what the template reads besides
Prompt = str | Sequence[int] | Sequence[Message]


@dataclass(frozen=True)
class EncodedPrompt:
    """Token ids of a prompt, and whether it was a chat."""

    token_ids: list[int]
    is_chat: bool


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    *,
    vocab_size: int,
    tools: Sequence[Mapping[str, Any]] | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> EncodedPrompt:
    """The prompt's token ids, each below vocab_size; raises ValueError with what is wrong.

    A text is encoded as it is, after the bos token if tokenizer_config.json has add_bos_token true
    (DeepSeek V2 and V3). Messages go through the chat template, with tools and options.
    """
    items = _items(prompt)
    is_chat = not isinstance(items, str) and isinstance(items[0], Mapping)
    if not is_chat and (tools or template_options):
        raise ValueError("tools and template_options belong to chat messages, not to a raw prompt")
    if not isinstance(items, str) and not is_chat:
        return EncodedPrompt(check_token_ids(items, vocab_size), is_chat=False)
    if tokenizer is None:
        raise ValueError(
            "the checkpoint has no tokenizer.json: give the prompt as a list of token ids"
        )
    if isinstance(items, str):
        ids = tokenizer.encode(items)
        if tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
    else:
        ids = tokenizer.apply_chat_template(items, tools=tools, template_options=template_options)
    if not ids:
        raise ValueError("the prompt is empty: give at least one token")
    return EncodedPrompt(check_token_ids(ids, vocab_size), is_chat)


def check_token_ids(
    token_ids: Sequence[Any], vocab_size: int, *, where: str = "the prompt"
) -> list[int]:
    """The ids as a list of int; raises ValueError for one that is no id of the model."""
    checked = []
    for i, token_id in enumerate(token_ids):
        try:
            value = operator.index(token_id)
        except TypeError:
            value = -1
        if isinstance(token_id, bool) or not 0 <= value < vocab_size:
            raise ValueError(
                f"token id {i} of {where}: expected a whole number from 0 to "
                f"{vocab_size - 1}, got {_shown(token_id)}"
            )
        checked.append(value)
    return checked


def _items(prompt: Any) -> Any:
    """The prompt as text or a list that is not empty; arrays and tensors become lists."""
    items = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if not isinstance(items, (str, list, tuple)):
        raise ValueError(
            "a prompt is a text, a list of token ids or a list of chat messages, "
            f"got {type(prompt).__name__}"
        )
    if not items:
        raise ValueError("the prompt is empty: give at least one token")
    return items


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
