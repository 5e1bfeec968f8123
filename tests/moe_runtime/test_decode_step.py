"""GPT-OSS's decode step, kernel by kernel against the twins: tiny in the interpreter, full width on
a GPU, where early starts, captured graphs and endurance are tested too."""

from dataclasses import replace

import pytest
import torch

from kernels import gemv, moe_gemv, moe_gemv_fp4, router_topk, sink_attention_decode
from kernels.reference import gemv as gemv_twin
from kernels.reference import moe_gemv as moe_twin
from kernels.reference import router_topk as router_twin
from kernels.reference import sink_attention_decode as attention_twin
from kernels.reference.rope_kv import rope_table
from moe_runtime import decode
from moe_runtime.cache import KVCache
from moe_runtime.decode import DecodeStep, LayerWeights, ModelWeights
from moe_runtime.models.gpt_oss_config import read_config
from quant.codecs import encode
from quant.formats import FP8_ROW, MXFP4
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

TWINS = {
    "gemv": gemv_twin.gemv,
    "embedding": gemv_twin.embedding,
    "router_topk": router_twin.router_topk,
    "sink_attention_decode": attention_twin.sink_attention_decode,
    "moe_gate_up": moe_twin.moe_gate_up,
    "moe_down": moe_twin.moe_down,
}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def sizes(device):
    """hidden, heads, kv heads, head width, experts, vocabulary, context, window."""
    if device.type == "cuda":
        return 2880, 64, 8, 64, 32, 201088, 16384, 128
    return 32, 2, 1, 16, 5, 32, 40, 16


@pytest.fixture(scope="module")
def config(device):
    width, heads, kv_heads, head_width, experts, vocabulary, context, window = sizes(device)
    settings = {
        "model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "hidden_act": "silu",
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size": width, "intermediate_size": width, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_width,
        "num_local_experts": experts, "num_experts_per_tok": 4, "experts_per_token": 4,
        "sliding_window": window, "max_position_embeddings": context, "attention_bias": True,
        "rope_theta": 150000, "rms_norm_eps": 1e-5, "swiglu_limit": 7.0, "eos_token_id": 1,
        "tie_word_embeddings": False,
        "rope_scaling": {
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
            "original_max_position_embeddings": 4096, "truncate": False,
        },
    }  # fmt: skip
    return read_config(settings, {}, "huggingface")


@pytest.fixture(scope="module", params=["plain", "fp8"] if torch.cuda.is_available() else ["fp8"])
def weights(request, config, device):
    """Random, so that each layer counts as much as what went into it."""
    c = config
    torch.manual_seed(0)
    # The interpreter gets bf16 arithmetic wrong.
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    def normal(*shape, size):
        return (torch.randn(shape, device=device) * size).to(dtype)

    def dense(rows, columns):
        plain = normal(rows, columns, size=columns**-0.5)
        return encode(plain, FP8_ROW) if request.param == "fp8" else plain

    def experts(rows, columns):
        shape = (c.num_experts, rows, columns)
        values = torch.randint(0, 256, (*shape[:2], columns // 2), device=device)
        scales = torch.randint(120, 123, (*shape[:2], columns // 32), device=device)
        return QuantTensor(values.to(torch.uint8), scales.to(torch.uint8), MXFP4, shape)

    def layer():
        width, wide = c.model_width, 2 * c.expert_width
        return LayerWeights(
            attention_norm=normal(width, size=0.1) + 1,
            qkv=dense(c.qkv_width, width),
            qkv_bias=normal(c.qkv_width, size=0.1),
            sinks=normal(c.num_heads, size=1),
            out=dense(width, c.attention_width),
            out_bias=normal(width, size=0.1),
            moe_norm=normal(width, size=0.1) + 1,
            router=normal(c.num_experts, width, size=width**-0.5),
            router_bias=normal(c.num_experts, size=0.1),
            gate_up=experts(wide, width),
            gate_up_bias=normal(c.num_experts, wide, size=0.1),
            down=experts(width, c.expert_width),
            down_bias=normal(c.num_experts, width, size=0.1),
        )

    table = normal(c.vocab_size, c.model_width, size=1)
    norm = normal(c.model_width, size=0.1) + 1
    return ModelWeights(table, norm, dense(c.vocab_size, c.model_width), [layer(), layer()])


@pytest.fixture(scope="module")
def full_cache(config, device):
    """A cache in which every position has been written."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cache = KVCache.allocate(config, config.max_context, device, dtype)
    torch.manual_seed(1)
    for kept in (*cache.keys, *cache.values):
        kept.normal_()
    return cache


@pytest.fixture
def make_step(config, weights, full_cache, device):
    """A step over a cache of its own, at a position."""

    def make(position, weights=weights):
        cache = replace(
            full_cache,
            keys=[kept.clone() for kept in full_cache.keys],
            values=[kept.clone() for kept in full_cache.values],
        )
        positions = torch.arange(config.max_context, device=device)
        rope = rope_table(config.rope, config.head_width, positions)
        step = DecodeStep(config, weights, cache, rope, config.max_context)
        step.state.token.fill_(17)
        step.state.position.fill_(position)
        step.state.settings.copy_(torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0]))
        step.state.threshold.fill_(float("-inf"))
        return step

    return make


def run(step):
    step.step(filtered=False)
    return step.logits.clone()


def expected_of(step, monkeypatch):
    """Logits by the twins."""
    with monkeypatch.context() as patch:
        for name, twin in TWINS.items():
            patch.setattr(decode, name, twin)
        return run(step)


def positions(device):
    return [5, 300, 8191] if device.type == "cuda" else [30]


def test_the_step_is_its_twins(make_step, device, monkeypatch):
    for position in positions(device):
        expected = expected_of(make_step(position), monkeypatch)
        assert_close(run(make_step(position)), expected, "decode_step")


@on_gpu
def test_the_same_step_again_gives_the_same_bits(make_step, device):
    position = positions(device)[-1]
    assert torch.equal(run(make_step(position)), run(make_step(position)))


@pytest.mark.parametrize("fault", ["scale", "head", "skipped", "stale"])
def test_faults_are_seen(make_step, weights, device, monkeypatch, fault):
    """One per cent in a layer or in the head, a kernel left out, an old row in the cache."""
    position = positions(device)[0]
    expected = expected_of(make_step(position), monkeypatch)
    step = make_step(position)
    if fault == "scale":
        step = make_step(
            position, replace(weights, layers=[off(weights.layers[0]), weights.layers[1]])
        )
    elif fault == "head":
        step = make_step(position, replace(weights, head=one_per_cent(weights.head)))
    elif fault == "skipped":
        left_out = iter([True, False])

        def sometimes(*arguments, **options):
            return None if next(left_out) else moe_gemv.moe_down(*arguments, **options)

        monkeypatch.setattr(decode, "moe_down", sometimes)
    else:
        step.cache.keys[1][:, position - 2] = step.cache.keys[1][:, position - 3]
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(run(step), expected, "decode_step")


def one_per_cent(weight):
    """Scales, or the numbers themselves, too large by one per cent."""
    if isinstance(weight, QuantTensor):
        return replace(weight, scales=weight.scales * 1.01)
    return (weight.float() * 1.01).to(weight.dtype)


def off(layer):
    return replace(layer, qkv=one_per_cent(layer.qkv), out=one_per_cent(layer.out))


@on_gpu
def test_early_starts_change_nothing(make_step, device, monkeypatch):
    early = [run(make_step(position)) for position in positions(device)]
    for module in (gemv, moe_gemv, moe_gemv_fp4, router_topk, sink_attention_decode):
        monkeypatch.setattr(module, "early_start", lambda tensor: {"EARLY": False})
    for position, expected in zip(positions(device), early, strict=True):
        assert torch.equal(run(make_step(position)), expected)


@on_gpu
def test_ten_thousand_steps_in_a_row(make_step, config):
    step = make_step(0)
    step.capture()
    step.state.position.fill_(0)
    step.state.step.zero_()
    for _ in range(10_000):
        step.replay(filtered=False)
    torch.cuda.synchronize()
    assert int(step.state.position) == int(step.state.step) == 10_000
    tokens = step.state.history[:10_000]
    assert int(tokens.min()) >= 0
    assert int(tokens.max()) < config.vocab_size
    assert bool(step.logits.isfinite().all())
