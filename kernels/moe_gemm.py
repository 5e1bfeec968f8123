"""The routed experts of many tokens: a grouped GEMM that decodes MXFP4 on the way in.

Weights stay in the published order and are the left operand of the product, so that they go from
memory through registers to the tensor cores: a thread decodes the words of its own rows and
columns and passes them on without an exchange. Activations stand in word order to match (see
kernels/word_order.py). In a word,

    bit    31..28 27..24 23..20 19..16 15..12 11..8  7..4   3..0
    code     7      6      5      4      3      2      1      0        code = s e e m

codes p and p + 4 become two bf16 at once: sign to bit 15, e e m to bits 8..6 of each half, which
is the code's value times 2^-126 (bf16 subnormals make 0.5 exact). Multiplying by 2^126 and then by
the group's scale is exact, as far as bf16 holds the product.

T tokens, D model width, F expert width, E experts, K experts per token; in the kernel N and K are
the rows and columns of the weight, M a block of (token, slot) pairs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe_routing import Routing
from kernels.word_order import to_word_order
from quant.formats import MXFP4
from quant.tensor import QuantTensor

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Tile:
    """How a program's share is cut: BLOCK_M comes from the routing."""

    block_n: int  # rows of weight
    block_k: int  # columns in one step
    num_warps: int
    num_stages: int  # steps in flight


# The best measured tile for each number of pairs in a block.
TILES = {
    16: Tile(128, 128, 4, 4),
    64: Tile(128, 64, 4, 4),
    128: Tile(128, 64, 4, 3),
}


@triton.jit
def _halves(codes, factor):
    """Two placed codes a word, in its halves, to two weights: [..., 2]."""
    if _INTERPRETED:  # bf16 arithmetic is wrong there; fp32 gives the same numbers
        low = (codes << 16).to(tl.float32, bitcast=True) * 2.0**126 * factor
        high = (codes & -0x10000).to(tl.float32, bitcast=True) * 2.0**126 * factor
    else:
        low = codes.to(tl.int16).to(tl.bfloat16, bitcast=True) * 2.0**126 * factor
        high = (codes >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True) * 2.0**126 * factor
    return tl.join(low, high)


@triton.jit
def _decode_tile(words, scales, dtype, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [BLOCK_N, BLOCK_K] in word order of words [.., BLOCK_K / 8] and E8M0 [.., / 32]."""
    GROUPS: tl.constexpr = BLOCK_K // 32
    MAGNITUDE: tl.constexpr = 0x01C001C0
    SIGN: tl.constexpr = -0x7FFF8000  # 0x80008000
    # E8M0: the byte is the exponent; byte 0 stands for 2^-127, a subnormal.
    if _INTERPRETED:
        bits = scales.to(tl.int32)
        factor = tl.where(bits == 0, 1 << 22, bits << 23).to(tl.float32, bitcast=True)
    else:
        bits = tl.where(scales == 0, 0x40, scales.to(tl.int16) << 7)
        factor = bits.to(tl.bfloat16, bitcast=True)
    factor = tl.broadcast_to(factor[:, :, None], (BLOCK_N, GROUPS, 4))
    factor = tl.reshape(factor, (BLOCK_N, GROUPS * 4))
    p0 = _halves(((words << 6) & MAGNITUDE) | ((words << 12) & SIGN), factor)
    p1 = _halves(((words << 2) & MAGNITUDE) | ((words << 8) & SIGN), factor)
    p2 = _halves(((words >> 2) & MAGNITUDE) | ((words << 4) & SIGN), factor)
    p3 = _halves(((words >> 6) & MAGNITUDE) | (words & SIGN), factor)
    # [word, half, p] to [p, word, half] within each group: registers change names, nothing moves.
    weights = tl.join(tl.join(p0, p2), tl.join(p1, p3))
    weights = tl.reshape(weights, (BLOCK_N, GROUPS, 4, 2, 4))
    weights = tl.permute(weights, (0, 1, 4, 2, 3))
    return tl.reshape(weights, (BLOCK_N, BLOCK_K)).to(dtype)


@triton.jit
def _store_rows(out_ptr, values, pair, working, column, WIDTH: tl.constexpr):
    """Values [columns, pairs] to rows of [pairs, WIDTH]."""
    out = out_ptr + pair.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = working[:, None] & (column < WIDTH)[None, :]
    tl.store(out, tl.trans(values.to(out_ptr.dtype.element_ty)), mask=inside)


# A program computes BLOCK_N weight rows of one expert by BLOCK_M pairs. The tiles of a block are
# neighbours and so are the blocks of an expert, so that both operands come from L2.
# Grid: B * ceil(N / BLOCK_N).
# The number of pairs is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["pairs"])
def _moe_gemm_kernel(
    x_ptr,  # [rows, K] in word order
    words_ptr,  # [E, N, K / 8] int32
    scales_ptr,  # [E, N, K / 32] uint8
    bias_ptr,  # [E, N]
    block_expert_ptr,  # [B] int32
    block_rows_ptr,  # [B, BLOCK_M] int32: pairs
    weights_ptr,  # [pairs] fp32, read unless SWIGLU
    out_ptr,  # [pairs, N / 2] in word order if SWIGLU else [pairs, N]
    pairs,
    N: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,  # pairs that share a row of x
    SWIGLU: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    NUM_TILES: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    GROUPS: tl.constexpr = BLOCK_K // 32
    block = tl.program_id(0) // NUM_TILES
    tile = tl.program_id(0) % NUM_TILES
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < E:
        pair = tl.load(block_rows_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        working = pair < pairs
        # Rows without work compute row 0 again and store nothing: no mask in the loop.
        x_row = tl.where(working, pair // PAIRS_PER_ROW, 0)
        i = tl.arange(0, BLOCK_N)
        # Rows r and r + 8 of every 16 are held by one thread: they become row `place` of the first
        # and of the second half of what is stored.
        place = i // 16 * 8 + i % 8
        second = i // 8 % 2
        if SWIGLU:
            # A gate and its up, in the order in which the second GEMM wants its columns.
            f = tile * (BLOCK_N // 2) + place
            n = (f // 32 * 32 + f % 8 * 4 + f % 32 // 8) * 2 + second
        else:
            n = tile * BLOCK_N + second * (BLOCK_N // 2) + place
        row = tl.minimum(n, N - 1)
        k = tl.arange(0, BLOCK_K)
        word = tl.arange(0, BLOCK_K // 8)
        group = tl.arange(0, GROUPS)
        # Offsets fit 32 bits within one expert and within the activations; the bases move.
        x_offsets = x_row[None, :] * K + k[:, None]
        word_offsets = row[:, None] * (K // 8) + word[None, :]
        scale_offsets = row[:, None] * (K // 32) + group[None, :]
        words_ptr += expert * (N * (K // 8))
        scales_ptr += expert * (N * (K // 32))
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        # Too narrow for the asynchronous copies of the other two, scales are read a step ahead.
        scales = tl.load(scales_ptr + scale_offsets, mask=(group < K // 32)[None, :], other=0)
        for k0 in range(0, K, BLOCK_K):
            if K % BLOCK_K == 0:
                words = tl.load(words_ptr + word_offsets)
                x = tl.load(x_ptr + x_offsets)
            else:
                inside = word < (K - k0) // 8
                words = tl.load(words_ptr + word_offsets, mask=inside[None, :], other=0)
                x = tl.load(x_ptr + x_offsets, mask=(k < K - k0)[:, None], other=0.0)
            scales_ptr += GROUPS
            left = group < K // 32 - k0 // 32 - GROUPS
            next_scales = tl.load(scales_ptr + scale_offsets, mask=left[None, :], other=0)
            weights = _decode_tile(words, scales, x.dtype, BLOCK_N, BLOCK_K)
            acc = tl.dot(weights, x, acc, input_precision="ieee")
            scales = next_scales
            words_ptr += BLOCK_K // 8
            x_ptr += BLOCK_K
        acc += tl.load(bias_ptr + expert * N + row).to(tl.float32)[:, None]
        acc = tl.permute(tl.reshape(acc, (BLOCK_N // 16, 2, 8, BLOCK_M)), (0, 2, 3, 1))
        upper, lower = tl.split(tl.reshape(acc, (BLOCK_N // 2, BLOCK_M, 2)))
        column = tl.arange(0, BLOCK_N // 2)
        if SWIGLU:
            gate = tl.minimum(upper, LIMIT)
            up = tl.minimum(tl.maximum(lower, -LIMIT), LIMIT)
            hidden = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
            _store_rows(out_ptr, hidden, pair, working, tile * (BLOCK_N // 2) + column, N // 2)
        else:
            weight = tl.load(weights_ptr + pair, mask=working, other=0.0)[None, :]
            column += tile * BLOCK_N
            _store_rows(out_ptr, upper * weight, pair, working, column, N)
            _store_rows(out_ptr, lower * weight, pair, working, column + BLOCK_N // 2, N)


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
    bias: Tensor,
    routing: Routing,
    *,
    limit: float,
    alpha: float,
) -> Tensor:
    """First half of the routed experts for T tokens: gate_up and the clamped SwiGLU.

    x_TD:     [T, D] normed tokens
    gate_up:  [E, 2F, D] MXFP4; rows alternate gate, up
    bias:     [E, 2F]
    routing:  of these tokens
    returns   [T * K, F] of x's dtype, row token * K + slot, columns in word order

    4 * T * K * F * D operations set its time; with few tokens, the bytes of the chosen experts.
    """
    tokens = len(x_TD)
    rows = gate_up.shape[1]
    top_k = routing.expert_weights.shape[1]
    out = torch.empty((tokens * top_k, rows // 2), dtype=x_TD.dtype, device=x_TD.device)
    x = to_word_order(x_TD)
    _launch(x, gate_up, bias, routing, out, top_k, swiglu=True, limit=limit, alpha=alpha)
    return out


def moe_gemm_down(hidden: Tensor, down: QuantTensor, bias: Tensor, routing: Routing) -> Tensor:
    """Second half: each pair's output times its weight; add_expert_outputs sums over K.

    hidden:   [T * K, F] of moe_gemm_gate_up, columns in word order
    down:     [E, D, F] MXFP4
    bias:     [E, D]
    returns   [T * K, D] fp32, row token * K + slot: weight * (down @ hidden + bias)

    2 * T * K * F * D operations set its time.
    """
    out = torch.empty((len(hidden), down.shape[1]), dtype=torch.float32, device=hidden.device)
    _launch(hidden, down, bias, routing, out, 1, swiglu=False, limit=0.0, alpha=0.0)
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
    bias: Tensor,
    routing: Routing,
    out: Tensor,
    pairs_per_row: int,
    *,
    swiglu: bool,
    limit: float,
    alpha: float,
) -> None:
    assert weight.format is MXFP4 and weight.scales is not None, weight.format.name
    experts, rows, columns = weight.shape
    blocks, block_m = routing.block_rows.shape
    tile = TILES[block_m]
    _moe_gemm_kernel[(blocks * triton.cdiv(rows, tile.block_n),)](
        x,
        weight.values.view(torch.int32),
        weight.scales,
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
        SWIGLU=swiglu,
        LIMIT=limit,
        ALPHA=alpha,
        BLOCK_M=block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
