"""A byte-level tokenizer with the control tokens of DeepSeek V4, for tests of its chats."""

import json
from functools import cache

from moe_runtime.deepseek_v4_chat import ASSISTANT, BOS, DSML, END_THINK, EOS, THINK, USER
from moe_runtime.tokenizer import Tokenizer
from tests.moe_runtime.text_helpers import byte_level_json


@cache
def deepseek_tokenizer_json(*, markers_are_special: bool) -> str:
    """tokenizer.json; BOS and EOS are special in any case, as in the published one."""
    data = json.loads(byte_level_json())
    markers = (USER, ASSISTANT, THINK, END_THINK, DSML)
    data["added_tokens"] = [t for t in data["added_tokens"] if t["content"] not in markers]
    first = 1 + max([*(t["id"] for t in data["added_tokens"]), *data["model"]["vocab"].values()])
    for i, text in enumerate((BOS, EOS, *markers)):
        special = text not in markers or markers_are_special
        data["added_tokens"].append(
            {"id": first + i, "content": text, "single_word": False, "lstrip": False,
             "rstrip": False, "normalized": False, "special": special}
        )  # fmt: skip
    return json.dumps(data)


@cache
def deepseek_tokenizer(*, markers_are_special: bool) -> Tokenizer:
    """The tokenizer without a chat template."""
    return Tokenizer.from_json(deepseek_tokenizer_json(markers_are_special=markers_are_special))
