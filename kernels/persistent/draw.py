"""The end of the persistent step: the token that is fed next, drawn where the logits are made.

Each program keeps the best of its own tokens and publishes it; one program waits for all, picks and
moves the request one step on. Noise, penalty and temperature are those of kernels/sampling.py,
whose kernels draw from distributions that are cut.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.persistent import sizes
from kernels.persistent.exchange import publish, wait_for_tagged_if
from kernels.reference import sampling

# Of a program: score, token, logit, largest logit, sum of exponentials.
WORDS = gl.constexpr(sizes.DRAW_WORDS)
_ROUND_A, _ROUND_B = gl.constexpr(sampling.ROUND_A), gl.constexpr(sampling.ROUND_B)
_KEY_A, _KEY_B = gl.constexpr(sampling.KEY_A), gl.constexpr(sampling.KEY_B)
_NONE = gl.constexpr(-1e30)
_WORST = gl.constexpr(float("-inf"))


@gluon.jit
def gumbel(seed, step, token):
    """Noise of tokens (int32) at a step: Philox4x32-10, key seed, counter (token, step, 0, 0)."""
    key_a = (seed & 0xFFFFFFFF).to(gl.uint32)
    key_b = ((seed >> 32) & 0xFFFFFFFF).to(gl.uint32)
    c0 = token.to(gl.uint32)
    c1 = gl.zeros_like(c0) + step.to(gl.uint32)
    c2 = gl.zeros_like(c0)
    c3 = gl.zeros_like(c0)
    for _ in range(10):
        a = c0.to(gl.uint64) * _ROUND_A
        b = c2.to(gl.uint64) * _ROUND_B
        c0 = (b >> 32).to(gl.uint32) ^ c1 ^ key_a
        c2 = (a >> 32).to(gl.uint32) ^ c3 ^ key_b
        c1 = (b & 0xFFFFFFFF).to(gl.uint32)
        c3 = (a & 0xFFFFFFFF).to(gl.uint32)
        key_a = key_a + _KEY_A
        key_b = key_b + _KEY_B
    uniform = ((c0 >> 9).to(gl.float32) + 0.5) * (1.0 / 8388608.0)
    return -gl.log(-gl.log(uniform))


@gluon.jit
def nothing_found(token):
    """What consider() begins with: tokens that exist, and no score."""
    zero = gl.zeros_like(token.to(gl.float32))
    return zero + _WORST, token, zero, zero + _NONE, zero


@gluon.jit
def consider(found, logit, token, inside, settings, seed, step, seen):
    """The better of what was found and of further tokens, one a place, and sums for the log
    probability.

    settings: temperature, repetition penalty, ..; seen: [V] uint8
    inside: whether there is such a token
    """
    best, best_token, best_logit, peak, total = found
    temperature = gl.load(settings)
    penalty = gl.load(settings + 1)
    was_seen = gl.load(seen + token, mask=inside, other=0)
    penalised = gl.where(logit > 0, logit / penalty, logit * penalty)
    score = gl.where(was_seen != 0, penalised, logit)
    score = score / gl.where(temperature > 0, temperature, 1.0)
    score = gl.where(temperature > 0, score + gumbel(seed, step, token), score)
    # NaN (weights that overflow) must not lead to a token that does not exist.
    better = inside & (score == score) & (score > best)
    best_token = gl.where(better, token, best_token)
    best_logit = gl.where(better, logit, best_logit)
    best = gl.where(better, score, best)
    logit = gl.where(inside, logit, _NONE)
    higher = gl.maximum(peak, logit)
    total = total * gl.exp(peak - higher) + gl.where(inside, gl.exp(logit - higher), 0.0)
    return best, best_token, best_logit, higher, total


@gluon.jit
def hand_in(found, words, tag):
    """Publish what this program found; of equal scores the first token."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    EACH: gl.constexpr = gl.BlockedLayout([4], [32], [8], [0])  # in every warp: no barriers
    best = gl.convert_layout(found[0], EACH)
    token = gl.convert_layout(found[1], EACH)
    logit = gl.convert_layout(found[2], EACH)
    peak = gl.convert_layout(found[3], EACH)
    total = gl.convert_layout(found[4], EACH)
    score = gl.max(best, 0)
    first = gl.min(gl.where(best == score, token, 0x7FFFFFFF), 0)
    # A token stands in one place, but places without a score have its number too.
    logit = gl.max(gl.where((token == first) & (best == score), logit, _NONE), 0)
    highest = gl.max(peak, 0)
    total = gl.sum(total * gl.exp(peak - highest), 0)
    i = gl.arange(0, 256, layout=ONE)
    value = gl.where(i == 0, score, gl.where(i == 1, first.to(gl.float32, bitcast=True), logit))
    value = gl.where(i == 3, highest, gl.where(i == 4, total, value))
    publish(words + gl.program_id(0) * WORDS + i, value, tag, i < 5)


@gluon.jit
def pick_token(
    words, tag, token_ptr, position_ptr, step_ptr, seen, history, logprobs, S: gl.constexpr
):  # fmt: skip
    """One program: the best of all programs' tokens; moves the request one step on."""
    ONE: gl.constexpr = gl.BlockedLayout([1], [32], [8], [0])
    EACH: gl.constexpr = gl.BlockedLayout([8], [32], [8], [0])  # in every warp: no barriers
    p = gl.arange(0, 256, layout=ONE)
    there = p < S.programs
    at = words + gl.minimum(p, S.programs - 1) * WORDS
    score = gl.where(there, wait_for_tagged_if(at, tag, there), _WORST)
    score = gl.convert_layout(score, EACH)
    token = gl.convert_layout(wait_for_tagged_if(at + 1, tag, there), EACH)
    token = token.to(gl.int32, bitcast=True)
    logit = gl.convert_layout(wait_for_tagged_if(at + 2, tag, there), EACH)
    peak = gl.where(there, wait_for_tagged_if(at + 3, tag, there), _NONE)
    peak = gl.convert_layout(peak, EACH)
    total = gl.convert_layout(wait_for_tagged_if(at + 4, tag, there), EACH)
    p = gl.arange(0, 256, layout=EACH)
    there = p < S.programs
    best = gl.max(score, 0)
    winner = gl.min(gl.where(there & (score == best), p, 256), 0)
    token = gl.sum(gl.where(p == winner, token, 0), 0)
    logit = gl.sum(gl.where(p == winner, logit, 0.0), 0)
    highest = gl.max(peak, 0)
    total = gl.sum(gl.where(there, total * gl.exp(peak - highest), 0.0), 0)
    step = gl.load(step_ptr)
    gl.store(history + step, token)
    gl.store(logprobs + step, logit - (highest + gl.log(total)))
    gl.store(seen + token, 1)
    gl.store(token_ptr, token)
    gl.store(step_ptr, step + 1)
    gl.store(position_ptr, gl.load(position_ptr) + 1)
