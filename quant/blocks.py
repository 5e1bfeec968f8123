"""What the block encoders share: tiles, magnitudes, signed codes, the search of scales.

Every step gives the same bytes on a CPU and on a GPU: comparisons, integer operations, and single
fp32 operations rounded as IEEE 754 says. Two traps are kept out. Division by a Python number is a
multiplication by its reciprocal in torch on CUDA, so divisors are tensors of the device. Sums are
taken by halves, since a library sums in an order of its own.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from quant.formats import QuantFormat
from quant.minifloat import Grid, magnitude_codes_, nearest_
from quant.tensor import QuantTensor
from quant.tiles import Tile, as_matrices, for_each, tiles_of

SCALE_SEARCHES = ("mse",)
_INFINITY = 0x7F800000  # bits of fp32; those of NaN are greater
_MAGNITUDE = 0x7FFFFFFF

EncodeTile = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def encode_in_tiles(
    weight: Tensor, format: QuantFormat, encode: EncodeTile, tensor_scale: Tensor | None = None
) -> QuantTensor:
    """Encode [..., rows, columns] tile by tile.

    encode: (fp32 weights, their magnitudes, free to overwrite) -> (packed uint8 codes, scales),
            for [rows, columns] of whole blocks
    Raises ValueError for a weight that holds NaN or infinity, or whose columns do not fit.
    """
    height, width = _require_blocks(weight, format)
    stack = as_matrices(weight)
    if height == 1:
        stack = stack.reshape(1, -1, weight.shape[-1])
    n, rows, columns = stack.shape
    packing = format.values_per_byte
    values = weight.new_empty(n, rows, columns // packing, dtype=torch.uint8)
    block_rows, block_columns = -(-rows // height), -(-columns // width)
    scales = weight.new_empty(n, block_rows, block_columns, dtype=format.scale_dtype)

    def encode_tile(tile: Tile) -> Tensor:
        chunk = tile.of(stack).float().contiguous()
        bits = magnitude_bits(chunk)
        largest = bits.amax()
        codes, found = encode(chunk, bits.view(torch.float32))
        tile.of(values, 1, packing).copy_(codes)
        tile.of(scales, height, width).copy_(found)
        return largest

    largest = for_each(tiles_of(stack, (height, width)), encode_tile, weight.device)
    if int(torch.stack(largest).amax()) >= _INFINITY:
        raise ValueError(f"cannot encode NaN or infinity as {_title(format)}")
    lead = weight.shape[:-1] if height == 1 else (*weight.shape[:-2], block_rows)
    return QuantTensor(
        values.view(*weight.shape[:-1], values.shape[-1]).view(format.value_dtype),
        scales.view(*lead, block_columns),
        format,
        tuple(weight.shape),
        tensor_scale,
    )


def magnitude_bits(values: Tensor) -> Tensor:
    """Bits of fp32 without the sign, int32 in new memory: in the order of the magnitudes."""
    return values.view(torch.int32) & _MAGNITUDE


def largest_magnitude(*weights: Tensor) -> Tensor:
    """The largest magnitude of all weights, fp32 []; infinity or NaN if one is in them."""
    found = []
    for weight in weights:
        stack = weight.reshape(1, -1, weight.shape[-1])

        def of_tile(tile: Tile, stack: Tensor = stack) -> Tensor:
            return magnitude_bits(tile.of(stack).float().contiguous()).amax()

        found += for_each(tiles_of(stack, (1, 1)), of_tile, weight.device)
    return torch.stack([each.to(weights[0].device) for each in found]).amax().view(torch.float32)


def block_maxima(magnitudes: Tensor, group: int) -> Tensor:
    """[rows, columns] to the largest of each `group` columns, [rows, columns / group]."""
    # As integers, which vectorise; fp32 >= 0 are in the order of their bits.
    groups = magnitudes.view(torch.int32).unflatten(-1, (-1, group))
    return groups.amax(-1).view(torch.float32)


def signed_codes(values: Tensor, magnitudes: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """uint8 codes of values / scales, their sign above grid.code_bits bits.

    magnitudes: of the values, overwritten
    scales:     fp32, broadcast over the magnitudes' shape
    """
    codes = magnitude_codes_(magnitudes.div_(scales), grid).view(values.shape)
    signs = values.view(torch.int32) >> (31 - grid.code_bits)
    return codes.bitwise_or_(signs.bitwise_and_(1 << grid.code_bits)).to(torch.uint8)


def least_squares(magnitudes: Tensor, candidates: Sequence[Tensor], grid: Grid) -> Tensor:
    """Which candidate scale of each group leaves the least squared error.

    magnitudes: fp32 [..., groups, group], the group a power of two
    candidates: fp32 [..., groups] each, above zero; the first wins a tie
    returns     int64 [..., groups], a place in `candidates`
    """
    best = torch.zeros_like(candidates[0], dtype=torch.int64)
    least = torch.full_like(candidates[0], torch.inf)
    for place, scales in enumerate(candidates):
        scaled = magnitudes / scales[..., None]
        error = nearest_(scaled.clone(), grid).sub_(scaled)
        # Relative to the first scale: its square alone could leave the range of fp32.
        ratio = scales / candidates[0]
        found = _sum_by_halves(error.mul_(error)) * (ratio * ratio)
        better = found < least
        least = torch.where(better, found, least)
        best = torch.where(better, place, best)
    return best


def require_choice(name: str, value: str | None, allowed: Sequence[str]) -> None:
    """Raise ValueError unless an option is None or one of those allowed."""
    if value is not None and value not in allowed:
        raise ValueError(f"unknown {name} {value!r}, expected one of {', '.join(allowed)}")


def _sum_by_halves(values: Tensor) -> Tensor:
    while values.shape[-1] > 1:
        half = values.shape[-1] // 2
        values = values[..., :half] + values[..., half:]
    return values[..., 0]


def _require_blocks(weight: Tensor, format: QuantFormat) -> tuple[int, int]:
    """Height and width of a block; ValueError for a weight that cannot be cut into them."""
    assert format.block is not None
    height, width = format.block
    if weight.dim() < 2 or weight.numel() == 0:
        shape = tuple(weight.shape)
        raise ValueError(f"{_title(format)} needs a matrix that is not empty, got shape {shape}")
    columns = weight.shape[-1]
    if height == 1 and columns % (width or 1):
        raise ValueError(f"{_title(format)} needs columns in multiples of {width}, got {columns}")
    return height, width or columns


def _title(format: QuantFormat) -> str:
    return format.name.upper().replace("_", " ")
