"""DeepSeek V3.2's chat as a prompt, for checkpoints without a Jinja template.

Without tools it is the chat of V4. How V3.2 writes tools is in Python code of its checkpoint, which
is not run: chats with tools are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_runtime.deepseek_v4_chat import DeepseekV4Chat


class DeepseekV32Chat:
    """Renders messages; has what the tokenizer needs of a template."""

    source = ""  # of Jinja: there is none

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt's text; ValueError for a chat with tools. Option: thinking (default False)."""
        uses_tools = (m["role"] == "tool" or m.get("tool_calls") for m in variables["messages"])
        if variables.get("tools") or any(uses_tools):
            raise ValueError("chats with tools are not supported for DeepSeek V3.2")
        without_effort = {k: v for k, v in variables.items() if k != "reasoning_effort"}
        return DeepseekV4Chat({}).render(without_effort)
