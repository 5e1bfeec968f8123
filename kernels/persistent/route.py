"""The router: logits in parts by many programs, the choice of experts by all.

An expert's logit is its row of the router times the normed residual behind attention. That is what
the residual in front of it gives, and what the output projection adds; the latter is a row times
attention's outputs, router x norm x output projection, which stands in tiles behind those of the
output projection (see mixed_projection in pack.py). So the logits are there when the residual is.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.persistent.exchange import (
    add_to_sums,
    sign,
    sum_of,
    wait_for_all_to_sign,
    wait_for_residual,
    wait_for_sums,
)
from kernels.persistent.gluon_names import wait_for_warps
from kernels.persistent.stamps import READY, ROUTER, stamp


@gluon.jit
def route_part(
    part, layer, x_ptr, norm_ptr, router, count, signed, sums, S: gl.constexpr
):  # fmt: skip
    """What 128 numbers of the residual in front of attention give to all experts' logits.

    The program signs that it has read them; nothing is added before all have signed.
    """
    L: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [8, 1], [1, 0])
    e = gl.arange(0, S.padded_experts, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, 128, layout=gl.SliceLayout(0, L))
    k = part * 128 + i
    inside = k < S.width
    row = gl.minimum(e, S.experts - 1)
    w = gl.load(
        router + ((layer * S.router_programs + part) * S.experts + row)[:, None] * 128 + i[None, :]
    )
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    x = gl.where(inside, wait_for_sums(x_ptr + k, count, 4), 0.0)
    z = gl.sum(w.to(gl.float32) * (x * weight)[None, :], 1)
    wait_for_warps()
    sign(signed)
    wait_for_all_to_sign(signed, (layer + 1) * S.programs)
    wait_for_warps()
    add_to_sums(sums + row, z, 1, e < S.experts)


@gluon.jit
def choose(
    layer, bias, x_ptr, count, sums, shared, trace, S: gl.constexpr
):  # fmt: skip
    """The experts of this token by falling logit, their weights, the norm's factor.

    One thread waits for each number; then every warp chooses alone: 128 logits are four a lane.
    """
    ALL: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    EACH: gl.constexpr = gl.BlockedLayout([S.padded_experts // 32], [32], [8], [0])
    PARTS: gl.constexpr = gl.BlockedLayout([8], [32], [8], [0])
    e = gl.arange(0, S.padded_experts, layout=EACH)
    row = gl.minimum(e, S.experts - 1)
    add = gl.load(bias + layer * S.experts + row).to(gl.float32)
    i = gl.arange(0, 256, layout=ALL)
    squares, words = wait_for_residual(
        x_ptr, count, S.width, sums + gl.minimum(i, S.experts - 1), S.logit_parts, i < S.experts
    )
    both = gl.join(sum_of(words), squares).permute([1, 0])
    # In one store: the compiler puts a barrier between two.
    shared.store(both.reshape([512]))
    wait_for_warps()
    stamp(trace, layer, ROUTER, READY, True, S)
    squared = gl.sum(shared.slice(256, 256).load(PARTS), 0)
    factor = gl.rsqrt(squared / S.width + S.eps)
    logits = shared.slice(0, S.padded_experts).load(EACH) * factor + add
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
