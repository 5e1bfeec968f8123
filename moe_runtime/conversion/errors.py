"""What stops a conversion, and the names by which a person may insist. No torch here."""

from __future__ import annotations

from loaders.errors import CheckpointError

# Name for --allow -> what it permits.
REFUSALS = {
    "non-finite": "NaN or infinity in a tensor; in a converted one NaN becomes 0 and infinity the "
    "largest finite value, a copied one stays as it is",
    "zero-scales": "scales of zero over codes that are not zero (never written by the tool)",
    "gate-up-scales": "gate and up of an expert with different tensor scales (engines that fuse "
    "them use one for both)",
    "router": "layers with experts and no router that can be told by name, or a quantized router",
    "missing-tensors": "layers or experts that config.json promises and the files do not have",
    "different-experts": "experts of one layer that differ in shape or number format",
    "model": "names, shapes or a config.json that are not those of the model family that "
    "config.json names",
    "requantize": "weights that are in a 4-bit format already and lose precision a second time",
}


class ConversionError(CheckpointError):
    """A conversion cannot begin or go on; what is done already is kept where that is possible."""


def refused(name: str, problem: str) -> ConversionError:
    """The error for one of the named refusals."""
    assert name in REFUSALS, name
    return ConversionError(problem, hint=f"--allow {name} converts anyway: {REFUSALS[name]}")
