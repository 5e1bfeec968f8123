"""Speed and memory of `convert`, beside compressed-tensors' own packing of the same tensors.

    python benchmarks/bench_convert.py --gigabytes 4 --csv benchmarks/results/cpu_2core.csv

Writes a synthetic bf16 checkpoint with the shapes of Qwen3-30B-A3B's experts (normal numbers of
deviation 0.02), converts it from end to end (read, encode, measure errors, write) in a process of
its own, and prints bytes of source a second, the same for each second of processor time, and the
largest resident size of that process. For each format some of the same tensors are then quantized
in memory, without files, by us and by compressed-tensors.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from quant.codecs import encode
from quant.formats import TARGETS

WIDTH, EXPERT_WIDTH, EXPERTS = 2048, 768, 128
FORMATS = ("mxfp4", "fp8-block")
COLUMNS = ("date", "commit", "gpu", "runtime", "model", "formats", "context", "metric", "value",
           "unit")  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        convert_here(Path(arguments.child[0]), Path(arguments.child[1]), arguments.child[2])
        return
    source = arguments.folder / "bench-convert-source"
    rows = []
    try:
        layers = write_checkpoint(source, arguments.gigabytes)
        size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
        print(f"{size / 1e9:.2f} GB in {layers} layers, {os.cpu_count()} cores")
        for target in arguments.formats:
            rows += bench(source, arguments.folder / f"bench-convert-{target}", target, size)
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if arguments.csv:
        append(arguments.csv, rows)


def bench(source: Path, output: Path, target: str, size: int) -> list[dict[str, object]]:
    """Rows of one format."""
    command = [sys.executable, __file__, "--child", str(source), str(output), target]
    try:
        told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)
    facts = json.loads(told.splitlines()[-1])
    rate = size / 1e6 / facts["seconds"]
    a_core = size / 1e6 / facts["cpu_seconds"]
    ours, theirs = encode_rate(target), compressed_tensors_rate(target)
    print(
        f"{target}: {rate:.0f} MB/s of bf16 source, {a_core:.0f} a core-second, "
        f"peak {facts['peak_bytes'] / 1e6:.0f} MB; in memory {ours:.0f} MB/s, "
        f"compressed-tensors {theirs:.0f} MB/s; load {os.getloadavg()[0]:.1f}"
    )
    found = [
        ("convert_mb_per_s", f"{rate:.1f}", "MB/s"),
        ("convert_mb_per_core_s", f"{a_core:.1f}", "MB/s"),
        ("convert_peak_memory", f"{facts['peak_bytes'] / 1e6:.0f}", "MB"),
        ("encode_mb_per_s", f"{ours:.1f}", "MB/s"),
        ("compressed_tensors_mb_per_s", f"{theirs:.1f}", "MB/s"),
        ("load_average", f"{os.getloadavg()[0]:.1f}", "processes"),
    ]
    return [row(target, size, *metric) for metric in found]


def convert_here(source: Path, output: Path, target: str) -> None:
    """In the child: convert, print seconds and the peak of resident memory."""
    from moe_runtime.conversion.convert import convert  # after --child alone: the parent needs none
    from moe_runtime.conversion.options import ConversionOptions

    start, cpu_start = time.perf_counter(), time.process_time()
    convert(str(source), output, ConversionOptions(target), progress=False)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    # Not ru_maxrss: a child starts with that of the process it was forked from.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    facts = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}
    print(json.dumps(facts))


def write_checkpoint(folder: Path, gigabytes: float) -> int:
    """A checkpoint of experts, one router a layer and a head; returns its number of layers."""
    from safetensors.torch import save_file  # only here: the child must not need it

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    layer_bytes = 3 * EXPERTS * EXPERT_WIDTH * WIDTH * 2
    layers = max(1, round(gigabytes * 1e9 / layer_bytes))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    for layer in range(layers):
        file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
        tensors = layer_tensors(layer, generator)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    config = {
        "model_type": "qwen3_moe",
        "hidden_size": WIDTH,
        "num_hidden_layers": layers,
        "num_experts": EXPERTS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return layers


def layer_tensors(layer: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Router and experts of one layer; experts repeat eight drawn ones."""
    prefix = f"model.layers.{layer}.mlp."
    shapes = {"gate_proj": (EXPERT_WIDTH, WIDTH), "up_proj": (EXPERT_WIDTH, WIDTH),
              "down_proj": (WIDTH, EXPERT_WIDTH)}  # fmt: skip
    drawn = {
        name: [torch.randn(shape, generator=generator).mul_(0.02).bfloat16() for _ in range(8)]
        for name, shape in shapes.items()
    }
    tensors = {prefix + "gate.weight": drawn["gate_proj"][0][:EXPERTS].clone()}
    for expert in range(EXPERTS):
        for name in shapes:
            weight = drawn[name][expert % 8].clone()
            tensors[f"{prefix}experts.{expert}.{name}.weight"] = weight
    return tensors


def some_tensors(count: int = 12) -> list[Tensor]:
    """Weights of a few experts."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(EXPERT_WIDTH, WIDTH, generator=generator).mul_(0.02).bfloat16()
        for _ in range(count)
    ]


def encode_rate(target: str) -> float:
    """MB of bf16 weights a second that our codec encodes in memory."""
    tensors = some_tensors()
    start = time.perf_counter()
    for weight in tensors:
        encode(weight, TARGETS[target])
    return sum(weight.nbytes for weight in tensors) / 1e6 / (time.perf_counter() - start)


def compressed_tensors_rate(target: str) -> float:
    """MB of bf16 weights a second that compressed-tensors scales, rounds and packs in memory."""
    from compressed_tensors.compressors import BaseCompressor  # slow, and only for comparison
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    block = target == "fp8-block"
    more = {"strategy": "block", "block_structure": [128, 128]} if block else {
        "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8}  # fmt: skip
    weights = QuantizationArgs(num_bits=8 if block else 4, type="float", symmetric=True, **more)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    name = "float-quantized" if block else "mxfp4-pack-quantized"
    compressor = BaseCompressor.get_value_from_registry(name)
    tensors = some_tensors()
    start = time.perf_counter()
    for weight in tensors:
        if block:
            tiles = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        else:
            low, high = torch.aminmax(weight.unflatten(-1, (-1, 32)), dim=-1)
        scale, zero_point = calculate_qparams(low, high, weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        compressor.compress(state, scheme)
    seconds = time.perf_counter() - start
    return sum(weight.nbytes for weight in tensors) / 1e6 / seconds


def row(target: str, size: int, metric: str, value: str, unit: str) -> dict[str, object]:
    """One line of the CSV."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    values = (
        *(datetime.date.today().isoformat(), commit, f"none, {os.cpu_count()} CPU cores"),
        *(f"torch {torch.__version__}", f"synthetic {size / 1e9:.1f} GB bf16 qwen3_moe"),
        *(f"experts={target}", "", metric, value, unit),
    )
    return dict(zip(COLUMNS, values, strict=True))


def append(path: Path, rows: list[dict[str, object]]) -> None:
    """Add rows to a CSV, with the header if it is new."""
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of bf16 source")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for source and result")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
