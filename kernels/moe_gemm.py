"""The routed experts of many tokens: a grouped GEMM that decodes weights on the way in.

One kernel for every format of kernels/weight_formats.py. Weights stay in the published order; a
tile is decoded to bf16 exactly, with the scales of groups in a row (kernels/weight_tiles.py).
Scales of 128x128 blocks multiply the fp32 sums of each step, scales of rows and of whole tensors
the sums at the end.

T tokens, D model width, F expert width, E experts, K experts per token; in the kernel N and K are
the rows and columns of the weight, M a block of (token, slot) pairs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe_routing import Routing
from kernels.swiglu import Swiglu, swiglu
from kernels.weight_formats import (
    as_words,
    codes_of,
    decode_scale,
    scale_block,
    scale_bytes,
    scales_of,
)
from kernels.weight_tiles import decode_tile
from quant.tensor import QuantTensor


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
    E: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,  # pairs that share a row of x
    CODES: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    SCALE_COLUMNS: tl.constexpr,
    SCALES_PER_EXPERT: tl.constexpr,
    SWIGLU: tl.constexpr,
    GATE_STEP: tl.constexpr,  # rows from one gate row to the next, and from a gate to its up row
    TO_UP: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Groups in a row are shorter than a step; blocks are not; a scale of a row is for all steps.
    # fp32 scales do not fit the weights' 16 bits: of a row shorter than a step they scale its sum.
    IN_TILE: tl.constexpr = SCALES != "none" and SCALE_COLUMNS < BLOCK_K
    GROUP: tl.constexpr = SCALE_COLUMNS if IN_TILE and SCALES != "fp32" else 0
    PER_ROW: tl.constexpr = SCALES != "none" and SCALE_COLUMNS >= K and GROUP == 0
    tl.static_assert(GROUP > 0 or PER_ROW or not IN_TILE, "blocks of fp32 scales within a step")
    PER_STEP: tl.constexpr = SCALES != "none" and GROUP == 0 and not PER_ROW
    block = tl.program_id(0)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < E:
        pair = tl.load(block_rows_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        working = pair < pairs
        x_row = (pair // PAIRS_PER_ROW).to(tl.int64)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        if SWIGLU:  # gate and up in turn; none for activations that there are not
            n = tl.where(n < N, n // 2 * GATE_STEP + n % 2 * TO_UP, N)
        row = expert * N + n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(
                x_ptr + x_row[:, None] * K + k[None, :],
                mask=working[:, None] & (k < K)[None, :],
                other=0.0,
            )
            if CODES == "bf16":
                w = tl.load(
                    weights_ptr + row[:, None] * K + k[None, :],
                    mask=(n < N)[:, None] & (k < K)[None, :],
                    other=0.0,
                ).to(x.dtype)
            else:
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
                across = (K + SCALE_COLUMNS - 1) // SCALE_COLUMNS
                place = expert * SCALES_PER_EXPERT + n // SCALE_ROWS * across + k0 // SCALE_COLUMNS
                scale = tl.load(scales_ptr + place, mask=n < N, other=0)
                acc += part * decode_scale(scale, SCALES)[None, :]
            else:
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if PER_ROW:
            place = expert * SCALES_PER_EXPERT + n // SCALE_ROWS
            scale = tl.load(scales_ptr + place, mask=n < N, other=0)
            acc *= decode_scale(scale, SCALES)[None, :]
        if tensor_scale_ptr is not None:
            acc *= tl.load(tensor_scale_ptr)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + row, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if SWIGLU:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
            hidden = swiglu(gate, up, LIMIT, ALPHA, OFFSET)
            f = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            out = out_ptr + pair.to(tl.int64)[:, None] * (N // 2) + f[None, :]
            inside = working[:, None] & (f < N // 2)[None, :]
            tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            weight = tl.load(expert_weights_ptr + pair, mask=working, other=0.0)
            out = out_ptr + pair.to(tl.int64)[:, None] * N + n[None, :]
            inside = working[:, None] & (n < N)[None, :]
            tl.store(out, acc * weight[:, None], mask=inside)


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


def rows_per_block(tokens: int, experts_per_token: int, num_experts: int) -> int:
    """Rows of a block that waste little: about the pairs an expert gets, from 16 to 128."""
    share = tokens * experts_per_token / num_experts
    return 128 if share > 48 else 64 if share > 24 else 16


def moe_gemm_gate_up(
    x_TD: Tensor,
    gate_up: QuantTensor,
    bias: Tensor | None,
    routing: Routing,
    activation: Swiglu,
) -> Tensor:
    """First half of the routed experts for T tokens: gate_up and the gated activation.

    x_TD:        [T, D] normed tokens
    gate_up:     [E, 2F, D] in any format
    bias:        [E, 2F] or None
    routing:     of these tokens
    activation:  also says how gate and up rows stand
    returns      [T * K, F] of x's dtype, row token * K + slot

    4 * T * K * F * D operations set its time; with few tokens, the bytes of the chosen experts.
    """
    tokens = len(x_TD)
    rows = gate_up.shape[1]
    top_k = routing.expert_weights.shape[1]
    out = torch.empty((tokens * top_k, rows // 2), dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, gate_up, bias, routing, out, top_k, activation)
    return out


def moe_gemm_down(
    hidden: Tensor, down: QuantTensor, bias: Tensor | None, routing: Routing
) -> Tensor:
    """Second half: each pair's output times its weight; add_expert_outputs sums over K.

    hidden:   [T * K, F] of moe_gemm_gate_up
    down:     [E, D, F] in any format
    bias:     [E, D] or None
    returns   [T * K, D] fp32, row token * K + slot: weight * (down @ hidden + bias)

    2 * T * K * F * D operations set its time.
    """
    out = torch.empty((len(hidden), down.shape[1]), dtype=torch.float32, device=hidden.device)
    _launch(hidden, down, bias, routing, out, 1, None)
    return out


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
    weight: QuantTensor,
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
    tile = TILES[block_m]
    codes = codes_of(weight.format).name
    scale_rows, scale_columns = scale_block(weight)
    assert scale_columns >= columns or max(scale_columns, tile.block_k) % tile.block_k == 0
    _moe_gemm_kernel[(blocks, triton.cdiv(rows, tile.block_n))](
        x,
        weight.values if codes == "bf16" else as_words(weight),
        scale_bytes(weight),
        weight.tensor_scale,
        bias,
        routing.block_expert,
        routing.block_rows,
        routing.expert_weights,
        out,
        len(out),
        N=rows,
        K=columns,
        E=experts,
        PAIRS_PER_ROW=pairs_per_row,
        CODES=codes,
        SCALES=scales_of(weight.format),
        SCALE_ROWS=scale_rows,
        SCALE_COLUMNS=scale_columns,
        SCALES_PER_EXPERT=0 if weight.scales is None else weight.scales[0].numel(),
        SWIGLU=activation is not None,
        GATE_STEP=step,
        TO_UP=to_up,
        LIMIT=gated.limit,
        ALPHA=gated.alpha,
        OFFSET=gated.offset,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
