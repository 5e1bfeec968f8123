"""`moe-runtime bench`: how fast a model starts, answers and decodes here."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from moe_runtime.commands.common import (
    dense_format_option,
    device_option,
    json_option,
    model_argument,
    print_json,
    revision_option,
    verb,
)


@verb(
    "bench",
    examples="""
    moe-runtime bench demo
    moe-runtime bench openai/gpt-oss-20b --context 128 --context 8192
    moe-runtime bench ./checkpoint --tokens 512 --csv results.csv
    moe-runtime bench openai/gpt-oss-20b --roofline --timeline step.svg
    """,
)
@model_argument
@revision_option
@device_option
@click.option("--backend", default="auto", show_default=True, metavar="BACKEND",
              help="auto, reference or triton.")  # fmt: skip
@dense_format_option
@click.option("--context", "contexts", multiple=True, type=click.IntRange(min=1), metavar="N",
              help="Tokens before decoding is timed; repeatable. Default: 128.")  # fmt: skip
@click.option("--prompt-tokens", "prompts", multiple=True, type=click.IntRange(min=1), metavar="N",
              help="Prompt lengths for first-token times; repeatable. Default: 128.")  # fmt: skip
@click.option("--tokens", default=256, show_default=True, type=click.IntRange(min=8), metavar="N",
              help="New tokens whose decoding is timed.")  # fmt: skip
@click.option("--repeats", default=3, show_default=True, type=click.IntRange(min=1), metavar="N",
              help="Timed repeats of each figure; medians are shown.")  # fmt: skip
@click.option("--max-context", type=click.IntRange(min=1), metavar="N",
              help="Tokens the cache is made for; default: what is needed.")  # fmt: skip
@click.option("--roofline", "with_roofline", is_flag=True,
              help="Bytes and time of a decode step by component; needs a GPU.")  # fmt: skip
@click.option("--timeline", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE.svg",
              help="Draw the step's programs over time; needs a GPU.")  # fmt: skip
@click.option("--csv", "csv_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Append the figures to this file.")  # fmt: skip
@click.option("--name", metavar="NAME", help="Model name in the CSV; default: MODEL.")
@json_option
def command(
    model: str,
    revision: str | None,
    device: str,
    backend: str,
    dense_format: str,
    contexts: tuple[int, ...],
    prompts: tuple[int, ...],
    tokens: int,
    repeats: int,
    max_context: int | None,
    with_roofline: bool,
    timeline: Path | None,
    csv_path: Path | None,
    name: str | None,
    as_json: bool,
) -> None:
    """Measure start-up, time to first token and decode speed of MODEL on this machine.

    Prompts are fresh random tokens, decoding is greedy, the end token is ignored. The share is
    bytes read for a token times tokens a second, over the read bandwidth measured here.

    The parts of a roofline add up to the step: a component has the time from the end of the kernel
    in front to its own end, but for what passes until its first program has that one's results,
    which is waiting.
    """
    # Slow import: torch.
    import torch

    from moe_runtime.benchmark import run_bench

    with_roofline = with_roofline or timeline is not None
    if with_roofline and (device == "cpu" or not torch.cuda.is_available()):
        raise click.ClickException("--roofline and --timeline need a CUDA GPU: stamps are its own")

    contexts, prompts = contexts or (128,), prompts or (128,)
    steps = len(contexts) * (repeats + 1) + len(prompts) * repeats
    with tqdm(total=steps, desc="bench", unit="run", disable=as_json or None) as bar:
        report = run_bench(
            model,
            revision=revision,
            device=device,
            backend=backend,
            dense_format=dense_format,
            contexts=contexts,
            prompts=prompts,
            tokens=tokens,
            repeats=repeats,
            max_context=max_context,
            on_step=bar.update,
            with_roofline=with_roofline,
            timeline=timeline,
        )
    if csv_path:
        report.append_csv(csv_path, name or model)
    if as_json:
        print_json(report.as_dict(name or model))
    else:
        click.echo(report.table())
