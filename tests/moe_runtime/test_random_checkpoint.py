"""benchmarks/write_random_checkpoint.py: the tensors of the published models, and fewer layers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from loaders.checkpoint import open_files, open_folder
from loaders.weights import load_weights
from moe_runtime.gpu.families import GPU_FAMILIES
from moe_runtime.models.registry import plan_model
from quant.formats import TARGETS
from tests.oracles import published_headers
from tests.oracles.published_headers import HeaderFiles

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
# Bytes of the main model in the published files: tensors alone, without MTP.
V4_FLASH_BYTES, V4_PRO_BYTES = 156_015_698_140, 850_748_205_004


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(
        "write_random_checkpoint", FOLDER / "write_random_checkpoint.py"
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "write_random_checkpoint", module)
    spec.loader.exec_module(module)
    return module


def headers(script, shape, layers=None):
    found, config, _ = script.described(shape, layers, None)
    return HeaderFiles(config, {entry.name: (entry.dtype, entry.shape) for entry in found})


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ("20b", lambda: published_headers.gpt_oss(layers=24, experts=32)),
        ("v3", published_headers.deepseek_v3),
        ("v4-flash", published_headers.deepseek_v4_flash),
    ],
)
def test_tensors_are_those_that_are_published(script, shape, published):
    files = published()
    mtp = ("mtp.", "model.layers.61.")
    wanted = {n: t for n, t in files.tensors.items() if not n.startswith(mtp)}
    assert headers(script, shape).tensors == wanted


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "mxfp8", "fp8-channel", "fp8-block"])
def test_experts_in_every_format_are_read(script, format):
    found, config, _ = script.described("20b", 2, format)
    files = HeaderFiles(config, {entry.name: (entry.dtype, entry.shape) for entry in found})
    with open_files(files) as checkpoint:
        plan = plan_model(checkpoint).plan
    formats = {w.format for w in plan.weights if w.name.endswith(("gate_up", "down"))}
    assert formats == {TARGETS[format]}


@pytest.mark.parametrize(
    ("shape", "nbytes"), [("v4-flash", V4_FLASH_BYTES), ("v4-pro", V4_PRO_BYTES)]
)
def test_bytes_are_the_published_ones(script, shape, nbytes):
    assert sum(entry.nbytes for entry in script.described(shape, None, None)[0]) == nbytes


@pytest.mark.parametrize(
    ("shape", "layers"), [("v4-flash", 1), ("v4-flash", 22), ("v4-pro", 10), ("v32", 5)]
)
def test_fewer_layers_can_be_opened(script, shape, layers):
    """Full width, kernels for every weight, kinds of layers in proportion."""
    with open_files(headers(script, shape, layers)) as checkpoint:
        opened = plan_model(checkpoint)
    GPU_FAMILIES[opened.config.family].formats(opened.plan)
    assert opened.config.num_layers == layers
    if (shape, layers) == ("v4-flash", 22):
        assert opened.config.compress_ratios == (0, *(4, 128) * 10, 4)
        assert opened.config.num_hash_layers == 2


def test_numbers(script, tmp_path, monkeypatch):
    """A tiny model written and read again: nothing is NaN, tables name experts that there are."""
    v4 = sys.modules["random_deepseek_v4"]
    shape = v4.Shape(4, (0, 0), 128, 2, 128, 1, 8, 256, 32, 1.5)
    monkeypatch.setitem(v4.SHAPES, "v4-flash", shape)
    for name, size in (("VOCAB", 300), ("HEAD", 64), ("OUTPUT_RANK", 128), ("INDEX_HEADS", 2)):
        monkeypatch.setattr(v4, name, size)
    arguments = ["", "--shape", "v4-flash", "--layers", "3", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    script.main()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["compress_ratios"] == [0, 0, 4]
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    weights = load_weights(
        checkpoint, opened.table, opened.config.dims, 3, device="cpu", progress=False
    )
    reference = opened.family.reference(opened.config, weights, torch.device("cpu"))
    for name in ("layers.2.moe.gate_up", "layers.2.attention.query_b", "layers.0.moe.shared_down"):
        assert 0.005 < float(reference.weight(name).std()) < 0.05
    logits = reference.head(reference.forward(torch.arange(12)))
    assert bool(torch.isfinite(logits).all())
