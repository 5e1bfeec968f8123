"""DeepSeek V4's compressors: every R tokens become one cached row.

A row is the mean of its tokens' values, weighted for each channel by a softmax over the tokens'
gates; it is normed, and turned at the position of its first token. With overlap a token has two
values and gates for a channel: the first counts in the row of the next window, the second in that
of its own. Nothing of a token is kept but its part in running softmaxes, three numbers a channel:
so one launch does the same for one token and for many, and a sequence may be cut anywhere.

    state        maximum of the gates, sum of exp(gate - maximum), the same times values
    no overlap   [1, 3, C]: of the unfinished window
    overlap      [3, 3, C]: first halves of the window before, then first and second halves of the
                 unfinished one; a window that has just ended counts as unfinished until a token
                 of the next one comes

T tokens, C row width, P rotary width, R ratio, N compressed rows.
"""

import triton
import triton.language as tl
from torch import Tensor

from kernels.dependent_launch import early_start, let_next_start, stamp, wait_for_front
from kernels.pair_rotation import turn_pairs

_BLOCK_T = 8  # tokens that a program takes at a time


@triton.jit
def _sums(
    projected_ptr,  # [T, STRIDE]: values of all channels, then gates
    bias_ptr,  # [R, WIDTH]
    state_ptr,  # [3, C] of this part
    window,
    start,  # position of token 0
    end,  # and behind the last one
    column,  # of channel 0 among the values
    R: tl.constexpr,
    C: tl.constexpr,
    WIDTH: tl.constexpr,  # C, or 2 C with overlap
    STRIDE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Running softmax [BLOCK_C] over the tokens of a window that lie before `end`; the state has
    those before `start`. A window of negative number has none."""
    c = tl.arange(0, BLOCK_C)
    begin = window * R
    kept = c < tl.where((begin < start) & (window >= 0), C, 0)
    biggest = tl.load(state_ptr + c, mask=kept, other=float("-inf"))
    total = tl.load(state_ptr + C + c, mask=kept, other=0.0)
    acc = tl.load(state_ptr + 2 * C + c, mask=kept, other=0.0)
    last = tl.minimum(begin + R, end)
    for t0 in range(tl.maximum(begin, start), last, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        inside = (t < last)[:, None] & (c < C)[None, :]
        place = (t - start).to(tl.int64)[:, None] * STRIDE + column + c[None, :]
        values = tl.load(projected_ptr + place, mask=inside, other=0.0).to(tl.float32)
        gates = tl.load(projected_ptr + WIDTH + place, mask=inside, other=0.0).to(tl.float32)
        bias = bias_ptr + (t - begin)[:, None] * WIDTH + column + c[None, :]
        gates += tl.load(bias, mask=inside, other=0.0).to(tl.float32)
        gates = tl.where((t < last)[:, None], gates, float("-inf"))
        new = tl.maximum(biggest, tl.max(gates, axis=0))
        p = tl.exp(gates - new[None, :])
        shrink = tl.exp(biggest - new)
        total = total * shrink + tl.sum(p, axis=0)
        acc = acc * shrink + tl.sum(p * values, axis=0)
        biggest = new
    return biggest, total, acc


@triton.jit
def _store_sums(state_ptr, biggest, total, acc, C: tl.constexpr, BLOCK_C: tl.constexpr):
    c = tl.arange(0, BLOCK_C)
    tl.store(state_ptr + c, biggest, mask=c < C)
    tl.store(state_ptr + C + c, total, mask=c < C)
    tl.store(state_ptr + 2 * C + c, acc, mask=c < C)


# A program handles one window; the last one leaves the state. Grid: windows that T tokens touch.
# T is not specialised: no prompt length compiles anything new.
@triton.jit(do_not_specialize=["T"])
def _compressed_rows_kernel(
    projected_ptr,  # [T, STRIDE]
    bias_ptr,  # [R, WIDTH]
    norm_ptr,  # [C]
    cos_ptr,  # [positions, P / 2] fp32
    sin_ptr,
    position_ptr,  # [1] int32: position of token 0
    before_ptr,  # [parts, 3, C] fp32
    after_ptr,  # [parts, 3, C] fp32, written
    rows_ptr,  # [N, C], written where windows end
    trace_ptr,  # [programs, 3] int64 or None
    T,
    R: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    OVERLAP: tl.constexpr,
    STRIDE: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,
):
    stamp(trace_ptr, 0)
    let_next_start(EARLY)
    wait_for_front(EARLY)
    stamp(trace_ptr, 1)
    WIDTH: tl.constexpr = 2 * C if OVERLAP else C
    PART: tl.constexpr = 3 * C
    start = tl.load(position_ptr)
    end = start + T
    window = start // R + tl.program_id(0)
    if window * R < end:
        if OVERLAP:
            # Of the window before: kept as such if this one had begun, else as the unfinished.
            begun = window * R < start
            first = before_ptr + tl.where(begun, 0, PART)
            earlier, earlier_total, earlier_acc = _sums(
                projected_ptr, bias_ptr, first, window - 1, start, end, 0,
                R, C, WIDTH, STRIDE, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            halves, halves_total, halves_acc = _sums(
                projected_ptr, bias_ptr, before_ptr + PART, window, start, end, 0,
                R, C, WIDTH, STRIDE, BLOCK_T, BLOCK_C,
            )  # fmt: skip
            biggest, total, acc = _sums(
                projected_ptr, bias_ptr, before_ptr + 2 * PART, window, start, end, C,
                R, C, WIDTH, STRIDE, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        else:
            biggest, total, acc = _sums(
                projected_ptr, bias_ptr, before_ptr, window, start, end, 0,
                R, C, WIDTH, STRIDE, BLOCK_T, BLOCK_C,
            )  # fmt: skip
        if window == (end - 1) // R:
            # The state may be written where it was read: by this program, of all threads.
            tl.debug_barrier()
            if OVERLAP:
                _store_sums(after_ptr, earlier, earlier_total, earlier_acc, C, BLOCK_C)
                _store_sums(after_ptr + PART, halves, halves_total, halves_acc, C, BLOCK_C)
                _store_sums(after_ptr + 2 * PART, biggest, total, acc, C, BLOCK_C)
            else:
                _store_sums(after_ptr, biggest, total, acc, C, BLOCK_C)
        if window * R + R <= end:
            if OVERLAP:
                new = tl.maximum(biggest, earlier)
                own, others = tl.exp(biggest - new), tl.exp(earlier - new)
                total = total * own + earlier_total * others
                acc = acc * own + earlier_acc * others
            c = tl.arange(0, BLOCK_C)
            row = tl.where(c < C, acc / total, 0.0)
            weight = tl.load(norm_ptr + c, mask=c < C, other=0.0).to(tl.float32)
            row *= tl.rsqrt(tl.sum(row * row) / C + EPS) * weight
            turn = (window * R).to(tl.int64) * (P // 2)
            row = turn_pairs(
                row[None, :], 0, cos_ptr + turn, sin_ptr + turn, C, P, False, 1, BLOCK_C
            )
            place = window.to(tl.int64) * C + c[None, :]
            tl.store(rows_ptr + place, row.to(rows_ptr.dtype.element_ty), mask=c[None, :] < C)
    stamp(trace_ptr, 2)


def compressed_rows(
    projected: Tensor,
    position_bias: Tensor,
    norm: Tensor,
    rope: tuple[Tensor, Tensor],
    position: Tensor,
    before: Tensor,
    after: Tensor,
    rows: Tensor,
    *,
    eps: float,
    trace: Tensor | None = None,
) -> Tensor:
    """Take T tokens at position, position + 1, ...; write the rows of windows that they finish.

    projected:      [T, 2 C], or [T, 4 C] with overlap, any float dtype: values, then gates; a
                    token's numbers stand together
    position_bias:  [R, C] or [R, 2 C], added to the gates of a window's tokens
    norm:           [C] weight of a row's RMS norm, with eps
    rope:           cos and sin, [positions, P / 2] fp32
    position:       [1] int32 on the device
    before:         [1 or 3, 3, C] fp32: the state; at position 0 it is not looked at
    after:          the same, written; for one token it may be `before`
    rows:           [N, C], row n written when token n R + R - 1 is among the tokens; returned

    Bound by latency for one token.
    """
    tokens, ratio = len(projected), len(position_bias)
    width = rows.shape[1]
    overlap = position_bias.shape[1] == 2 * width
    assert projected.shape[1] == 2 * position_bias.shape[1] and projected.stride(1) == 1
    assert before.shape == after.shape == (3 if overlap else 1, 3, width)
    assert tokens == 1 or before.data_ptr() != after.data_ptr() or before.is_meta
    windows = 1 if tokens == 1 else (tokens - 2) // ratio + 2
    _compressed_rows_kernel[(windows,)](
        projected,
        position_bias,
        norm,
        *rope,
        position,
        before,
        after,
        rows,
        trace,
        tokens,
        R=ratio,
        C=width,
        P=2 * rope[0].shape[1],
        OVERLAP=overlap,
        STRIDE=projected.stride(0),
        EPS=eps,
        BLOCK_T=_BLOCK_T,
        BLOCK_C=triton.next_power_of_2(width),
        num_warps=4,
        **early_start(projected),
    )
    return rows
