"""`moe-runtime inspect`: what a checkpoint holds and what this version can do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from moe_runtime.commands.common import (
    json_option,
    model_argument,
    print_json,
    revision_option,
    verb,
)
from moe_runtime.commands.headers import open_headers

if TYPE_CHECKING:
    from loaders.safetensors_header import TensorInfo
    from moe_runtime.inspection import Inspection

_MOST_SPECIAL_TOKENS = 12


@verb(
    "inspect",
    examples="""
    moe-runtime inspect demo
    moe-runtime inspect openai/gpt-oss-120b
    moe-runtime inspect ./checkpoint --tensors
    moe-runtime inspect openai/gpt-oss-20b --json
    """,
)
@model_argument
@revision_option
@click.option("--tensors", "list_tensors", is_flag=True, help="List every tensor too.")
@json_option
def command(model: str, revision: str | None, list_tensors: bool, as_json: bool) -> int:
    """Show what the checkpoint MODEL holds, by its headers: no weight is read or downloaded.

    Exit status 0 if it is sound, whether or not this version can run it.
    """
    # Slow import: torch.
    from moe_runtime.inspection import inspect_checkpoint

    with open_headers(model, revision) as checkpoint:
        found = inspect_checkpoint(checkpoint)
        tensors = list(checkpoint.tensors.values()) if list_tensors else []
    if as_json:
        listed = {"tensors": [_tensor_entry(info) for info in tensors]} if list_tensors else {}
        print_json({"model": model, **found.as_dict(), **listed})
    else:
        lines = [f"{model}", *describe(found)]
        click.echo("\n".join(lines + [_tensor_line(info) for info in tensors]))
    return 0 if found.sound else 1


def describe(found: Inspection) -> list[str]:
    """The report in lines."""
    sizes = found.sizes
    lines = [
        f"  architecture  {found.architecture}, {found.layout} layout"
        + (f", quantization {found.quantization}" if found.quantization else ""),
        f"  sizes         {', '.join(f'{word} {size}' for word, size in _words(sizes))}",
        f"  context       {sizes.get('context', 'unknown')} tokens",
        f"  parameters    {_count(found.parameters)}"
        + (f", {_count(found.active_parameters)} for a token" if found.active_parameters else ""),
        f"  tokenizer     {_tokenizer(found)}",
        "",
        *_component_table(found),
        "",
    ]
    if found.problem:
        state = "not supported" if found.sound else "not sound"
        lines.append(f"  {state}: {found.problem}")
        return lines + ([f"  {found.hint}"] if found.hint else [])
    lines += [f"  backend {name}: {needs}" for name, needs in found.backends.items()]
    if found.memory_bytes:
        lines.append(
            f"  takes {_size(found.memory_bytes)} of GPU memory with the whole context; "
            f"the cache grows by {found.cache_bytes_per_token} bytes a token"
        )
    return lines


def _words(sizes: dict[str, int]) -> list[tuple[str, int]]:
    return [(word.replace("_", " "), n) for word, n in sizes.items() if word != "context"]


def _component_table(found: Inspection) -> list[str]:
    read = found.bytes_per_token or {}
    rows = [("", "tensors", "bytes", "read a token", "formats")]
    for part in found.components:
        formats = ", ".join(f"{name} {_size(size)}" for name, size in part.formats.items())
        seen = _size(read[part.name]) if part.name in read else "-"
        rows.append((part.name, str(part.tensors), _size(part.nbytes), seen, formats))
    total = sum(read.values())
    files = f"in {found.files} file{'s' if found.files > 1 else ''}"
    seen = _size(total) if total else "-"
    rows.append(("total", str(found.num_tensors), _size(found.total_bytes), seen, files))
    width = max(14, *(len(row[0]) + 1 for row in rows))
    return [f"  {a:{width}}{b:>8}{c:>12}{d:>14}  {e}".rstrip() for a, b, c, d, e in rows]


def _tokenizer(found: Inspection) -> str:
    tokenizer = found.tokenizer
    if tokenizer.problem:
        return tokenizer.problem
    if not tokenizer.present:
        return "none"
    ids = f"{tokenizer.num_ids} ids" if tokenizer.num_ids else "tokenizer.json not fetched"
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    if tokenizer.chat_code and not tokenizer.chat_template:
        template += " but code for chats"
    special = tokenizer.special_tokens
    named = " ".join(special[:_MOST_SPECIAL_TOKENS])
    more = len(special) - _MOST_SPECIAL_TOKENS
    rest = f" and {more} more" if more > 0 else ""
    return f"{ids}, {template}, {len(special)} special tokens: {named}{rest}".rstrip(": ")


def _tensor_entry(info: TensorInfo) -> dict[str, object]:
    return {
        "name": info.name,
        "dtype": info.dtype,
        "shape": list(info.shape),
        "file": info.file,
        "nbytes": info.nbytes,
    }


def _tensor_line(info: TensorInfo) -> str:
    shape = "x".join(map(str, info.shape)) or "scalar"
    return f"  {info.name}  {info.dtype} {shape}  {info.nbytes} bytes  {info.file}"


def _count(number: int) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return str(number)


def _size(nbytes: int) -> str:
    """Bytes with a unit that leaves digits to read."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
