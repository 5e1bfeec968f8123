"""The page of a conversion report: one HTML file, figures inline, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from moe_runtime.conversion.figures import bars, dots, histogram

_MOST_ROWS = 2000  # of the list of tensors; the JSON file has all of them
_MOST_DOTS = 2000  # of the figure by layer, beside the worst of each layer
_LAYER = re.compile(r"\.(\d+)\.")
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --soft: #5d636b; --line: #d7dade;
  --mark: #2f6f9f; --back: #ffffff; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e7e9; --soft: #a3a8af; --line: #3b4046;
  --mark: #6fb1e0; --back: #17191c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back);
  max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p, td, th, figcaption { max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: 0.2rem 0.8rem 0.2rem 0; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
td:first-child, th:first-child, .text { text-align: left; }
th, .soft { color: var(--soft); font-weight: normal; }
svg { width: 100%; max-width: 760px; height: auto; font: 12px system-ui, sans-serif; }
svg text { fill: var(--text); } .mark { fill: var(--mark); } .grid { stroke: var(--line); }
"""


def page(report: Mapping[str, Any]) -> str:
    """The page of what `report.summarize` made."""
    totals, tensors = report["totals"], report["tensors"]
    title = "Conversion report"
    body = [
        f"<h1>{title}</h1>",
        f"<p>{_counts(totals)}</p>",
        _meta(report["meta"]),
        "<h2>By component</h2>",
        _component_table(report["components"]),
    ]
    if totals["quality"] is not None:
        body += _quality_figures(report)
    body += ["<h2>Every tensor</h2>", _tensor_table(tensors)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _counts(totals: Mapping[str, Any]) -> str:
    return (
        f"{totals['converted']} weights were converted, {totals['copied']} copied as they are, "
        f"{totals['skipped']} skipped. {_size(totals['source_bytes'])} became "
        f"{_size(totals['bytes'])}."
    )


def _quality_figures(report: Mapping[str, Any]) -> list[str]:
    tensors = {tensor["name"]: tensor for tensor in report["tensors"]}
    measured = [tensor for tensor in report["tensors"] if tensor["quality"] is not None]
    by_component = [
        (part["component"], part["quality"]["sqnr_db"])
        for part in report["components"]
        if part["quality"] is not None and part["quality"]["sqnr_db"] is not None
    ]
    worst = [tensors[name] for name in report["worst"]]
    worst_rows = [
        (tensor["name"], 100 * tensor["quality"]["relative_mse"])
        for tensor in worst
        if tensor["quality"]["relative_mse"] > 0
    ]
    scales = {
        part["component"]: part["quality"]["scale_exponents"]
        for part in report["components"]
        if part["quality"] is not None and part["quality"]["scale_exponents"]
    }
    return [
        "<h2>Signal to noise</h2>",
        "<p>10 log10 of the squared weights over the squared errors, in dB: 6 dB more is half the "
        "error. Weights drawn from a normal distribution have about 19 dB in MXFP4, 20 dB in NVFP4 "
        "and 31 dB in FP8. Where scales were searched for, the plain rule's is in brackets.</p>",
        bars(by_component, "dB", "Signal to noise by component"),
        dots(_by_layer(measured), "dB", "Signal to noise of each tensor by layer"),
        "<h2>The worst ten</h2>" if worst_rows else "",
        "<p>Squared error as a share of the squared weights.</p>" if worst_rows else "",
        bars(worst_rows, "%", "Largest relative errors"),
        "<h2>Block scales</h2>" if scales else "",
        *(_scale_figure(component, exponents) for component, exponents in scales.items()),
    ]


def _scale_figure(component: str, exponents: Mapping[str, int]) -> str:
    drawn = histogram(
        {int(exponent): count for exponent, count in exponents.items()},
        "floor(log2(scale)), tensor scales included",
        f"Histogram of block scales: {component}",
    )
    return f"<p>{escape(component)}</p>{drawn}"


def _by_layer(tensors: Sequence[Mapping[str, Any]]) -> list[tuple[int, float, str]]:
    """Layer, SQNR and name: of many tensors some of every layer, the worst of each among them."""
    points = []
    for tensor in tensors:
        layer, found = _LAYER.search(tensor["name"]), tensor["quality"]["sqnr_db"]
        if layer and found is not None:
            points.append((int(layer[1]), found, tensor["name"]))
    worst = {point[0]: point for point in sorted(points, reverse=True)}
    return sorted({*points[:: -(-len(points) // _MOST_DOTS) or 1], *worst.values()})


def _meta(meta: Mapping[str, Any]) -> str:
    rows = [
        f"<tr><td>{escape(str(key).replace('_', ' '))}</td>"
        f'<td class="text">{escape(_shown(value))}</td></tr>'
        for key, value in meta.items()
        if value not in (None, "", [], {})
    ]
    return _table("", rows)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(
            f"{key.replace('_', ' ')} {_shown(one)}"
            for key, one in value.items()
            if one not in (None, "", [], {})
        )
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def _component_table(components: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{escape(part['component'])}</td><td>{part['converted']}</td>"
        f"<td>{part['copied']}</td><td>{part['skipped']}</td><td>{_size(part['source_bytes'])}</td>"
        f"<td>{_size(part['bytes'])}</td><td>{escape(', '.join(part['formats']))}</td>"
        f"{_quality_cells(part['quality'])}</tr>"
        for part in components
    ]
    heads = ("component", "converted", "copied", "skipped", "was", "is", "formats", *_QUALITY_HEADS)
    return _table("".join(f"<th>{head}</th>" for head in heads), rows)


_QUALITY_HEADS = ("SQNR dB", "largest error", "clipped", "zero blocks")


def _quality_cells(quality: Mapping[str, Any] | None) -> str:
    if quality is None:
        return "<td>-</td>" * len(_QUALITY_HEADS)
    found = quality["sqnr_db"]
    blocks = quality["blocks"]
    plain = quality["plain_sqnr_db"]
    beside = "" if plain is None else f" ({plain:.2f})"
    cells = (
        "exact" if found is None else f"{found:.2f}{beside}",
        f"{quality['max_abs_error']:.3g}",
        f"{100 * quality['saturated_share']:.2f} %",
        f"{100 * quality['zero_blocks'] / blocks:.2f} %" if blocks else "-",
    )
    return "".join(f"<td>{cell}</td>" for cell in cells)


def _tensor_table(tensors: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        f"<tr><td>{escape(tensor['name'])}</td><td>{escape('x'.join(map(str, tensor['shape'])))}"
        f"</td><td>{escape(tensor['source_format'])}</td><td>{escape(tensor['format'] or '-')}</td>"
        f'{_quality_cells(tensor["quality"])}<td class="text soft">{escape(_outcome(tensor))}'
        "</td></tr>"
        for tensor in tensors[:_MOST_ROWS]
    ]
    heads = ("tensor", "shape", "was", "is", *_QUALITY_HEADS)
    more = len(tensors) - len(rows)
    note = f"<p>{more} more are in conversion_report.json.</p>" if more else ""
    head = "".join(f"<th>{one}</th>" for one in heads) + '<th class="text">what was done</th>'
    return _table(head, rows) + note


def _outcome(tensor: Mapping[str, Any]) -> str:
    reason = f": {tensor['reason']}" if tensor["reason"] else ""
    return f"{tensor['action']}{reason}"


def _table(head: str, rows: Sequence[str]) -> str:
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="wide"><table>{top}<tbody>{"".join(rows)}</tbody></table></div>'


def _size(nbytes: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} B"
