"""How well a model predicts a text, and how far it is from a second model on the same text.

Both models read the text in the same windows, teacher forced, and every token but the first is
scored once: perplexity of each, KL(second || first) and how often the likeliest token is the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

WINDOW = 1024  # tokens read at once; bounds the logits in memory
_ROWS = 64  # of logits in float64 at once


class Scored(Protocol):
    """What is asked of a model: MoeModel has it."""

    @property
    def max_context(self) -> int:
        """Tokens that it can read at once."""
        ...

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """[T, vocab] fp32 on the CPU: row t predicts token t + 1."""
        ...


@dataclass
class Sums:
    """What is added up over the tokens of a text."""

    tokens: int = 0
    negative_log_likelihood: float = 0.0
    correct: int = 0  # tokens that were the likeliest
    divergence: float = 0.0
    agreed: int = 0
    largest_divergence: float = 0.0


@dataclass(frozen=True)
class Evaluation:
    """The figures of one model on one text; the last four with a second model only."""

    tokens: int  # scored
    perplexity: float
    accuracy: float  # share of tokens that were the likeliest
    seconds: float
    reference_perplexity: float | None = None
    kl: float | None = None  # mean over tokens, in nats: KL(second || first)
    largest_kl: float | None = None
    top1_agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return dict(self.__dict__)


@dataclass
class _Pair:
    """Sums of the model and of the second one."""

    ours: Sums = field(default_factory=Sums)
    theirs: Sums = field(default_factory=Sums)


def evaluate(
    model: Scored,
    token_ids: Sequence[int],
    *,
    against: Scored | None = None,
    window: int | None = None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> Evaluation:
    """Score a text, and compare with a second model of the same vocabulary.

    token_ids: of the text, at least 2
    window:    tokens read at once; default the smallest of both models' context and 1024. A longer
               text is read in windows that overlap by half: each token is scored once, with at
               least half a window before it
    on_tokens: told how many more tokens are scored

    Raises ValueError for a text that is too short or a window that does not fit.
    """
    if len(token_ids) < 2:
        raise ValueError(f"the text has {len(token_ids)} tokens: at least 2 are needed")
    largest = min(model.max_context, against.max_context if against else model.max_context)
    size = min(largest, WINDOW) if window is None else window
    if not 2 <= size <= largest:
        raise ValueError(f"window must be from 2 to {largest} tokens, got {size}")
    started = time.perf_counter()
    sums = _Pair()
    for start, first in windows(len(token_ids), size):
        ids = list(token_ids[start : start + size])
        _add(sums, model, against, ids, first)
        on_tokens(len(ids) - first)
    return _evaluation(sums, against is not None, time.perf_counter() - started)


def windows(num_tokens: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, first) of each window: tokens `first` and later of text[start : start + size]."""
    scored = 1  # tokens scored or, the first one, never scored
    while scored < num_tokens:
        start = 0 if scored == 1 else scored - size // 2
        yield start, scored - start
        scored = min(start + size, num_tokens)


def _add(
    sums: _Pair, model: Scored, against: Scored | None, ids: Sequence[int], first: int
) -> None:
    """Add a window; row t of the logits predicts token t + 1."""
    targets = torch.tensor(ids[first:]).split(_ROWS)
    ours = model.logits(ids)[first - 1 : len(ids) - 1].split(_ROWS)
    theirs: tuple[Tensor, ...] = ()
    if against is not None:
        theirs = against.logits(ids)[first - 1 : len(ids) - 1].split(_ROWS)
        if theirs[0].shape != ours[0].shape:
            raise ValueError(
                f"the vocabularies differ: {ours[0].shape[1]} and {theirs[0].shape[1]} tokens; "
                "compare a model with one that has the same tokenizer"
            )
    for i, part in enumerate(targets):
        # In float64: two models may differ in the seventh digit.
        log_ours = ours[i].double().log_softmax(1)
        _score(sums.ours, log_ours, part)
        if theirs:
            log_theirs = theirs[i].double().log_softmax(1)
            _score(sums.theirs, log_theirs, part)
            _compare(sums.ours, log_ours, log_theirs)


def _compare(sums: Sums, ours: Tensor, theirs: Tensor) -> None:
    # Where the second model gives no probability at all there is nothing to lose.
    gap = torch.where(theirs.isneginf(), 0.0, theirs - ours)
    divergence = (theirs.exp() * gap).sum(dim=1)
    sums.divergence += float(divergence.sum())
    sums.largest_divergence = max(sums.largest_divergence, float(divergence.amax()))
    sums.agreed += int((ours.argmax(1) == theirs.argmax(1)).sum())


def _score(sums: Sums, log_probabilities: Tensor, targets: Tensor) -> None:
    sums.tokens += len(targets)
    chosen = log_probabilities.gather(1, targets[:, None])
    sums.negative_log_likelihood -= float(chosen.sum())
    sums.correct += int((log_probabilities.argmax(1) == targets).sum())


def _evaluation(sums: _Pair, compared: bool, seconds: float) -> Evaluation:
    ours, theirs = sums.ours, sums.theirs
    figures: dict[str, float] = {}
    if compared:
        figures = {
            "reference_perplexity": _perplexity(theirs),
            "kl": ours.divergence / ours.tokens,
            "largest_kl": ours.largest_divergence,
            "top1_agreement": ours.agreed / ours.tokens,
        }
    return Evaluation(
        tokens=ours.tokens,
        perplexity=_perplexity(ours),
        accuracy=ours.correct / ours.tokens,
        seconds=seconds,
        **figures,
    )


def _perplexity(sums: Sums) -> float:
    return math.exp(sums.negative_log_likelihood / sums.tokens)
