"""The page of a conversion report: one HTML file, figures inline, nothing loaded from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(report: Mapping[str, Any]) -> str:
    """The page of what `report.summarize` made."""
    return f"<!doctype html><title>Conversion report</title><p>{len(report['tensors'])} tensors"
