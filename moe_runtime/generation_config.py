"""Defaults of a request, from the checkpoint's generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loaders.errors import CheckpointError
from moe_runtime.config import eos_ids
from moe_runtime.sampling import SamplingParams

_FILE = "generation_config.json"


@dataclass(frozen=True)
class GenerationDefaults:
    """How the checkpoint's authors want it sampled, and where its output ends."""

    sampling: SamplingParams  # used when sampling; its seed means nothing
    do_sample: bool  # False: greedy unless the caller gives a sampling parameter
    eos_token_ids: tuple[int, ...]

    @classmethod
    def read(
        cls, values: Mapping[str, Any] | None, *, vocab_size: int, eos_token_ids: tuple[int, ...]
    ) -> GenerationDefaults:
        """From the file's content, None if there is no file.

        eos_token_ids: those of config.json, for a file that names none
        Raises CheckpointError naming the key.
        """
        values = values or {}
        do_sample = values.get("do_sample")
        if do_sample not in (None, True, False):
            raise CheckpointError(f"{_FILE}: do_sample: expected true or false, got {do_sample!r}")
        return cls(
            sampling=_sampling(values),
            do_sample=bool(do_sample),
            eos_token_ids=eos_ids(values.get("eos_token_id"), vocab_size, _FILE) or eos_token_ids,
        )

    def sampling_for(
        self,
        *,
        temperature: float | None,
        top_p: float | None,
        top_k: int | None,
        min_p: float | None,
        repetition_penalty: float | None,
        seed: int,
    ) -> SamplingParams:
        """The parameters of one request: what the caller gave, the defaults for the rest.

        Without a temperature the request is greedy if the checkpoint does not ask for sampling and
        the caller gave no top_p, top_k or min_p either, which mean nothing to a greedy request.
        """
        cuts = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
        given = {name: value for name, value in cuts.items() if value is not None}
        if temperature is None:
            temperature = self.sampling.temperature if self.do_sample or given else 0.0
        if repetition_penalty is None:
            repetition_penalty = self.sampling.repetition_penalty
        return SamplingParams(
            temperature=temperature,
            repetition_penalty=repetition_penalty,
            seed=seed,
            **{name: given.get(name, getattr(self.sampling, name)) for name in cuts},
        )


def _sampling(values: Mapping[str, Any]) -> SamplingParams:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    stored = {name: values[name] for name in names if values.get(name) is not None}
    if stored.get("top_k") == -1:  # another way to write "all"
        del stored["top_k"]
    try:
        return SamplingParams(**stored)
    except ValueError as error:
        raise CheckpointError(f"{_FILE}: {error}") from None
