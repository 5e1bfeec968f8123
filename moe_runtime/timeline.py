"""A decode step as a picture: an SVG of its own, no script, no font, nothing from outside.

Above, the whole step: a row a component, a bar a launch. Below, one layer in the middle of the
step: a strip a launch, a line a program. Pale is before a program has what it waited for (it may
load weights meanwhile), full is after.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

import torch
from torch import Tensor

from moe_runtime.gpu.step_trace import LaunchTimes, StepTrace
from moe_runtime.roofline import COMPONENTS

_COLORS = {  # Okabe and Ito's, which most eyes tell apart
    "embedding": "#999999",
    "hyper-connections": "#882255",
    "qkv": "#0072B2",
    "compressor": "#44AA99",
    "indexer": "#8C6BB1",
    "attention": "#E69F00",
    "output projection": "#56B4E9",
    "mlp": "#A6761D",
    "router": "#CC79A7",
    "experts gate_up": "#009E73",
    "experts down": "#7CC576",
    "head": "#D55E00",
    "sampling": "#F0E442",
    "other": "#444444",
}
_LEFT, _WIDTH = 150, 1400  # of the plots
_ROW, _STRIP, _GAP = 18, 64, 6
_MOST_LINES = 64  # of a strip: of more programs every n-th is drawn
_NICE = (1, 2, 5, 10)  # times a power of ten: what lies between ticks


def timeline_svg(trace: StepTrace, title: str) -> str:
    """The whole picture as text.

    title: above the picture: model, formats, GPU, context
    """
    names = [name for name in COMPONENTS if any(one.component == name for one in trace.launches)]
    layer = middle_layer(trace.launches)
    top = 70
    below = top + len(names) * _ROW + 90
    height = below + len(layer) * (_STRIP + _GAP) + 50
    step_us = (trace.end_ns - trace.begin_ns) / 1e3
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDTH + 40} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        _text(20, 28, f"{title}: one step, {step_us:.1f} us", size=16),
        _text(
            20, 50, "pale: before a program has what it waited for; full: after; hover for times"
        ),
    ]
    whole = _Axis(trace.begin_ns, trace.end_ns)
    parts += _step_rows(trace.launches, names, whole, top)
    parts += whole.ticks(top + len(names) * _ROW + 4, "us since the step began")
    if layer:
        begin = min(int(one.stamps[:, 0].min()) for one in layer)
        end = max(int(one.stamps[:, 2].max()) for one in layer)
        zoom = _Axis(begin, end)
        parts.append(_text(20, below - 16, "one layer, a line a program", size=14))
        for place, launch in enumerate(layer):
            parts += _strip(launch, zoom, below + place * (_STRIP + _GAP))
        parts += zoom.ticks(height - 42, "us since the layer's first program")
    return "\n".join([*parts, "</svg>", ""])


def middle_layer(launches: Sequence[LaunchTimes]) -> list[LaunchTimes]:
    """The launches of one layer halfway through the step: from one qkv to the next."""
    drawn = [launch for launch in launches if len(launch.stamps)]
    starts = [i for i, launch in enumerate(drawn) if launch.component == "qkv"]
    if not starts:
        return []
    middle = len(starts) // 2
    heads = [i for i, launch in enumerate(drawn) if launch.component == "head"]
    return drawn[starts[middle] : [*starts, *heads, len(drawn)][middle + 1]]


class _Axis:
    """Times to places on the page."""

    def __init__(self, begin_ns: int, end_ns: int) -> None:
        self.begin, self.length = begin_ns, max(1, end_ns - begin_ns)

    def x(self, ns: int) -> float:
        return _LEFT + _WIDTH * (ns - self.begin) / self.length

    def bar(self, first: int, last: int, y: float, high: float, color: str, pale: bool) -> str:
        left, right = self.x(first), self.x(last)
        opacity = ' opacity="0.35"' if pale else ""
        wide = max(right - left, 0.4)  # at least a hairline
        return (
            f'<rect x="{left:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{high:.2f}" '
            f'fill="{color}"{opacity}/>'
        )

    def us(self, ns: int) -> float:
        return (ns - self.begin) / 1e3

    def ticks(self, y: float, label: str) -> Iterator[str]:
        length_us = self.length / 1e3
        scale = 10.0 ** (len(str(int(length_us))) - 2)
        step = next(nice * scale for nice in _NICE if length_us / (nice * scale) <= 14)
        for i in range(int(length_us / step) + 1):
            x = self.x(self.begin + int(1e3 * i * step))
            yield f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#444444"/>'
            yield _text(x, y + 18, f"{i * step:g}", anchor="middle")
        yield _text(_LEFT + _WIDTH, y + 34, label, anchor="end")


def _step_rows(
    launches: Sequence[LaunchTimes], names: Sequence[str], axis: _Axis, top: float
) -> Iterator[str]:
    for place, name in enumerate(names):
        y = top + place * _ROW
        yield _text(_LEFT - 8, y + 13, name, anchor="end")
        yield (
            f'<line x1="{_LEFT}" y1="{y + _ROW}" x2="{_LEFT + _WIDTH}" y2="{y + _ROW}" '
            'stroke="#dddddd"/>'
        )
        for launch in launches:
            if launch.component == name and len(launch.stamps):
                yield from _bars(launch, axis, y + 2, _ROW - 4)


def _bars(launch: LaunchTimes, axis: _Axis, y: float, high: float) -> Iterator[str]:
    """All programs of a launch as one bar."""
    start, ready = int(launch.stamps[:, 0].min()), int(launch.stamps[:, :2].amax(1).min())
    end = int(launch.stamps[:, 2].max())
    color = _COLORS[launch.component]
    yield f"<g>{_hover(launch, axis, start, ready, end)}"
    yield axis.bar(start, ready, y, high, color, pale=True)
    yield axis.bar(ready, end, y, high, color, pale=False)
    yield "</g>"


def _strip(launch: LaunchTimes, axis: _Axis, y: float) -> Iterator[str]:
    """A launch's programs under each other, by their start."""
    programs = _sample(launch.stamps)
    high = _STRIP / len(programs)
    color = _COLORS[launch.component]
    yield _text(_LEFT - 8, y + _STRIP / 2, launch.component, anchor="end")
    yield _text(_LEFT - 8, y + _STRIP / 2 + 15, f"{len(launch.stamps)} programs", anchor="end")
    for place, (start, waited, end) in enumerate(programs.tolist()):
        ready = max(start, waited)
        line = y + place * high
        yield f"<g>{_hover(launch, axis, start, ready, end)}"
        yield axis.bar(start, ready, line, 0.85 * high, color, pale=True)
        yield axis.bar(ready, end, line, 0.85 * high, color, pale=False)
        yield "</g>"


def _sample(stamps: Tensor) -> Tensor:
    """At most _MOST_LINES programs, evenly taken, by their start."""
    ordered = stamps[stamps[:, 0].argsort(stable=True)]
    if len(ordered) <= _MOST_LINES:
        return ordered
    return ordered[torch.linspace(0, len(ordered) - 1, _MOST_LINES).round().long()]


def _hover(launch: LaunchTimes, axis: _Axis, start: int, ready: int, end: int) -> str:
    times = ", ".join(
        f"{what} {axis.us(ns):.2f}"
        for what, ns in (("starts", start), ("ready", ready), ("ends", end))
    )
    return f"<title>{escape(launch.component)} ({escape(launch.kernel)}): {times} us</title>"


def _text(x: float, y: float, text: str, *, size: int = 12, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="#222222">{escape(text)}</text>'
    )
