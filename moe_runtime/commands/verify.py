"""`moe-runtime verify`: whether a checkpoint is what it says it is, and what it lost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from tqdm import tqdm

from moe_runtime.bundled import BUNDLED
from moe_runtime.commands.common import json_option, print_json, verb

if TYPE_CHECKING:
    from moe_runtime.verification.result import Verification

_MOST_FINDINGS = 20


@verb(
    "verify",
    examples="""
    moe-runtime verify ./model-mxfp4
    moe-runtime verify ./model-mxfp4 --against ./model
    moe-runtime verify ./model-mxfp4 --against org/model --json
    """,
)
@click.argument("folder", metavar="DIR")
@click.option("--against", metavar="MODEL", help="The source: a folder or a hub id.")
@json_option
def command(folder: str, against: str | None, as_json: bool) -> int:
    """Re-read the checkpoint in DIR: every tensor accounted for, shapes, numbers and scales sound.

    With --against, every weight is compared with the source's: copied ones bit for bit, converted
    ones by their signal to noise ratio. Reads any checkpoint in a format that this version reads.
    Exit status 1 if something is wrong.
    """
    # Slow imports: torch and huggingface_hub.
    from loaders.hub import resolve
    from moe_runtime.verification.verify import verify

    source = resolve(against, progress=not as_json, bundled=BUNDLED) if against else None
    with tqdm(desc="verify", unit="B", unit_scale=True, disable=as_json or None) as bar:
        found = verify(BUNDLED.get(folder, Path(folder)), source, on_total=bar.reset,
                       on_bytes=bar.update)  # fmt: skip
    if as_json:
        print_json({"folder": folder, "against": against, **found.as_dict()})
    else:
        click.echo("\n".join([folder, *describe(found)]))
    return 0 if found.sound else 1


def describe(found: Verification) -> list[str]:
    """The result in lines."""
    lines = _table(found) if found.tensors else []
    shown = sorted(found.findings, key=lambda finding: not finding.is_error)[:_MOST_FINDINGS]
    for finding in shown:
        word = "error" if finding.is_error else "warning"
        name = f"{finding.tensor} " if finding.tensor else ""
        lines.append(f"  {word}: {finding.check}: {name}{finding.message}")
    more = len(found.findings) - len(shown)
    lines += [f"  and {more} more: see --json"] if more > 0 else []
    errors = sum(finding.is_error for finding in found.findings)
    verdict = "sound" if found.sound else f"not sound: {errors} error{'s' if errors > 1 else ''}"
    rate = found.bytes_read / max(found.seconds, 1e-9) / 1e6
    size = f"{found.bytes_read / 1e6:.1f} MB in {found.seconds:.1f} s ({rate:.0f} MB/s)"
    return [*lines, f"  {verdict}; {len(found.tensors)} weights, read {size}"]


def _table(found: Verification) -> list[str]:
    # Slow import: torch.
    from moe_runtime.verification.result import summary

    rows = [("", "weights", "MB", "equal", "SQNR dB", "clipped")]
    for name, group in found.components().items():
        part = summary(group)
        equal = str(part["equal"]) if found.compared else "-"
        rows.append((name, str(part["tensors"]), f"{part['bytes'] / 1e6:.1f}", equal,
                     *_quality(part["quality"])))  # fmt: skip
    return [f"  {a:36}{b:>8}{c:>11}{d:>8}{e:>9}{f:>10}".rstrip() for a, b, c, d, e, f in rows]


def _quality(quality: dict[str, Any] | None) -> tuple[str, str]:
    if quality is None:
        return "-", "-"
    found = quality["sqnr_db"]
    shown = "exact" if found is None else f"{found:.2f}"
    return shown, f"{100 * quality['saturated_share']:.2f} %"
