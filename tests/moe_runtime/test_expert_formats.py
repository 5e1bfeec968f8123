"""GPT-OSS with experts and dense matrices in every format: the reference against transformers.

transformers runs on the weights that the checkpoint's codes stand for, in fp32.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM, Mxfp4Config

from loaders.checkpoint import open_folder
from loaders.weights import load_mapped, load_staged
from moe_runtime.backends import create_backend
from moe_runtime.decode import zero_weights
from moe_runtime.models.registry import plan_model
from moe_runtime.sampling import SamplingParams
from moe_runtime.triton_backend import TritonBackend
from quant.codecs import decode
from quant.formats import FORMATS, MXFP4
from quant.tensor import QuantTensor
from tests.oracles.expert_formats import EXPERT_FORMATS, quantize_dense, write_with_experts
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import assert_close

# d over 128 and no multiple of it: blocks of 128 are whole and partial.
SHAPE = {"layers": 2, "d": 160, "f": 96, "heads": 10, "kv": 2, "hd": 16, "experts": 4, "topk": 2}
IDS = [3, 17, 101, 4, 99, 200, 7, 7, 45, 3, 88]


def uncounted(nbytes):
    """Progress that nobody looks at."""


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' model of the checkpoint as published, in fp32; tests change its weights."""
    folder = tmp_path_factory.mktemp("published")
    write_tiny_gpt_oss(folder, **SHAPE)
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        quantization_config=Mxfp4Config(dequantize=True),
    )
    return model.float().eval()


def logits_with(theirs, held):
    """What transformers says with these weights, by checkpoint names."""
    parameters = dict(theirs.named_parameters())
    before = {name: parameters[name].detach().clone() for name in held}
    with torch.no_grad():
        for name, weight in held.items():
            parameters[name].copy_(weight.mT if weight.dim() == 3 else weight)
        logits = theirs(torch.tensor([IDS])).logits[0]
        for name, weight in before.items():
            parameters[name].copy_(weight)
    return logits


def backend_of(folder):
    checkpoint = open_folder(folder)
    return create_backend(
        checkpoint, plan_model(checkpoint), device="cpu", backend="reference", max_context=64,
        progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_logits_and_tokens(tmp_path, theirs, format):
    held = write_with_experts(tmp_path, format, **SHAPE)
    ours = backend_of(tmp_path)
    expected = logits_with(theirs, held)
    assert_close(ours.logits(IDS), expected, "model_fp32")
    first = next(iter(ours.decode(IDS, SamplingParams(temperature=0.0), max_new_tokens=1)))
    assert first.token_id == int(expected[-1].argmax())
    wrong = logits_with(theirs, {name: weight * 1.01 for name, weight in held.items()})
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(ours.logits(IDS), wrong, "model_fp32")


@pytest.mark.parametrize("ending", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("kv", [2, 8])
def test_dense_matrices_in_fp8_blocks(tmp_path, theirs, ending, kv):
    """With 2 kv heads the rows of q, k and v do not come in whole blocks; with 8 they do."""
    shape = {**SHAPE, "kv": kv, "heads": 8, "hd": 16} if kv == 8 else SHAPE
    write_with_experts(tmp_path, MXFP4.name, **shape)
    held = quantize_dense(tmp_path, ending)
    checkpoint = open_folder(tmp_path)
    weights = load_mapped(checkpoint, plan_model(checkpoint).plan, torch.device("cpu"), uncounted)
    qkv = weights["layers.1.attention.qkv"]
    assert isinstance(qkv, QuantTensor) == (kv == 8)
    names = [f"model.layers.1.self_attn.{n}_proj.weight" for n in "qkv"]
    joined = decode(qkv) if isinstance(qkv, QuantTensor) else qkv
    assert torch.equal(joined, torch.cat([held[name] for name in names]))
    if kv == 2:
        held |= write_with_experts(tmp_path / "again", MXFP4.name, **shape)
        ours = backend_of(tmp_path)
        assert_close(ours.logits(IDS), logits_with(theirs, held), "model_fp32")


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_staging_gives_the_same_weights(tmp_path, format):
    held = write_with_experts(tmp_path, format, **SHAPE)
    checkpoint = open_folder(tmp_path)
    plan = plan_model(checkpoint).plan
    assert plan.total_bytes == checkpoint.total_bytes
    weights = load_staged(checkpoint, plan, torch.device("cpu"), uncounted)
    for ours, name in (("gate_up", "gate_up_proj"), ("down", "down_proj")):
        weight = weights[f"layers.1.moe.{ours}"]
        wanted = held[f"model.layers.1.mlp.experts.{name}"]
        if isinstance(weight, QuantTensor):
            assert weight.values.is_contiguous() and weight.format.name == format
            weight = decode(weight)
        assert weight.is_contiguous() and torch.equal(weight.float(), wanted)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs the interpreter; tests/gpu covers machines with a GPU"
)
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8", "fp8_block128", "bf16"])
def test_the_kernels_agree_with_the_reference(tmp_path, format):
    """Prefill and decode through Triton's interpreter, with fp32 dense weights and cache."""
    shape = {"layers": 1, "d": 32, "f": 32, "heads": 2, "kv": 1, "hd": 16, "experts": 5}
    write_with_experts(tmp_path, format, **shape, topk=2, vocab=40)
    reference = backend_of(tmp_path)
    checkpoint = open_folder(tmp_path)
    opened = plan_model(checkpoint)
    weights = load_staged(checkpoint, opened.plan, torch.device("cpu"), uncounted)
    wide = {
        name: w.float() if isinstance(w, torch.Tensor) and "moe." not in name else w
        for name, w in weights.items()
    }
    triton = TritonBackend(
        opened.config, wide, reference.plan, torch.device("cpu"), cache_dtype=torch.float32
    )
    ids = [5, 39, 3, 32, 17, 8]
    assert_close(triton.logits(ids), reference.logits(ids), "moe_gemv_mxfp4")
    greedy = SamplingParams(temperature=0.0)
    ours, expected = (list(b.decode(ids, greedy, max_new_tokens=2)) for b in (triton, reference))
    assert [t.token_id for t in ours] == [t.token_id for t in expected]
    assert ours[1].logprob == pytest.approx(expected[1].logprob, abs=5e-3)


@pytest.mark.parametrize("format", EXPERT_FORMATS)
def test_weights_to_compile_with_are_laid_out_like_real_ones(tmp_path, format):
    write_with_experts(tmp_path, format, **SHAPE)
    opened = plan_model(open_folder(tmp_path))
    weights = load_mapped(open_folder(tmp_path), opened.plan, torch.device("cpu"), uncounted)
    zeros = zero_weights(opened.config, torch.device("cpu"), (FORMATS[format],) * 2).layers[0]
    for zero, name in ((zeros.gate_up, "gate_up"), (zeros.down, "down")):
        real = weights[f"layers.0.moe.{name}"]
        assert zero.shape == real.shape
        if isinstance(real, QuantTensor):
            for a, b in ((zero.values, real.values), (zero.scales, real.scales)):
                assert (a.dtype, a.shape[1:]) == (b.dtype, b.shape[1:])
            assert (zero.tensor_scale is None) == (real.tensor_scale is None)
