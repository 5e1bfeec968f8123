"""What this version runs, as data: model family, formats, backend, and the GPU it takes."""

from __future__ import annotations

from dataclasses import dataclass

ANY = "any"


@dataclass(frozen=True)
class Support:
    """One combination that is implemented and tested."""

    family: str  # as in DecoderConfig.family
    experts: str  # format names of quant.formats, or ANY that is read
    dense: str
    backend: str
    least_capability: tuple[int, int] | None  # of a CUDA device; None: any device of torch

    @property
    def needs(self) -> str:
        """What it takes, in words."""
        if self.least_capability is None:
            return "any CPU or GPU"
        return f"an NVIDIA GPU of {_sm(self.least_capability)} or newer"

    def why_not(
        self, capabilities: list[tuple[int, int]], triton_problem: str | None
    ) -> str | None:
        """The reason that it does not run here, None when it does.

        capabilities:    compute capability of each GPU
        triton_problem:  why Triton cannot be used, None when it can
        """
        if self.least_capability is None:
            return None
        needed = f"sm_{self.least_capability[0]}{self.least_capability[1]}"
        if not capabilities:
            return f"needs an NVIDIA GPU of {needed} or newer; none is visible"
        if max(capabilities) < self.least_capability:
            best = max(capabilities)
            return (
                f"needs an NVIDIA GPU of {needed} or newer; the best here is sm_{best[0]}{best[1]}"
            )
        return triton_problem


LEAST_CAPABILITY = (8, 0)  # of a GPU for our kernels: bf16 tensor cores
FP8_CAPABILITY = (8, 9)  # for dense weights in FP8: Triton has E4M3 from Ada on

SUPPORTED = (
    Support("gpt_oss", ANY, "bf16 or fp8", "triton", LEAST_CAPABILITY),
    Support("deepseek_v2", ANY, "bf16 or fp8_block128", "triton", LEAST_CAPABILITY),
    Support("deepseek_v3", ANY, "bf16 or fp8_block128", "triton", LEAST_CAPABILITY),
    Support("deepseek_v32", ANY, "bf16 or fp8_block128", "triton", LEAST_CAPABILITY),
    Support("deepseek_v4", ANY, "bf16 or fp8_block128", "triton", LEAST_CAPABILITY),
    Support("gpt_oss", ANY, ANY, "reference", None),
    Support("deepseek_v2", ANY, ANY, "reference", None),
    Support("deepseek_v3", ANY, ANY, "reference", None),
    Support("deepseek_v32", ANY, ANY, "reference", None),
    Support("deepseek_v4", ANY, ANY, "reference", None),
)


def has_kernels(family: str) -> bool:
    """Whether there is a backend of GPU kernels for a family."""
    return any(row.family == family and row.backend == "triton" for row in SUPPORTED)


def _sm(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
