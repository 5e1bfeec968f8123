"""One request: token ids from a backend, turned into chunks of text until something ends it."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from moe_runtime.backend import Backend, SampledToken
from moe_runtime.harmony import ToolCall
from moe_runtime.output_text import OutputText, Piece
from moe_runtime.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]
MAX_LOGPROBS = 20


class EventLike(Protocol):
    """threading.Event, or anything that can be set."""

    def is_set(self) -> bool:
        """Whether to stop."""
        ...


StopOn = EventLike | Callable[[], Any]


@dataclass(frozen=True)
class Chunk:
    """What one new token added. Text may be empty: part of a character, of a possible stop string,
    or of a header. A last chunk without a token carries text that was held back."""

    text: str
    token_id: int | None
    logprob: float | None  # natural logarithm, under the unmodified logits
    reasoning: str = ""  # of a chat with channels: text that is not part of the reply
    channel: str | None = None  # that the token is in: "analysis", "commentary", "final"
    top_logprobs: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


@dataclass(frozen=True)
class Timings:
    """Measured times of one request; None where there is nothing to measure."""

    load_s: float | None = None  # of the model, once
    prefill_s: float | None = None  # from the first work on the device to the first token
    first_token_s: float | None = None  # the same with encoding the prompt
    decode_tokens_per_s: float | None = None  # after the first token
    bytes_per_token: int | None = None  # read for a token at the mean context of the decode
    bandwidth_share: float | None = None  # of the device's read bandwidth, if that is known


@dataclass(frozen=True)
class Generation:
    """The result of one request."""

    text: str  # joined texts of all chunks; of a chat with channels: the reply alone
    token_ids: list[int]  # new tokens, the stop token not included
    finish_reason: FinishReason
    logprobs: list[SampledToken]  # one for each of token_ids
    prompt_tokens: int
    timings: Timings
    seed: int  # that repeats this output
    reasoning: str = ""  # of a chat with channels
    answer: str = ""  # the text without what a model says before it calls a tool
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Request:
    """A checked request."""

    prompt_ids: list[int]
    sampling: SamplingParams
    max_new_tokens: int
    eos_token_ids: frozenset[int] = frozenset()  # tokens that end the output
    num_logprobs: int = 0
    stop_on: StopOn | None = None
    load_s: float | None = None
    encode_s: float = 0.0  # spent on the prompt before

    @property
    def is_cancelled(self) -> bool:
        """Whether the caller wants the output to end now."""
        if self.stop_on is None:
            return False
        if hasattr(self.stop_on, "is_set"):
            return bool(self.stop_on.is_set())
        return bool(cast("Callable[[], Any]", self.stop_on)())


class TextStream(Iterator[Chunk]):
    """An iterator of chunks over one running request.

    Closing it (or leaving its `with` block, or an exception such as Ctrl-C inside it) ends the work
    on the device; the model stays usable. `result` is the Generation so far.
    """

    def __init__(self, backend: Backend, request: Request, output: OutputText) -> None:
        self._request = request
        self._backend = backend
        self._output = output
        self._clock = _Clock()
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._logprobs: list[SampledToken] = []
        self._finish_reason: FinishReason = "cancelled"  # until something else ends it
        self._chunks = self._run()

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the request; without effect when it has ended."""
        self._chunks.close()

    @property
    def result(self) -> Generation:
        """Everything given out so far; final once the iterator is exhausted."""
        return Generation(
            text="".join(self._text),
            token_ids=[sampled.token_id for sampled in self._logprobs],
            finish_reason=self._finish_reason,
            logprobs=list(self._logprobs),
            prompt_tokens=len(self._request.prompt_ids),
            timings=self._timings(),
            seed=self._request.sampling.seed,
            reasoning="".join(self._reasoning),
            answer=self._output.answer,
            tool_calls=self._output.tool_calls,
        )

    def _run(self) -> Generator[Chunk, None, None]:
        request = self._request
        stop_id = None
        self._clock.start()
        tokens = self._backend.decode(
            request.prompt_ids,
            request.sampling,
            max_new_tokens=request.max_new_tokens,
            num_logprobs=request.num_logprobs,
        )
        try:
            while self._finish_reason == "cancelled" and not request.is_cancelled:
                sampled = next(tokens, None)
                if sampled is None:
                    self._finish_reason = "length"
                    break
                self._clock.tick()
                if sampled.token_id in request.eos_token_ids:
                    self._finish_reason = "stop"
                    stop_id = sampled.token_id
                    break
                yield self._chunk(sampled)
        finally:
            if close := getattr(tokens, "close", None):
                close()
        rest = self._keep(self._output.end(stop_id))
        if rest.text or rest.reasoning:
            yield Chunk(rest.text, None, None, rest.reasoning, rest.channel)

    def _chunk(self, sampled: SampledToken) -> Chunk:
        """The chunk of one token; notes what the token ends before it is given out."""
        piece = self._keep(self._output.push(sampled.token_id))
        self._logprobs.append(sampled)
        if self._output.stopped:
            self._finish_reason = "stop"
        elif len(self._logprobs) == self._request.max_new_tokens:
            self._finish_reason = "length"
        return Chunk(
            piece.text,
            sampled.token_id,
            sampled.logprob,
            piece.reasoning,
            piece.channel,
            sampled.top_logprobs,
        )

    def _keep(self, piece: Piece) -> Piece:
        self._text.append(piece.text)
        self._reasoning.append(piece.reasoning)
        return piece

    def _timings(self) -> Timings:
        request, clock = self._request, self._clock
        speed = clock.tokens_per_s
        read = self._bytes_per_token()
        bandwidth = self._backend.read_bandwidth
        share = read * speed / bandwidth if speed and bandwidth else None
        return Timings(
            load_s=request.load_s,
            prefill_s=clock.first_s,
            first_token_s=None if clock.first_s is None else request.encode_s + clock.first_s,
            decode_tokens_per_s=speed,
            bytes_per_token=read,
            bandwidth_share=share,
        )

    def _bytes_per_token(self) -> int:
        """Bytes read for a token with half of the new ones in the cache."""
        context = len(self._request.prompt_ids) + len(self._logprobs) // 2
        return sum(self._backend.plan.decode_bytes(context).values())


class _Clock:
    """Times of the tokens of one request."""

    def __init__(self) -> None:
        self.first_s: float | None = None  # from the start to the first token
        self._started = 0.0
        self._num_tokens = 0
        self._last_s = 0.0

    def start(self) -> None:
        """The request's work begins."""
        self._started = time.perf_counter()

    def tick(self) -> None:
        """A token has come."""
        self._last_s = time.perf_counter() - self._started
        self._num_tokens += 1
        if self.first_s is None:
            self.first_s = self._last_s

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens after the first over the time after the first."""
        if self.first_s is None or self._last_s <= self.first_s:
            return None
        return (self._num_tokens - 1) / (self._last_s - self.first_s)
