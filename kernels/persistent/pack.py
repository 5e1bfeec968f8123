"""Weights laid out for the persistent step: tiles in the order in which they are multiplied.

    dense    128 rows x 320 columns: chunks of 128 rows x 32 bytes (32 columns in FP8, 16 in bf16),
             a row's two halves of 16 bytes exchanged where bit 2 of the row is set, as the tensor
             core reads them
    experts  128 rows x 320 columns: 5 chunks of 128 rows x 64 columns in E2M1, then 3 x 128 words
             of scales: groups 0, 2, 4, 6 of 32 columns, then 1, 3, 5, 7, then 8 and 9. Above these
             two is the row's bias in bf16, zero but in the first column of tiles

A chunk of an expert is [8 warps, 8 rows, 4, 4] words of 32 bits; byte e of word (w, r, c, q) holds
the codes s e e m of rows 16 w + r and 16 w + r + 8 in column 16 q + 4 c + e:

    bit   7   6   5   4   3   2   1   0
          s   E   S   e   e   m   E   M     small: row r; capital: row r + 8 (S E E M)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.persistent.sizes import (
    CHUNK_BYTES,
    PIECE_CHUNKS,
    SCALE_WORDS,
    TILE_COLUMNS,
    TILE_ROWS,
    cdiv,
)

_TILE_CODES = PIECE_CHUNKS * CHUNK_BYTES
_GROUP_ORDER = [0, 2, 4, 6, 1, 3, 5, 7, 8, 9]  # of the scales of a row
EXPERT_TILE_BYTES = _TILE_CODES + SCALE_WORDS * TILE_ROWS * 4


@dataclass(frozen=True)
class TiledExperts:
    """One half of a layer's experts in tiles: of each expert gate_up's stand before down's.

    tiles:       [E, tiles of both halves, EXPERT_TILE_BYTES] uint8
    first_tile:  where this half begins
    shape:       [E, N, K] of the weights
    """

    tiles: Tensor
    first_tile: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of this half."""
        return len(self.tiles) * tiles_of(self.shape[1], self.shape[2]) * EXPERT_TILE_BYTES


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
    """Bytes [tiles, tile bytes] of a matrix [N, K] of bf16 or FP8 codes.

    by_rows: blocks of rows one after the other, as the head is read; else columns of tiles
    """
    size = weight.element_size()
    columns, blocks = cdiv(weight.shape[1], TILE_COLUMNS), cdiv(weight.shape[0], TILE_ROWS)
    raw = weight.contiguous().view(torch.uint8)
    raw = padded(raw, blocks * TILE_ROWS, columns * TILE_COLUMNS * size)
    tiles = raw.view(blocks, TILE_ROWS, columns, TILE_COLUMNS * size // 32, 2, 16)
    tiles = tiles.permute(0, 2, 3, 1, 4, 5) if by_rows else tiles.permute(2, 0, 3, 1, 4, 5)
    return _swapped(tiles).reshape(blocks * columns, -1)


def unpack_dense(
    tiles: Tensor, rows: int, columns: int, dtype: torch.dtype, *, by_rows: bool = False
) -> Tensor:
    """The matrix [rows, columns] that pack_dense was given."""
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    halves = _swapped(
        tiles.view(*((down, across) if by_rows else (across, down)), -1, TILE_ROWS, 2, 16)
    )
    halves = halves.permute(0, 3, 1, 2, 4, 5) if by_rows else halves.permute(1, 3, 0, 2, 4, 5)
    matrix = halves.reshape(down * TILE_ROWS, -1).view(dtype)
    return matrix[:rows, :columns].contiguous()


def pack_experts(values: Tensor, scales: Tensor, bias: Tensor) -> Tensor:
    """Bytes [E, tiles, EXPERT_TILE_BYTES] of MXFP4 weights.

    values:  [E, N, K / 2] uint8, low nibble first
    scales:  [E, N, K / 32] uint8 E8M0
    bias:    [E, N] bf16
    """
    experts, rows, half = values.shape
    columns, blocks = cdiv(2 * half, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    values = padded(values, blocks * TILE_ROWS, columns * TILE_COLUMNS // 2)
    codes = torch.stack([values & 15, values >> 4], dim=-1)
    # expert, block, warp, row + 8, row, column of tiles, chunk, q, c, e
    codes = codes.view(experts, blocks, TILE_ROWS // 16, 2, 8, columns, PIECE_CHUNKS, 4, 4, 4)
    a, b = codes.unbind(3)
    packed = ((a & 8) << 4) | ((a & 7) << 2) | ((b & 8) << 2) | ((b & 4) << 4) | (b & 3)
    del codes, a, b
    # expert, block, warp, row, tile column, chunk, q, c, e -> .. chunk, warp, row, c, q, e
    packed = packed.permute(0, 4, 1, 5, 2, 3, 7, 6, 8).reshape(experts, columns * blocks, -1)
    out = torch.zeros(
        (experts, columns * blocks, EXPERT_TILE_BYTES), dtype=torch.uint8, device=values.device
    )
    out[..., :_TILE_CODES] = packed
    groups = TILE_COLUMNS // 32
    scales = padded(scales, blocks * TILE_ROWS, columns * groups)
    scales = scales.view(experts, blocks, TILE_ROWS, columns, groups).permute(0, 3, 1, 2, 4)
    words = padded(scales[..., _GROUP_ORDER], TILE_ROWS, SCALE_WORDS * 4)
    words = words.unflatten(-1, (SCALE_WORDS, 4))
    words = words.movedim(-2, -3).contiguous()  # expert, column, block, word, row, byte
    bias = padded(bias[:, None], 1, blocks * TILE_ROWS).view(experts, blocks, TILE_ROWS, 1)
    words[:, 0, :, -1, :, 2:] = bias.view(torch.uint8)
    out[..., _TILE_CODES:] = words.reshape(experts, columns * blocks, -1)
    return out


def unpack_experts(tiles: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales and biases that pack_experts was given."""
    experts = tiles.shape[0]
    across, down = cdiv(columns, TILE_COLUMNS), cdiv(rows, TILE_ROWS)
    bytes_ = tiles[..., :_TILE_CODES].reshape(
        experts, across, down, PIECE_CHUNKS, TILE_ROWS // 16, 8, 4, 4, 4
    )
    a = ((bytes_ >> 4) & 8) | ((bytes_ >> 2) & 7)
    b = ((bytes_ >> 2) & 8) | ((bytes_ >> 4) & 4) | (bytes_ & 3)
    codes = torch.stack([a, b], dim=5)  # expert, column, block, chunk, warp, row + 8, row, c, q, e
    codes = codes.permute(0, 2, 4, 5, 6, 1, 3, 8, 7, 9).reshape(experts, down * TILE_ROWS, -1, 2)
    values = (codes[..., 0] | (codes[..., 1] << 4))[:, :rows, : columns // 2]
    words = tiles[..., _TILE_CODES:].reshape(experts, across, down, SCALE_WORDS, TILE_ROWS, 4)
    bias = words[:, 0, :, -1, :, 2:].contiguous().view(torch.bfloat16).reshape(experts, -1)
    places = [_GROUP_ORDER.index(group) for group in range(TILE_COLUMNS // 32)]
    scales = words.movedim(3, 4).flatten(-2)[..., places]
    scales = scales.permute(0, 2, 3, 1, 4).reshape(experts, down * TILE_ROWS, -1)
    scales = scales[:, :rows, : columns // 32]
    return values.contiguous(), scales.contiguous(), bias[:, :rows].contiguous()
