"""A step's time by component from stamps that were made up, its table and its picture."""

import re
import xml.etree.ElementTree as ET

import pytest
import torch

from moe_runtime import benchmark, roofline
from moe_runtime.cli import run
from moe_runtime.gpu import gpt_oss
from moe_runtime.gpu.step_trace import LaunchTimes, StepTrace, named
from moe_runtime.roofline import COMPONENTS, WAITING
from moe_runtime.timeline import middle_layer, timeline_svg

BEGIN = 5_000_000


def launch(component, *programs):
    """programs: (start, ready, end) in ns since the step began."""
    stamps = torch.tensor(programs, dtype=torch.int64).reshape(-1, 3)
    return LaunchTimes(
        component, f"_{component}_kernel", torch.where(stamps > 0, stamps + BEGIN, 0)
    )


@pytest.fixture
def trace():
    """Embedding 2 us; qkv ready at 2, done at 10; attention waits 1 us and takes 4; and so on."""
    layer = [
        launch("qkv", (500, 2000, 9000), (600, 2100, 10000)),
        launch("attention", (4000, 11000, 15000), (4100, 11200, 13000)),
        launch("output projection", (11000, 15500, 17000)),
        launch("router", (15600, 17500, 18000), (18100, 18200, 19000)),
        launch("experts gate_up", (17600, 19000, 30000)),
        launch("experts down"),  # no program had work
        launch("head", (29000, 31000, 50000)),
    ]
    return StepTrace(BEGIN, BEGIN + 60_000, tuple(layer))


def test_the_parts_are_the_step(trace):
    times, ahead = roofline.attributed(trace)
    assert times == {
        "embedding": 2000, "qkv": 8000, "attention": 4000, "output projection": 1500,
        "router": 1500, "experts gate_up": 11000, "head": 19000, "sampling": 10000,
        "waiting": 1000 + 500 + 500 + 0 + 1000,
    }  # fmt: skip
    assert sum(times.values()) == 60_000
    assert ahead["attention"] == 6000 and ahead["head"] == 1000 and ahead["qkv"] == 0


def test_rates_and_the_table(trace):
    read = {"qkv": 16_000_000, "head": 38_000_000}
    found = roofline.roofline(trace, read, context=128, read_gbps=3000.0, plain_us=58.0)
    rows = {row.component: row for row in found.components}
    assert rows["qkv"].gbps == pytest.approx(2000) and rows["qkv"].us == pytest.approx(8)
    assert rows["qkv"].bandwidth_share == pytest.approx(2 / 3)
    assert rows["head"].share_of_step == pytest.approx(19 / 60)
    assert rows["attention"].ahead_us == pytest.approx(6)
    assert rows["experts down"].us == 0 and rows["experts down"].launches == 1
    assert "other" not in rows
    assert found.least_us == pytest.approx(18.0) and found.step_us == 60
    lines = found.table().splitlines()
    assert lines[0].startswith("one step at context 128: 58.0 us, 60.0 us with stamps; 54.0 MB, 18")
    (qkv,) = [line for line in lines if line.startswith("qkv")]
    assert qkv.split() == ["qkv", "1", "16.00", "8.0", "13.3", "%", "2000", "66.7", "%", "0.00"]
    assert lines[-1].split() == ["step", "7", "54.00", "60.0", "100.0", "%", "900", "30.0", "%"]


def test_bytes_are_those_of_the_plan():
    class Layer:
        qkv, out = torch.zeros(6, 2), torch.zeros(2, 2)
        gate_up, down = torch.zeros(4, 2), torch.zeros(2, 2)

    plan = {
        "embedding": 7,
        "attention": 1000,
        "router": 30,
        "experts": 900,
        "norms": 5,
        "head": 400,
    }
    read = gpt_oss.component_bytes({**plan, "cache": 64}, Layer)
    assert sum(read.values()) == sum(plan.values()) + 64
    assert read["qkv"] == 755 and read["output projection"] == 250
    assert read["experts gate_up"] == 600 and read["attention"] == 64


def test_launches_are_named_by_the_weight_that_they_read():
    class Launch:
        kernel = "_gemv_kernel"
        parts = ()
        stamps = torch.tensor([[[1, 2, 3]], [[1, 0, 0]]])  # the second program had no work

        def __init__(self, *operands):
            self.operands = frozenset(operands)

    found = list(named([Launch(1, 77), Launch(88, 2), Launch(3)], {77: "qkv", 88: "head"}))
    assert [one.component for one in found] == ["qkv", "head", "other"]
    assert found[0].stamps.tolist() == [[1, 2, 3]]
    several = Launch(77)
    several.parts = ("router", "head")
    several.stamps = torch.tensor([[[1, 2, 3], [4, 5, 6]], [[1, 0, 0], [4, 5, 7]]])
    router, head = named([several], {77: "qkv"})
    assert (router.component, head.component) == ("router", "head")
    assert router.stamps.tolist() == [[1, 2, 3]] and len(head.stamps) == 2


def test_the_picture(trace):
    text = timeline_svg(trace, "a <model> & more")
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"href|url\(|@import|<script", text)
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <model> & more: one step, 60.0 us" in words
    assert {"qkv", "attention", "head", "2 programs"} <= set(words)
    titles = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    # six launches with work in the step, eight programs in the layer
    assert len(titles) == 6 + 8
    assert titles[0] == "qkv (_qkv_kernel): starts 0.50, ready 2.00, ends 10.00 us"
    bars = [r for r in root.iter("{http://www.w3.org/2000/svg}rect") if r.get("x")]
    pale, full = bars[0], bars[1]
    assert pale.get("opacity") and not full.get("opacity")
    # 60 us are 1,400 wide from 150 on
    assert float(full.get("x")) == pytest.approx(150 + 1400 * 2 / 60, abs=0.01)
    assert float(full.get("width")) == pytest.approx(1400 * 8 / 60, abs=0.01)
    left, _, width, height = map(float, root.get("viewBox").split())
    for bar in bars:
        assert (
            left < float(bar.get("x")) and float(bar.get("y")) + float(bar.get("height")) < height
        )
        assert float(bar.get("x")) + float(bar.get("width")) <= width


def test_every_component_can_be_drawn():
    names = [name for name in COMPONENTS if name != WAITING]
    launches = tuple(launch(name, (i, i + 1, i + 2)) for i, name in enumerate(names, 1))
    text = timeline_svg(StepTrace(BEGIN, BEGIN + 99_000, launches), "all")
    assert all(f">{name}<" in text for name in names)


def test_of_many_programs_some_are_drawn():
    stamps = torch.arange(3000)[:, None] + torch.tensor([1, 10, 900])
    many = LaunchTimes("qkv", "k", stamps + BEGIN)
    trace = StepTrace(BEGIN, BEGIN + 5000, (many, launch("head", (4000, 4100, 4200))))
    text = timeline_svg(trace, "many")
    assert text.count("<title>") == 2 + 64 and "3000 programs" in text


def test_the_layer_in_the_middle():
    layers = [launch(name, (i, i + 1, i + 2)) for i, name in enumerate(["qkv", "router"] * 3, 1)]
    found = middle_layer([*layers, launch("head", (9, 10, 11))])
    assert [one.stamps[0, 0].item() - BEGIN for one in found] == [3, 4]
    assert middle_layer([launch("head", (1, 2, 3))]) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_it_needs_a_gpu(capsys):
    for option in (["--roofline"], ["--timeline", "x.svg"]):
        assert run(["bench", "demo", *option]) == 1
        assert "need a CUDA GPU" in capsys.readouterr().err


def test_rows_of_the_csv(trace, tmp_path):
    parts = roofline.roofline(trace, {"head": 1}, context=128, read_gbps=3e3, plain_us=58.0)
    report = benchmark.BenchReport("gpu", "triton", "dense=bf16", 3000.0, [], [parts])
    report.append_csv(tmp_path / "rows.csv", "m")
    lines = (tmp_path / "rows.csv").read_text().splitlines()
    assert any(line.endswith(",128,step_experts_gate_up_us,11,us") for line in lines)
    assert report.as_dict("m")["rooflines"][0]["components"][0]["component"] == "embedding"
    assert "one step at context 128" in report.table()
