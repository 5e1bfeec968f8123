"""Choosing a backend: what is refused, and when kernels are compiled beside the loading."""

from dataclasses import replace

import pytest
import torch

from loaders.checkpoint import open_folder
from loaders.errors import UnsupportedModelError
from moe_runtime import backends
from moe_runtime.errors import DoesNotFitError
from moe_runtime.gpu import gpt_oss
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, MoreBytes, weights_by_component
from quant.formats import BF16, FORMATS, MXFP4
from tests.oracles.expert_formats import quantize_dense, write_with_experts
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_gpt_oss(folder, layers=2)
    checkpoint = open_folder(folder)
    return checkpoint, plan_model(checkpoint)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backend": "onnx"}, "backend must be auto, reference or triton, got 'onnx'"),
        ({"device": "gpu"}, "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ({"device": "cuda:x"}, "got 'cuda:x'"),
        ({"device": "cuda:99"}, r"device 'cuda:99': this machine has \d+ CUDA GPUs"),
        ({"device": "cpu", "dtype": "bf16"}, "dtype must be auto or fp32 for the reference"),
        ({"device": "cpu", "backend": "triton"}, "compute capability 8.0 or more, got cpu"),
        ({"device": "cpu", "max_context": 10**9}, "max_context must be from 1 to 131072"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_refusals(opened, arguments, message):
    checkpoint, model = opened
    with pytest.raises(ValueError, match=message):
        backends.create_backend(checkpoint, model, progress=False, **arguments)


@pytest.mark.parametrize("roomy", [True, False])
def test_kernels_compile_beside_the_loading_where_there_is_room(opened, monkeypatch, roomy):
    _, model = opened
    plan = MemoryPlan(model.config, weights_by_component(model.plan.nbytes), 4096)
    free = plan.total_bytes + (plan.compile_bytes if roomy else plan.compile_bytes - 1)
    order = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty cache"))

    def compile_kernels(config, max_context, device, formats, dense_format, *, tiled):
        assert dense_format is None and not tiled
        assert formats == ((MXFP4, MXFP4),)
        if roomy:  # the loading goes on meanwhile
            while "load" not in order:
                pass
        order.append("compile")

    monkeypatch.setattr(backends, "compile_kernels", compile_kernels)

    def load():
        order.append("load")
        return {"head": torch.zeros(1)}

    weights = backends._compile_and_load(
        plan, torch.device("cuda"), load, gpt_oss.expert_formats(model.plan)
    )
    assert list(weights) == ["head"]
    assert order == (["load", "compile"] if roomy else ["compile", "empty cache", "load"])


@pytest.mark.parametrize("missing", [0, 1])
def test_where_tiles_do_not_fit_the_chain_of_kernels_runs_and_that_is_said(
    opened, monkeypatch, capsys, missing
):
    _, model = opened
    tiles = 123 << 20
    weight_bytes = weights_by_component(model.plan.nbytes)
    needed = MemoryPlan(model.config, weight_bytes, 4096).total_bytes
    asked = []

    def more(target, tiled):
        asked.append(tiled)
        return MoreBytes(tiles if tiled else 0, 0)

    free = needed + tiles - missing
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
    place = (model.config, weight_bytes, torch.device("cuda"), 4096, more)
    plan = backends._fit_gpu(*place)
    said = capsys.readouterr().err
    if missing:
        assert plan.more.tiles == 0 and plan.max_context == 4096
        assert said.count("chain of kernels") == 1 and "0.13 GB more" in said
        free = needed - 1
        with pytest.raises(DoesNotFitError):
            backends._fit_gpu(*place)
    else:
        assert plan.more.tiles == tiles and said == "" and asked == [True]


@pytest.mark.parametrize("format", [BF16.name, "nvfp4", "fp8_block128"])
def test_the_formats_to_compile_for_are_those_of_the_layers(tmp_path, format):
    write_with_experts(tmp_path, format, layers=2)
    plan = plan_model(open_folder(tmp_path)).plan
    assert gpt_oss.expert_formats(plan) == ((FORMATS[format], FORMATS[format]),)


def test_dense_weights_without_gpu_kernels_are_named(tmp_path):
    write_with_experts(tmp_path, MXFP4.name, layers=1)
    quantize_dense(tmp_path, "weight_scale")
    plan = plan_model(open_folder(tmp_path)).plan
    with pytest.raises(UnsupportedModelError, match="no GPU kernels for it in fp8_block128") as no:
        gpt_oss.expert_formats(plan)
    assert "layers.0.attention.qkv" in no.value.message and "reference" in no.value.hint


def test_4_bit_gate_up_and_8_bit_down_are_refused(tmp_path):
    """The first half's kernel leaves its vector in the form that the second half's reads."""
    write_with_experts(tmp_path, MXFP4.name, layers=1)
    plan = plan_model(open_folder(tmp_path)).plan
    weights = []
    for weight in plan.weights:
        if weight.name.endswith(".down"):
            tensor = replace(weight.pieces[0].tensor, format=FORMATS["mxfp8"])
            weight = replace(weight, pieces=(replace(weight.pieces[0], tensor=tensor),))
        weights.append(weight)
    with pytest.raises(UnsupportedModelError, match="gate_up is in mxfp4 and down in mxfp8"):
        gpt_oss.expert_formats(replace(plan, weights=tuple(weights)))
