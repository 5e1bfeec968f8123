"""The routed experts of many tokens, of weights in the tiles of the persistent step.

T tokens, D model width, F expert width, E experts, K experts per token, M rows of a block.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kernels.moe_routing import Routing
from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.launch import copied
from kernels.persistent.pack import TiledExperts
from kernels.swiglu import Swiglu
from kernels.tile_gemm.kernel import gemm_kernel
from kernels.tile_gemm.sizes import STEP_COLUMNS, GemmSizes

COLUMNS_IN_TURN = 32  # in which x_order changes the order of columns
_SHARED_BYTES = 227 << 10  # of a program on Hopper
_SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)


# A program copies a row's token into its place, its columns in the order of operands.py.
# Grid: B * M.
@triton.jit(do_not_specialize=["pairs"])
def _gather_kernel(
    x_ptr,  # [T, D]
    block_rows_ptr,  # [B * M] int32
    out_ptr,  # [B * M, D] bf16, written where there is work
    pairs,
    D: tl.constexpr,
    K: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    pair = tl.load(block_rows_ptr + row)
    if pair < pairs:
        d = tl.arange(0, BLOCK_D)
        x = tl.load(x_ptr + (pair // K).to(tl.int64) * D + d, mask=d < D).to(tl.bfloat16)
        if BITS == 4:
            x = tl.permute(tl.reshape(x, (BLOCK_D // 16, 4, 2, 2)), (0, 2, 1, 3))
        else:
            x = tl.permute(tl.reshape(x, (BLOCK_D // 32, 4, 2, 2, 2)), (0, 2, 3, 1, 4))
        tl.store(out_ptr + row.to(tl.int64) * D + d, tl.reshape(x, (BLOCK_D,)), mask=d < D)


def rows_per_block(tokens: int, experts_per_token: int, weight: TiledExperts) -> int:
    """M: rows of a block. Decoding weights costs more than products with empty rows."""
    share = tokens * experts_per_token / weight.shape[0]
    # With 8 bits too little of x would have room.
    return 128 if share > 48 and weight.facts.bits == 4 else 64


def moe_gemm_gate_up(
    x_TD: Tensor, gate_up: TiledExperts, bias: Tensor, routing: Routing, activation: Swiglu
) -> Tensor:
    """First half of the routed experts for T tokens: gate_up and the gated activation.

    x_TD:        [T, D] normed tokens, cast to bf16
    gate_up:     [E, 2F, D], gate and up rows in turn
    bias:        [E, 2F]
    routing:     of these tokens, in blocks of 64 or 128 rows
    activation:  alternating
    returns      [B * M, F] bf16: of each row of the blocks, columns in x_order; rows without work
                 hold anything

    4 * T * K * F * D operations set its time; with few tokens, the bytes of the chosen experts.
    """
    assert activation.alternating, activation
    x = gathered(x_TD, routing, gate_up.facts.bits)
    out = x.new_empty((len(x), gate_up.shape[1] // 2))
    _launch(x, gate_up, bias, routing, out, activation)
    return out


def moe_gemm_down(hidden: Tensor, down: TiledExperts, bias: Tensor, routing: Routing) -> Tensor:
    """Second half: each pair's output times its weight; add_expert_outputs sums over K.

    hidden:   [B * M, F] of moe_gemm_gate_up
    down:     [E, D, F]
    bias:     [E, D]
    returns   [T * K, D] fp32, row token * K + slot: weight * (down @ hidden + bias)

    2 * T * K * F * D operations set its time.
    """
    pairs = routing.expert_weights.numel()
    out = hidden.new_empty((pairs, down.shape[1]), dtype=torch.float32)
    _launch(hidden, down, bias, routing, out, None)
    return out


def gathered(x_TD: Tensor, routing: Routing, bits: int) -> Tensor:
    """[B * M, D] bf16: the token of each row of the blocks, columns in x_order; rows without work
    hold anything.

    Writes 2 * T * K * D bytes.
    """
    width, top_k = x_TD.shape[1], routing.expert_weights.shape[1]
    x = x_TD.new_empty((routing.block_rows.numel(), width), dtype=torch.bfloat16)
    _gather_kernel[(len(x),)](
        x_TD,
        routing.block_rows,
        x,
        routing.expert_weights.numel(),
        D=width,
        K=top_k,
        BITS=bits,
        BLOCK_D=triton.next_power_of_2(width),
    )
    return x


def x_order(columns: int, bits: int) -> Tensor:
    """[columns] int64: which column stands at each place, for weights with codes of `bits`."""
    k = torch.arange(columns)
    if bits == 4:  # 4 c + 2 h + j comes to 8 h + 2 c + j
        return k.view(-1, 4, 2, 2).transpose(1, 2).reshape(-1)
    # 8 c + 4 f + 2 h + j comes to 16 f + 8 h + 2 c + j
    return k.view(-1, 4, 2, 2, 2).permute(0, 2, 3, 1, 4).reshape(-1)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def gemm_sizes(
    weight: TiledExperts,
    m: int,
    out_columns: int,
    activation: Swiglu | None,
    programs: int,
) -> GemmSizes:
    """Of one half of a layer's experts, with blocks of m rows."""
    tiles = weight.format.name, weight.tiles.shape[1], weight.first_tile
    return _sizes(*weight.shape, *tiles, m, out_columns, activation, programs)


@functools.cache  # all layers have the same
def _sizes(
    experts: int,
    rows: int,
    columns: int,
    format: str,
    tiles_per_expert: int,
    first_tile: int,
    m: int,
    out_columns: int,
    activation: Swiglu | None,
    programs: int,
) -> GemmSizes:
    assert columns % COLUMNS_IN_TURN == 0 and rows % COLUMNS_IN_TURN == 0, (rows, columns)
    gated = activation or Swiglu()
    return GemmSizes(
        rows=rows,
        columns=columns,
        experts=experts,
        tiles_per_expert=tiles_per_expert,
        first_tile=first_tile,
        tiles=EXPERT_TILES[format],
        block_rows=m,
        out_columns=out_columns,
        gated=activation is not None,
        limit=gated.limit,
        alpha=gated.alpha,
        offset=gated.offset,
        programs=programs,
    ).with_rings(_SHARED_BYTES)


def _launch(
    x: Tensor,
    weight: TiledExperts,
    bias: Tensor,
    routing: Routing,
    out: Tensor,
    activation: Swiglu | None,
) -> None:
    blocks, m = routing.block_rows.shape
    s = gemm_sizes(weight, m, out.shape[1], activation, _processors(x.device))
    gemm_kernel[(s.programs,)](
        TensorDescriptor(x, list(x.shape), list(x.stride()), [m // 2, STEP_COLUMNS], _SWIZZLED),
        copied(weight.tiles, s.chunk_rows),
        copied(weight.tiles, s.words_rows),
        weight.tiles,
        bias,
        routing.block_expert,
        routing.block_rows,
        routing.expert_weights,
        torch.zeros(1, dtype=torch.int32, device=x.device),
        out,
        routing.expert_weights.numel(),
        blocks,
        s.groups,
        S=s,
        num_warps=4,
    )
