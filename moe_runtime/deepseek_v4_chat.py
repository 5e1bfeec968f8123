"""DeepSeek V4's chat as a prompt. Its checkpoints have no Jinja template but Python code.

    BOS system <User> question <Assistant> <think> reasoning </think> answer EOS <User> ...

Without thinking, </think> follows <Assistant> at once. Results of tools are part of a user's turn,
in the order of their calls. Reasoning of turns before the last user's is dropped, unless there are
tools. The long texts that explain tools and ask for the most effort are read from the checkpoint's
own encoding/encoding_dsv4.py, as constants: the code in it is never run.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ENCODING_FILE = "encoding/encoding_dsv4.py"
BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
USER = "<\uff5cUser\uff5c>"
ASSISTANT = "<\uff5cAssistant\uff5c>"
THINK, END_THINK = "<think>", "</think>"
DSML = "\uff5cDSML\uff5c"

_TOOLS_TEXT = "TOOLS_TEMPLATE"
_EFFORT_TEXT = "REASONING_EFFORT_MAX"
_EFFORTS = (None, "high", "max")

Message = Mapping[str, Any]


class DeepseekV4Chat:
    """Renders messages; has what the tokenizer needs of a template."""

    source = ""  # of Jinja: there is none

    def __init__(self, texts: Mapping[str, str]) -> None:
        """texts: constants of the checkpoint's encoding file, see read_texts."""
        self._texts = texts

    @classmethod
    def of_checkpoint(cls, encoding: str | None) -> DeepseekV4Chat:
        """From the text of ENCODING_FILE; without it, chats with tools are refused."""
        return cls(read_texts(encoding) if encoding else {})

    def render(self, variables: Mapping[str, Any]) -> str:
        """The prompt's text; ValueError for what cannot be rendered.

        variables: messages (see chat_messages.plain_messages), tools, add_generation_prompt, and
                   the options thinking (default False) and reasoning_effort ("high" or "max")
        """
        tools = variables.get("tools") or []
        thinking = bool(variables.get("thinking", variables.get("enable_thinking", False)))
        keeps_thinking = thinking and bool(tools)
        turns = _turns(variables["messages"])
        if thinking and not keeps_thinking:
            turns = _without_old_instructions(turns)
        last_user = _last_user(turns)
        text = BOS + self._effort(variables.get("reasoning_effort"), thinking)
        if tools:
            text += self._with_tools(turns, tools)
        for i, turn in enumerate(turns):
            followed = i + 1 < len(turns)
            if turn["role"] == "assistant":
                shows = thinking and (keeps_thinking or i > last_user)
                text += _assistant(turn, shows_thinking=shows)
                continue
            text += (USER if _asks(turn) else "") + turn["content"]
            answered = followed and turns[i + 1]["role"] == "assistant"
            opens = answered or (not followed and variables.get("add_generation_prompt", True))
            if _asks(turn) and opens:
                thinks = thinking and (keeps_thinking or i >= last_user)
                text += ASSISTANT + (THINK if thinks else END_THINK)
        return text

    def _effort(self, effort: Any, thinking: bool) -> str:
        if effort not in _EFFORTS:
            raise ValueError(f"reasoning_effort must be 'high' or 'max', got {effort!r}")
        return self._text(_EFFORT_TEXT) if effort == "max" and thinking else ""

    def _with_tools(self, turns: list[dict[str, Any]], tools: Sequence[Any]) -> str:
        """Put the tools into the system message, or return them where there is none."""
        schemas = "\n".join(_json(tool.get("function", tool)) for tool in tools)
        explained = self._text(_TOOLS_TEXT)
        for name, value in (
            ("{dsml_token}", DSML),
            ("{thinking_start_token}", THINK),
            ("{thinking_end_token}", END_THINK),
            ("{tool_schemas}", schemas),
        ):
            explained = explained.replace(name, value)
        if turns[0]["role"] != "system":
            return "\n\n" + explained
        turns[0]["content"] += "\n\n" + explained
        return ""

    def _text(self, name: str) -> str:
        if name not in self._texts:
            raise ValueError(
                f"tools and reasoning_effort 'max' need the text {name} of {ENCODING_FILE}, "
                "which this checkpoint's folder does not have: download that file into it"
            )
        return self._texts[name]


def read_texts(encoding: str) -> dict[str, str]:
    """The texts among the constants of the vendor's encoding file, by name; nothing is run."""
    try:
        body = ast.parse(encoding).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return {}
    found = {}
    for node in body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        value = node.value
        if not isinstance(value, ast.Constant) or not isinstance(value.value, str):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            if isinstance(target, ast.Name):
                found[target.id] = value.value
    return found


def _turns(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """Messages with those of user and tools that follow each other joined to one of the user."""
    turns: list[dict[str, Any]] = []
    order: list[Any] = []  # ids of the calls that results answer
    for message in messages:
        role = message["role"]
        if role == "assistant":
            order = [call.get("id") for call in message.get("tool_calls") or []]
        if role not in ("user", "tool"):
            turns.append({**message, "content": message["content"] or ""})
            continue
        if not turns or turns[-1]["role"] != "user":
            turns.append({"role": "user", "blocks": []})
        turns[-1]["blocks"].append(message)
        turns[-1]["content"] = "\n\n".join(_blocks(turns[-1]["blocks"], order))
    return turns


def _blocks(messages: Sequence[Message], order: Sequence[Any]) -> list[str]:
    """Texts of one turn; the places of tool results are kept, their order is that of the calls."""
    results = [message for message in messages if message["role"] == "tool"]
    ids = [message.get("tool_call_id") for message in results]
    if all(i in order for i in ids):
        results.sort(key=lambda message: order.index(message.get("tool_call_id")))
    sorted_results = iter(results)
    return [
        f"<tool_result>{next(sorted_results)['content'] or ''}</tool_result>"
        if message["role"] == "tool"
        else message["content"] or ""
        for message in messages
    ]


def _last_user(turns: Sequence[Message]) -> int:
    return max((i for i, turn in enumerate(turns) if _asks(turn)), default=-1)


def _without_old_instructions(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Developer messages before the last user's turn go where reasoning is dropped."""
    last_user = _last_user(turns)
    return [t for i, t in enumerate(turns) if t["role"] != "developer" or i >= last_user]


def _asks(turn: Message) -> bool:
    return turn["role"] in ("user", "developer")


def _assistant(turn: Message, *, shows_thinking: bool) -> str:
    reasoning = f"{turn.get('reasoning_content') or ''}{END_THINK}" if shows_thinking else ""
    calls = "\n".join(_call(call.get("function", call)) for call in turn.get("tool_calls") or [])
    block = f"\n\n<{DSML}tool_calls>\n{calls}\n</{DSML}tool_calls>" if calls else ""
    return reasoning + turn["content"] + block + EOS


def _call(function: Message) -> str:
    """One call as markup. Arguments may be an object or its JSON text, as OpenAI's API has it."""
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = {"arguments": arguments}
    if not isinstance(arguments, dict):
        arguments = {"arguments": arguments}
    lines = [
        f'<{DSML}parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else _json(value)}</{DSML}parameter>"
        for name, value in arguments.items()
    ]
    inner = "\n".join(lines)
    return f'<{DSML}invoke name="{function.get("name")}">\n{inner}\n</{DSML}invoke>'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
