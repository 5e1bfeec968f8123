"""Weights laid out for the persistent step: tiles in the order in which they are multiplied.

    dense    128 rows x 320 columns: chunks of 128 rows x 32 bytes (32 columns in FP8, 16 in bf16),
             a row's two halves of 16 bytes exchanged where bit 2 of the row is set, as the tensor
             core reads them
    experts  128 rows x 320 columns of codes (formats.py), then words of 32 bits of its rows,
             [words, 128]. A row's bias in bf16 is the upper half of a word, zero but in the first
             column of tiles

E4M3 codes of experts stand as FP8 dense weights do. A chunk of E2M1 codes, 64 columns, is [8 warps,
8 rows, 4, 4] words of 32 bits; byte e of word (w, r, c, q) holds the codes s e e m of rows 16 w + r
and 16 w + r + 8 in column 16 q + 4 c + e:

    bit   7   6   5   4   3   2   1   0
          s   E   S   e   e   m   E   M     small: row r; capital: row r + 8 (S E E M)

The words behind the codes, by what the scales are; bytes from the lowest:

    e8m0   of 32 columns: groups 0 2 4 6 | 1 3 5 7 | 8 9 bias
    e4m3   of 16 columns: 0 2 4 6 | 1 3 5 7 | 8 10 12 14 | 9 11 13 15 | 16 18 bias | 17 19 bias |
           fp32 of the row (the tensor's). Scales have five bits of exponent (23 more) and three of
           mantissa, so that none is subnormal
    fp32   fp32 of the row | fp32 of 64 columns and all rows, in rows 0 to 4 | 0 0 bias
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.persistent.formats import (
    EXPERT_TILES,
    TILE_COLUMNS,
    TILE_ROWS,
    ExpertTiles,
)
from kernels.persistent.sizes import StepSizes, cdiv
from quant.codecs import decode
from quant.e8m0 import decode_e8m0
from quant.formats import QuantFormat
from quant.tensor import QuantTensor

# Scales of a row in the order of its bytes; -1: the bias, or nothing.
_E8M0_ORDER = [0, 2, 4, 6, 1, 3, 5, 7, 8, 9, -1, -1]
_E4M3_ORDER = [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15, 16, 18, -1, -1, 17, 19, -1, -1]
_BLOCK = 64  # columns of a tile that have one fp32 scale


@dataclass(frozen=True)
class TiledExperts:
    """One half of a layer's experts in tiles: of each expert gate_up's stand before down's.

    tiles:       [E, tiles of both halves, bytes of a tile] uint8
    first_tile:  where this half begins
    shape:       [E, N, K] of the weights
    format:      of the weights
    """

    tiles: Tensor
    first_tile: int
    shape: tuple[int, ...]
    format: QuantFormat

    @property
    def facts(self) -> ExpertTiles:
        """What stands in a tile."""
        return EXPERT_TILES[self.format.name]

    @property
    def nbytes(self) -> int:
        """Bytes of this half."""
        return len(self.tiles) * tiles_of(self.shape[1], self.shape[2]) * self.facts.bytes


def tiles_of(rows: int, columns: int) -> int:
    """Tiles of an expert's matrix."""
    return cdiv(rows, TILE_ROWS) * cdiv(columns, TILE_COLUMNS)


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """[.., N, K] with zeros behind rows and columns."""
    n, k = matrix.shape[-2:]
    if (n, k) == (rows, columns):
        return matrix
    out = matrix.new_zeros((*matrix.shape[:-2], rows, columns))
    out[..., :n, :k] = matrix
    return out


def _swapped(halves: Tensor) -> Tensor:
    """[.., rows, 2, 16] with the halves of rows exchanged whose bit 2 is set; its own inverse."""
    rows = halves.unflatten(-3, (-1, 2, 4))
    return torch.stack([rows[..., 0, :, :, :], rows[..., 1, :, :, :].flip(-2)], dim=-4).flatten(
        -5, -3
    )


def pack_dense(weight: Tensor, *, by_rows: bool = False) -> Tensor:
    """Bytes [.., tiles, tile bytes] of matrices [.., N, K] of bf16 or FP8 codes.

    by_rows: blocks of rows one after the other, as the head is read; else columns of tiles
    """
    size = weight.element_size()
    *stack, rows, columns = weight.shape
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    raw = weight.contiguous().view(torch.uint8)
    raw = padded(raw, down * TILE_ROWS, across * TILE_COLUMNS * size)
    tiles = raw.view(*stack, down, TILE_ROWS, across, TILE_COLUMNS * size // 32, 2, 16)
    tiles = tiles.movedim(-5, -3)  # block, column of tiles, chunk, row, half, byte
    tiles = tiles if by_rows else tiles.transpose(-6, -5)
    return _swapped(tiles).reshape(*stack, down * across, -1)


def unpack_dense(
    tiles: Tensor, rows: int, columns: int, dtype: torch.dtype, *, by_rows: bool = False
) -> Tensor:
    """The matrices [.., rows, columns] that pack_dense was given."""
    *stack, _, _ = tiles.shape
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    order = (down, across) if by_rows else (across, down)
    halves = _swapped(tiles.reshape(*stack, *order, -1, TILE_ROWS, 2, 16))
    halves = halves if by_rows else halves.transpose(-6, -5)
    matrix = halves.movedim(-3, -5).reshape(*stack, down * TILE_ROWS, -1).view(dtype)
    return matrix[..., :rows, :columns].contiguous()


def mixed_projection(
    sizes: StepSizes, out: Tensor | QuantTensor, bias: Tensor, router: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer's output projection, and behind it rows that give the experts' logits.

    out:     [D, A] bf16, or FP8 with scales of rows
    bias:    [D] bf16
    router:  [E, D] bf16
    norm:    [D] bf16, of the norm in front of the experts
    returns  [R, A] bf16 or FP8 codes; [R] fp32 scales of FP8's rows; [R] bf16 biases

    What attention's outputs a give to the residual, out @ a + bias, gives (router * norm) @ (out @
    a + bias) to the logits: that product of matrices stands behind the padded rows of out as terms
    that add up to it, term by term, each of padded_experts rows. Two terms of bf16 hold 16 bits,
    three of E4M3, each 1/16 of the last, 12.
    """
    s = sizes
    plain = decode(out).float() if isinstance(out, QuantTensor) else out.float()
    weighted = router.float() * norm.float()
    rest, constant = weighted @ plain, weighted @ bias.float()
    rows = torch.zeros(s.mixed_blocks * TILE_ROWS, plain.shape[1], device=plain.device)
    rows = rows.to(torch.float8_e4m3fn if s.fp8 else torch.bfloat16)
    scales = torch.zeros(len(rows), device=rows.device)
    biases = torch.zeros(len(rows), dtype=torch.bfloat16, device=rows.device)
    if isinstance(out, QuantTensor):
        assert out.scales is not None
        scales[: len(plain)] = out.scales.view(-1)
    rows[: len(plain)] = out.values if isinstance(out, QuantTensor) else out
    biases[: len(plain)] = bias
    largest = rest.abs().amax(1).clamp(min=2.0**-100)
    scale = torch.exp2(torch.ceil(torch.log2(largest / 448))) if s.fp8 else torch.ones_like(largest)
    for term in range(s.router_terms):
        begin = s.out_blocks * TILE_ROWS + term * s.padded_experts
        at = slice(begin, begin + s.experts)
        rows[at] = (rest / scale[:, None]).to(rows.dtype)
        rest = rest - rows[at].float() * scale[:, None]
        biases[at] = constant.to(torch.bfloat16)
        constant = constant - biases[at].float()
        scales[at] = scale
        if s.fp8:
            scale = scale / 16
    return rows, scales, biases


def pack_experts(weight: QuantTensor, bias: Tensor) -> Tensor:
    """Bytes [E, tiles, bytes of a tile] of weights [E, N, K] in a format of EXPERT_TILES.

    bias: [E, N] bf16
    """
    facts = EXPERT_TILES[weight.format.name]
    experts, rows, columns = weight.shape
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    values, scales = weight.values.view(torch.uint8), weight.scales
    assert scales is not None
    words = values.new_zeros((experts, across, down, facts.words, TILE_ROWS, 4))
    if facts.scales == "fp32":
        _fill_fp32_words(words, scales, weight.format)
    else:
        scales = scales.view(torch.uint8)
        if facts.scales == "e4m3":
            values, scales = _without_zero_and_sign(values, scales)
            scales = _WIDER.to(scales.device)[scales.int()]
            assert weight.tensor_scale is not None
            words[..., -1, :, :] = weight.tensor_scale.float().view(1).view(torch.uint8)
        _fill_byte_words(words, scales, _order_of(facts))
    bias = padded(bias[:, None], 1, down * TILE_ROWS).view(experts, down, 1, TILE_ROWS, 1)
    words[:, 0, :, facts.bias_words, :, 2:] = bias.contiguous().view(torch.uint8)
    out = values.new_zeros((experts, across * down, facts.bytes))
    codes = _packed_e2m1(values, across, down) if facts.bits == 4 else pack_dense(values)
    out[..., : facts.code_bytes] = codes
    out[..., facts.code_bytes :] = words.reshape(experts, across * down, -1)
    return out


def unpack_experts(
    tiles: Tensor, format: QuantFormat, rows: int, columns: int
) -> tuple[QuantTensor, Tensor]:
    """Weights and biases that pack_experts was given.

    Scales of NVFP4 that were zero or negative come back positive, the codes as zero or negated.
    """
    facts = EXPERT_TILES[format.name]
    experts = len(tiles)
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    codes = tiles[..., : facts.code_bytes]
    if facts.bits == 4:
        values = _unpacked_e2m1(codes.reshape(experts, across, down, -1))
        values = values[:, :rows, : columns // 2].contiguous()
    else:
        values = unpack_dense(codes, rows, columns, format.value_dtype)
    words = tiles[..., facts.code_bytes :].reshape(experts, across, down, facts.words, TILE_ROWS, 4)
    bias = words[:, 0, :, facts.bias_words.start, :, 2:].contiguous().view(torch.bfloat16)
    whole = None
    if facts.scales == "fp32":
        scales = _fp32_scales(words, format, rows, columns)
    else:
        groups = columns // facts.scale_columns
        scales = _byte_scales(words, _order_of(facts))[:, :rows, :groups].contiguous()
        if facts.scales == "e4m3":
            narrower = torch.zeros(256, dtype=torch.uint8, device=tiles.device)
            narrower[_WIDER.to(tiles.device).int()] = torch.arange(
                len(_WIDER), dtype=torch.uint8, device=tiles.device
            )
            scales = narrower[scales.int()].view(torch.float8_e4m3fn)
            whole = words[0, 0, 0, -1, 0].contiguous().view(torch.float32)[0]
    weight = QuantTensor(values, scales, format, (experts, rows, columns), whole)
    return weight, bias.reshape(experts, -1)[:, :rows].contiguous()


def _packed_e2m1(values: Tensor, across: int, down: int) -> Tensor:
    """[E, tiles, bytes] of nibbles [E, N, K / 2]."""
    values = padded(values, down * TILE_ROWS, across * TILE_COLUMNS // 2)
    codes = torch.stack([values & 15, values >> 4], dim=-1)
    # expert, block, warp, row + 8, row, column of tiles, chunk, q, c, e
    codes = codes.view(len(values), down, TILE_ROWS // 16, 2, 8, across, -1, 4, 4, 4)
    a, b = codes.unbind(3)
    packed = ((a & 8) << 4) | ((a & 7) << 2) | ((b & 8) << 2) | ((b & 4) << 4) | (b & 3)
    del codes, a, b
    # expert, block, warp, row, tile column, chunk, q, c, e -> .. chunk, warp, row, c, q, e
    packed = packed.permute(0, 4, 1, 5, 2, 3, 7, 6, 8)
    return packed.reshape(len(values), across * down, -1)


def _unpacked_e2m1(tiles: Tensor) -> Tensor:
    """Nibbles of codes [E, across, down, bytes], of all padded rows and columns."""
    experts, across, down, _ = tiles.shape
    bytes_ = tiles.view(experts, across, down, -1, TILE_ROWS // 16, 8, 4, 4, 4)
    a = ((bytes_ >> 4) & 8) | ((bytes_ >> 2) & 7)
    b = ((bytes_ >> 2) & 8) | ((bytes_ >> 4) & 4) | (bytes_ & 3)
    codes = torch.stack([a, b], dim=5)  # expert, column, block, chunk, warp, row + 8, row, c, q, e
    codes = codes.permute(0, 2, 4, 5, 6, 1, 3, 8, 7, 9).reshape(experts, down * TILE_ROWS, -1, 2)
    return codes[..., 0] | (codes[..., 1] << 4)


def _order_of(facts: ExpertTiles) -> list[int]:
    return _E4M3_ORDER if facts.scales == "e4m3" else _E8M0_ORDER


def _fill_byte_words(words: Tensor, scales: Tensor, order: list[int]) -> None:
    """Put bytes [E, N, groups] where `order` says; others of those words are left at zero."""
    experts, across, down = words.shape[:3]
    groups = max(order) + 1
    scales = padded(scales, down * TILE_ROWS, across * groups)
    scales = scales.view(experts, down, TILE_ROWS, across, groups).permute(0, 3, 1, 2, 4)
    for at, group in enumerate(order):
        if group >= 0:
            words[..., at // 4, :, at % 4] = scales[..., group]


def _byte_scales(words: Tensor, order: list[int]) -> Tensor:
    """Bytes [E, N, groups] of all padded rows and columns."""
    places = [order.index(group) for group in range(max(order) + 1)]
    scales = torch.stack([words[..., at // 4, :, at % 4] for at in places], dim=-1)
    return scales.permute(0, 2, 3, 1, 4).reshape(len(words), words.shape[2] * TILE_ROWS, -1)


def _fill_fp32_words(words: Tensor, scales: Tensor, format: QuantFormat) -> None:
    """Scales of rows or of 128 x 128 blocks."""
    experts, across, down = words.shape[:3]
    numbers = words.view(torch.float32)[..., 0]  # [E, across, down, words, 128]
    blocks = TILE_COLUMNS // _BLOCK
    scales = scales.float() if scales.dtype == torch.float32 else decode_e8m0(scales)
    if format.block == (1, 0):
        rows = padded(scales.view(experts, 1, -1), 1, down * TILE_ROWS)
        numbers[..., 0, :] = rows.view(experts, 1, down, TILE_ROWS)
        numbers[..., 1, :blocks] = 1.0
        return
    numbers[..., 0, :] = 1.0
    scales = padded(scales.repeat_interleave(2, -1)[..., : across * blocks], down, across * blocks)
    numbers[..., 1, :blocks] = scales.view(experts, down, across, blocks).transpose(1, 2)


def _fp32_scales(words: Tensor, format: QuantFormat, rows: int, columns: int) -> Tensor:
    """What _fill_fp32_words was given."""
    assert format.block is not None and format.scale_dtype is not None
    experts = len(words)
    numbers = words.contiguous().view(torch.float32)[..., 0]
    if format.block == (1, 0):
        return numbers[:, 0, :, 0].reshape(experts, -1, 1)[:, :rows].contiguous()
    scales = numbers[..., 1, : TILE_COLUMNS // _BLOCK].transpose(1, 2)
    height, width = format.block
    scales = scales.reshape(experts, scales.shape[1], -1)[..., :: width // _BLOCK]
    scales = scales[:, : cdiv(rows, height), : cdiv(columns, width)].contiguous()
    if format.scale_dtype == torch.float32:
        return scales
    return (scales.view(torch.int32) >> 23).to(torch.uint8)


def _wider() -> Tensor:
    """E4M3 bytes without a sign as five bits of exponent and three of mantissa; NaN, the last, is
    not loaded."""
    code = torch.arange(127, dtype=torch.uint8)
    bits = code.view(torch.float8_e4m3fn).float().view(torch.int32)
    wider = (bits >> 20) - ((127 - 23) << 3)
    return torch.where(code == 0, 0, wider).to(torch.uint8)


_WIDER = _wider()


def _without_zero_and_sign(values: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Codes whose E4M3 scale is zero as zeros, those whose scale is negative negated."""
    groups = values.unflatten(-1, (-1, 8))
    flip = torch.where(scales >= 128, 0x88, 0).to(torch.uint8)[..., None]
    keep = torch.where((scales & 127) == 0, 0, 255).to(torch.uint8)[..., None]
    return ((groups ^ flip) & keep).flatten(-2), scales & 127
