"""Drawing a token, in plain torch: what kernels/sampling.py does, and the cut they share.

settings is [temperature, repetition penalty, top_k, top_p, min_p] in fp32; V vocabulary.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
# Of Philox4x32.
ROUND_A, ROUND_B = 0xD2511F53, 0xCD9E8D57
KEY_A, KEY_B = 0x9E3779B9, 0xBB67AE85


def adjust(logits: Tensor, seen: Tensor, settings: Tensor) -> Tensor:
    """Repetition penalty on seen tokens, then temperature (0 divides by 1). All [V] fp32."""
    temperature, penalty = settings[0], settings[1]
    penalised = torch.where(logits > 0, logits / penalty, logits * penalty)
    logits = torch.where(seen != 0, penalised, logits)
    return logits / torch.where(temperature > 0, temperature, torch.ones_like(temperature))


def cut_threshold(logits: Tensor, seen: Tensor, settings: Tensor) -> Tensor:
    """The smallest adjusted logit, [1] fp32, that top-k, top-p and min-p leave; ties stay in.

    Top-p keeps the smallest set, in falling order, whose probability reaches top_p, within what
    top-k left. Runs on any device without synchronising.
    """
    ordered = adjust(logits, seen, settings).sort(descending=True).values
    rank = torch.arange(len(ordered), device=ordered.device)
    top_k, top_p, min_p = settings[2], settings[3], settings[4]
    keep = (top_k == 0) | (rank < top_k)
    probabilities = ordered.masked_fill(~keep, float("-inf")).softmax(0)
    before = probabilities.cumsum(0) - probabilities
    keep &= (top_p >= 1) | (before < top_p)
    keep &= probabilities >= min_p * probabilities[0]
    return ordered.masked_fill(~keep, float("inf")).amin().reshape(1)


def philox(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """First word of Philox4x32-10 (Salmon et al. 2011), key `seed`, counter (token, step, 0, 0).

    seed [1] int64, step [1] int, tokens [V] int64; returns [V] int64 in [0, 2^32).
    """
    key_a, key_b = seed & _MASK, (seed >> 32) & _MASK
    c0 = tokens & _MASK
    c1 = torch.zeros_like(c0) + (step.to(torch.int64) & _MASK)
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    for _ in range(10):
        high_a, low_a = _multiply(c0, ROUND_A)
        high_b, low_b = _multiply(c2, ROUND_B)
        c0, c1, c2, c3 = high_b ^ c1 ^ key_a, low_b, high_a ^ c3 ^ key_b, low_a
        key_a, key_b = (key_a + KEY_A) & _MASK, (key_b + KEY_B) & _MASK
    return c0


def gumbel(seed: Tensor, step: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise [V] fp32 of each token at a step."""
    uniform = ((philox(seed, step, tokens) >> 9).float() + 0.5) * (1.0 / 8388608.0)
    return -torch.log(-torch.log(uniform))


def sample(
    logits: Tensor, seen: Tensor, settings: Tensor, seed: Tensor, step: Tensor
) -> tuple[int, float]:
    """One draw: the token and its log probability under the plain logits."""
    scores = adjust(logits, seen, settings)
    scores = scores.masked_fill(scores < cut_threshold(logits, seen, settings), float("-inf"))
    if settings[0] > 0:
        tokens = torch.arange(len(logits), device=logits.device)
        scores = scores + gumbel(seed, step, tokens)
    token = int(scores.argmax())
    return token, float(logits.log_softmax(0)[token])


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32-bit product, without leaving int64."""
    low = (a & 0xFFFF) * constant
    high = (a >> 16) * constant
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)
