"""A program's 320 numbers of the vector that a phase reads, as the tensor cores take them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kernels.persistent.exchange import wait_for_sums, wait_for_tagged, wait_for_two_sums
from kernels.persistent.gluon_names import wait_for_warps
from kernels.persistent.multiply import power_of_two_for, store_bf16_terms, store_fp8_terms


@gluon.jit
def scaled(v):
    """v times a power of two that E4M3 holds, and the inverse of that."""
    EACH: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])  # in every warp
    largest = gl.convert_layout(gl.max(gl.abs(v), 1), EACH)
    scale, unscale = power_of_two_for(gl.max(largest, 0))
    return v * scale, unscale


@gluon.jit
def slice_stored():
    """The tensor cores can read what all warps have stored."""
    fence_async_shared()
    wait_for_warps()


@gluon.jit
def _places(column, GROUP: gl.constexpr):
    """Group numbers of a slice of 320 columns, element numbers, and which are there: [16, 32] or
    [32, 16], of which 10 or 20 rows are used."""
    GROUPS: gl.constexpr = 512 // GROUP
    L: gl.constexpr = gl.BlockedLayout([1, 1], [32 // GROUP, GROUP], [8, 1], [1, 0])
    g = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, L))
    i = gl.arange(0, GROUP, layout=gl.SliceLayout(0, L))
    inside = (g < 320 // GROUP)[:, None] & (i >= 0)[None, :]
    return g, inside, column * 320 + gl.minimum(g, 320 // GROUP - 1)[:, None] * GROUP + i[None, :]


@gluon.jit
def store_dense(v, store, at, S: gl.constexpr):
    """A slice for dense tiles, [16, 32] or [32, 16]; returns what multiplies its sums."""
    if S.fp8:
        v, unscale = scaled(v)
        store_fp8_terms(v, store.index(at), 16, False)
    else:
        store_bf16_terms(v, store.index(at), 32)
        unscale = 1.0
    return unscale


@gluon.jit
def residual_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """320 numbers of the residual: weighted by the norm, and the sums of plain ones' squares."""
    GROUP: gl.constexpr = S.group
    g, inside, k = _places(column, GROUP)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    x = gl.where(inside, wait_for_sums(x_ptr + k, count, 2), 0.0)
    return g, x * weight, gl.sum(x * x, 1)


@gluon.jit
def attention_slice(attention, tag, column, S: gl.constexpr):
    """320 outputs of attention."""
    GROUP: gl.constexpr = S.group
    _, inside, k = _places(column, GROUP)
    inside = inside & (k < S.attention_width)
    a = wait_for_tagged(attention + gl.minimum(k, S.attention_width - 1), tag, 2)
    return gl.where(inside, a, 0.0)


@gluon.jit
def gate_up_slice(x_ptr, norm_ptr, count, column, S: gl.constexpr):
    """320 numbers of the residual, weighted by the norm, [16, 32]."""
    _, inside, k = _places(column, 32)
    inside = inside & (k < S.width)
    k = gl.minimum(k, S.width - 1)
    weight = gl.load(norm_ptr + k).to(gl.float32)
    return gl.where(inside, wait_for_sums(x_ptr + k, count, 2) * weight, 0.0)


@gluon.jit
def swiglu(gate, up, LIMIT: gl.constexpr, ALPHA: gl.constexpr, OFFSET: gl.constexpr):
    """The activation of fp32 tensors, as kernels/swiglu.py has it for Triton; LIMIT may be None."""
    if LIMIT is not None:
        gate = gl.minimum(gate, LIMIT)
        up = gl.minimum(gl.maximum(up, -LIMIT), LIMIT)
    return gate / (1.0 + gl.exp(-ALPHA * gate)) * (up + OFFSET)


@gluon.jit
def down_slice(sums_ptr, factor, column, S: gl.constexpr):
    """320 activations of an expert, [16, 32]."""
    _, inside, k = _places(column, 32)
    inside = inside & (k < S.hidden)
    k = gl.minimum(k, S.hidden - 1)
    gate, up = wait_for_two_sums(sums_ptr + 2 * k, sums_ptr + 2 * k + 1, S.gate_up_columns)
    LIMIT: gl.constexpr = S.limit
    ALPHA: gl.constexpr = S.alpha
    hidden = swiglu(gate * factor, up * factor, LIMIT, ALPHA, 1.0)
    return gl.where(inside, hidden, 0.0)


@gluon.jit
def stage_rows(ptr, factor, first, at, rows, S: gl.constexpr):
    """Numbers of this program's rows, [ROWS, 128], into shared memory before they are needed."""
    ROWS: gl.constexpr = S.most_blocks
    L: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [8, 1], [1, 0])
    block = first + gl.arange(0, ROWS, layout=gl.SliceLayout(1, L))
    row = block[:, None] * 128 + gl.arange(0, 128, layout=gl.SliceLayout(0, L))[None, :]
    value = gl.load(ptr + gl.minimum(row, S.mixed_blocks * 128 - 1)).to(gl.float32)
    rows.index(at).store(value * factor)
