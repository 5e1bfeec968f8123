"""The Triton backend: prefill in chunks, then captured decode steps read a little behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kernels.read_bandwidth import read_bandwidth
from kernels.reference.rope_kv import rope_table
from kernels.sampling import NO_CUT
from moe_runtime.backend import SampledToken
from moe_runtime.cache import KVCache
from moe_runtime.config import ModelConfig
from moe_runtime.decode import DecodeStep, ModelWeights, zero_weights
from moe_runtime.plan import PREFILL_CHUNK, MemoryPlan
from moe_runtime.prefill import Prefill
from moe_runtime.reference_backend import sampling_settings, signed64
from moe_runtime.sampling import SamplingParams
from quant.formats import MXFP4, QuantFormat
from quant.tensor import QuantTensor

STEPS_AHEAD = 3  # decode steps launched before the oldest unread token is waited for
_LOGITS_CHUNK = 256  # rows of logits computed at once
_BANDWIDTH_BUFFER_BYTES = 512 << 20  # ten times an L2 cache


class TritonBackend:
    """A Backend (see moe_runtime/backend.py) that runs our kernels on one GPU.

    On a CPU it runs through Triton's interpreter, uncaptured: for tests of tiny models only.
    """

    name = "triton"

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor | QuantTensor],
        plan: MemoryPlan,
        device: torch.device,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.plan = plan
        self.device = device
        self.vocab_size = config.vocab_size
        self.max_context = plan.max_context
        model = ModelWeights.from_named(weights, config)
        cache = KVCache.allocate(config, plan.max_context, device, cache_dtype)
        positions = torch.arange(plan.max_context, device=device)
        rope = rope_table(config.rope, config.head_width, positions)
        self._step = DecodeStep(config, model, cache, rope, plan.max_context)
        chunk = min(PREFILL_CHUNK, plan.max_context)
        self._prefill = Prefill(config, model, cache, rope, chunk)
        self.read_bandwidth: float | None = None
        if device.type == "cuda":
            measured = read_bandwidth(device, buffer_bytes=_BANDWIDTH_BUFFER_BYTES)
            self.read_bandwidth = measured.gbps * 1e9
            self._step.capture()

    def decode(
        self,
        prompt_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        max_new_tokens: int,
        num_logprobs: int = 0,
    ) -> Iterator[SampledToken]:
        """See Backend.decode."""
        assert len(prompt_ids) + max_new_tokens <= self.max_context + 1
        self._start(prompt_ids, sampling)
        filtered = sampling.filtered
        self._step.sample_residual(filtered=filtered)
        reader = _TokenReader(self._step, num_logprobs)
        reader.record(0)
        launched = 1
        for step in range(max_new_tokens):
            while launched < min(step + 1 + STEPS_AHEAD, max_new_tokens):
                self._step.replay(filtered=filtered)
                reader.record(launched)
                launched += 1
            yield reader.read()

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """See Backend.logits."""
        rows = []
        for residual_TD in self._prefill.run(self._device_ids(token_ids)):
            for part in residual_TD.split(_LOGITS_CHUNK):
                rows.append(self._prefill.head(part).float().cpu())
        return torch.cat(rows)

    def time_steps(self, position: int, steps: int) -> float:
        """Seconds of one captured step, by the GPU's clock: `steps` in a row from a position.

        They read what the cache holds, and whatever request ran last is lost.
        """
        assert position + steps <= self.max_context, (position, steps, self.max_context)
        state = self._step.state
        state.position.fill_(position)
        state.step.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(steps):
            self._step.replay(filtered=False)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / steps

    def close(self) -> None:
        """See Backend.close."""
        del self._step, self._prefill
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _start(self, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        """Reset the request's state and run the prompt; leaves its last residual in the step."""
        state = self._step.state
        ids = self._device_ids(prompt_ids)
        state.settings.copy_(sampling_settings(sampling))
        state.seed.fill_(signed64(sampling.seed))
        state.step.zero_()
        state.threshold.fill_(NO_CUT)
        state.seen.zero_()
        state.seen[ids] = 1
        for residual_TD in self._prefill.run(ids):
            self._step.residual.copy_(residual_TD[-1])
        # The draw adds one: the first new token then stands right after the prompt.
        state.position.fill_(len(prompt_ids) - 1)

    def _device_ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(token_ids), dtype=torch.int64).to(self.device)


def compile_kernels(
    config: ModelConfig,
    max_context: int,
    device: torch.device,
    expert_formats: Iterable[tuple[QuantFormat, QuantFormat]] = ((MXFP4, MXFP4),),
    dense_format: QuantFormat | None = None,
) -> None:
    """Compile every kernel that a model of this config can launch, so that nothing compiles later.

    expert_formats: pairs of gate_up's and down's that the layers have
    dense_format:   of projections and head if they are packed
    Runs one sliding and one full layer of zeros with the model's own sizes, which takes K experts
    and one cache of memory; it can go on while the weights are read.
    """
    kinds = tuple(dict.fromkeys(config.layer_is_sliding))
    small = replace(config, num_layers=len(kinds), layer_is_sliding=kinds)
    cache = KVCache.allocate(small, max_context, device, torch.bfloat16, shared=True)
    rope = rope_table(config.rope, config.head_width, torch.arange(max_context, device=device))
    for formats in expert_formats:
        weights = zero_weights(small, device, formats, dense_format)
        step = DecodeStep(small, weights, cache, rope, max_context)
        for filtered in (False, True):
            step.step(filtered=filtered)
        prefill = Prefill(small, weights, cache, rope, min(PREFILL_CHUNK, max_context))
        for length in prefill.warm_up_lengths():
            for residual_TD in prefill.run(torch.zeros(length, dtype=torch.int64, device=device)):
                prefill.head(residual_TD[-1:])
    torch.cuda.synchronize()


class _TokenReader:
    """Brings sampled tokens to the host behind the steps, on a stream of its own."""

    def __init__(self, step: DecodeStep, num_logprobs: int) -> None:
        self._step = step
        self._num_logprobs = num_logprobs
        self._cuda = step.logits.is_cuda
        self._stream = torch.cuda.Stream() if self._cuda else None
        self._pending: deque[tuple[list[Tensor], torch.cuda.Event | None]] = deque()

    def record(self, step: int) -> None:
        """Ask for the token of a step whose work has been launched."""
        state = self._step.state
        sources = [state.history[step], state.logprobs[step]]
        if self._num_logprobs:
            # Taken here, in launch order: the next step overwrites the logits.
            best = self._step.logits.log_softmax(0).topk(self._num_logprobs)
            sources += [best.indices, best.values]
        if self._stream is None:
            self._pending.append(([s.clone() for s in sources], None))
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for source in sources[2:]:  # temporaries: the buffers of the state stay
                source.record_stream(self._stream)
            copies = [s.to("cpu", non_blocking=True) for s in sources]
            done = torch.cuda.Event()
            done.record(self._stream)
        self._pending.append((copies, done))

    def read(self) -> SampledToken:
        """The oldest token asked for; waits for it."""
        copies, done = self._pending.popleft()
        if done is not None:
            done.synchronize()
        top: tuple[tuple[int, float], ...] = ()
        if self._num_logprobs:
            top = tuple(zip(copies[2].tolist(), copies[3].tolist(), strict=True))
        return SampledToken(int(copies[0]), float(copies[1]), top)
