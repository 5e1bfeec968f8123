"""The Triton backend: prefill in chunks, then captured decode steps read a little behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.compile_ahead import compile_ahead
from kernels.read_bandwidth import read_bandwidth
from kernels.sampling import NO_CUT
from moe_runtime.backend import SampledToken
from moe_runtime.config import DecoderConfig
from moe_runtime.gpu.captured_prompts import CapturedPrompts
from moe_runtime.gpu.captured_step import CapturedStep, Prompts
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.models.reference_model import Weights
from moe_runtime.plan import MemoryPlan
from moe_runtime.reference_backend import sampling_settings, signed64
from moe_runtime.sampling import SamplingParams
from quant.formats import QuantFormat

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
        config: DecoderConfig,
        weights: Weights,
        plan: MemoryPlan,
        device: torch.device,
        cache_dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.plan = plan
        self.device = device
        self.vocab_size = config.vocab_size
        self.max_context = plan.max_context
        family = GPU_FAMILIES[config.family]
        self._step, prefill = family.assemble(
            config, weights, plan.max_context, device, cache_dtype
        )
        self._prefill: Prompts = prefill
        if prefill.may_pad:
            self._prefill = CapturedPrompts(prefill, plan.max_context, device)
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
            yield self._read(reader)

    def _read(self, reader: _TokenReader) -> SampledToken:
        try:
            return reader.read()
        except RuntimeError as error:  # torch's for errors of the GPU
            where = self._step.where_it_stands()
            if where is None:
                raise
            message = str(error).strip().splitlines()[0]
            raise RuntimeError(f"the decode step failed on the GPU ({message}): {where}") from error

    def logits(self, token_ids: Sequence[int]) -> Tensor:
        """See Backend.logits."""
        rows = []
        for residual in self._prefill.run(self._device_ids(token_ids)):
            for part in residual.split(_LOGITS_CHUNK):
                rows.append(self._prefill.head(part).float().cpu())
        return torch.cat(rows)

    @property
    def step(self) -> CapturedStep:
        """The decode step, for those who measure it."""
        return self._step

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
        for residual in self._prefill.run(ids):
            self._step.residual.copy_(residual[-1])
        # The draw adds one: the first new token then stands right after the prompt.
        state.position.fill_(len(prompt_ids) - 1)

    def _device_ids(self, token_ids: Sequence[int]) -> Tensor:
        return torch.tensor(list(token_ids), dtype=torch.int64).to(self.device)


def compile_kernels(
    config: DecoderConfig,
    max_context: int,
    device: torch.device,
    formats: tuple[Any, ...],
    dense_format: QuantFormat | None = None,
    *,
    tiled: bool = True,
) -> int:
    """Compile every kernel that a model of this config can launch, so that nothing compiles later.

    formats:       what GpuFamily.formats found in its headers
    dense_format:  of the weights that moe_runtime/dense_format.py packs
    tiled:         whether weights stand in tiles if the model can have them
    returns        how many kernels were not in this process yet

    First all at once on all processors; then they are run, which loads them onto the GPU.
    """
    family = GPU_FAMILIES[config.family]
    run = family.compile if tiled else family.compile_without_tiles or family.compile
    with compile_ahead() as asked:
        run(config, max_context, device, formats, dense_format)
    run(config, max_context, device, formats, dense_format)
    return asked.num_kernels


class _TokenReader:
    """Brings sampled tokens to the host behind the steps, on a stream of its own."""

    def __init__(self, step: CapturedStep, num_logprobs: int) -> None:
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
