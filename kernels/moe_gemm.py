"""The routed experts of many tokens: a grouped GEMM that decodes weights on the way in.

One kernel for every format of kernels/weight_formats.py. Weights stay in the published order; a
tile is decoded to bf16 exactly, with the scales of groups in a row (kernels/weight_tiles.py).
Scales of 128x128 blocks multiply the fp32 sums of each step, scales of rows and of whole tensors
the sums at the end.

Experts in the tiles of the persistent step (kernels/persistent/pack.py) are read as they lie, 64
columns of a tile in a step. With 4 bits these are a chunk, whose rows and columns stand in the
order of the words: the columns of x are put into that order before (in_chunk_order), so that they
are read in whole pieces.

T tokens, D model width, F expert width, E experts, K experts per token; in the kernel N and K are
the rows and columns of the weight, M a block of (token, slot) pairs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe_routing import Routing
from kernels.persistent.formats import TILE_COLUMNS, TILE_ROWS
from kernels.persistent.pack import TiledExperts
from kernels.swiglu import Swiglu, swiglu
from kernels.weight_formats import (
    as_words,
    codes_of,
    decode_scale,
    scale_block,
    scale_bytes,
    scales_of,
)
from kernels.weight_tiles import (
    decode_chunk,
    decode_tile,
    load_chunk,
    load_step,
    row_factor,
    step_factor,
)
from quant.tensor import QuantTensor

STEP_COLUMNS = 64  # of a tile: a chunk of 4 bits, two of 8


@dataclass(frozen=True)
class Tile:
    """How a program's share is cut: BLOCK_M comes from the routing."""

    block_n: int  # rows of weight
    block_k: int  # columns in one step
    num_warps: int
    num_stages: int  # steps in flight


# For each number of pairs in a block. Measured on an H100 with 8,192 pairs of gpt-oss-20b: 966 and
# 560 us a layer; wider and deeper tiles were slower, weights as the left operand too.
TILES = {
    16: Tile(64, 64, 4, 3),
    64: Tile(128, 64, 4, 3),
    128: Tile(128, 64, 8, 3),
}
# Of experts in tiles. Measured on an H100 with 128, 512 and 2,048 tokens of gpt-oss-20b and 120b:
# both halves of a layer take 398, 649 and 1,693 us, and 1,358 (128 tokens) and 2,399; blocks of 16
# and 32 pairs, four warps, other numbers of stages were slower (docs/performance.md).
TILES_OF_TILES = {
    64: Tile(TILE_ROWS, STEP_COLUMNS, 8, 3),
    128: Tile(TILE_ROWS, STEP_COLUMNS, 8, 2),
}


@triton.jit
def chunk_rows(ROWS: tl.constexpr):
    """Row numbers of a chunk in the order in which it is decoded: r, r + 8, r + 1, r + 9, .."""
    i = tl.arange(0, ROWS)
    return i // 16 * 16 + i % 2 * 8 + i // 2 % 8


@triton.jit
def place_in_chunks(k):
    """Where in_chunk_order puts column k."""
    return k // 64 * 64 + k // 4 % 4 * 16 + k // 16 % 4 * 4 + k % 4


@triton.jit
def _moe_gemm_block(
    expert,
    x_ptr,
    weights_ptr,
    scales_ptr,
    tensor_scale_ptr,
    bias_ptr,
    block_rows_ptr,
    expert_weights_ptr,
    out_ptr,
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    TILED: tl.constexpr,
    TILES_PER_EXPERT: tl.constexpr,
    FIRST_TILE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEPS: tl.constexpr,
    OUT_STRIDE: tl.constexpr,
    SWIGLU: tl.constexpr,
    GATE_STEP: tl.constexpr,
    TO_UP: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pairs by BLOCK_N weight rows of an expert; the kernel's arguments, block_rows_ptr of
    this block."""
    # Groups in a row are shorter than a step; blocks are not; a scale of a row is for all steps.
    # fp32 scales do not fit the weights' 16 bits: of a row shorter than a step they scale its sum.
    # fp32 scales in tiles are both: of 64 columns, which are a step, and of a row.
    IN_CHUNKS: tl.constexpr = TILED and CODES == "e2m1"
    IN_TILE: tl.constexpr = SCALES != "none" and SCALE_COLUMNS < BLOCK_K
    GROUP: tl.constexpr = SCALE_COLUMNS if IN_TILE and SCALES != "fp32" else 0
    PER_ROW: tl.constexpr = SCALES != "none" and SCALE_COLUMNS >= K and GROUP == 0 and not TILED
    tl.static_assert(GROUP > 0 or PER_ROW or not IN_TILE, "blocks of fp32 scales within a step")
    PER_STEP: tl.constexpr = SCALES != "none" and GROUP == 0 and not PER_ROW
    pair = tl.load(block_rows_ptr + tl.arange(0, BLOCK_M))
    working = pair < pairs
    x_row = (pair // PAIRS_PER_ROW).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    if SWIGLU:  # gate and up in turn; none for activations that there are not
        n = tl.where(n < N, n // 2 * GATE_STEP + n % 2 * TO_UP, N)
    row = expert * N + n
    if IN_CHUNKS:
        n = tl.program_id(1) * BLOCK_N + chunk_rows(BLOCK_N)
        row = expert * N + n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    first_tile = (expert * TILES_PER_EXPERT + FIRST_TILE + tl.program_id(1)) * TILE_BYTES
    tile = first_tile
    chunk = tl.program_id(1) * 0
    x_rows = x_ptr + x_row[:, None] * X_STRIDE
    if IN_CHUNKS:
        words, first, second = load_chunk(weights_ptr + tile, chunk, SCALES, BLOCK_N, STEPS)
        k = tl.arange(0, BLOCK_K)
        x_next = tl.load(x_rows + k[None, :], mask=working[:, None], other=0.0)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = working[:, None] & (k < K)[None, :]
        if IN_CHUNKS:
            # Loads of the next chunk are under way while this one is decoded and multiplied.
            # Behind a tile's last one comes the same rows' tile of the next columns.
            is_last = chunk == STEPS - 1
            tile += tl.where(is_last, (N + BLOCK_N - 1) // BLOCK_N * TILE_BYTES, 0)
            next_chunk = tl.where(is_last, 0, chunk + 1)
            more = k0 + BLOCK_K < K  # else any tile
            next_words, next_first, next_second = load_chunk(
                weights_ptr + tl.where(more, tile, 0), next_chunk, SCALES, BLOCK_N, STEPS
            )
            x = x_next
            x_next = tl.load(
                x_rows + (k + BLOCK_K)[None, :], mask=working[:, None] & more, other=0.0
            )
            w = decode_chunk(words, first, second, chunk, x.dtype, SCALES, BLOCK_N, STEPS)
            words, first, second, chunk = next_words, next_first, next_second, next_chunk
        elif TILED:
            x = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
            step = k0 // BLOCK_K
            down: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
            tile = first_tile + step // STEPS * (down * TILE_BYTES)
            words, stored = load_step(weights_ptr + tile, step % STEPS, BLOCK_N, STEPS)
            w = decode_tile(words, stored, x.dtype, CODES, SCALES, GROUP, BLOCK_N, BLOCK_K)
        elif CODES == "bf16":
            x = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
            w = tl.load(
                weights_ptr + row[:, None] * K + k[None, :],
                mask=(n < N)[:, None] & (k < K)[None, :],
                other=0.0,
            ).to(x.dtype)
        else:
            x = tl.load(x_rows + k[None, :], mask=inside, other=0.0)
            word = k0 // 8 + tl.arange(0, BLOCK_K // 8)
            words = tl.load(
                weights_ptr + row[:, None] * (K // 8) + word[None, :],
                mask=(n < N)[:, None] & (word < K // 8)[None, :],
                other=0,
            )
            stored = 0
            if GROUP > 0:
                group = k0 // GROUP + tl.arange(0, BLOCK_K // GROUP)
                stored = tl.load(
                    scales_ptr + row[:, None] * (K // GROUP) + group[None, :],
                    mask=(n < N)[:, None] & (group < K // GROUP)[None, :],
                    other=0,
                )
            w = decode_tile(words, stored, x.dtype, CODES, SCALES, GROUP, BLOCK_N, BLOCK_K)
        if PER_STEP:
            part = tl.dot(x, tl.trans(w), input_precision="ieee")
            if TILED:
                acc += part * step_factor(weights_ptr + tile, step % STEPS, BLOCK_N, STEPS)
            else:
                across = (K + SCALE_COLUMNS - 1) // SCALE_COLUMNS
                place = expert * SCALES_PER_EXPERT + n // SCALE_ROWS * across
                scale = tl.load(scales_ptr + place + k0 // SCALE_COLUMNS, mask=n < N, other=0)
                acc += part * decode_scale(scale, SCALES)[None, :]
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    if PER_ROW:
        place = expert * SCALES_PER_EXPERT + n // SCALE_ROWS
        scale = tl.load(scales_ptr + place, mask=n < N, other=0)
        acc *= decode_scale(scale, SCALES)[None, :]
    if TILED and SCALES != "e8m0":
        in_tile = n - tl.program_id(1) * BLOCK_N
        acc *= row_factor(weights_ptr + first_tile, in_tile, SCALES, BLOCK_N, STEPS)[None, :]
    if tensor_scale_ptr is not None:
        acc *= tl.load(tensor_scale_ptr)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + row, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if SWIGLU:
        f = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        if IN_CHUNKS:
            # Pairs of rows r and r + 8 stand side by side: gate and up are two apart.
            acc = tl.permute(tl.reshape(acc, (BLOCK_M, BLOCK_N // 4, 2, 2)), (0, 1, 3, 2))
            i = tl.arange(0, BLOCK_N // 2)
            f = tl.program_id(1) * (BLOCK_N // 2) + i // 8 * 8 + i % 2 * 4 + i // 2 % 4
        gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
        hidden = swiglu(gate, up, LIMIT, ALPHA, OFFSET)
        inside = working[:, None] & (f < N // 2)[None, :]
        if IN_CHUNKS:  # what it is multiplied with stands in tiles too
            f = place_in_chunks(f)
        out = out_ptr + pair.to(tl.int64)[:, None] * OUT_STRIDE + f[None, :]
        tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        weight = tl.load(expert_weights_ptr + pair, mask=working, other=0.0)
        out = out_ptr + pair.to(tl.int64)[:, None] * OUT_STRIDE + n[None, :]
        inside = working[:, None] & (n < N)[None, :]
        tl.store(out, acc * weight[:, None], mask=inside)


# A program computes BLOCK_M pairs by BLOCK_N weight rows of one expert. Row blocks change fastest,
# so that blocks of one expert read its weights from L2. Grid: B, N / BLOCK_N.
# The number of pairs is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["pairs"])
def _moe_gemm_kernel(
    x_ptr,  # [rows, K]
    weights_ptr,  # [E, N, K / 8] words of codes, or [E, N, K] bf16
    scales_ptr,  # [E, N / SCALE_ROWS, K / SCALE_COLUMNS], or None
    tensor_scale_ptr,  # [] fp32, or None
    bias_ptr,  # [E, N] or None
    block_expert_ptr,  # [B] int32
    block_rows_ptr,  # [B, BLOCK_M] int32: pairs
    expert_weights_ptr,  # [pairs] fp32, read unless SWIGLU
    out_ptr,  # [pairs, N / 2] if SWIGLU else [pairs, N]
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    X_STRIDE: tl.constexpr,  # from one row of x to the next: K, but whole chunks if IN_CHUNKS
    E: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,  # pairs that share a row of x
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    TILED: tl.constexpr,
    TILES_PER_EXPERT: tl.constexpr,
    FIRST_TILE: tl.constexpr,
    TILE_BYTES: tl.constexpr,
    STEPS: tl.constexpr,  # of a tile
    OUT_STRIDE: tl.constexpr,
    SWIGLU: tl.constexpr,
    GATE_STEP: tl.constexpr,  # rows from one gate row to the next, and from a gate to its up row
    TO_UP: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALVES: tl.constexpr,  # whether a block with few pairs is computed as half of one
):
    block = tl.program_id(0)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    rows_ptr = block_rows_ptr + block * BLOCK_M
    if expert < E:
        HALF: tl.constexpr = BLOCK_M // 2
        if HALVES and tl.load(rows_ptr + HALF) == pairs:
            _moe_gemm_block(
                expert, x_ptr, weights_ptr, scales_ptr, tensor_scale_ptr, bias_ptr, rows_ptr,
                expert_weights_ptr, out_ptr, pairs, N, K, X_STRIDE, PAIRS_PER_ROW, CODES, SCALES,
                SCALE_ROWS, SCALE_COLUMNS, SCALES_PER_EXPERT, TILED, TILES_PER_EXPERT, FIRST_TILE,
                TILE_BYTES, STEPS, OUT_STRIDE, SWIGLU, GATE_STEP, TO_UP, LIMIT, ALPHA, OFFSET,
                HALF, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _moe_gemm_block(
                expert, x_ptr, weights_ptr, scales_ptr, tensor_scale_ptr, bias_ptr, rows_ptr,
                expert_weights_ptr, out_ptr, pairs, N, K, X_STRIDE, PAIRS_PER_ROW, CODES, SCALES,
                SCALE_ROWS, SCALE_COLUMNS, SCALES_PER_EXPERT, TILED, TILES_PER_EXPERT, FIRST_TILE,
                TILE_BYTES, STEPS, OUT_STRIDE, SWIGLU, GATE_STEP, TO_UP, LIMIT, ALPHA, OFFSET,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


# A program adds the K outputs of one token, in order, to BLOCK_D columns of its residual.
# Grid: T, D / BLOCK_D.
@triton.jit
def _add_expert_outputs_kernel(
    outputs_ptr, residual_ptr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.load(outputs_ptr + token * (K * D) + d, mask=d < D, other=0.0)
    for slot in tl.static_range(1, K):
        total += tl.load(outputs_ptr + (token * K + slot) * D + d, mask=d < D, other=0.0)
    residual = residual_ptr + token * D + d
    tl.store(residual, tl.load(residual, mask=d < D, other=0.0) + total, mask=d < D)


def rows_per_block(
    tokens: int, experts_per_token: int, num_experts: int, *, tiled: bool = False
) -> int:
    """Rows of a block that waste little: about the pairs an expert gets, up to 128.

    tiled: experts stand in tiles, whose decoding costs more than products with empty rows
    """
    share = tokens * experts_per_token / num_experts
    if tiled:
        return 128 if share > 48 else 64
    return 128 if share > 48 else 64 if share > 24 else 16


def moe_gemm_gate_up(
    x_TD: Tensor,
    gate_up: QuantTensor | TiledExperts,
    bias: Tensor | None,
    routing: Routing,
    activation: Swiglu,
) -> Tensor:
    """First half of the routed experts for T tokens: gate_up and the gated activation.

    x_TD:        [T, D] normed tokens
    gate_up:     [E, 2F, D] in any format, or in tiles
    bias:        [E, 2F] or None
    routing:     of these tokens
    activation:  also says how gate and up rows stand
    returns      [T * K, F] of x's dtype, row token * K + slot, as moe_gemm_down takes it: for tiles
                 of 4 bits in_chunk_order

    4 * T * K * F * D operations set its time; with few tokens, the bytes of the chosen experts.
    """
    tokens = len(x_TD)
    width = gate_up.shape[1] // 2
    top_k = routing.expert_weights.shape[1]
    out = x_TD.new_empty((tokens * top_k, width))
    if isinstance(gate_up, TiledExperts) and gate_up.facts.bits == 4:
        x_TD = in_chunk_order(x_TD)
        padded = triton.cdiv(width, STEP_COLUMNS) * STEP_COLUMNS
        if padded != width:
            out = x_TD.new_zeros((tokens * top_k, padded))
    _launch(x_TD, gate_up, bias, routing, out, top_k, activation)
    return out


def moe_gemm_down(
    hidden: Tensor, down: QuantTensor | TiledExperts, bias: Tensor | None, routing: Routing
) -> Tensor:
    """Second half: each pair's output times its weight; add_expert_outputs sums over K.

    hidden:   [T * K, F] of moe_gemm_gate_up; for tiles of 4 bits in_chunk_order
    down:     [E, D, F] in any format, or in tiles
    bias:     [E, D] or None
    returns   [T * K, D] fp32, row token * K + slot: weight * (down @ hidden + bias)

    2 * T * K * F * D operations set its time.
    """
    out = torch.empty((len(hidden), down.shape[1]), dtype=torch.float32, device=hidden.device)
    _launch(hidden, down, bias, routing, out, 1, None)
    return out


def in_chunk_order(x: Tensor) -> Tensor:
    """Columns of [.., K] as chunks of 4 bits hold them, with zeros up to a whole chunk.

    Of each 64 columns, column 16 q + 4 c + e comes to place 16 c + 4 q + e.
    """
    missing = -x.shape[-1] % STEP_COLUMNS
    if missing:
        x = torch.nn.functional.pad(x, (0, missing))
    return x.unflatten(-1, (-1, 4, 4, 4)).transpose(-3, -2).flatten(-4)


def add_expert_outputs(outputs: Tensor, residual_TD: Tensor) -> Tensor:
    """residual += the sum of each token's K expert outputs, always in the same order.

    outputs:      [T * K, D] fp32, row token * K + slot
    residual_TD:  [T, D] fp32, added to and returned

    Moves 4 * T * D * (K + 2) bytes.
    """
    tokens, width = residual_TD.shape
    block = min(1024, triton.next_power_of_2(width))
    _add_expert_outputs_kernel[(tokens, triton.cdiv(width, block))](
        outputs, residual_TD, K=len(outputs) // tokens, D=width, BLOCK_D=block, num_warps=4
    )
    return residual_TD


def _launch(
    x: Tensor,
    weight: QuantTensor | TiledExperts,
    bias: Tensor | None,
    routing: Routing,
    out: Tensor,
    pairs_per_row: int,
    activation: Swiglu | None,
) -> None:
    experts, rows, columns = weight.shape
    gated = activation or Swiglu()
    step, to_up = gated.rows(rows // 2)
    blocks, block_m = routing.block_rows.shape
    tile = (TILES_OF_TILES if isinstance(weight, TiledExperts) else TILES)[block_m]
    if isinstance(weight, TiledExperts):
        assert activation is None or (step, to_up) == (2, 1), activation
        values, scales, tensor_scale = weight.tiles, None, None
        facts = weight.facts
        formats = {
            "CODES": codes_of(weight.format).name, "SCALES": facts.scales, "SCALE_ROWS": 1,
            "SCALE_COLUMNS": facts.scale_columns, "SCALES_PER_EXPERT": 0, "TILED": True,
            "TILES_PER_EXPERT": weight.tiles.shape[1], "FIRST_TILE": weight.first_tile,
            "TILE_BYTES": facts.bytes,
        }  # fmt: skip
    else:
        codes = codes_of(weight.format).name
        values = weight.values if codes == "bf16" else as_words(weight)
        scales, tensor_scale = scale_bytes(weight), weight.tensor_scale
        scale_rows, scale_columns = scale_block(weight)
        assert scale_columns >= columns or max(scale_columns, tile.block_k) % tile.block_k == 0
        formats = {
            "CODES": codes, "SCALES": scales_of(weight.format), "SCALE_ROWS": scale_rows,
            "SCALE_COLUMNS": scale_columns, "TILED": False, "TILES_PER_EXPERT": 0, "FIRST_TILE": 0,
            "SCALES_PER_EXPERT": 0 if weight.scales is None else weight.scales[0].numel(),
            "TILE_BYTES": 0,
        }  # fmt: skip
    _moe_gemm_kernel[(blocks, triton.cdiv(rows, tile.block_n))](
        x,
        values,
        scales,
        tensor_scale,
        bias,
        routing.block_expert,
        routing.block_rows,
        routing.expert_weights,
        out,
        len(out),
        N=rows,
        K=columns,
        X_STRIDE=x.shape[1],
        E=experts,
        PAIRS_PER_ROW=pairs_per_row,
        **formats,
        STEPS=TILE_COLUMNS // STEP_COLUMNS,
        OUT_STRIDE=out.shape[1],
        SWIGLU=activation is not None,
        GATE_STEP=step,
        TO_UP=to_up,
        LIMIT=gated.limit,
        ALPHA=gated.alpha,
        OFFSET=gated.offset,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        HALVES=isinstance(weight, TiledExperts) and block_m == 128,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
