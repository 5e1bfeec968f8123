"""Speed and memory of `convert`, beside compressed-tensors' own packing of the same tensors.

    python benchmarks/bench_convert.py --gigabytes 4 --csv benchmarks/results/cpu_2core.csv
    python benchmarks/bench_convert.py --gigabytes 20 --memory-limit 2 --kills 3

Writes a synthetic bf16 checkpoint with the shapes of Qwen3-30B-A3B's experts (normal numbers of
deviation 0.02), reads it once for the disk's own rate, converts it from end to end (read, encode,
measure errors, write) and verifies the result against it, each in a process of its own with a cold
page cache, and prints bytes a second and the largest resident size of those processes. For each
format some of the same tensors are then quantized in memory, without files, by us and by
compressed-tensors.

With --kills the conversion is done again, killed with SIGKILL at random moments and resumed; every
file of the result must have the hash that it had before.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import hashlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quant.codecs import encode
from quant.formats import TARGETS

WIDTH, EXPERT_WIDTH, EXPERTS = 2048, 768, 128
FORMATS = ("mxfp4", "fp8-block")
# Target -> its name and arguments there.
COMPRESSED_TENSORS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"num_bits": 4, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {
            **{"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
            "scale_dtype": torch.float8_e4m3fn,
        },
    ),
    "mxfp8": (
        "mxfp8-quantized",
        {"num_bits": 8, "strategy": "group", "group_size": 32, "scale_dtype": torch.uint8},
    ),
    "fp8-block": (
        "float-quantized",
        {"num_bits": 8, "strategy": "block", "block_structure": [128, 128]},
    ),
    "fp8-channel": ("float-quantized", {"num_bits": 8, "strategy": "channel"}),
}
SHARD_BYTES = 10**9
MOST_READ_BYTES = 4 * 10**9  # for the disk's rate
READ_BYTES = 16 << 20
COLUMNS = ("date", "commit", "gpu", "runtime", "model", "formats", "context", "metric", "value",
           "unit")  # fmt: skip


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        work, source, output, target = arguments.child
        work_here(work, Path(source), Path(output), target, arguments.memory_limit)
        return
    source = arguments.folder / "bench-convert-source"
    rows = []
    try:
        layers = write_checkpoint(source, arguments.gigabytes)
        size = bytes_of(source)
        disk_rate = read_rate(source)
        print(f"{size / 1e9:.2f} GB in {layers} layers, {os.cpu_count()} cores, "
              f"the disk reads {disk_rate:.0f} MB/s")  # fmt: skip
        for target in arguments.formats:
            metrics = [("disk_read_mb_per_s", f"{disk_rate:.1f}", "MB/s")]
            metrics += bench(source, target, size, arguments)
            model = model_name(size, arguments.memory_limit)
            rows += [row(target, model, *metric) for metric in metrics]
    finally:
        shutil.rmtree(source, ignore_errors=True)
    if arguments.csv:
        append(arguments.csv, rows)


Metric = tuple[str, str, str]  # name, value, unit


def bench(source: Path, target: str, size: int, arguments: argparse.Namespace) -> Iterator[Metric]:
    """The measurements of one format."""
    with result_folder(arguments.folder / f"bench-convert-{target}") as output:
        facts = child("convert", source, output, target, arguments.memory_limit)
        rate, a_core = (size / 1e6 / facts[key] for key in ("seconds", "cpu_seconds"))
        print(f"{target}: {rate:.0f} MB/s of bf16 source, {a_core:.0f} a core-second, "
              f"peak {facts['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip
        yield "convert_mb_per_s", f"{rate:.1f}", "MB/s"
        yield "convert_mb_per_core_s", f"{a_core:.1f}", "MB/s"
        yield "convert_peak_memory", f"{facts['peak_bytes'] / 1e6:.0f}", "MB"
        checked = child("verify", source, output, target, arguments.memory_limit)
        rate = (size + bytes_of(output)) / 1e6 / checked["seconds"]
        print(f"{target}: verified at {rate:.0f} MB/s of both, "
              f"peak {checked['peak_bytes'] / 1e6:.0f} MB")  # fmt: skip
        yield "verify_mb_per_s", f"{rate:.1f}", "MB/s"
        yield "verify_peak_memory", f"{checked['peak_bytes'] / 1e6:.0f}", "MB"
        expected = hashes(output) if arguments.kills else {}
    if arguments.kills:
        yield from killed_and_resumed(source, target, expected, facts["seconds"], arguments)
    ours, theirs = encode_rates(target)
    load = os.getloadavg()[0]
    print(f"{target}: in memory {ours:.0f} MB/s, compressed-tensors {theirs:.0f} MB/s; "
          f"load {load:.1f}")  # fmt: skip
    yield "encode_mb_per_s", f"{ours:.1f}", "MB/s"
    yield "compressed_tensors_mb_per_s", f"{theirs:.1f}", "MB/s"
    yield "load_average", f"{load:.1f}", "processes"


def killed_and_resumed(
    source: Path,
    target: str,
    expected: dict[str, str],
    seconds: float,
    arguments: argparse.Namespace,
) -> Iterator[Metric]:
    """Convert again with interruptions; raises SystemExit when the result is another one.

    seconds: of the conversion without interruptions
    """
    moments = random.Random(target)
    with result_folder(arguments.folder / f"bench-convert-{target}-killed") as output:
        command = child_command("convert", source, output, target, arguments.memory_limit)
        kills = 0
        while kills < arguments.kills:
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
            moment = moments.uniform(0.1, 0.5) * seconds
            try:
                process.wait(moment)
                break  # finished before
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
                done = len(list(output.parent.glob(f"{output.name}.partial/*.safetensors")))
                print(f"{target}: killed after {moment:.1f} s, {done} files are whole")
        facts = child("convert", source, output, target, arguments.memory_limit)
        if hashes(output) != expected:
            raise SystemExit(f"{target}: after {kills} kills the result is another one")
    print(f"{target}: {len(expected)} files, equal after {kills} kills")
    yield "kills", str(kills), "SIGKILL"
    yield "files_equal_after_kills", str(len(expected)), "files"
    yield "peak_memory_after_kills", f"{facts['peak_bytes'] / 1e6:.0f}", "MB"


@contextmanager
def result_folder(output: Path) -> Iterator[Path]:
    """A folder for a result, removed at the end with what an interrupted conversion left."""
    try:
        yield output
    finally:
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(output.with_name(output.name + ".partial"), ignore_errors=True)


def child(
    work: str, source: Path, output: Path, target: str, limit: float | None
) -> dict[str, float]:
    """What a child measured; the files that it reads are not in the page cache."""
    for path in (*source.iterdir(), *(output.iterdir() if output.exists() else ())):
        forget(path)
    command = child_command(work, source, output, target, limit)
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(json.loads(told.splitlines()[-1]))


def child_command(
    work: str, source: Path, output: Path, target: str, limit: float | None
) -> list[str]:
    """The command line of a child."""
    limited = [] if limit is None else ["--memory-limit", str(limit)]
    return [sys.executable, __file__, *limited, "--child", work, str(source), str(output), target]


def work_here(work: str, source: Path, output: Path, target: str, limit: float | None) -> None:
    """In the child: convert or verify, print seconds and the peak of resident memory."""
    # After --child alone: the parent needs none.
    from moe_runtime.conversion.convert import convert
    from moe_runtime.conversion.options import ConversionOptions
    from moe_runtime.verification.verify import verify

    if limit is not None:
        nbytes = int(limit * 2**30)
        resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))
    start, cpu_start = time.perf_counter(), time.process_time()
    if work == "convert":
        options = ConversionOptions(target, shard_bytes=SHARD_BYTES)
        convert(str(source), output, options, progress=False)
    else:
        found = verify(output, source)
        assert found.sound and found.compared, found.findings
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    # Not ru_maxrss: a child starts with that of the process it was forked from.
    status = Path("/proc/self/status").read_text()
    peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
    facts = {"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak}
    print(json.dumps(facts))


def read_rate(folder: Path) -> float:
    """MB a second that the disk gives to one reader who does nothing else."""
    total, start = 0, time.perf_counter()
    memory = bytearray(READ_BYTES)
    for path in sorted(folder.glob("*.safetensors")):
        forget(path)
        with path.open("rb", buffering=0) as file:
            while total < MOST_READ_BYTES and (count := file.readinto(memory)):
                total += count
    return total / 1e6 / (time.perf_counter() - start)


def forget(path: Path) -> None:
    """Have a file written and dropped from the page cache."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(READ_BYTES):
                digest.update(piece)
        found[path.name] = digest.hexdigest()
    return found


def bytes_of(folder: Path) -> int:
    """Bytes of all weight files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


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


def encode_rates(target: str, repeats: int = 5) -> tuple[float, float]:
    """MB of bf16 weights a second, encoded in memory by our codec and by compressed-tensors.

    Medians of turns that alternate, so that other work on the cores meets both.
    """
    tensors = some_tensors()
    works = (lambda weight: encode(weight, TARGETS[target]), compressed_tensors_packing(target))
    rates: tuple[list[float], list[float]] = ([], [])
    for turn in range(repeats + 1):  # the first one is to warm up
        for work, found in zip(works, rates, strict=True):
            start = time.perf_counter()
            for weight in tensors:
                work(weight)
            if turn:
                nbytes = sum(weight.nbytes for weight in tensors)
                found.append(nbytes / 1e6 / (time.perf_counter() - start))
    return statistics.median(rates[0]), statistics.median(rates[1])


def compressed_tensors_packing(target: str) -> Callable[[Tensor], object]:
    """What scales, rounds and packs one weight by compressed-tensors."""
    from compressed_tensors.compressors import BaseCompressor  # slow, and only for comparison
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    name, settings = COMPRESSED_TENSORS[target]
    weights = QuantizationArgs(type="float", symmetric=True, **settings)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = BaseCompressor.get_value_from_registry(name)

    def pack(weight: Tensor) -> object:
        if target == "fp8-block":
            tiles = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            low, high = tiles.amin((1, 3)), tiles.amax((1, 3))
        elif target == "fp8-channel":
            low, high = torch.aminmax(weight, dim=-1, keepdim=True)
        else:
            low, high = torch.aminmax(weight.unflatten(-1, (-1, settings["group_size"])), dim=-1)
        state = {"weight": weight}
        whole = None
        if target == "nvfp4":
            whole = state["weight_global_scale"] = generate_gparam(low.amin(), high.amax())
        scale, zero_point = calculate_qparams(low, high, weights, global_scale=whole)
        state |= {"weight_scale": scale, "weight_zero_point": zero_point}
        return compressor.compress(state, scheme)

    return pack


def model_name(size: int, memory_limit: float | None) -> str:
    """What was converted, and under which limit."""
    limited = "" if memory_limit is None else f", RLIMIT_DATA {memory_limit:g} GiB"
    return f"synthetic {size / 1e9:.1f} GB bf16 qwen3_moe{limited}"


def row(target: str, model: str, metric: str, value: str, unit: str) -> dict[str, object]:
    """One line of the CSV."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    values = (
        *(datetime.date.today().isoformat(), commit, f"none, {os.cpu_count()} CPU cores"),
        *(f"torch {torch.__version__}", model, f"experts={target}", "", metric, value, unit),
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
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of each process")
    parser.add_argument("--kills", type=int, default=0, help="convert again, killed so often")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
