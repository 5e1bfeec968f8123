"""Matching of names, shapes and dtypes, from headers alone."""

import dataclasses

import pytest

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError
from loaders.logical import LogicalTensor, logical_tensors
from loaders.names import gpt_oss
from loaders.names.table import NameTable, dense, match_names, resolve_shape, rows
from loaders.safetensors_header import TensorInfo
from quant.formats import MXFP4
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

DIMS = {"D": 32, "H": 2, "Q": 16, "KV": 8, "QKV": 32, "E": 3, "F": 64, "2F": 128, "V": 16}
SHAPE = {"layers": 2, "d": 32, "f": 64, "heads": 2, "kv": 1, "hd": 8, "experts": 3, "vocab": 16}
ROUTER = "model.layers.1.mlp.router.weight"
GATE_UP = "model.layers.0.mlp.experts.gate_up_proj"
K_BIAS = "model.layers.0.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    """Logical tensors of a tiny checkpoint in both layouts, by name."""
    folder = tmp_path_factory.mktemp("tiny")
    infos = {}
    for layout in gpt_oss.TABLES:
        write_tiny_gpt_oss(folder / layout, layout=layout, **SHAPE)
        infos[layout] = by_name(logical_tensors(open_folder(folder / layout)))
    return infos


def by_name(tensors):
    return {tensor.name: tensor for tensor in tensors}


def match(tensors, layout="huggingface", dims=DIMS, num_layers=2):
    return match_names(tensors.values(), gpt_oss.TABLES[layout], dims, num_layers)


def changed(tensors, name, **fields):
    return {**tensors, name: dataclasses.replace(tensors[name], **fields)}


def test_both_layouts_give_the_same_weights(tensors):
    ours, original = (match(tensors[layout], layout) for layout in gpt_oss.TABLES)
    assert ours.nbytes == original.nbytes and not ours.skipped
    assert ours.total_bytes == sum(tensor.nbytes for tensor in tensors["original"].values())
    for a, b in zip(ours.weights, original.weights, strict=True):
        assert (a.name, a.format, a.shape) == (b.name, b.format, b.shape)


def test_what_is_where(tensors):
    weights = {w.name: w for w in match(tensors["huggingface"]).weights}
    assert len(weights) == 2 * 13 + 3
    (qkv,) = weights["layers.1.attention.qkv"].parts
    assert [s.name.rpartition("self_attn.")[2] for s in qkv.sources] == [
        "q_proj.weight", "k_proj.weight", "v_proj.weight",
    ]  # fmt: skip
    assert (qkv.shape, qkv.dtype, qkv.holds) == ((32, 32), "BF16", "floats")
    gate_up = weights["layers.0.moe.gate_up"]
    assert (gate_up.format, gate_up.shape) == (MXFP4, (3, 128, 32))
    assert [(p.shape, p.holds) for p in gate_up.parts] == [
        ((3, 128, 1, 16), "bytes"), ((3, 128, 1), "e8m0"),
    ]  # fmt: skip
    assert weights["layers.0.moe.down"].parts[1].shape == (3, 32, 2)


def test_resolve_shape():
    assert resolve_shape("E 2F D/32 16", DIMS) == (3, 128, 1, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(ROUTER) and t, f"1 of 37 tensors are missing: {ROUTER}"),
        (
            lambda t: {n: i for n, i in t.items() if "experts" not in n},
            "8 of 37 tensors are missing: .*down_proj, .*down_proj_bias, .* and 5 more",
        ),
        (
            lambda t: {**t, "x": dataclasses.replace(t[ROUTER], name="extra.bias")},
            "1 tensors are not part of this model: extra.bias",
        ),
        (
            lambda t: changed(t, ROUTER, shape=(32, 3)),
            rf"{ROUTER}: expected shape \(3, 32\) \(E D\), found \(32, 3\) in model-",
        ),
        (
            lambda t: changed(t, GATE_UP, shape=(3, 64, 32)),
            rf"{GATE_UP}: expected shape \(3, 128, 32\) \(E 2F D\), found \(3, 64, 32\) in",
        ),
        (
            lambda t: changed(t, ROUTER, dtype="F8_E4M3"),
            f"{ROUTER}: expected dtype BF16 or F16 or F32, found F8_E4M3 in model-",
        ),
        (lambda t: changed(t, ROUTER, format=MXFP4), "F16 or F32, found mxfp4 in model-"),
        (lambda t: changed(t, K_BIAS, dtype="F32"), f"{K_BIAS}: expected BF16, found F32"),
    ],
)
def test_a_mismatch_is_named(tensors, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        match(change(dict(tensors["huggingface"])))
    assert "config.json and the weights do not belong together" in caught.value.hint


@pytest.mark.parametrize(
    ("dims", "num_layers", "message"),
    [
        (DIMS, 1, "17 tensors are not part of this model: model.layers.1"),
        (DIMS, 3, "17 of 54 tensors are missing: model.layers.2"),
        ({**DIMS, "E": 4}, 2, r"expected shape \(4, .*\), found \(3, "),
        ({**DIMS, "V": 17}, 2, r"embed_tokens.weight: expected shape \(17, 32\) \(V D\)"),
    ],
)
def test_a_config_of_another_model(tensors, dims, num_layers, message):
    with pytest.raises(CheckpointError, match=message):
        match(tensors["huggingface"], dims=dims, num_layers=num_layers)


def test_the_skip_list_accounts_for_tensors_with_a_reason():
    table = NameTable(
        {"head": dense("head", "V D"), "qk": rows(("q", "Q D"), ("k", "KV D"))},
        skip={r"mtp\.\d+\..*": "multi-token prediction is not used"},
    )

    def info(name, *shape):
        values = TensorInfo(name, "BF16", shape, "f", 0, 0)
        return LogicalTensor(name, shape, None, "BF16", {"values": values})

    tensors = {
        t.name: t for t in (info("head", 16, 32), info("q", 16, 32), info("k", 8, 32))
    }  # fmt: skip
    with_extra = {**tensors, "mtp.0.w": info("mtp.0.w", 1)}
    assert match_names(with_extra.values(), table, DIMS, 0).skipped == {
        "mtp.0.w": "multi-token prediction is not used"
    }
    with pytest.raises(CheckpointError, match=r"not part of this model: a.mtp.0.w"):
        match_names([*tensors.values(), info("a.mtp.0.w", 1)], table, DIMS, 0)
