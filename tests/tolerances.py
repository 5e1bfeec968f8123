"""The one table of tolerances: how far a result may be from its twin or oracle.

Both bounds are relative to the root mean square of the expected values, so that a single small
value near zero does not decide. Where data is stored in 16 bits in between, the bound is about
twice the rounding of that type; an error of 1 % fails everywhere but in whole models in bf16.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """Bounds on the error, both over the RMS of the expected values."""

    rms: float  # of the error's root mean square
    largest: float  # of the largest single error


TOLERANCES = {
    # fp32 arithmetic, sums in another order
    "rms_norm": Tolerance(1e-6, 1e-5),
    "rope": Tolerance(1e-6, 1e-5),
    "router": Tolerance(1e-5, 1e-4),
    "gemv": Tolerance(1e-5, 1e-4),
    "attention": Tolerance(2e-6, 2e-5),
    "moe_gemm_mxfp4": Tolerance(2e-6, 2e-5),
    "model_fp32": Tolerance(1e-4, 1e-3),
    # 16-bit inputs or results; Triton's interpreter truncates where a GPU rounds to nearest
    "bf16": Tolerance(3e-3, 4e-2),
    "packed_fp16": Tolerance(1e-3, 1e-2),
    "attention_bf16": Tolerance(4e-3, 4e-2),
    "moe_gemm_mxfp4_bf16": Tolerance(4e-3, 4e-2),
    "moe_gemv_mxfp4": Tolerance(1e-3, 1e-2),
    # the demo with dense weights in FP8 rows against those in bf16: 0.85 % and 4.6 %
    "dense_fp8": Tolerance(1.7e-2, 1e-1),
    # one step of two layers, which hand on vectors of 16 bits
    "decode_step": Tolerance(2e-3, 2e-2),
    # a whole model, its weights the same on both sides
    "model_bf16": Tolerance(2e-2, 2e-1),
    # random weights magnify bf16 rounding: ours 8.2e-2 on an H100, transformers in bf16 1.0e-1 to
    # 1.4e-1 on the same weights
    "model_bf16_random": Tolerance(1.2e-1, 2.0),
}

# Two logits closer than this may change places in bf16.
TIE_MARGIN = 0.1


def assert_close(actual: Tensor, expected: Tensor, name: str) -> None:
    """Assert equal shapes, no NaN, and an error within TOLERANCES[name]."""
    tolerance = TOLERANCES[name]
    assert actual.shape == expected.shape, (tuple(actual.shape), tuple(expected.shape))
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    assert bool(torch.isfinite(expected).all()), "the expected values are not finite"
    unfit = int((~torch.isfinite(actual)).sum())
    assert not unfit, f"{unfit} of {actual.numel()} values are not finite"
    size = expected.square().mean().sqrt().clamp(min=1e-30)
    error = actual - expected
    rms, largest = float(error.square().mean().sqrt() / size), float(error.abs().max() / size)
    assert rms <= tolerance.rms, (
        f"{name}: relative RMS error {rms:.2e} is over {tolerance.rms:.0e} (largest {largest:.2e})"
    )
    assert largest <= tolerance.largest, (
        f"{name}: largest error {largest:.2e} of the RMS is over {tolerance.largest:.0e}"
    )
