"""`moe-runtime eval`: perplexity on a text, and the distance to a second model."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from moe_runtime.commands.common import (
    device_option,
    json_option,
    model_argument,
    print_json,
    revision_option,
    verb,
)

if TYPE_CHECKING:
    from moe_runtime.conversion.report import TensorRecord
    from moe_runtime.evaluation import Evaluation
    from moe_runtime.model import MoeModel


@verb(
    "eval",
    examples="""
    moe-runtime eval demo --text book.txt
    moe-runtime eval ./model-mxfp4 --text book.txt --against ./model --add-to-report
    cat book.txt | moe-runtime eval ./model --text - --max-tokens 2000 --json
    """,
)
@model_argument
@revision_option
@device_option
@click.option("--backend", default="auto", show_default=True, metavar="BACKEND",
              help="auto, reference or triton.")  # fmt: skip
@click.option("--text", "text_path", required=True, metavar="FILE",
              type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
              help="UTF-8 text to score; - for stdin.")  # fmt: skip
@click.option("--against", metavar="MODEL", help="A second model: KL and top-1 agreement with it.")
@click.option("--max-tokens", type=click.IntRange(min=2), metavar="N",
              help="Tokens of the text to use; default: all.")  # fmt: skip
@click.option("--window", type=click.IntRange(min=2), metavar="N",
              help="Tokens read at once; default: 1024, or the context if smaller.")  # fmt: skip
@click.option("--add-to-report", is_flag=True,
              help="Also write the figures into MODEL's conversion report and card.")  # fmt: skip
@json_option
def command(
    model: str,
    revision: str | None,
    device: str,
    backend: str,
    text_path: Path,
    against: str | None,
    max_tokens: int | None,
    window: int | None,
    add_to_report: bool,
    as_json: bool,
) -> None:
    """Score the text in FILE with MODEL: perplexity over every token but the first.

    With --against, both models read the same tokens; the second one is what KL and agreement refer
    to, so give the source of a conversion there. Both are in memory at the same time.
    """
    # Slow imports: torch.
    from moe_runtime.conversion.report import read_report
    from moe_runtime.evaluation import evaluate
    from moe_runtime.model import MoeModel

    report = read_report(Path(model)) if add_to_report else None

    text = _read_text(text_path)
    with ExitStack() as stack:
        opened = []
        for name, name_revision in ((model, revision), (against, None)):
            if name is not None:
                made = MoeModel.from_pretrained(
                    name,
                    revision=name_revision,
                    device=device,
                    backend=backend,
                    max_context=window,
                    progress=not as_json,
                )
                opened.append(stack.enter_context(made))
        ids = _token_ids(opened, text)[:max_tokens]
        with tqdm(
            total=max(len(ids) - 1, 0), desc="eval", unit="tok", disable=as_json or None
        ) as bar:
            found = evaluate(
                opened[0],
                ids,
                against=opened[1] if against else None,
                window=window,
                on_tokens=bar.update,
            )
    figures = {"against": against, "text": str(text_path), **found.as_dict()}
    if report is not None:
        _add_to_report(Path(model), *report, figures)
    if as_json:
        print_json({"model": model, **figures})
    else:
        click.echo("\n".join([model, *describe(found)]))


def _add_to_report(
    folder: Path, records: list[TensorRecord], meta: dict[str, Any], figures: dict[str, Any]
) -> None:
    """Into the report of a conversion, and into the card if it is still there."""
    # Slow imports: torch.
    from moe_runtime.conversion.card import with_evaluation
    from moe_runtime.conversion.report import write_report

    write_report(folder, records, {**meta, "evaluation": figures})
    card = folder / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(with_evaluation(text, figures), encoding="utf-8")


def describe(found: Evaluation) -> list[str]:
    """The figures in lines."""
    lines = [
        f"  tokens                    {found.tokens}",
        f"  perplexity                {found.perplexity:.4f}",
        f"  top-1 accuracy            {100 * found.accuracy:.2f} %",
    ]
    if found.kl is not None:
        assert found.reference_perplexity is not None and found.top1_agreement is not None
        lines += [
            f"  perplexity of the second  {found.reference_perplexity:.4f} "
            f"(ratio {found.perplexity / found.reference_perplexity:.4f})",
            f"  KL from the second        {found.kl:.3e} nats, at most {found.largest_kl:.3e}",
            f"  top-1 agreement           {100 * found.top1_agreement:.2f} %",
        ]
    rate = found.tokens / max(found.seconds, 1e-9)
    return [*lines, f"  time                      {found.seconds:.1f} s ({rate:.0f} tokens/s)"]


def _read_text(path: Path) -> str:
    raw = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 text") from error


def _token_ids(models: list[MoeModel], text: str) -> list[int]:
    ids = [model.tokenizer.encode(text) for model in models]
    if any(other != ids[0] for other in ids[1:]):
        raise ValueError("the tokenizers of both models differ: they cannot be compared")
    return list(ids[0])
