"""`moe-runtime generate`: continue a prompt and print the text as it comes."""

from __future__ import annotations

from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any, TextIO

import click

from moe_runtime.commands.common import json_option, model_argument, print_json, verb
from moe_runtime.commands.reply import note, print_reply, summary
from moe_runtime.commands.request_options import request_options

if TYPE_CHECKING:
    from moe_runtime.generate import Generation

EXAMPLE_PROMPTS = {"demo": "It was a dark night, and the old man"}  # when no prompt is given


@verb(
    "generate",
    examples="""
    moe-runtime generate demo
    moe-runtime generate demo --prompt "The old house" --temperature 0.8 --seed 7
    moe-runtime generate openai/gpt-oss-20b --chat --prompt "Why is the sky blue?"
    cat notes.txt | moe-runtime generate ./checkpoint - --max-new-tokens 64 --json
    """,
)
@model_argument
@click.argument("stdin", metavar="[-]", required=False, type=click.Choice(["-"]))
@click.option("--prompt", "-p", metavar="TEXT", help="Text to continue, taken as it is.")
@click.option("--prompt-file", type=click.File("r", encoding="utf-8"), metavar="FILE",
              help="Read the prompt from a file; - is stdin.")  # fmt: skip
@click.option("--chat", is_flag=True, help="Send the prompt as a user's message of a chat.")
@click.option("--system", metavar="TEXT", help="System message, with --chat.")
@click.option("--reasoning-effort", metavar="LEVEL",
              help="low, medium or high, with --chat, for templates that know it.")  # fmt: skip
@click.option("--thinking/--no-thinking", default=None,
              help="Think before the answer, with --chat, for templates that know it.")  # fmt: skip
@click.option("--logprobs", type=click.IntRange(0, 20), default=0, metavar="N",
              help="Alternatives to report for each token, with --json.")  # fmt: skip
@request_options
@json_option
def command(
    model: str,
    stdin: str | None,
    prompt: str | None,
    prompt_file: TextIO | None,
    chat: bool,
    system: str | None,
    reasoning_effort: str | None,
    thinking: bool | None,
    logprobs: int,
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
    as_json: bool,
) -> None:
    """Continue a prompt with MODEL and print the new text as it comes.

    The prompt is --prompt, --prompt-file or, with a - after MODEL, stdin. A line of times follows
    on stderr.
    """
    if (system or reasoning_effort or thinking is not None) and not chat:
        raise click.UsageError("--system, --reasoning-effort and --thinking need --chat")
    if logprobs and not as_json:
        raise click.UsageError("--logprobs needs --json")
    text = _prompt_text(model, stdin, prompt, prompt_file)
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
        stream = opened.stream(
            chat_messages(text, system) if chat else text,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
            logprobs=logprobs,
            template_options=template_options(reasoning_effort, thinking),
        )
        if as_json:
            for _ in stream:
                pass
            print_json(as_data(stream.result, with_logprobs=logprobs > 0))
        else:
            print_reply(stream)
        note(summary(stream.result))


def chat_messages(text: str, system: str | None) -> list[dict[str, str]]:
    """A user's message, after a system message if there is one."""
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": text}]


def template_options(reasoning_effort: str | None, thinking: bool | None) -> dict[str, Any]:
    """Variables of the chat template that options of the command line set."""
    options: dict[str, Any] = {"reasoning_effort": reasoning_effort} if reasoning_effort else {}
    if thinking is not None:  # DeepSeek's templates read the first, others the second
        options |= {"thinking": thinking, "enable_thinking": thinking}
    return options


def as_data(generation: Generation, *, with_logprobs: bool) -> dict[str, Any]:
    """A generation as JSON-ready data; logprobs only if they were asked for."""
    data = asdict(generation)
    if not with_logprobs:
        del data["logprobs"]
    return data


def _prompt_text(
    model: str, stdin: str | None, prompt: str | None, prompt_file: TextIO | None
) -> str:
    """The prompt from the one place that was named."""
    named = [source for source in (stdin, prompt, prompt_file) if source is not None]
    if len(named) > 1:
        raise click.UsageError("give one prompt: --prompt, --prompt-file or -")
    if stdin is not None or prompt == "-":
        return _read(click.open_file("-", encoding="utf-8"), "stdin")
    if prompt_file is not None:
        return _read(prompt_file, getattr(prompt_file, "name", "stdin"))
    if prompt is not None:
        return prompt
    if model in EXAMPLE_PROMPTS:
        note(f"prompt: {EXAMPLE_PROMPTS[model]}")
        return EXAMPLE_PROMPTS[model]
    raise click.UsageError("no prompt: give --prompt TEXT, --prompt-file FILE or - for stdin")


def _read(file: IO[str], name: str) -> str:
    try:
        return file.read()
    except UnicodeDecodeError as error:
        raise click.ClickException(
            f"{name}: byte {error.start} is not UTF-8 text: {error.reason}"
        ) from None
