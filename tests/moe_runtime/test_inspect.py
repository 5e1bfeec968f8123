"""`moe-runtime inspect`: published sizes to the byte, sound and unsound checkpoints, the hub."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_files, open_folder
from loaders.errors import CheckpointError
from loaders.safetensors_header import DTYPE_BITS, TensorInfo
from moe_runtime import cli
from moe_runtime.inspection import inspect_checkpoint, sort_components
from moe_runtime.models.registry import plan_model
from moe_runtime.plan import weights_by_component
from moe_runtime.published import PUBLISHED as PUBLISHED_MODELS
from tests.loaders.hub_server import ROOT, FakeHub, client_environment, serve
from tests.oracles.published_headers import deepseek_v3
from tests.oracles.tiny_deepseek_v4 import write_tiny_deepseek_v4
from tests.oracles.tiny_gpt_oss import hf_config, original_config, write_tiny_gpt_oss

# Sums of the published checkpoints (openai/gpt-oss-20b and -120b): metadata.total_size of the
# index, and the bytes that one token reads, worked out by hand from the shapes.
PUBLISHED = {
    "20b": {
        "layers": 24,
        "experts": 32,
        "total_bytes": 13_761_264_768,
        "parameters": 20_914_757_184,
        "active_parameters": 3_608_307_264,
        "cache_bytes_per_token": 24_576,
        "bytes_per_token": {
            "embedding": 5_760,
            "attention": 1_274_406_912,
            "router": 4_425_216,
            "experts": 1_270_702_080,
            "norms": 282_240,
            "head": 1_158_266_880,
        },
    },
    "120b": {
        "layers": 36,
        "experts": 128,
        "total_bytes": 65_248_815_744,
        "parameters": 116_829_156_672,
        "active_parameters": 5_132_849_472,
        "cache_bytes_per_token": 36_864,
        "bytes_per_token": {
            "embedding": 5_760,
            "attention": 1_911_610_368,
            "router": 26_551_296,
            "experts": 1_906_053_120,
            "norms": 420_480,
            "head": 1_158_266_880,
        },
    },
}
WIDTH, QUERY, KEY, VOCAB = 2880, 4096, 512, 201_088


class HeadersOnly:
    """A checkpoint that exists as names and shapes alone."""

    label = "headers"

    def __init__(self, prefix: str, config: dict[str, Any], shapes: dict[str, Any]) -> None:
        self.config = {prefix + "config.json": json.dumps(config).encode()}
        self.file = prefix + "model.safetensors"
        self.shapes = shapes

    def names(self) -> list[str]:
        return [*self.config, self.file]

    def text(self, name: str, *, max_bytes: int = 0) -> bytes | None:
        return self.config.get(name)

    def header(self, name: str) -> dict[str, TensorInfo]:
        found, end = {}, 0
        for tensor, (dtype, shape) in self.shapes.items():
            start, end = end, end + math.prod(shape) * DTYPE_BITS[dtype] // 8
            found[tensor] = TensorInfo(tensor, dtype, shape, name, start, end)
        return found


def expert_shapes(prefix: str, experts: int, separator: str, names: tuple[str, str]):
    for name, rows in zip(names, (2 * WIDTH, WIDTH), strict=True):
        yield f"{prefix}{name}{separator}blocks", ("U8", (experts, rows, 90, 16))
        yield f"{prefix}{name}{separator}scales", ("U8", (experts, rows, 90))
        yield f"{prefix}{name.removesuffix('_weight')}_bias", ("BF16", (experts, rows))


def huggingface_headers(layers: int, experts: int) -> HeadersOnly:
    bf16 = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    quantized = {}
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name, rows in (("q", QUERY), ("k", KEY), ("v", KEY)):
            bf16[f"{layer}self_attn.{name}_proj.weight"] = (rows, WIDTH)
            bf16[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        bf16 |= {
            layer + "self_attn.o_proj.weight": (WIDTH, QUERY),
            layer + "self_attn.o_proj.bias": (WIDTH,),
            layer + "self_attn.sinks": (64,),
            layer + "input_layernorm.weight": (WIDTH,),
            layer + "post_attention_layernorm.weight": (WIDTH,),
            layer + "mlp.router.weight": (experts, WIDTH),
            layer + "mlp.router.bias": (experts,),
        }
        names = ("gate_up_proj", "down_proj")
        quantized |= dict(expert_shapes(layer + "mlp.experts.", experts, "_", names))
    config = hf_config(
        layers=layers, d=WIDTH, f=WIDTH, heads=64, kv=8, hd=64, experts=experts, topk=4,
        window=128, vocab=VOCAB,
    )  # fmt: skip
    shapes = {name: ("BF16", shape) for name, shape in bf16.items()} | quantized
    return HeadersOnly("", config, shapes)


def original_headers(layers: int, experts: int) -> HeadersOnly:
    bf16 = {
        "embedding.weight": (VOCAB, WIDTH),
        "unembedding.weight": (VOCAB, WIDTH),
        "norm.scale": (WIDTH,),
    }
    quantized = {}
    for i in range(layers):
        layer = f"block.{i}."
        bf16 |= {
            layer + "attn.qkv.weight": (QUERY + 2 * KEY, WIDTH),
            layer + "attn.qkv.bias": (QUERY + 2 * KEY,),
            layer + "attn.out.weight": (WIDTH, QUERY),
            layer + "attn.out.bias": (WIDTH,),
            layer + "attn.sinks": (64,),
            layer + "attn.norm.scale": (WIDTH,),
            layer + "mlp.norm.scale": (WIDTH,),
            layer + "mlp.gate.weight": (experts, WIDTH),
            layer + "mlp.gate.bias": (experts,),
        }
        names = ("mlp1_weight", "mlp2_weight")
        quantized |= dict(expert_shapes(layer + "mlp.", experts, ".", names))
    config = original_config(
        layers=layers, d=WIDTH, f=WIDTH, heads=64, kv=8, hd=64, experts=experts, topk=4,
        window=128, vocab=VOCAB,
    )  # fmt: skip
    shapes = {name: ("BF16", shape) for name, shape in bf16.items()} | quantized
    return HeadersOnly("original/", config, shapes)


@pytest.mark.parametrize("layout", [huggingface_headers, original_headers])
@pytest.mark.parametrize("model", PUBLISHED)
def test_published_sizes_to_the_byte(layout, model):
    expected = dict(PUBLISHED[model])
    files = layout(expected.pop("layers"), expected.pop("experts"))
    found = inspect_checkpoint(open_files(files))
    assert found.problem is None
    for field, value in expected.items():
        assert getattr(found, field) == value, field
    per_token = found.as_dict()["bytes_per_token_total"]
    assert per_token == sum(expected["bytes_per_token"].values())
    assert round(per_token / 1e9, 3) == {"20b": 3.708, "120b": 5.003}[model]
    assert found.backends.keys() == {"triton", "reference"}


@pytest.mark.parametrize("model", PUBLISHED_MODELS, ids=lambda model: model.repo_id)
def test_what_doctor_knows_of_published_models(model):
    """doctor computes from facts what inspect reads from headers."""
    files = huggingface_headers(model.config.num_layers, model.config.num_experts)
    with open_files(files) as checkpoint:
        opened = plan_model(checkpoint)
    assert weights_by_component(opened.plan.nbytes) == model.weight_bytes
    assert replace(opened.config, eos_token_ids=()) == replace(model.config, eos_token_ids=())


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_components_are_the_ones_the_runtime_plans_with(tmp_path, layout):
    write_tiny_gpt_oss(tmp_path, layout=layout)
    with open_folder(tmp_path) as checkpoint:
        ours = weights_by_component(plan_model(checkpoint).plan.nbytes)
        by_name = {c.name: c.nbytes for c in sort_components(checkpoint)}
    assert by_name == ours


def test_deepseek_as_published():
    """Scales are no parameters, and the MTP layer is a component of its own."""
    found = inspect_checkpoint(open_files(deepseek_v3(v32=True)))
    by_name = {component.name: component for component in found.components}
    assert found.problem is None and found.backends.keys() == {"reference", "triton"}
    assert found.backends["reference"] == "any CPU or GPU"
    assert found.backends["triton"] == "an NVIDIA GPU of sm_89 or newer"
    assert found.tokenizer.chat_code
    indexer_bytes = 14_422_240  # of one layer
    assert by_name["indexer"].nbytes == 61 * indexer_bytes
    assert by_name["mtp"].nbytes == 15_424_227_552 + indexer_bytes
    main = found.parameters - by_name["mtp"].parameters - by_name["indexer"].parameters
    assert round(main / 1e9, 2) == 671.03
    assert round(found.active_parameters / 1e9, 1) == 37.5
    assert found.cache_bytes_per_token == 61 * (1152 + 256)


def test_hash_tables_are_no_experts(tmp_path):
    """A token reads one row of each; their bytes are those that the runtime plans with."""
    write_tiny_deepseek_v4(tmp_path)
    with open_folder(tmp_path) as checkpoint:
        found = inspect_checkpoint(checkpoint)
        ours = weights_by_component(plan_model(checkpoint).plan.nbytes)
    by_name = {component.name: component.nbytes for component in found.components}
    experts, chosen = (found.sizes[what] for what in ("experts", "experts_per_token"))
    assert found.bytes_per_token["experts"] == by_name["experts"] * chosen // experts
    assert (
        found.bytes_per_token["hash tables"] == by_name["hash tables"] // found.sizes["vocabulary"]
    )
    assert {name: size for name, size in by_name.items() if name != "mtp"} == ours


def inspect(*args: str) -> int:
    return cli.run(["inspect", *args])


def test_report_of_a_checkpoint_that_runs(tmp_path, capsys):
    tensors = write_tiny_gpt_oss(tmp_path, vocab=300, tokenizer=True)
    assert inspect(str(tmp_path)) == 0
    out, err = capsys.readouterr()
    assert not err
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert "architecture GptOssForCausalLM, huggingface layout, quantization mxfp4" in lines
    assert any(line.startswith("tokenizer 265 ids, a chat template, 9 special") for line in lines)
    total = sum(tensor.nbytes for tensor in tensors.values())
    assert any(line.startswith(f"total 79 {total / 1e3:.2f} kB") for line in lines)
    assert any("backend reference" in line for line in lines)

    assert inspect(str(tmp_path), "--tensors") == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}  " in listed for name in tensors)
    assert "  model.layers.0.mlp.router.weight  BF16 8x64  1024 bytes  model-" in listed


def test_json_report(tmp_path, capsys):
    tensors = write_tiny_gpt_oss(tmp_path, vocab=300, tokenizer=True)
    assert inspect(str(tmp_path), "--json", "--tensors") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"] == str(tmp_path)
    assert report["supported"] and report["sound"] and report["problem"] is None
    assert report["sizes"]["experts_per_token"] == 4
    assert report["num_tensors"] == len(tensors) == len(report["tensors"])
    assert report["total_bytes"] == sum(entry["nbytes"] for entry in report["tensors"])
    assert report["tokenizer"]["num_ids"] == 265
    assert report["tokenizer"]["special_tokens"][2] == "<|return|>"
    assert "tensors" not in json.loads(run_json(tmp_path, capsys))


def run_json(folder: Path, capsys) -> str:
    inspect(str(folder), "--json")
    return capsys.readouterr().out


def test_another_family_is_listed_and_not_supported(tmp_path, capsys):
    tensors = write_tiny_gpt_oss(tmp_path, shards=1)
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert inspect(str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "  not supported: model_type 'mixtral'" in out and "\n  supported: gpt_oss" in out
    assert "experts " in out and "model width 64" in out
    report = json.loads(run_json(tmp_path, capsys))
    assert not report["supported"] and report["sound"]
    assert report["bytes_per_token"] is None and report["backends"] == {}
    assert report["num_tensors"] == len(tensors)


def test_a_checkpoint_that_does_not_add_up_is_status_1(tmp_path, capsys):
    write_tiny_gpt_oss(tmp_path, shards=1)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.2.self_attn.sinks"]
    save_file(tensors, tmp_path / "model.safetensors")
    assert inspect(str(tmp_path)) == 1
    out = capsys.readouterr().out
    assert "not sound: 1 of 71 tensors are missing: model.layers.2.self_attn.sinks" in out
    assert "attention " in out, "what is there is listed"


def test_a_tokenizer_of_another_model_is_status_1(tmp_path, capsys):
    write_tiny_gpt_oss(tmp_path, shards=1, vocab=300, tokenizer=True)
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    last = tokenizer["added_tokens"][-1]
    tokenizer["added_tokens"] += [
        {**last, "id": 265 + i, "content": f"<|more{i}|>"} for i in range(40)
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert inspect(str(tmp_path)) == 1
    assert "not sound: tokenizer.json does not match the model" in capsys.readouterr().out


def test_what_cannot_be_opened_is_one_line(tmp_path, capsys):
    write_tiny_gpt_oss(tmp_path, shards=1)
    shard = tmp_path / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    for model in (str(tmp_path), str(tmp_path / "nothing"), str(shard)):
        assert inspect(model) == 1
        out, err = capsys.readouterr()
        assert not out
        assert [line.split(":")[0] for line in err.splitlines()] == ["error", "hint"]


def test_a_hub_model_by_its_headers(tmp_path):
    """Through the real command, against a hub on localhost; a big tokenizer stays there too."""
    write_tiny_gpt_oss(tmp_path / "model", vocab=8192, tokenizer=True)
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    files["tokenizer.json"] += b" " * 3_000_000
    total = sum(map(len, files.values()))
    with serve(FakeHub(repos={"acme/tiny": files})) as hub:
        result = subprocess.run(
            [sys.executable, "-m", "moe_runtime", "inspect", "acme/tiny", "--json"],
            cwd=ROOT, env=client_environment(hub, tmp_path / "cache"), text=True,
            capture_output=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        report = json.loads(result.stdout)
        assert report["supported"]
        assert report["num_tensors"] == 79 and report["files"] == 2
        assert report["tokenizer"]["num_ids"] is None
        assert report["tokenizer"]["chat_template"]
        assert sum(hub.fetched().values()) < 230_000 < total - 5_000_000
        assert hub.fetched()["tokenizer.json"] == 0


def test_headers_alone_cannot_be_read(tmp_path):
    checkpoint = open_files(huggingface_headers(1, 8))
    with pytest.raises(CheckpointError, match="only the headers"):
        checkpoint.read("lm_head.weight")
