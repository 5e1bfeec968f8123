"""Weights as they arrive: bit for bit what was written, checked, and without needless memory."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError
from loaders.staging import Span, copy_spans
from loaders.weights import load_mapped, load_staged, load_weights
from moe_runtime.models.registry import plan_model
from quant.formats import MXFP4
from quant.tensor import QuantTensor
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

CPU = torch.device("cpu")
SHAPE = {"layers": 2, "d": 64, "f": 32, "heads": 4, "kv": 2, "hd": 8, "experts": 3, "topk": 2}
LAYOUTS = ("huggingface", "original")
PATHS = {"mapped": load_mapped, "staged": load_staged}
ROUTER = "model.layers.1.mlp.router.weight"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
K_WEIGHT = "model.layers.0.self_attn.k_proj.weight"


def load(folder, how=load_mapped, on_bytes=lambda count: None):
    checkpoint = open_folder(folder)
    return how(checkpoint, plan_model(checkpoint).plan, CPU, on_bytes)


def expected_weights(t):
    """Our names from the tensors by their published names, written out by hand."""
    weights = {
        "embedding": t["model.embed_tokens.weight"],
        "final_norm": t["model.norm.weight"],
        "head": t["lm_head.weight"],
    }
    for i in range(2):
        layer, ours = f"model.layers.{i}.", f"layers.{i}."
        attention = {f"{n}_{k}": t[f"{layer}self_attn.{n}_proj.{k}"]
                     for n in "qkvo" for k in ("weight", "bias")}  # fmt: skip
        mlp = layer + "mlp."
        weights |= {
            ours + "attention.norm": t[layer + "input_layernorm.weight"],
            ours + "attention.qkv": torch.cat([attention[f"{n}_weight"] for n in "qkv"]),
            ours + "attention.qkv_bias": torch.cat([attention[f"{n}_bias"] for n in "qkv"]),
            ours + "attention.sinks": t[layer + "self_attn.sinks"],
            ours + "attention.out": attention["o_weight"],
            ours + "attention.out_bias": attention["o_bias"],
            ours + "moe.norm": t[layer + "post_attention_layernorm.weight"],
            ours + "moe.router": t[mlp + "router.weight"],
            ours + "moe.router_bias": t[mlp + "router.bias"],
            ours + "moe.gate_up_bias": t[mlp + "experts.gate_up_proj_bias"],
            ours + "moe.down_bias": t[mlp + "experts.down_proj_bias"],
        }
        for name in ("gate_up", "down"):
            blocks = t[f"{mlp}experts.{name}_proj_blocks"]
            shape = (*blocks.shape[:2], 32 * blocks.shape[2])
            scales = t[f"{mlp}experts.{name}_proj_scales"]
            weights[f"{ours}moe.{name}"] = QuantTensor(blocks.flatten(2), scales, MXFP4, shape)
    return weights


def assert_same(loaded, expected):
    assert loaded.keys() == expected.keys()
    for name, wanted in expected.items():
        found = loaded[name]
        assert type(found) is type(wanted), name
        if isinstance(wanted, QuantTensor):
            assert (found.format, found.shape) == (wanted.format, wanted.shape), name
            pairs = [(found.values, wanted.values), (found.scales, wanted.scales)]
        else:
            pairs = [(found, wanted)]
        for a, b in pairs:
            assert a.dtype == b.dtype and torch.equal(a, b), name


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 2])
def test_bit_for_bit_what_was_written(tmp_path, layout, shards, how):
    published = write_tiny_gpt_oss(tmp_path / "hf", **SHAPE)
    write_tiny_gpt_oss(tmp_path / "here", layout=layout, shards=shards, **SHAPE)
    assert_same(load(tmp_path / "here", PATHS[how]), expected_weights(published))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("how", PATHS)
def test_other_float_dtypes_stay_as_they_are(tmp_path, dtype, how):
    published = write_tiny_gpt_oss(tmp_path, shards=1, **SHAPE)
    published = {n: t if t.dtype == torch.uint8 else t.to(dtype) for n, t in published.items()}
    save_file(published, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, PATHS[how]), expected_weights(published))


def test_load_weights_is_the_mapped_path_on_the_cpu(tmp_path, capsys):
    published = write_tiny_gpt_oss(tmp_path, **SHAPE)
    checkpoint = open_folder(tmp_path)
    model = plan_model(checkpoint)
    weights = load_weights(
        checkpoint, model.table, model.config.dims, model.config.num_layers,
        device="cpu", progress=False,
    )  # fmt: skip
    assert_same(weights, expected_weights(published))
    assert capsys.readouterr() == ("", "")
    router = weights["layers.1.moe.router"]
    assert router.data_ptr() == checkpoint.read(ROUTER).data_ptr()  # mapped, not copied


@pytest.mark.parametrize("how", PATHS)
def test_progress_counts_every_byte_once(tmp_path, how):
    write_tiny_gpt_oss(tmp_path, **SHAPE)
    counts = []
    load(tmp_path, PATHS[how], counts.append)
    assert sum(counts) == open_folder(tmp_path).total_bytes


def spoil(folder, name, index, value):
    """Put one bad value into a tensor of a single-file checkpoint."""
    tensors = load_file(folder / "model.safetensors")
    tensors[name][index] = value
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize(
    ("name", "index", "value", "message"),
    [
        (ROUTER, (2, 63), float("nan"), rf"{ROUTER}: found nan at \(2, 63\) in model.safetensors"),
        (ROUTER, (0, 0), float("inf"), rf"{ROUTER}: found inf at \(0, 0\) in model.safetensors"),
        (K_WEIGHT, (1, 5), float("-inf"), rf"{K_WEIGHT}: found -inf at \(1, 5\) in model.safete"),
        ("lm_head.weight", -1, float("nan"), r"found nan at \(255, 0\) in .* 64 such values"),
        (SCALES, (2, 63, 0), 255, rf"{SCALES}: found scale byte 255 \(NaN\) at \(2, 63, 0\)"),
    ],
)
def test_bad_values_are_named(tmp_path, how, name, index, value, message):
    write_tiny_gpt_oss(tmp_path, shards=1, **SHAPE)
    spoil(tmp_path, name, index, value)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path, PATHS[how])


@pytest.mark.parametrize("how", PATHS)
def test_extreme_but_sound_values_pass(tmp_path, how):
    """Any code byte, scales 0 and 254, the largest bf16."""
    write_tiny_gpt_oss(tmp_path, shards=1, **SHAPE)
    spoil(tmp_path, SCALES, (0, 0, 0), 254)
    spoil(tmp_path, SCALES, (0, 1, 0), 0)
    spoil(tmp_path, SCALES.replace("scales", "blocks"), (0, 0, 0, 0), 255)
    spoil(tmp_path, ROUTER, (0, 0), torch.finfo(torch.bfloat16).min)
    load(tmp_path, PATHS[how])


@pytest.mark.parametrize("num_readers", [1, 3])
@pytest.mark.parametrize("buffer_bytes", [7, 64, 1 << 16])
def test_staging_with_small_buffers(tmp_path, num_readers, buffer_bytes):
    """Spans larger and smaller than a buffer, out of order, from two files, some of no bytes."""
    data = torch.randint(0, 256, (2, 1000), dtype=torch.uint8)
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, row in zip(paths, data, strict=True):
        path.write_bytes(bytes(row.tolist()))
    cuts = [(0, 300, 700), (1, 0, 1000), (0, 5, 5), (0, 0, 300), (1, 999, 1000)]
    targets = [torch.zeros(end - start, dtype=torch.uint8) for _, start, end in cuts]
    spans = [
        Span(paths[row], start, target)
        for (row, start, _), target in zip(cuts, targets, strict=True)
    ]
    copy_spans(
        spans, device=CPU, on_bytes=lambda count: None,
        num_readers=num_readers, buffer_bytes=buffer_bytes,
    )  # fmt: skip
    for (row, start, end), target in zip(cuts, targets, strict=True):
        assert torch.equal(target, data[row, start:end])


def test_staging_stops_at_a_file_that_ends_early(tmp_path):
    path = tmp_path / "short.safetensors"
    path.write_bytes(bytes(100))
    span = Span(path, 50, torch.zeros(60, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="is truncated: expected 110 bytes, found 100"):
        copy_spans([span], device=CPU, on_bytes=lambda count: None)


def test_staging_names_a_file_that_is_gone(tmp_path):
    span = Span(tmp_path / "gone", 0, torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(CheckpointError, match="gone cannot be read: No such file"):
        copy_spans([span], device=CPU, on_bytes=lambda count: None)


def test_staging_ends_when_a_callback_fails(tmp_path):
    """Ctrl-C and the like: the other readers stop and the error comes through."""
    path = tmp_path / "a"
    path.write_bytes(bytes(1000))
    calls = []

    def fail(count):
        calls.append(count)
        raise KeyboardInterrupt

    spans = [Span(path, 0, torch.zeros(1000, dtype=torch.uint8))]
    with pytest.raises(KeyboardInterrupt):
        copy_spans(spans, device=CPU, on_bytes=fail, num_readers=2, buffer_bytes=1)
    assert len(calls) <= 2
