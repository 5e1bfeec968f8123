"""Write a full-size GPT-OSS or DeepSeek checkpoint of random weights in the published format.

    python benchmarks/write_random_checkpoint.py --shape 20b --output /dev/shm/gpt-oss-20b
    python benchmarks/write_random_checkpoint.py --shape 20b --format nvfp4 --output /dev/shm/20b-4
    python benchmarks/write_random_checkpoint.py --shape v2-lite --format fp8 --output /dev/shm/v2
    python benchmarks/write_random_checkpoint.py --shape v3 --layers 6 --output /dev/shm/v3
    python benchmarks/write_random_checkpoint.py --shape v4-flash --layers 16 --output /dev/shm/v4

Numbers are drawn on the GPU if there is one and written by several threads. Dense weights are
normal with deviation 0.02, norms 1, biases and sinks normal with 0.1, codes of FP4 and FP8 uniform
with scales that make weights of about 0.02: nothing is zero, nothing overflows. There is no
tokenizer: such a checkpoint takes and gives token ids.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import random_deepseek
import random_deepseek_v4
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
SHAPES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts
WIDTH, EXPERT_WIDTH, VOCAB = 2880, 2880, 201088
HEADS, KV_HEADS, HEAD_WIDTH = 64, 8, 64
SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 64 << 20
NUM_THREADS = 12
DTYPES = {
    "BF16": (torch.bfloat16, 2),
    "F32": (torch.float32, 4),
    "F8_E4M3": (torch.uint8, 1),
    "F8_E8M0": (torch.uint8, 1),
    "U8": (torch.uint8, 1),
    "I8": (torch.uint8, 1),
    "I64": (torch.int64, 8),
}
_E4M3_NAN = 127  # of either sign
# (part, dtype, bits of a code) of experts -> how numbers are drawn
EXPERT_KINDS = {
    ("values", "U8", 4): "codes",
    ("values", "F8_E4M3", 8): "e4m3",
    ("scales", "U8", 4): "scales",
    ("scales", "U8", 8): "e4m3 scales",
    ("scales", "F8_E4M3", 4): "scales of 16",
    ("scales", "F32", 8): "block scales",
    ("tensor_scale", "F32", 4): "tensor scale",
}
_NAMED_EXPERTS = 256  # of which a table of experts by token id names some


@dataclass(frozen=True)
class Entry:
    """One tensor of the file: what it is called, its shape and how its numbers are drawn."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str  # see draw

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype][1]


def entries(layers: int, experts: int, format: str) -> list[Entry]:
    """All tensors of a GPT-OSS of this size, in the Hugging Face layout.

    format: of the experts, as `convert --to` names it
    """
    q, kv = HEADS * HEAD_WIDTH, KV_HEADS * HEAD_WIDTH
    found = [
        Entry("model.embed_tokens.weight", "BF16", (VOCAB, WIDTH), "weight"),
        Entry("lm_head.weight", "BF16", (VOCAB, WIDTH), "weight"),
        Entry("model.norm.weight", "BF16", (WIDTH,), "norm"),
    ]
    for i in range(layers):
        layer = f"model.layers.{i}."
        attention, mlp = layer + "self_attn.", layer + "mlp."
        found += [
            Entry(layer + "input_layernorm.weight", "BF16", (WIDTH,), "norm"),
            Entry(layer + "post_attention_layernorm.weight", "BF16", (WIDTH,), "norm"),
            Entry(attention + "sinks", "BF16", (HEADS,), "small"),
            Entry(mlp + "router.weight", "BF16", (experts, WIDTH), "weight"),
            Entry(mlp + "router.bias", "BF16", (experts,), "small"),
        ]
        for name, rows, columns in (
            ("q", q, WIDTH),
            ("k", kv, WIDTH),
            ("v", kv, WIDTH),
            ("o", WIDTH, q),
        ):
            found.append(Entry(f"{attention}{name}_proj.weight", "BF16", (rows, columns), "weight"))
            found.append(Entry(f"{attention}{name}_proj.bias", "BF16", (rows,), "small"))
        for name, rows, columns in (
            ("gate_up_proj", 2 * EXPERT_WIDTH, WIDTH),
            ("down_proj", WIDTH, EXPERT_WIDTH),
        ):
            stem = f"{mlp}experts.{name}"
            found += expert_entries(stem, (experts, rows, columns), format)
            found.append(Entry(stem + "_bias", "BF16", (experts, rows), "small"))
    return found


def expert_entries(stem: str, shape: tuple[int, ...], format: str) -> list[Entry]:
    """Codes and scales of stacked experts, named as `convert` names them."""
    from moe_runtime.conversion.layouts import GPT_OSS, written_parts  # slow imports
    from quant.formats import TARGETS

    found = []
    for kind, part in written_parts(GPT_OSS, stem, shape, TARGETS[format]).items():
        key = (kind, part.dtype, TARGETS[format].value_bits)
        found.append(Entry(part.name, part.dtype, part.shape, EXPERT_KINDS[key]))
    return found


def config(layers: int, experts: int, format: str) -> dict:
    """config.json with the published keys; experts in other formats are named as `convert` does."""
    quantized = {"quant_method": "mxfp4"}
    if format != "mxfp4":
        quantized = {"quant_method": "moe_runtime", "format": format}
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "eos_token_id": 200002,
        "pad_token_id": 199999,
        "experts_per_token": 4,
        "num_experts_per_tok": 4,
        "head_dim": HEAD_WIDTH,
        "hidden_act": "silu",
        "hidden_size": WIDTH,
        "initial_context_length": 4096,
        "intermediate_size": EXPERT_WIDTH,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "max_position_embeddings": 131072,
        "num_attention_heads": HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": KV_HEADS,
        "num_local_experts": experts,
        "quantization_config": quantized
        | {
            "modules_to_not_convert": [
                "model.layers.*.self_attn",
                "model.layers.*.mlp.router",
                "model.embed_tokens",
                "lm_head",
            ],
        },
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }


def draw(kind: str, dtype: str, items: int, seed: int, device: torch.device) -> Tensor:
    """`items` random numbers of one kind, drawn on the device, as bytes on the CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    place = {"generator": generator, "device": device}
    if kind == "codes":
        numbers = torch.randint(0, 256, (items,), dtype=torch.uint8, **place)
    elif kind == "scales":
        numbers = torch.randint(119, 122, (items,), dtype=torch.uint8, **place)
    elif kind == "e4m3 scales":  # uniform codes have a deviation of 116
        numbers = torch.randint(113, 116, (items,), dtype=torch.uint8, **place)
    elif kind == "scales of 16":  # E4M3 of 0.75 to 1.25
        numbers = torch.randint(0x34, 0x3B, (items,), dtype=torch.uint8, **place)
    elif kind == "tensor scale":  # uniform codes of E2M1 have a deviation of 3
        numbers = torch.full((items,), 0.02 / 3, device=device)
    elif kind == "experts":
        numbers = torch.randint(0, _NAMED_EXPERTS, (items,), **place)
    elif kind == "e4m3":
        codes = torch.randint(0, 256, (items,), dtype=torch.uint8, **place)
        numbers = codes.masked_fill_((codes & 127) == _E4M3_NAN, 0)
    elif kind == "block scales":  # uniform codes have a deviation of 116
        numbers = (1.0 + torch.rand(items, **place)) * (0.02 / 1.5 / 116)
    elif kind == "norm":
        numbers = torch.ones(items, dtype=DTYPES[dtype][0], device=device)
    else:
        deviation = 0.02 if kind == "weight" else 0.1
        numbers = (torch.randn(items, **place) * deviation).to(DTYPES[dtype][0])
    return numbers.cpu().view(torch.uint8)


def shards(found: list[Entry]) -> list[list[Entry]]:
    """Split into files of about SHARD_BYTES, in order."""
    parts: list[list[Entry]] = [[]]
    for entry in found:
        if parts[-1] and sum(e.nbytes for e in parts[-1]) + entry.nbytes > SHARD_BYTES:
            parts.append([])
        parts[-1].append(entry)
    return parts


def write_header(file: int, part: list[Entry]) -> int:
    """Write the header and size the file; returns the first byte of the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in part:
        end = offset + entry.nbytes
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    os.pwrite(file, len(raw).to_bytes(8, "little") + raw, 0)
    os.ftruncate(file, 8 + len(raw) + offset)
    return 8 + len(raw)


def write_shard(
    path: Path,
    part: list[Entry],
    seed: int,
    device: torch.device,
    pool: ThreadPoolExecutor,
    bar: tqdm,
) -> None:
    """One safetensors file: the header, then chunks drawn and written by the pool's threads."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    start = write_header(file, part)

    def write_chunk(entry: Entry, items: int, place: int) -> None:
        octets = draw(entry.kind, entry.dtype, items, seed + place, device)
        os.pwrite(file, memoryview(octets.numpy()), place)
        bar.update(octets.numel())

    pending = []
    for entry in part:
        item_bytes = DTYPES[entry.dtype][1]
        items, most = math.prod(entry.shape), CHUNK_BYTES // item_bytes
        for done in range(0, items, most):
            count = min(most, items - done)
            pending.append(pool.submit(write_chunk, entry, count, start + done * item_bytes))
        start += entry.nbytes
    for write in pending:
        write.result()
    os.close(file)


def described(shape: str, layers: int | None, format: str | None) -> tuple[list[Entry], dict, dict]:
    """Tensors, config.json and generation_config.json."""
    v4 = random_deepseek_v4.SHAPES.get(shape)
    if v4 is not None:
        layers = layers or v4.layers
        found = [Entry(*tensor) for tensor in random_deepseek_v4.tensors(v4, layers)]
        return found, random_deepseek_v4.config(v4, layers), {"eos_token_id": 1}
    deepseek = random_deepseek.SHAPES.get(shape)
    if deepseek is not None:
        sizes = (deepseek, layers or deepseek.layers, format or deepseek.format)
        found = [Entry(*tensor) for tensor in random_deepseek.tensors(*sizes)]
        return found, random_deepseek.config(*sizes), {"eos_token_id": 1}
    published, experts = SHAPES[shape]
    layers = layers or published
    generation = {"eos_token_id": [200002, 199999, 200012], "pad_token_id": 199999}
    sizes = (layers, experts, format or "mxfp4")
    return entries(*sizes), config(*sizes), generation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*SHAPES, *random_deepseek.SHAPES, *random_deepseek_v4.SHAPES)
    parser.add_argument("--shape", choices=names, default="20b")
    parser.add_argument(
        "--format",
        choices=("bf16", "fp8", "mxfp4", "nvfp4", "mxfp8", "fp8-channel", "fp8-block"),
        help="of V2's and V3's weights (bf16, fp8), or of GPT-OSS's experts (the others)",
    )
    parser.add_argument("--layers", type=int, help="fewer layers than published, to try things out")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found, settings, generation = described(options.shape, options.layers, options.format)
    total = sum(entry.nbytes for entry in found)
    options.output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(options.output).free
    if free < total:
        parser.error(f"{options.output}: needs {total / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
    parts = shards(found)
    weight_map = {}
    with (
        ThreadPoolExecutor(NUM_THREADS) as pool,
        tqdm(total=total, unit="B", unit_scale=True, desc="random weights") as bar,
    ):
        for number, part in enumerate(parts):
            name = f"model-{number:05d}-of-{len(parts) - 1:05d}.safetensors"
            write_shard(
                options.output / name, part, options.seed + (number << 40), device, pool, bar
            )
            weight_map |= {entry.name: name for entry in part}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (options.output / "model.safetensors.index.json").write_text(json.dumps(index))
    (options.output / "config.json").write_text(json.dumps(settings, indent=1))
    (options.output / "generation_config.json").write_text(json.dumps(generation))


if __name__ == "__main__":
    main()
