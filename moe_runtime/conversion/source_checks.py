"""What no conversion should carry on in silence: NaN, infinity, scales that were lost."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loaders.checkpoint import TORCH_DTYPES
from loaders.logical import LogicalTensor
from loaders.tensor_rows import RowReader
from moe_runtime.conversion.errors import refused
from moe_runtime.conversion.options import ConversionOptions
from quant.tensor import QuantTensor

_E8M0_NAN, _E4M3_NAN = 0xFF, 0x7F
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def repaired(
    weight: LogicalTensor,
    numbers: Tensor,
    matrix: int,
    start: int,
    options: ConversionOptions,
    *,
    raw: bool = False,
) -> Tensor:
    """The numbers, if all are finite; with --allow non-finite the others replaced.

    raw: `numbers` are bytes of a plain tensor from byte `start` on, and only looked at
    Raises ConversionError naming the first bad number otherwise.
    """
    dtype = TORCH_DTYPES.get(weight.dtype)
    values = numbers
    if raw:
        if dtype not in _FLOATS:
            return numbers
        values = numbers.view(dtype)
    if not values.numel() or _all_finite(values):
        return numbers
    if "non-finite" not in options.allow:
        raise refused("non-finite", _describe(weight, values, matrix, start, raw=raw))
    if raw:
        return numbers
    finite = torch.where(values.isfinite(), values, torch.zeros_like(values))
    largest = float(finite.abs().amax())
    return torch.nan_to_num(values, nan=0.0, posinf=largest, neginf=-largest)


def check_scales(weight: LogicalTensor, stored: QuantTensor, options: ConversionOptions) -> None:
    """Raise ConversionError for scales of zero over codes that are not."""
    if "zero-scales" in options.allow or stored.scales is None:
        return
    whole = stored.tensor_scale
    if whole is not None and not (whole > 0 and whole.isfinite()):
        raise refused(
            "zero-scales", f"{weight.name}: its tensor scale is {float(whole)}, never written?"
        )
    count = _unwritten(stored)
    if count:
        info = weight.parts["scales"]
        raise refused(
            "zero-scales",
            f"{info.name}: {count} scales of zero over codes that are not zero in {info.file}",
        )


def check_copied(weight: LogicalTensor, stored: QuantTensor, options: ConversionOptions) -> None:
    """The same for codes and scales that are copied, and that none of them is NaN or infinity."""
    check_scales(weight, stored, options)
    if "non-finite" in options.allow or stored.scales is None:
        return
    info = weight.parts["scales"]
    scales = stored.scales
    bad = scales == _E8M0_NAN if scales.dtype == torch.uint8 else ~scales.float().isfinite()
    if stored.format.value_bits == 8 and not bool(bad.any()):
        info = weight.parts["values"]
        bad = (stored.values.view(torch.uint8) & 0x7F) == _E4M3_NAN
    if bool(bad.any()):
        raise refused("non-finite", f"{info.name}: found NaN in {info.file}")


def check_shared_scale(
    reader: RowReader, weights: Sequence[LogicalTensor], options: ConversionOptions
) -> None:
    """Raise ConversionError when gate and up have different tensor scales."""
    scales = [reader.tensor_scale(weight) for weight in weights]
    found = [float(scale) for scale in scales if scale is not None]
    if len(set(found)) > 1 and "gate-up-scales" not in options.allow:
        raise refused(
            "gate-up-scales",
            f"{weights[0].name} and {weights[1].name} have the tensor scales {found[0]:.9g} and "
            f"{found[1]:.9g}",
        )


def _all_finite(values: Tensor) -> bool:
    low, high = torch.aminmax(values)
    return bool(low.isfinite() & high.isfinite())


def _describe(weight: LogicalTensor, values: Tensor, matrix: int, start: int, *, raw: bool) -> str:
    bad = (~values.isfinite()).flatten().nonzero()
    first = int(bad[0])
    found = float(values.flatten()[first])
    if raw:
        where = f"element {start // values.element_size() + first}"
    else:
        row, column = divmod(first, values.shape[-1])
        where = f"row {start + row}, column {column}"
        if len(weight.shape) > 2:
            where = f"expert {matrix}, {where}"
    info = weight.parts["values"]
    return f"{weight.name}: found {found} at {where} in {info.file}, {len(bad)} such numbers nearby"


def _unwritten(stored: QuantTensor) -> int:
    """Scales of zero over codes that are not zero.

    A zero byte of E8M0 is a tiny power of two, right for a block of zeros: only when every scale in
    sight is that byte was none of them written.
    """
    assert stored.scales is not None and stored.format.block is not None
    scales = stored.scales
    zero = scales == 0 if scales.dtype == torch.uint8 else scales.float() == 0
    if not bool(zero.any()) or (scales.dtype == torch.uint8 and not bool(zero.all())):
        return 0
    height, width = stored.format.block
    width = (width or stored.shape[-1]) // stored.format.values_per_byte
    codes = stored.values.view(torch.uint8)
    used = (codes & (0x77 if stored.format.value_bits == 4 else 0x7F)) != 0
    rows, columns = used.shape
    wide = zero.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    bad = wide & used
    return int(bad.any(-1).sum()) if bool(bad.any()) else 0
