"""What the numbers of a weight say about it, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loaders.logical import LogicalTensor
from moe_runtime.verification.result import Finding
from quant.blocks import magnitude_bits
from quant.quality import scale_values
from quant.tensor import QuantTensor

_INFINITY = 0x7F800000  # bits of fp32; those of NaN are greater
_NAN_CODE = 0x7F  # of E4M3
# Fewer scales than this may be equal by chance.
_MANY_SCALES = 64


@dataclass(frozen=True)
class Facts:
    """What was seen in some rows of a weight."""

    bad: str = ""  # where the first NaN or infinity is
    bad_scales: int = 0  # NaN, infinite or below zero
    zero_scales: int = 0  # of zero
    unwritten: int = 0  # of them, those over codes that are not zero
    scales: int = 0
    # Bits of the smallest and largest number of a plain weight, or byte or number of its scales.
    lowest: float = torch.inf
    highest: float = -torch.inf
    any_nonzero: bool = False


def look_at(piece: Tensor | QuantTensor, where: str) -> Facts:
    """Facts of some rows: numbers [rows, columns] or a vector, or their stored form.

    where: what to call the place in a message
    """
    return _look_at_codes(piece, where) if isinstance(piece, QuantTensor) else _look(piece, where)


def merge_facts(parts: Iterable[Facts]) -> Facts:
    """The facts of a whole weight."""
    parts = list(parts)
    return Facts(
        bad=next((part.bad for part in parts if part.bad), ""),
        bad_scales=sum(part.bad_scales for part in parts),
        zero_scales=sum(part.zero_scales for part in parts),
        unwritten=sum(part.unwritten for part in parts),
        scales=sum(part.scales for part in parts),
        lowest=min(part.lowest for part in parts),
        highest=max(part.highest for part in parts),
        any_nonzero=any(part.any_nonzero for part in parts),
    )


def judge(weight: LogicalTensor, facts: Facts) -> Iterator[Finding]:
    """What is wrong with a weight."""
    if facts.bad:
        yield Finding("numbers", f"found {facts.bad}", weight.name)
    if facts.bad_scales:
        message = f"{facts.bad_scales} of {facts.scales} scales are NaN, infinite or negative"
        yield Finding("scales", message, weight.name)
    # Byte 0 of E8M0 is a power of two, and right for blocks of zeros; for all blocks it is not.
    never = weight.format is not None and facts.highest == 0 and facts.any_nonzero
    unwritten = facts.scales if never else facts.unwritten
    if unwritten:
        message = f"{unwritten} of {facts.scales} scales are zero over codes that are not zero"
        yield Finding("scales", message, weight.name)
    elif (
        _stored_scales(weight) >= _MANY_SCALES
        and facts.lowest == facts.highest
        and facts.any_nonzero
    ):
        message = f"all {facts.scales} scales are the same: were they ever written?"
        yield Finding("scales", message, weight.name, is_error=False)
    if not facts.any_nonzero and len(weight.shape) > 1 and not facts.bad:
        yield Finding("numbers", "every number is zero", weight.name, is_error=False)


def _stored_scales(weight: LogicalTensor) -> int:
    """One may stand for all rows."""
    return math.prod(weight.parts["scales"].shape) if weight.format is not None else 0


def _look(numbers: Tensor, where: str) -> Facts:
    if not numbers.is_floating_point() or not numbers.numel():
        return Facts(any_nonzero=True)
    bits = magnitude_bits(numbers.float().contiguous())
    largest = int(bits.amax())
    bad = _first_bad(numbers, where) if largest >= _INFINITY else ""
    return Facts(bad=bad, any_nonzero=largest > 0)


def _look_at_codes(stored: QuantTensor, where: str) -> Facts:
    assert stored.scales is not None
    codes = stored.values.view(torch.uint8)
    largest = int((codes & (0x77 if stored.format.value_bits == 4 else 0x7F)).amax())
    bad = ""
    if stored.format.value_bits == 8 and largest == _NAN_CODE:
        bad = _first_bad(stored.values.float(), where)
    factors = scale_values(stored).contiguous()
    bits = factors.view(torch.int32)
    # As integers every negative number is below zero, and NaN above infinity.
    bad_scales = int(((bits >= _INFINITY) | (bits < 0)).sum())
    zeros = factors == 0
    zero_scales = int(zeros.sum())
    raw = stored.scales.float()
    return Facts(
        bad=bad,
        bad_scales=bad_scales,
        zero_scales=zero_scales,
        unwritten=_unwritten(stored, zeros) if zero_scales else 0,
        scales=factors.numel(),
        lowest=float(raw.amin()),
        highest=float(raw.amax()),
        any_nonzero=largest > 0,
    )


def _unwritten(stored: QuantTensor, zeros: Tensor) -> int:
    """Scales of zero over codes that are not zero."""
    assert stored.format.block is not None
    height, width = stored.format.block
    width = (width or stored.shape[-1]) // stored.format.values_per_byte
    codes = stored.values.view(torch.uint8)
    used = (codes & (0x77 if stored.format.value_bits == 4 else 0x7F)) != 0
    rows, columns = used.shape
    padded = torch.nn.functional.pad(used, (0, -columns % width, 0, -rows % height))
    blocks = padded.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))
    return int((blocks.any(-1).any(-2) & zeros).sum())


def _first_bad(numbers: Tensor, where: str) -> str:
    bad = (~numbers.isfinite()).nonzero()
    place = ", ".join(map(str, bad[0].tolist()))
    found = float(numbers[tuple(bad[0])])
    more = f", and {len(bad) - 1} more nearby" if len(bad) > 1 else ""
    return f"{found} at {where}[{place}]{more}"
