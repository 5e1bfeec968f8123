"""The routed experts of many tokens: a grouped GEMM that decodes MXFP4 on the way in.

Weights stay in the published order (see kernels/moe_gemv.py for the word of eight codes). A tile is
decoded to bf16, exactly: sign to bit 15 and e e m to bits 8..6 of each half make the code's value
times 2^-126; two multiplications, by 2^126 and by the group's scale, finish it.

T tokens, D model width, F expert width, E experts, K experts per token; in the kernel N and K are
the rows and columns of the weight, M a block of (token, slot) pairs.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.moe_routing import Routing
from quant.formats import MXFP4
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

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# $0 to $3 eight bf16 weights in order; $4 the codes; $5 the scale as bf16 in both halves.
_DECODE8_PTX = tl.constexpr("""{
.reg .b32 a, b, c, d, t, u;
shl.b32 t, $4, 6;  shl.b32 u, $4, 12; and.b32 t, t, 0x01C001C0; lop3.b32 a, u, 0x80008000, t, 0xEA;
shl.b32 t, $4, 2;  shl.b32 u, $4, 8;  and.b32 t, t, 0x01C001C0; lop3.b32 b, u, 0x80008000, t, 0xEA;
shr.b32 t, $4, 2;  shl.b32 u, $4, 4;  and.b32 t, t, 0x01C001C0; lop3.b32 c, u, 0x80008000, t, 0xEA;
shr.b32 t, $4, 6;  and.b32 t, t, 0x01C001C0; lop3.b32 d, $4, 0x80008000, t, 0xEA;
mov.b32 t, 0x7E807E80; mov.b32 u, 0x80008000;
fma.rn.bf16x2 a, a, t, u; fma.rn.bf16x2 a, a, $5, u;
fma.rn.bf16x2 b, b, t, u; fma.rn.bf16x2 b, b, $5, u;
fma.rn.bf16x2 c, c, t, u; fma.rn.bf16x2 c, c, $5, u;
fma.rn.bf16x2 d, d, t, u; fma.rn.bf16x2 d, d, $5, u;
prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, c, d, 0x5410;
prmt.b32 $2, a, b, 0x7632; prmt.b32 $3, c, d, 0x7632;
}""")


@triton.jit
def _decode_tile(words, scales, dtype, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Weights [BLOCK_N, BLOCK_K] of words [BLOCK_N, BLOCK_K / 8] and E8M0 bytes, one a group."""
    if _INTERPRETED:  # PTX does not run there; the same numbers by plain arithmetic
        code = (words[:, :, None] >> (tl.arange(0, 8) * 4)[None, None, :]) & 15
        magnitude = (((code & 8) << 28) | ((code & 7) << 22)).to(tl.float32, bitcast=True)
        bits = tl.where(scales == 0, 1 << 22, scales << 23).to(tl.float32, bitcast=True)
        groups = tl.reshape(magnitude, (BLOCK_N, BLOCK_K // 32, 32)) * 2.0**126
        return tl.reshape(groups * bits[:, :, None], (BLOCK_N, BLOCK_K)).to(dtype)
    else:
        half = tl.where(scales == 0, 0x40, scales << 7)
        pair = half | (half << 16)
        pair = tl.broadcast_to(pair[:, :, None], (BLOCK_N, BLOCK_K // 32, 4))
        pair = tl.reshape(pair, (BLOCK_N, BLOCK_K // 8))
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _DECODE8_PTX,
            "=&r,=&r,=&r,=&r,r,r",
            [words, pair],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        pairs = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK_N, BLOCK_K // 2))
        low = pairs.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (pairs >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
        return tl.reshape(tl.join(low, high), (BLOCK_N, BLOCK_K)).to(dtype)


# A program computes BLOCK_M pairs by BLOCK_N weight rows of one expert. Row blocks change fastest,
# so that blocks of one expert read its weights from L2. Grid: B, N / BLOCK_N.
# The number of pairs is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["pairs"])
def _moe_gemm_kernel(
    x_ptr,  # [rows, K]
    words_ptr,  # [E, N, K / 8] int32
    scales_ptr,  # [E, N, K / 32] uint8
    bias_ptr,  # [E, N]
    block_expert_ptr,  # [B] int32
    block_rows_ptr,  # [B, BLOCK_M] int32: pairs
    weights_ptr,  # [pairs] fp32, read unless SWIGLU
    out_ptr,  # [pairs, N / 2] if SWIGLU else [pairs, N]
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
    block = tl.program_id(0)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    if expert < E:
        pair = tl.load(block_rows_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
        working = pair < pairs
        x_row = (pair // PAIRS_PER_ROW).to(tl.int64)
        n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        row = expert * N + n
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            word = k0 // 8 + tl.arange(0, BLOCK_K // 8)
            group = k0 // 32 + tl.arange(0, BLOCK_K // 32)
            x = tl.load(
                x_ptr + x_row[:, None] * K + k[None, :],
                mask=working[:, None] & (k < K)[None, :],
                other=0.0,
            )
            words = tl.load(
                words_ptr + row[:, None] * (K // 8) + word[None, :],
                mask=(n < N)[:, None] & (word < K // 8)[None, :],
                other=0,
            )
            scales = tl.load(
                scales_ptr + row[:, None] * (K // 32) + group[None, :],
                mask=(n < N)[:, None] & (group < K // 32)[None, :],
                other=0,
            )
            w = _decode_tile(words, scales.to(tl.int32), x.dtype, BLOCK_N, BLOCK_K)
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        acc += tl.load(bias_ptr + row, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if SWIGLU:
            gate, up = tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_N // 2, 2)))
            gate = tl.minimum(gate, LIMIT)
            up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
            hidden = gate / (1.0 + tl.exp(-ALPHA * gate)) * (up + 1.0)
            f = tl.program_id(1) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            out = out_ptr + pair.to(tl.int64)[:, None] * (N // 2) + f[None, :]
            inside = working[:, None] & (f < N // 2)[None, :]
            tl.store(out, hidden.to(out_ptr.dtype.element_ty), mask=inside)
        else:
            weight = tl.load(weights_ptr + pair, mask=working, other=0.0)
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
    returns   [T * K, F] of x's dtype, row token * K + slot

    4 * T * K * F * D operations set its time; with few tokens, the bytes of the chosen experts.
    """
    tokens = len(x_TD)
    rows = gate_up.shape[1]
    top_k = routing.expert_weights.shape[1]
    out = torch.empty((tokens * top_k, rows // 2), dtype=x_TD.dtype, device=x_TD.device)
    _launch(x_TD, gate_up, bias, routing, out, top_k, swiglu=True, limit=limit, alpha=alpha)
    return out


def moe_gemm_down(hidden: Tensor, down: QuantTensor, bias: Tensor, routing: Routing) -> Tensor:
    """Second half: each pair's output times its weight; add_expert_outputs sums over K.

    hidden:   [T * K, F] of moe_gemm_gate_up
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
    _moe_gemm_kernel[(blocks, triton.cdiv(rows, tile.block_n))](
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
