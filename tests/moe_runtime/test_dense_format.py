"""Dense weights packed to FP8 while loading: what is planned is held, and it computes right.

The kernels run in Triton's interpreter with fp32 activations, against the reference with the same
packed weights; the reference itself is held against the weights as published.
"""

import json
from dataclasses import replace

import pytest
import torch

from kernels import moe_gemv
from kernels.reference.gemv import gemv as gemv_twin
from loaders.checkpoint import open_folder
from loaders.errors import UnsupportedModelError
from loaders.logical import logical_tensors
from loaders.weights import load_weights
from moe_runtime import MoeModel, dense_format
from moe_runtime.cli import run
from moe_runtime.decode import ModelWeights, zero_weights
from moe_runtime.errors import DoesNotFitError
from moe_runtime.models.gpt_oss import GptOssReference
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import MemoryPlan, MoreBytes, fit, weights_by_component
from moe_runtime.planning.components import by_component
from moe_runtime.planning.variants import variants
from moe_runtime.reference_backend import ReferenceBackend
from moe_runtime.sampling import SamplingParams
from moe_runtime.triton_backend import TritonBackend
from quant.formats import FP8_ROW
from quant.tensor import QuantTensor
from tests.oracles.expert_formats import quantize_dense, write_with_experts
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import assert_close

CPU = torch.device("cpu")
IDS = [5, 39, 3, 32, 17, 8, 24, 1, 2, 37, 31]
on_cpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter; tests/gpu covers machines with a GPU"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    write_tiny_gpt_oss(
        path, layers=2, d=32, f=32, heads=2, kv=1, hd=16, window=6,
        vocab=40, experts=5, topk=2,
    )  # fmt: skip
    return path


def loaded(folder):
    """The opened model and its weights, packed."""
    with open_folder(folder) as checkpoint:
        opened = plan_model(checkpoint)
        config = opened.config
        weights = load_weights(
            checkpoint, opened.table, config.dims, config.num_layers, device="cpu", progress=False
        )
    names = dense_format.packed_names(opened.plan, config.family, "fp8")
    return opened, dense_format.pack(weights, names)


def plan_of(opened):
    return MemoryPlan(opened.config, weights_by_component(opened.plan.nbytes), 64)


@pytest.fixture(scope="module")
def pair(folder):
    opened, weights = loaded(folder)
    plan = plan_of(opened)
    wide = {n: w.float() if isinstance(w, torch.Tensor) else w for n, w in weights.items()}
    reference = ReferenceBackend(GptOssReference(opened.config, weights, CPU), plan)
    triton = TritonBackend(opened.config, wide, plan, CPU, cache_dtype=torch.float32)
    return reference, triton


def test_what_is_planned_is_what_is_held(folder):
    opened, weights = loaded(folder)
    packed = {name for name, weight in weights.items() if getattr(weight, "format", 0) is FP8_ROW}
    ends = [f"layers.{i}.attention.{name}" for i in range(2) for name in ("qkv", "out")]
    assert packed == {*ends, "head"}
    held = {name: weight.nbytes for name, weight in weights.items()}
    assert dense_format.bytes_as_loaded(opened.plan, packed) == held
    # and what `plan` says it would be
    with open_folder(folder) as checkpoint:
        groups = by_component(logical_tensors(checkpoint), opened.config.num_layers)
    row = next(v for v in variants(opened.config, groups) if v.name == "dense fp8")
    assert row.weight_bytes == weights_by_component(held)
    spare = dense_format.packing_bytes(opened.plan, packed) - dense_format.ENCODING_BYTES
    assert spare == sum(opened.plan.nbytes.values()) - sum(held.values()) > 0
    assert dense_format.packing_bytes(opened.plan, ()) == 0


def test_memory_while_packing_is_part_of_the_fit(folder):
    opened, _ = loaded(folder)
    weight_bytes = weights_by_component(opened.plan.nbytes)
    room = 10**9
    plan = replace(plan_of(opened), more=MoreBytes(packing=room))
    assert plan.total_bytes > plan_of(opened).total_bytes
    options = {"max_context": 64, "device": "gpu", "more": MoreBytes(packing=room)}
    assert fit(opened.config, weight_bytes, free_bytes=plan.total_bytes, **options) == plan
    with pytest.raises(DoesNotFitError):
        fit(opened.config, weight_bytes, free_bytes=plan.total_bytes - 1, **options)


def test_packed_in_the_file_stays(tmp_path):
    write_with_experts(tmp_path, "mxfp4", layers=1)
    quantize_dense(tmp_path, "weight_scale")
    with open_folder(tmp_path) as checkpoint:
        plan = plan_model(checkpoint).plan
    assert dense_format.packed_names(plan, "gpt_oss", "fp8") == frozenset()


def test_refusals(folder):
    with pytest.raises(ValueError, match="dense_format must be as-published or fp8, got 'int4'"):
        MoeModel.from_pretrained(folder, dense_format="int4")
    with open_folder(folder) as checkpoint:
        plan = plan_model(checkpoint).plan
    with pytest.raises(UnsupportedModelError, match="not there for deepseek_v3 models"):
        dense_format.packed_names(plan, "deepseek_v3", "fp8")
    assert dense_format.packed_names(plan, "deepseek_v3", "as-published") == frozenset()


@on_cpu
def test_prefill(pair):
    reference, triton = pair
    assert_close(triton.logits(IDS), reference.logits(IDS), "moe_gemv_mxfp4")


@on_cpu
def test_decode_and_a_wrong_scale(pair, monkeypatch):
    """Logits of a step after a prompt; then one scale of the head is 1 % off."""
    for rows in ("GATE_UP_ROWS", "DOWN_ROWS"):  # the interpreter's time is programs, not rows
        monkeypatch.setattr(moe_gemv, rows, 16, raising=False)
    reference, triton = pair
    greedy = SamplingParams(temperature=0.0)
    new = [t.token_id for t in triton.decode(IDS, greedy, max_new_tokens=2)]
    expected = reference.logits(IDS + new[:-1])[-1]
    assert_close(triton._step.logits, expected, "moe_gemv_mxfp4")
    scales = triton._step.weights.head.scales
    row = int(expected.abs().argmax())
    kept = scales[row].clone()
    scales[row] *= 1.01
    try:
        triton._step.sample_residual(filtered=False)
        with pytest.raises(AssertionError, match="moe_gemv_mxfp4"):
            assert_close(triton._step.logits, expected, "moe_gemv_mxfp4")
    finally:
        scales[row] = kept


@on_cpu
@pytest.mark.parametrize("name", ["qkv", "out"])
def test_products_of_prefill_and_a_wrong_scale(pair, name):
    _, triton = pair
    prompts = triton._prefill._prompts
    layer = prompts.weights.layers[1]
    weight, bias = getattr(layer, name), getattr(layer, f"{name}_bias")
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
    rows = [gemv_twin(row, weight, torch.empty(weight.shape[0]), bias=bias) for row in x]
    expected = torch.stack(rows)
    assert_close(prompts._project(x, weight, bias), expected, "gemv")
    scales = weight.scales.clone()
    scales[3] *= 1.01
    with pytest.raises(AssertionError, match="gemv"):
        wrong = prompts._project(x, replace(weight, scales=scales), bias)
        assert_close(wrong, expected, "gemv")


def test_against_the_weights_as_published():
    with (
        MoeModel.from_pretrained("demo", device="cpu", max_context=64) as published,
        MoeModel.from_pretrained(
            "demo", device="cpu", max_context=64, dense_format="fp8"
        ) as packed,
    ):
        assert packed.plan.format_label == "dense=fp8 experts=mxfp4"
        assert published.plan.format_label == "dense=bf16 experts=mxfp4"
        assert packed.plan.weight_bytes["embedding"] == published.plan.weight_bytes["embedding"]
        ids = packed.tokenizer.encode("It was a dark night, and the old man stood at the door.")
        logits, expected = packed.logits(ids), published.logits(ids)
        error = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert_close(logits, expected, "dense_fp8")
        assert error > 1e-3  # it was packed


def test_option_of_the_command_line(folder, capsys):
    arguments = ["--context", "4", "--tokens", "8", "--repeats", "1", "--prompt-tokens", "4"]
    arguments += ["--device", "cpu", "--dense-format", "fp8", "--json"]
    assert run(["bench", str(folder), *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["formats"] == "dense=fp8 experts=mxfp4"
    assert run(["bench", str(folder), "--device", "cpu", "--dense-format", "fp4"]) == 1
    assert "dense_format must be as-published or fp8" in capsys.readouterr().err


def test_kernels_are_compiled_for_what_is_loaded(folder):
    """Zeros are like the packed weights in shape, dtype and format: nothing compiles later."""
    opened, weights = loaded(folder)
    real = ModelWeights.from_named(weights, opened.config)
    zeros = zero_weights(opened.config, CPU, dense_format=FP8_ROW)

    def kind(weight):
        if isinstance(weight, QuantTensor):
            return weight.format, tuple(weight.shape), tuple(weight.scales.shape)[1:]
        return weight.dtype, tuple(weight.shape)

    assert kind(real.head) == kind(zeros.head)
    for name, weight in vars(real.layers[1]).items():
        assert kind(weight) == kind(getattr(zeros.layers[1], name)), name
