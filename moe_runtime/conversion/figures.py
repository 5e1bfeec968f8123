"""Figures as inline SVG, from plain numbers: bars, a histogram, one dot for each tensor by layer.

Colours come from the page's style, so that the figures follow its light or dark theme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_ROW = 22  # height of a bar and the space after it
_LABEL = 300  # width of the names
_WIDTH = 760
_VALUE = 80  # width of the numbers after the bars
_HEIGHT = 220  # of figures with axes
_MARGIN = 46
_TOP = 26  # above the axes, for what they count


def bars(rows: Sequence[tuple[str, float]], unit: str, title: str) -> str:
    """Horizontal bars from zero, one for each (name, value)."""
    if not rows:
        return ""
    longest = max(value for _, value in rows) or 1.0
    room = _WIDTH - _LABEL - _VALUE
    parts = []
    for i, (name, value) in enumerate(rows):
        y = i * _ROW
        width = max(0.0, value) / longest * room
        shown = escape(name if len(name) < 46 else "..." + name[-42:])
        parts.append(
            f'<text x="{_LABEL - 8}" y="{y + 14}" text-anchor="end">{shown}</text>'
            f'<rect class="mark" x="{_LABEL}" y="{y + 3}" width="{width:.1f}" height="15">'
            f"<title>{escape(name)}: {value:.4g} {unit}</title></rect>"
            f'<text x="{_LABEL + width + 6:.1f}" y="{y + 14}">{value:.4g} {unit}</text>'
        )
    return _svg("".join(parts), len(rows) * _ROW, title)


def histogram(counts: Mapping[int, int], x_label: str, title: str) -> str:
    """Columns over whole numbers, their heights the shares of all counts."""
    if not counts:
        return ""
    total = sum(counts.values())
    low, high = min(counts), max(counts)
    tallest = max(counts.values()) / total
    step = (_WIDTH - 2 * _MARGIN) / (high - low + 1)
    every = max(1, round((high - low + 1) / 20))
    parts = [_y_axis(100 * tallest, "% of blocks")]
    for number in range(low, high + 1):
        share = counts.get(number, 0) / total
        height = share / tallest * (_HEIGHT - _MARGIN - _TOP)
        x = _MARGIN + (number - low) * step
        y = _HEIGHT - _MARGIN - height
        parts.append(
            f'<rect class="mark" x="{x + 0.5:.1f}" y="{y:.1f}" width="{max(step - 1, 0.5):.1f}" '
            f'height="{height:.1f}"><title>{number}: {counts.get(number, 0)} blocks, '
            f"{100 * share:.3g} %</title></rect>"
        )
        if (number - low) % every == 0:
            parts.append(_x_number(x + step / 2, number))
    parts.append(_x_label(x_label))
    return _svg("".join(parts), _HEIGHT, title)


def dots(points: Sequence[tuple[int, float, str]], y_label: str, title: str) -> str:
    """One dot for each (layer, value, name); the axis begins below the smallest value."""
    if not points:
        return ""
    values = [value for _, value, _ in points]
    low, high = min(values), max(values)
    pad = max((high - low) * 0.1, 0.5)
    low, high = low - pad, high + pad
    layers = max(layer for layer, _, _ in points) + 1
    step = (_WIDTH - 2 * _MARGIN) / layers
    room = _HEIGHT - _MARGIN - _TOP
    parts = []
    for fraction in (0.0, 0.5, 1.0):
        y = _TOP + room * (1 - fraction)
        parts.append(_grid_line(y, f"{low + fraction * (high - low):.1f}"))
    for layer, value, name in points:
        x = _MARGIN + (layer + 0.5) * step
        y = _TOP + room * (high - value) / (high - low)
        parts.append(
            f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill-opacity="0.6">'
            f"<title>{escape(name)}: {value:.2f}</title></circle>"
        )
    for layer in range(0, layers, max(1, round(layers / 20))):
        parts.append(_x_number(_MARGIN + (layer + 0.5) * step, layer))
    parts.append(_x_label("layer"))
    parts.append(f'<text x="2" y="9">{escape(y_label)}</text>')
    return _svg("".join(parts), _HEIGHT, title)


def _svg(inner: str, height: int, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(title, quote=True)}">'
        f"{inner}</svg>"
    )


def _y_axis(top: float, label: str) -> str:
    room = _HEIGHT - _MARGIN - _TOP
    lines = [_grid_line(_TOP + room * (1 - f), f"{top * f:.3g}") for f in (0.0, 0.5, 1.0)]
    return "".join(lines) + f'<text x="2" y="9">{escape(label)}</text>'


def _grid_line(y: float, text: str) -> str:
    return (
        f'<line class="grid" x1="{_MARGIN}" x2="{_WIDTH - _MARGIN}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text x="{_MARGIN - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _x_number(x: float, number: int) -> str:
    y = _HEIGHT - _MARGIN + 15
    return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{number}</text>'


def _x_label(text: str) -> str:
    y = _HEIGHT - _MARGIN + 34
    return f'<text x="{_WIDTH / 2}" y="{y}" text-anchor="middle">{escape(text)}</text>'
