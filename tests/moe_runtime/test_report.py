"""The report of a conversion: what both files say, and that they say it alike."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from moe_runtime.conversion.figures import bars, dots, histogram
from moe_runtime.conversion.report import TensorRecord, summarize, write_report
from moe_runtime.conversion.report_html import _by_layer
from quant.codecs import encode
from quant.formats import MXFP4
from quant.quality import measure, merge

META = {"source": "org/<model>", "target": "mxfp4", "revision": None}
VOID = {"meta", "rect", "line", "circle"}


def record(number: int, scale: float = 1.0) -> TensorRecord:
    """A converted weight; a larger `scale` spreads its numbers and so its errors."""
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(number))
    weight = weight * torch.exp(scale * weight.abs())
    return TensorRecord(
        name=f"model.layers.{number}.mlp.experts.0.up_proj.weight",
        component="experts",
        action="converted",
        shape=(32, 64),
        source_format="bf16",
        format="mxfp4",
        source_bytes=4096,
        bytes=1088,
        quality=measure(weight, encode(weight, MXFP4)),
    )


@pytest.fixture
def records() -> list[TensorRecord]:
    kept = TensorRecord("model.norm.weight", "norm", "copied", (64,), "bf16", "bf16", 128, 128,
                        reason="norms stay as they are")  # fmt: skip
    left = TensorRecord("model.x.k_scale", "other", "skipped", (1,), "fp32", "", 4, 0,
                        reason="scale of a <KV> cache")  # fmt: skip
    return [record(i, 0.1 * i) for i in range(12)] + [kept, left]


class Page(HTMLParser):
    """The text of a page, its tags balanced, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.loads: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in VOID or tag in ("rect", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_json_has_every_figure(tmp_path, records):
    report = write_report(tmp_path, records, META)
    saved = json.loads((tmp_path / "conversion_report.json").read_text())
    assert saved == report and saved["meta"] == META
    totals = saved["totals"]
    assert (totals["converted"], totals["copied"], totals["skipped"]) == (12, 1, 1)
    assert totals["source_bytes"] == 12 * 4096 + 132 and totals["bytes"] == 12 * 1088 + 128
    expected = merge(r.quality for r in records if r.quality)
    assert totals["quality"]["sqnr_db"] == expected.sqnr_db
    assert [part["component"] for part in saved["components"]] == ["experts", "norm", "other"]
    assert saved["components"][1]["quality"] is None
    losses = {r.name: r.quality.relative_mse for r in records if r.quality}
    assert saved["worst"] == sorted(losses, key=losses.get, reverse=True)[:10]
    assert [TensorRecord.from_dict(entry) for entry in saved["tensors"]] == records


def test_the_page_stands_alone_and_says_the_same(tmp_path, records):
    write_report(tmp_path, records, META)
    text = (tmp_path / "conversion_report.html").read_text()
    page = Page(text)
    assert page.loads == [] and "script" not in page.count and "://" not in text
    assert page.count["svg"] == 4
    words = "\n".join(page.text)
    for expected in ("org/<model>", "scale of a <KV> cache", "12 weights were converted",
                     "norms stay as they are", "49.28 kB became 13.18 kB"):  # fmt: skip
        assert expected in words, expected
    for one in records:
        assert one.name in words
        if one.quality:
            assert f"{one.quality.sqnr_db:.2f}" in words
    exponents = merge(r.quality for r in records if r.quality).scale_exponents
    low, high = min(exponents), max(exponents)
    for number in range(low, high + 1):
        assert f"{number}: {exponents.get(number, 0)} blocks" in words


def test_every_layer_of_a_large_model_is_in_the_figure():
    """45,000 tensors are too many dots; the first 2,000 would be those of the first layers."""
    layers, experts = 40, 300
    tensors = [
        {
            "name": f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
            "quality": {"sqnr_db": 10.0 + (expert * 7) % experts},
        }
        for layer in range(layers)
        for expert in range(experts)
    ]
    points = _by_layer(tensors)
    assert 2000 <= len(points) <= 2000 + layers
    for layer in range(layers):
        found = [decibels for number, decibels, _ in points if number == layer]
        assert len(found) >= 49 and min(found) == 10.0, layer


def test_scales_are_drawn_by_component(tmp_path, records):
    other = replace(records[0], name="model.layers.0.self_attn.q_proj.weight", component="<att>")
    write_report(tmp_path, [*records, other], META)
    text = (tmp_path / "conversion_report.html").read_text()
    Page(text)
    for component in ("experts", "&lt;att&gt;"):
        assert text.count(f"Histogram of block scales: {component}") == 1


def test_the_same_records_give_the_same_bytes(tmp_path, records):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_report(tmp_path / name, records, META)
    for file in ("conversion_report.json", "conversion_report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_nothing_converted(tmp_path, records):
    report = write_report(tmp_path, records[-2:], META)
    assert report["totals"]["quality"] is None and report["worst"] == []
    assert Page((tmp_path / "conversion_report.html").read_text()).count.get("svg") is None
    assert summarize([], {})["components"] == []


def test_figures_are_to_scale():
    drawn = bars([("half", 5.0), ("all", 10.0), ("none", 0.0)], "dB", "title")
    widths = [float(part.split('"')[1]) for part in drawn.split("<rect")[1:]
              for part in [part[part.index("width") :]]]  # fmt: skip
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1) and widths[2] == 0
    columns = histogram({-3: 30, -1: 60, 0: 10}, "x", "title")
    heights = [float(part[part.index("height") :].split('"')[1])
               for part in columns.split("<rect")[1:]]  # fmt: skip
    assert heights[0] == pytest.approx(heights[2] / 2, abs=0.1) and heights[1] == 0
    points = dots([(0, 10.0, "a"), (1, 20.0, "b"), (2, 15.0, "c")], "dB", "title")
    y = [float(part[part.index("cy") :].split('"')[1]) for part in points.split("<circle")[1:]]
    assert y[1] < y[2] < y[0] and y[2] == pytest.approx((y[0] + y[1]) / 2, abs=0.1)
    assert bars([], "", "") == histogram({}, "", "") == dots([], "", "") == ""
