"""Time of every prefill kernel at full size on one GPU, for several tiles each; experts of decode.

    python benchmarks/bench_kernels.py --shape 20b                 (about a minute)
    python benchmarks/bench_kernels.py --shape 120b --only moe --tokens 2048
    python benchmarks/bench_kernels.py --only moe --tokens 2048 --one-tile --formats mxfp4 nvfp4

Weights are random. Every configuration is first compared with its plain-torch twin on the whole
problem; a wrong kernel stops the run. Each measurement is the median of 15 replays of a CUDA graph
that runs the operation once on each of --layers sets of weights, so that no weight comes from L2;
launch costs of the host are not in it. TFLOP/s counts the work asked for, not padding.
"""

from __future__ import annotations

import argparse
import csv
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from kernels import moe_gemm, moe_gemv, rms_norm, rope_kv, sink_attention_prefill
from kernels.moe_routing import Routing, route_tokens
from kernels.packed_vector import activation_scale, packed_vectors, store_vector, unpack_vectors
from kernels.reference import moe_gemm as moe_twin
from kernels.reference import moe_gemv as gemv_twin
from kernels.reference import rms_norm as norm_twin
from kernels.reference import rope_kv as rope_twin
from kernels.reference import sink_attention_prefill as attention_twin
from kernels.swiglu import Swiglu
from quant.codecs import CODECS
from quant.formats import FORMATS, MXFP4
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

DEVICE = torch.device("cuda")
D = F = 2880
H, G, C, K, W = 64, 8, 64, 4, 128
EXPERTS = {"20b": 32, "120b": 128}
CONTEXT = 16384
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)

MoeTile = moe_gemm.Tile
# Candidates by pairs in a block; the first of each is tried at every length.
MOE_TILES = {
    16: [MoeTile(64, 64, 4, 3), MoeTile(64, 128, 4, 3), MoeTile(128, 64, 4, 4)],
    64: [MoeTile(128, 64, 4, 3), MoeTile(256, 64, 8, 3), MoeTile(128, 64, 8, 4)],
    128: [
        MoeTile(128, 64, 8, 3),
        MoeTile(128, 64, 8, 4),
        MoeTile(128, 64, 4, 3),
        MoeTile(256, 64, 8, 3),
    ],
    256: [MoeTile(64, 64, 4, 3), MoeTile(128, 64, 8, 3)],
}
# Blocks worth trying for a number of pairs an expert.
MOE_BLOCKS = ((24, (16,)), (48, (16, 64)), (128, (64, 128)), (1 << 30, (64, 128, 256)))

AttentionTile = sink_attention_prefill.Tile
ATTENTION_TILES = [
    AttentionTile(64, 8, 3),
    AttentionTile(64, 4, 3),
    AttentionTile(128, 8, 2),
    AttentionTile(64, 8, 2),
]


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    operation: str
    tokens: int
    tile: str
    us: float  # one layer, median
    tflops: float | None = None
    gbps: float | None = None  # 10^9 bytes a second


@dataclass(frozen=True)
class Layer:
    """The experts of one layer."""

    gate_up: QuantTensor
    gate_up_bias: Tensor
    down: QuantTensor
    down_bias: Tensor


def random_experts(format: str, experts: int, rows: int, columns: int) -> QuantTensor:
    """Weights of about 0.02, so that activations stay of the order of 1; every fourth is equal."""
    few = CODECS[format].encode(torch.randn(4, rows, columns, device=DEVICE) * 0.02)
    times = (experts // 4, 1, 1)
    scales = None if few.scales is None else few.scales.repeat(times)
    shape = (experts, rows, columns)
    return replace(few, values=few.values.repeat(times), scales=scales, shape=shape)


def random_layer(experts: int, format: str) -> Layer:
    def bias(width: int) -> Tensor:
        return torch.randn(experts, width, device=DEVICE).bfloat16()

    gate_up, down = (random_experts(format, experts, *s) for s in ((2 * F, D), (D, F)))
    return Layer(gate_up, bias(2 * F), down, bias(D))


def median_us(run: Callable[[], object], repeats: int = 15) -> float:
    """Microseconds of a CUDA graph of run()."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for i in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(begin.elapsed_time(end) * 1e3)
    return statistics.median(times)


def bench_decode_experts(layers: list[Layer], experts: int) -> list[Row]:
    """Both halves of one token's experts."""
    formats = layers[0].gate_up.format, layers[0].down.format
    packed = packed_vectors(formats[0], 1, D, DEVICE)
    store_vector(packed, 0, torch.randn(D, device=DEVICE), 2.0**-12)
    ids = torch.randperm(experts, device=DEVICE)[:K].to(torch.int32)
    weights = torch.rand(K, device=DEVICE)
    unscale = 1 / activation_scale(ACTIVATION.limit)
    hidden = packed_vectors(formats[1], K, F, DEVICE, unscale)
    residual = torch.zeros(D, device=DEVICE)

    def gate_up(layer: Layer, module=moe_gemv, checked: bool = False) -> Tensor:
        module.moe_gate_up(packed, layer.gate_up, layer.gate_up_bias, ids, hidden, ACTIVATION)
        return unpack_vectors(hidden) if checked else hidden.values

    def down(layer: Layer, module=moe_gemv, checked: bool = False) -> Tensor:
        out = residual if module is moe_gemv else residual.clone()
        return module.moe_down(hidden, layer.down, layer.down_bias, ids, weights, out)

    rows = []
    for name, run, weight in (
        ("decode gate_up", gate_up, layers[0].gate_up),
        ("decode down", down, layers[0].down),
    ):
        residual.zero_()
        expected = run(layers[0], gemv_twin, checked=True).clone()
        assert_close(run(layers[0], checked=True), expected, "moe_gemv_mxfp4")
        us = median_us(functools.partial(run_all, run, layers)) / len(layers)
        read = weight.nbytes * K // experts
        rows.append(Row(f"{name} {weight.format.name}", 1, "", us, None, read / us / 1e3))
    return rows


def bench_moe(layers: list[Layer], experts: int, tokens: int, all_tiles: bool) -> list[Row]:
    """Both GEMMs and what stands around them."""
    x = torch.randn(tokens, D, device=DEVICE).bfloat16()
    logits = torch.randn(tokens, experts, device=DEVICE)
    rows = []
    share = tokens * K / experts
    blocks = next(blocks for limit, blocks in MOE_BLOCKS if share <= limit)
    expected = moe_expected(x, layers[0], route_tokens(logits, K, blocks[0]))
    for block in blocks:
        routing = route_tokens(logits, K, block)
        for tile in MOE_TILES[block][: None if all_tiles else 1]:
            rows += moe_rows(layers, x, routing, tile, expected)
    rows.append(
        Row("route_tokens", tokens, "", median_us(lambda: route_tokens(logits, K, blocks[0])))
    )
    residual = torch.zeros(tokens, D, device=DEVICE)
    outputs = expected[1]
    us = median_us(lambda: moe_gemm.add_expert_outputs(outputs, residual))
    rows.append(Row("add_expert_outputs", tokens, "", us, None, tokens * D * 24 / us / 1e3))
    return rows


def moe_expected(x: Tensor, layer: Layer, routing: Routing) -> tuple[Tensor, Tensor]:
    """What the twins say of both halves."""
    hidden = moe_twin.moe_gemm_gate_up(x, layer.gate_up, layer.gate_up_bias, routing, ACTIVATION)
    return hidden, moe_twin.moe_gemm_down(hidden, layer.down, layer.down_bias, routing)


def moe_rows(
    layers: list[Layer],
    x: Tensor,
    routing: Routing,
    tile: MoeTile,
    expected: tuple[Tensor, Tensor],
) -> list[Row]:
    """Check and time one tile."""
    tokens, block = len(x), routing.block_rows.shape[1]
    hidden = expected[0]
    before = moe_gemm.TILES.get(block)
    moe_gemm.TILES[block] = tile

    def gate_up(layer: Layer) -> Tensor:
        return moe_gemm.moe_gemm_gate_up(x, layer.gate_up, layer.gate_up_bias, routing, ACTIVATION)

    def down(layer: Layer) -> Tensor:
        return moe_gemm.moe_gemm_down(hidden, layer.down, layer.down_bias, routing)

    used = int(routing.block_expert.unique().numel()) - 1
    used += int(routing.block_expert[-1]) < layers[0].gate_up.shape[0]
    rows = []
    try:
        for name, run, weight, wanted in (
            ("moe gate_up", gate_up, layers[0].gate_up, expected[0]),
            ("moe down", down, layers[0].down, expected[1]),
        ):
            assert_close(run(layers[0]), wanted, "moe_gemm_mxfp4_bf16")
            us = median_us(functools.partial(run_all, run, layers)) / len(layers)
            flops = 2 * tokens * K * weight.shape[1] * D
            weight_bytes = weight.nbytes * used // weight.shape[0]
            if weight.format is not MXFP4:
                name += f" {weight.format.name}"
            label = f"M {block} N {tile.block_n} K {tile.block_k} w {tile.num_warps}"
            label += f" s {tile.num_stages}"
            rows.append(Row(name, tokens, label, us, flops / us / 1e6, weight_bytes / us / 1e3))
    finally:
        if before is None:
            del moe_gemm.TILES[block]
        else:
            moe_gemm.TILES[block] = before
    return rows


def run_all(run: Callable[[Layer], Tensor], layers: list[Layer]) -> None:
    """run() on each layer."""
    for layer in layers:
        run(layer)


def bench_attention(tokens: int, position: int, all_tiles: bool) -> list[Row]:
    """Full and sliding layers; the twin checks the last 32 tokens of the chunk."""
    rows = []
    for window, slots in ((0, CONTEXT), (W, W + 4095)):
        q = torch.randn(tokens, H, C, device=DEVICE).bfloat16() * 2
        k_cache, v_cache = torch.randn(2, G, slots, C, device=DEVICE).bfloat16()
        sinks = torch.randn(H, device=DEVICE).bfloat16()
        out = torch.empty(tokens, H * C, dtype=torch.bfloat16, device=DEVICE)
        where = torch.tensor([position], dtype=torch.int32, device=DEVICE)
        last = min(32, tokens)
        end = torch.tensor([position + tokens - last], dtype=torch.int32, device=DEVICE)
        expected = attention_twin.sink_attention_prefill(
            q[-last:], k_cache, v_cache, sinks, end, out[:last].clone(), window=window
        )

        def run(a=(q, k_cache, v_cache, sinks, where, out), window=window) -> Tensor:
            return sink_attention_prefill.sink_attention_prefill(*a, window=window)

        keys = sum(min(position + t + 1, window or CONTEXT) for t in range(tokens))
        block = sink_attention_prefill.rows_per_program(tokens, H // G)
        before = sink_attention_prefill.TILES[block]
        for tile in ATTENTION_TILES if all_tiles and block == 128 else [before]:
            sink_attention_prefill.TILES[block] = tile
            out.fill_(float("nan"))
            assert_close(run()[-last:], expected, "attention_bf16")
            us = median_us(run)
            label = f"M {block} N {tile.block_n} w {tile.num_warps} s {tile.num_stages}"
            name = f"attention {'full' if not window else 'window'} at {position}"
            rows.append(Row(name, tokens, label, us, 4 * keys * H * C / us / 1e6))
        sink_attention_prefill.TILES[block] = before
    return rows


def bench_small(tokens: int) -> list[Row]:
    """Norm and rope."""
    x, weight = torch.randn(tokens, D, device=DEVICE), torch.ones(D, device=DEVICE).bfloat16()
    actual = rms_norm.rms_norm(x, weight, 1e-5, torch.bfloat16)
    assert_close(actual, norm_twin.rms_norm(x, weight, 1e-5), "bf16")
    us = median_us(lambda: rms_norm.rms_norm(x, weight, 1e-5, torch.bfloat16))
    rows = [Row("rms_norm", tokens, "", us, None, tokens * D * 6 / us / 1e3)]
    qkv = torch.randn(tokens, (H + 2 * G) * C, device=DEVICE).bfloat16()
    cos, sin = torch.rand(2, CONTEXT, C // 2, device=DEVICE)
    position = torch.tensor([77], dtype=torch.int32, device=DEVICE)
    results = []
    for module in (rope_twin, rope_kv):
        k_cache, v_cache = torch.zeros(2, G, CONTEXT, C, dtype=torch.bfloat16, device=DEVICE)
        q = torch.empty(tokens, H, C, dtype=torch.bfloat16, device=DEVICE)
        module.rope_and_cache(qkv, cos, sin, position, k_cache, v_cache, q)
        written = slice(77, 77 + tokens)
        results.append((q, k_cache[:, written], v_cache[:, written]))
    for wanted, actual in zip(*results, strict=True):
        assert_close(actual, wanted, "bf16")
    us = median_us(lambda: rope_kv.rope_and_cache(qkv, cos, sin, position, k_cache, v_cache, q))
    return rows + [Row("rope_and_cache", tokens, "", us, None, qkv.nbytes * 2 / us / 1e3)]


def print_table(rows: list[Row]) -> None:
    """Fixed columns; the fastest tile of an operation and length is starred."""
    best: dict[tuple[str, int], float] = {}
    for row in rows:
        key = (row.operation, row.tokens)
        best[key] = min(row.us, best.get(key, row.us))
    print(f"{'operation':24} {'tokens':>6}  {'tile':28} {'us':>9} {'TFLOP/s':>8} {'GB/s':>7}")
    for row in rows:
        star = "*" if row.tile and row.us == best[row.operation, row.tokens] else " "
        tflops = f"{row.tflops:8.0f}" if row.tflops else " " * 8
        gbps = f"{row.gbps:7.0f}" if row.gbps else " " * 7
        print(
            f"{row.operation:24} {row.tokens:6}  {row.tile:27}{star} {row.us:9.1f} {tflops} {gbps}"
        )


def main() -> None:
    """Run, print, and append to a CSV if asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=EXPERTS, default="20b")
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 512, 128, 10])
    parser.add_argument("--only", choices=["moe", "attention", "small"])
    parser.add_argument("--layers", type=int, default=2, help="sets of expert weights")
    parser.add_argument(
        "--formats", nargs="*", choices=FORMATS, default=["mxfp4"], help="of the experts"
    )
    parser.add_argument("--one-tile", action="store_true", help="the first tile of each kind only")
    parser.add_argument("--csv", type=pathlib.Path, help="append the rows here")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    experts = EXPERTS[arguments.shape]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, gpt-oss-{arguments.shape}")
    rows: list[Row] = []
    all_tiles = not arguments.one_tile
    if arguments.only in (None, "moe"):
        for format in arguments.formats:
            layers = [random_layer(experts, format) for _ in range(arguments.layers)]
            rows += bench_decode_experts(layers, experts)
            for tokens in arguments.tokens:
                rows += bench_moe(layers, experts, tokens, all_tiles)
            del layers
    for index, tokens in enumerate(arguments.tokens):
        if arguments.only in (None, "attention"):
            rows += bench_attention(tokens, 0, all_tiles and index == 0)
            if index == 0:
                rows += bench_attention(tokens, 8192, all_tiles)
        if arguments.only in (None, "small"):
            rows += bench_small(tokens)
    print_table(rows)
    if arguments.csv:
        append_csv(arguments.csv, arguments.shape, rows)


def append_csv(path: pathlib.Path, shape: str, rows: list[Row]) -> None:
    """One line a row; a new file gets a header."""
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["gpu", "torch", "shape", "operation", "tokens", "tile", "us",
                             "tflops", "gbps"])  # fmt: skip
        where = [torch.cuda.get_device_name(), torch.__version__, shape]
        for row in rows:
            values = [f"{v:.1f}" if v is not None else "" for v in (row.us, row.tflops, row.gbps)]
            writer.writerow([*where, row.operation, row.tokens, row.tile, *values])


if __name__ == "__main__":
    main()
