"""Checkpoints that come with the package, by the name that opens them."""

from collections.abc import Mapping
from pathlib import Path

BUNDLED: Mapping[str, Path] = {"demo": Path(__file__).parent / "demo"}
