"""`moe-runtime chat`: a conversation in the terminal, or line by line from a pipe."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe_runtime.commands.common import model_argument, verb
from moe_runtime.commands.generate import template_options
from moe_runtime.commands.reply import note, print_reply, summary
from moe_runtime.commands.request_options import request_options

if TYPE_CHECKING:
    from moe_runtime.generate import Generation
    from moe_runtime.model import MoeModel

HELP = """\
/system TEXT  set the system message; without TEXT, remove it
/reset        forget the conversation, keep the system message
/save FILE    write the conversation as JSON
/quit         leave; so does the end of input (Ctrl-D)
//TEXT        send a message that begins with a slash
Ctrl-C stops an answer."""


@verb(
    "chat",
    examples="""
    moe-runtime chat openai/gpt-oss-20b
    moe-runtime chat openai/gpt-oss-20b --system "Answer in one sentence." --reasoning-effort low
    echo "Why is the sky blue?" | moe-runtime chat ./checkpoint
    """,
)
@model_argument
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--reasoning-effort", metavar="LEVEL",
              help="low, medium or high, for templates that know it.")  # fmt: skip
@click.option("--thinking/--no-thinking", default=None,
              help="Think before the answer, for templates that know it.")  # fmt: skip
@request_options
def command(
    model: str,
    system: str | None,
    reasoning_effort: str | None,
    thinking: bool | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    min_p: float | None,
    repetition_penalty: float | None,
    seed: int | None,
    stop: tuple[str, ...],
    revision: str | None,
    device: str,
    backend: str,
    dense_format: str,
    max_context: int | None,
) -> None:
    """Talk with MODEL. Answers go to stdout, reasoning and remarks to stderr.

    Type /help for the commands inside.
    """
    # Slow import: torch.
    from moe_runtime.model import MoeModel

    with MoeModel.from_pretrained(
        model,
        revision=revision,
        device=device,
        backend=backend,
        dense_format=dense_format,
        max_context=max_context,
    ) as opened:
        if not opened.tokenizer.renders_chats:
            raise click.ClickException(
                f"{model} has no chat template: use moe-runtime generate to continue a text"
            )
        request = {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": stop,
            "template_options": template_options(reasoning_effort, thinking),
        }
        conversation = Conversation(opened, request)
        conversation.set_system(system or "")
        if sys.stdin.isatty():
            note("/help lists the commands, Ctrl-D leaves")
        for line in input_lines():
            if not conversation.take(line):
                break


class Conversation:
    """The messages so far, and what a line of input does with them."""

    def __init__(self, model: MoeModel, request: dict[str, Any]) -> None:
        self._model = model
        self._request = request  # arguments of MoeModel.stream besides the messages
        self._system: list[dict[str, Any]] = []
        self._turns: list[dict[str, Any]] = []
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: note(HELP),
            "/reset": self._reset,
            "/system": self.set_system,
            "/save": self._save,
        }

    @property
    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat messages."""
        return [*self._system, *self._turns]

    def take(self, line: str) -> bool:
        """A command or a message; False when the user wants to leave."""
        text = line.strip()
        if text.startswith("/") and not text.startswith("//"):
            name, _, argument = text.partition(" ")
            if name in ("/quit", "/exit"):
                return False
            action = self._commands.get(name)
            if action is None:
                note(f"{name}: no such command; /help lists them, //TEXT sends a slash")
            else:
                action(argument.strip())
        elif text:
            self._answer(text.removeprefix("/"))
        return True

    def set_system(self, text: str) -> None:
        """The system message from now on; "" for none."""
        self._system = [{"role": "system", "content": text}] if text else []

    def _reset(self, _: str) -> None:
        self._turns = []
        note("forgotten")

    def _save(self, file: str) -> None:
        if not file:
            note("/save needs a file name")
            return
        try:
            text = json.dumps(self.messages, indent=2, ensure_ascii=False)
            Path(file).expanduser().write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            note(f"error: {file}: {error.strerror}")
        else:
            note(f"saved {len(self.messages)} messages in {file}")

    def _answer(self, text: str) -> None:
        """Ask the model; the exchange enters the conversation if there was an answer."""
        question = {"role": "user", "content": text}
        try:
            stream = self._model.stream([*self.messages, question], **self._request)
        except ValueError as error:
            note(f"error: {error}")
            note("hint: /reset forgets the conversation")
            return
        with stream, contextlib.suppress(KeyboardInterrupt):
            print_reply(stream)
        result = stream.result
        if result.text:
            self._turns += [question, _as_message(result)]
        note(_remark(result))


def _as_message(result: Generation) -> dict[str, Any]:
    # The template decides which reasoning stays: GPT-OSS's drops it once an answer followed.
    message = {"role": "assistant", "content": result.text}
    return message | ({"thinking": result.reasoning} if result.reasoning else {})


def _remark(result: Generation) -> str:
    """What to say after an answer: its times, and whatever the answer does not show."""
    remarks = [f"[{summary(result)}]"]
    remarks += [
        f"the model asks for the tool {call.name} with {call.arguments}; a chat has no tools"
        for call in result.tool_calls
    ]
    if result.finish_reason == "length":
        remarks.append("cut off: --max-new-tokens or --max-context allow no more")
    if not result.text:
        remarks.append("no answer; the message was dropped")
    return "\n".join(remarks)


def input_lines() -> Iterator[str]:
    """Lines that the user types, with editing and history on a terminal, or of a pipe."""
    if not sys.stdin.isatty():
        yield from click.open_file("-", encoding="utf-8", errors="replace")
        return
    # Importing it is what gives input() its line editing; Windows has none.
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
    while True:
        try:
            yield input("> ")
        except KeyboardInterrupt:
            note("\n/quit or Ctrl-D leaves")
        except EOFError:
            note("")
            return
