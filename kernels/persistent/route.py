"""The router: parts of the logits by some programs, the choice of experts by all."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.persistent.exchange import (
    add_to_sums,
    publish,
    sum_of,
    wait_for_sums,
    wait_for_sums_if,
    wait_for_tagged_if,
)
from kernels.persistent.gluon_names import wait_for_warps
from kernels.persistent.shares import duty
from kernels.persistent.stamps import READY, ROUTER, stamp


@gluon.jit
def route_part(
    program, layer, x_ptr, norm_ptr, router, count, tag, sums, squares, trace, S: gl.constexpr,
    E2: gl.constexpr,
):  # fmt: skip
    """128 columns of the router: their part of all experts' logits, and their squares."""
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    e = gl.arange(0, E2, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = program * 128 + i
    inside = k < S.width
    row = gl.minimum(e, S.experts - 1)
    w = gl.load(
        router
        + ((layer * S.router_programs + program) * S.experts + row)[:, None] * 128
        + i[None, :]
    )
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    zero = gl.zeros_like(k.to(gl.int64))
    x = gl.where(inside, sum_of(wait_for_sums(x_ptr + k, zero, zero + count, 4), zero), 0.0)
    stamp(trace, layer, ROUTER, READY, True, S)
    z = gl.sum(w.to(gl.float32) * (x * weight)[None, :], 1)
    add_to_sums(sums + row, z, 1, e < S.experts)
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    one = gl.arange(0, 1, layout=ONE)
    publish(
        squares + program + one,
        gl.zeros([1], gl.float32, layout=ONE) + gl.sum(x * x, 0),
        tag,
        one == 0,
    )


@gluon.jit
def choose(
    layer, bias, tag, sums, squares, shared, trace, S: gl.constexpr, E2: gl.constexpr
):  # fmt: skip
    """The experts of this token by falling logit, their weights, the norm's factor.

    One thread waits for each number; then every warp chooses alone: 128 logits are four a lane.
    """
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    EACH: gl.constexpr = gl.BlockedLayout([E2 // 32], [32], [8], [0])
    PARTS: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    e = gl.arange(0, E2, layout=EACH)
    row = gl.minimum(e, S.experts - 1)
    add = gl.load(bias + layer * S.experts + row).to(gl.float32)
    i = gl.arange(0, 256, layout=ALL)
    words = wait_for_sums_if(sums + gl.minimum(i, S.experts - 1), S.router_programs, i < S.experts)
    part = gl.minimum(gl.maximum(i - 128, 0), S.router_programs - 1)
    found = wait_for_tagged_if(squares + part, tag, (i >= 128) & (i < 128 + S.router_programs))
    shared.store(gl.where(i < 128, sum_of(words, gl.zeros_like(words)), found))
    wait_for_warps()
    stamp(trace, layer, ROUTER, READY, duty(gl.program_id(0), S) >= S.router_programs, S)
    p = gl.arange(0, 32, layout=PARTS)
    squared = gl.where(p < S.router_programs, shared.slice(128, 32).load(PARTS), 0.0)
    factor = gl.rsqrt(gl.sum(squared, 0) / S.width + S.eps)
    logits = shared.slice(0, E2).load(EACH) * factor + add
    bits = logits.to(gl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # orders as the floats do
    # NaN (weights that overflow) must not lead to an expert that does not exist.
    key = gl.where((e < S.experts) & (logits == logits), key, -2147483647)
    key = gl.where(e < S.experts, key, -2147483647 - 1)
    ids = ()
    peaks = ()
    for _ in gl.static_range(4):
        best = gl.max(key, 0)
        at = gl.min(gl.where(key == best, e, S.experts - 1), 0)
        key = gl.where(e == at, -2147483647 - 1, key)
        back = best ^ ((best >> 31) & 0x7FFFFFFF)
        ids = ids + (at,)
        peaks = peaks + (back.to(gl.float32, bitcast=True),)
    w1 = gl.exp(peaks[1] - peaks[0])
    w2 = gl.exp(peaks[2] - peaks[0])
    w3 = gl.exp(peaks[3] - peaks[0])
    all = 1.0 + w1 + w2 + w3
    return ids, (1.0 / all, w1 / all, w2 / all, w3 / all), factor


@gluon.jit
def pick(place, four):
    """One of four scalars, or several by a tensor of places."""
    return gl.where(
        place == 0, four[0], gl.where(place == 1, four[1], gl.where(place == 2, four[2], four[3]))
    )
