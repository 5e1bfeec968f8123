"""Time of every kernel in DeepSeek V4-Flash's decode step, at full size on one GPU.

    python benchmarks/bench_v4_kernels.py                          (under a minute)
    python benchmarks/bench_v4_kernels.py --context 1024 --only attention index

Weights are random. Each kernel is first compared with its plain-torch twin; a wrong one is named
and counted, and its time is not taken. A time is the median of 15 replays of a CUDA graph that runs
the operation on several sets of weights in turn, so that no weight comes from L2, divided by their
number; kernels start early, as they do in the step.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from kernels import (
    compressed_rows,
    gemv,
    grouped_router,
    hyper_connections,
    latent_index,
    moe_gemv,
    shared_row_attention,
    shared_rows,
)
from kernels.latent_cache import rope_of
from kernels.packed_vector import activation_scale, packed_vectors, store_vector, unpack_vectors
from kernels.reference import compressed_rows as compressed_rows_twin
from kernels.reference import gemv as gemv_twin
from kernels.reference import grouped_router as grouped_router_twin
from kernels.reference import hyper_connections as hyper_connections_twin
from kernels.reference import latent_index as latent_index_twin
from kernels.reference import moe_gemv as moe_gemv_twin
from kernels.reference import shared_row_attention as shared_row_attention_twin
from kernels.reference import shared_rows as shared_rows_twin
from kernels.swiglu import Swiglu
from quant.codecs import encode
from quant.formats import FP8_BLOCK128_E8M0, MXFP4, QuantFormat
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

L2_BYTES = 120 << 20  # sets of weights take more than this together
REPEATS = 15
PLAIN = torch.bfloat16  # plain weights and caches


@dataclass(frozen=True)
class Sizes:
    """Letters as in kernels/."""

    D: int = 4096
    H: int = 64
    C: int = 512
    P: int = 64
    R: int = 1024
    groups: int = 8
    group_rows: int = 1024
    I: int = 64
    J: int = 128
    top_k: int = 512
    W: int = 128
    E: int = 256
    K: int = 6
    F: int = 2048
    N: int = 4
    V: int = 129280
    chunk: int = 2048


@dataclass(frozen=True)
class Case:
    """One operation.

    run:         launches it with one set of weights
    outputs:     of the kernel (False) or of the twin (True), for the first set, from equal inputs
    """

    name: str
    sets: int
    run: Callable[[int], object]
    outputs: Callable[[bool], tuple[Tensor, ...]]
    tolerance: str
    read_bytes: int


def sets_of(nbytes: int) -> int:
    """Sets of weights of this size that do not fit an L2 cache."""
    return max(2, min(64, -(-L2_BYTES // nbytes)))


class Maker:
    """Random tensors on one device."""

    def __init__(self, device: torch.device, sizes: Sizes, context: int) -> None:
        self.device, self.s, self.context = device, sizes, context
        self.generator = torch.Generator(device).manual_seed(0)
        self.position = torch.tensor([context - 1], dtype=torch.int32, device=device)
        frequencies = 10000.0 ** -(torch.arange(sizes.P // 2) / (sizes.P // 2)).double()
        self.rope = rope_of(frequencies, 1.0, torch.arange(context, device=device))

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).to(dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def matrix(self, rows: int, columns: int) -> QuantTensor:
        return encode(self.normal(rows, columns) * columns**-0.5, FP8_BLOCK128_E8M0)

    def experts(self, count: int, rows: int, columns: int, format: QuantFormat) -> QuantTensor:
        """A stack whose experts are the same four in turn: encoding takes a while."""
        few = encode(self.normal(min(4, count), rows, columns) * columns**-0.5, format)
        times = (-(-count // len(few.values)), 1, 1)
        assert few.scales is not None
        values, scales = few.values.repeat(times)[:count], few.scales.repeat(times)[:count]
        return QuantTensor(values, scales, format, (count, rows, columns))


def projections(m: Maker) -> Iterator[Case]:
    """Dense weights, by what they are for."""
    s = m.s
    shapes = {
        "inputs": (s.R + s.C, s.D, 1, True),
        "queries": (s.H * s.C + s.I * s.J, s.R, 1, True),
        "out_a": (s.groups * s.group_rows, s.H * s.C // s.groups, s.groups, False),
        "out_b": (s.D, s.groups * s.group_rows, 1, False),
        "compressed": (4 * (s.C + s.J) + s.I, s.D, 1, True),
    }
    for name, (rows, columns, groups, normed) in shapes.items():
        plain = name == "compressed"
        sets = sets_of(rows * columns * (2 if plain else 1))
        weights: list[Tensor | QuantTensor] = [
            m.normal(rows, columns, dtype=PLAIN) if plain else m.matrix(rows, columns)
            for _ in range(sets)
        ]
        x, out = m.normal(groups * columns), m.zeros(rows)
        norm = m.normal(columns, dtype=PLAIN) if normed else None

        def launch(i: int, module=gemv, x=x, weights=weights, out=out, norm=norm, groups=groups):
            return module.gemv(x, weights[i], out, norm=norm, eps=1e-6, groups=groups)

        def outputs(twin: bool, launch=launch) -> tuple[Tensor, ...]:
            return (launch(0, gemv_twin if twin else gemv).clone(),)

        yield Case(f"gemv {name}", sets, launch, outputs, "gemv", weights[0].nbytes)


def hyper(m: Maker) -> Iterator[Case]:
    """The end of a block and the begin of the next one."""
    s = m.s
    rows = s.N * (2 + s.N)
    sets = sets_of(4 * rows * s.N * s.D)
    functions = [m.normal(rows, s.N * s.D) * (s.N * s.D) ** -0.5 for _ in range(sets)]
    base, scale = m.normal(rows), m.normal(3)
    streams, result, mix = m.normal(s.N, s.D), m.normal(s.D), 0.2 * m.normal(s.N * (1 + s.N))
    partial = m.zeros(hyper_connections.num_programs(s.D), rows + 1)
    ticket, out = m.zeros(1, dtype=torch.int32), m.zeros(s.D)

    def launch(i: int, module=hyper_connections, state=(streams, result, mix)) -> Tensor:
        return module.hyper_step(
            *state, functions[i], base, scale, out, first=False, iterations=20, eps=1e-6,
            norm_eps=1e-6, partial=partial, ticket=ticket,
        )  # fmt: skip

    def outputs(twin: bool) -> tuple[Tensor, ...]:
        state = (streams.clone(), m.normal(s.D).fill_(0.7), mix.clone())
        launch(0, hyper_connections_twin if twin else hyper_connections, state)
        return out.clone(), state[0], state[2]

    yield Case("hyper_step", sets, launch, outputs, "gemv", functions[0].nbytes)


def rows(m: Maker) -> Iterator[Case]:
    """Queries, the row, and what a token adds to compressors."""
    s = m.s
    slots = min(m.context, s.W + s.chunk)
    q, index_q = m.normal(1, s.H, s.C), m.normal(1, s.I, s.J)
    row, norm = m.normal(1, s.C), m.normal(s.C)

    def make(module=shared_rows) -> tuple[Tensor, ...]:
        ring = m.zeros(slots, s.C, dtype=PLAIN)
        query = m.zeros(1, s.H, s.C, dtype=PLAIN)
        index_query = m.zeros(1, s.I, s.J, dtype=PLAIN)

        def launch(i: int = 0) -> tuple[Tensor, ...]:
            module.shared_rows(
                q, row, norm, m.rope, m.position, ring, query, eps=1e-6, index_q=index_q,
                index_query=index_query,
            )  # fmt: skip
            return query, ring, index_query

        return launch  # type: ignore[return-value]

    timed = make()
    yield Case(
        "shared_rows", 2, timed, lambda twin: make(shared_rows_twin if twin else shared_rows)(),
        "bf16", 4 * (q.numel() + index_q.numel()),
    )  # fmt: skip
    for ratio, width in ((4, s.C), (4, s.J), (128, s.C)):
        wide, parts = (2 * width, 3) if ratio == 4 else (width, 1)
        projected, bias, weight = m.normal(1, 2 * wide), m.normal(ratio, wide), m.normal(width)
        before = 1 + m.normal(parts, 3, width).abs()
        finished = -(-m.context // ratio)

        def compress(
            module, state: Tensor, ratio=ratio, width=width, projected=projected, bias=bias,
            weight=weight, finished=finished,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            made = m.zeros(finished, width, dtype=PLAIN)
            module.compressed_rows(
                projected, bias, weight, m.rope, m.position, state, state, made, eps=1e-6
            )
            return made, state

        made = m.zeros(finished, width, dtype=PLAIN)
        state = before.clone()

        def again(
            i: int, state=state, made=made, projected=projected, bias=bias, weight=weight
        ) -> None:
            compressed_rows.compressed_rows(
                projected, bias, weight, m.rope, m.position, state, state, made, eps=1e-6
            )

        def outputs(twin: bool, compress=compress, before=before) -> tuple[Tensor, ...]:
            return compress(compressed_rows_twin if twin else compressed_rows, before.clone())

        name = f"compressed_rows {ratio} x {width}"
        yield Case(name, 2, again, outputs, "bf16", 8 * before.numel() + projected.nbytes)


def index(m: Maker) -> Iterator[Case]:
    """The indexer's choice, of rows whose scores are not equal."""
    s = m.s
    finished = m.context // 4
    query, weights = m.normal(1, s.I, s.J, dtype=PLAIN), m.normal(1, s.I)
    keys = m.normal(-(-m.context // 4), s.J, dtype=PLAIN)
    scores = m.zeros(1, len(keys))

    def outputs(twin: bool) -> tuple[Tensor, ...]:
        chosen = m.zeros(1, s.top_k, dtype=torch.int32)
        module = latent_index_twin if twin else latent_index
        module.index_choose(query, weights, keys, m.position, scores, chosen, ratio=4)
        # Sums in another order may change places at the edge: compare what is kept.
        plain = (weights[0, :, None] * (query[0].float() @ keys.float().T).relu()).sum(0)
        return (plain[chosen[0, : min(finished, s.top_k)].long()].sort().values,)

    chosen = m.zeros(1, s.top_k, dtype=torch.int32)

    def run(i: int) -> Tensor:
        return latent_index.index_choose(query, weights, keys, m.position, scores, chosen, ratio=4)

    yield Case("index_choose", 2, run, outputs, "bf16", finished * s.J * 2)


def attention(m: Maker) -> Iterator[Case]:
    """Over the window, over chosen rows besides, over all compressed rows besides."""
    s = m.s
    slots = min(m.context, s.W + s.chunk)
    splits = shared_row_attention.SPLITS
    acc, stats = m.zeros(s.H, splits, s.C), m.zeros(s.H, splits, 2)
    query, sinks = m.normal(s.H, s.C, dtype=PLAIN) * 2, m.normal(s.H)
    for ratio in (0, 4, 128):
        finished = m.context // ratio if ratio else 0
        cached = m.normal(slots + finished + 1, s.C, dtype=PLAIN)
        chosen, far = None, finished
        if ratio == 4 and finished > s.top_k:
            order = torch.randperm(finished, generator=m.generator, device=m.device)
            chosen, far = order[: s.top_k].sort().values.to(torch.int32), s.top_k
        out = m.zeros(s.H, s.C)

        def launch(
            i: int, module=shared_row_attention, cached=cached, chosen=chosen, ratio=ratio, out=out
        ) -> Tensor:
            return module.shared_row_attention_decode(
                query, cached, m.position, sinks, m.rope, out, slots=slots, window=s.W,
                ratio=ratio, acc=acc, stats=stats, chosen=chosen,
            )  # fmt: skip

        def outputs(twin: bool, launch=launch) -> tuple[Tensor, ...]:
            module = shared_row_attention_twin if twin else shared_row_attention
            return (launch(0, module).clone(),)

        read = (min(s.W, m.context) + far) * s.C * 2
        yield Case(f"attention, ratio {ratio}", 2, launch, outputs, "attention_bf16", read)


def experts(m: Maker) -> Iterator[Case]:
    """The router, routed experts in FP4, the shared one in FP8."""
    s = m.s
    sets = sets_of(2 * s.E * s.D)
    routers = [m.normal(s.E, s.D, dtype=PLAIN) * 0.02 for _ in range(sets)]
    x, norm, bias = m.normal(s.D), m.normal(s.D, dtype=PLAIN), m.normal(s.E)
    table = torch.randint(0, s.E, (s.V, s.K), generator=m.generator, device=m.device)
    for name, hashed in (("router", False), ("router, by token id", True)):
        ids, weights = m.zeros(s.K, dtype=torch.int32), m.zeros(s.K)
        fp4, fp8 = (packed_vectors(f, 1, s.D, m.device) for f in (MXFP4, FP8_BLOCK128_E8M0))
        logits, ticket = m.zeros(s.E), m.zeros(1, dtype=torch.int32)
        token = m.zeros(1, dtype=torch.int32)

        def route(
            i: int, module=grouped_router, hashed=hashed, ids=ids, weights=weights, fp4=fp4,
            fp8=fp8, logits=logits, ticket=ticket, token=token,
        ) -> tuple[Tensor, ...]:  # fmt: skip
            module.grouped_router(
                x, norm, routers[i], None if hashed else bias, eps=1e-6, scores="sqrtsoftplus",
                num_groups=1, num_limited=1, normalized=True, scale=1.5, logits=logits,
                ticket=ticket, expert_ids=ids, expert_weights=weights, packed=fp4, also=fp8,
                token=token, table=table if hashed else None,
            )  # fmt: skip
            return logits, ids, weights

        def outputs(twin: bool, route=route, fp4=fp4, fp8=fp8) -> tuple[Tensor, ...]:
            found = route(0, grouped_router_twin if twin else grouped_router)
            copies = tuple(t.clone() for t in found)
            return *copies, unpack_vectors(fp4), unpack_vectors(fp8)

        yield Case(name, sets, route, outputs, "packed_fp16", routers[0].nbytes)
    for format, count, chosen in ((MXFP4, s.E, s.K), (FP8_BLOCK128_E8M0, 1, 1)):
        yield from halves(m, format, count, chosen)


def halves(m: Maker, format: QuantFormat, count: int, chosen: int) -> Iterator[Case]:
    """gate_up and down of experts in one format; other experts in each set."""
    s, activation = m.s, Swiglu(10.0)
    shapes = (2 * s.F, s.D), (s.D, s.F)
    shared = count == 1
    if shared:  # one expert in each set, which every token takes
        sets = sets_of(s.D * s.F)
        stacks = [[m.experts(1, *shape, format) for _ in range(sets)] for shape in shapes]
        ids = [torch.zeros(1, dtype=torch.int32, device=m.device)] * sets
    else:
        sets = count // chosen
        stacks = [[m.experts(count, *shape, format)] * sets for shape in shapes]
        order = torch.randperm(count, generator=m.generator, device=m.device).to(torch.int32)
        ids = [order[i * chosen : (i + 1) * chosen].contiguous() for i in range(sets)]
    gate_up, down = stacks
    weights, out = m.normal(chosen).abs(), m.zeros(s.D)
    packed = packed_vectors(format, 1, s.D, m.device)
    store_vector(packed, 0, m.normal(s.D), 2.0**-12)
    unscale = 1 / activation_scale(activation.limit)
    hidden = packed_vectors(format, chosen, s.F, m.device, unscale)

    def first(i: int, module=moe_gemv) -> object:
        return module.moe_gate_up(
            packed, gate_up[i], None, ids[i], hidden, activation, in_order=shared
        )

    def second(i: int, module=moe_gemv, out=out) -> Tensor:
        return module.moe_down(hidden, down[i], None, ids[i], weights, out)

    def first_outputs(twin: bool) -> tuple[Tensor, ...]:
        first(0, moe_gemv_twin if twin else moe_gemv)
        return (unpack_vectors(hidden),)

    def second_outputs(twin: bool) -> tuple[Tensor, ...]:
        return (second(0, moe_gemv_twin if twin else moe_gemv, m.zeros(s.D)),)

    for name, run, found, weight in (
        ("gate_up", first, first_outputs, gate_up[0]),
        ("down", second, second_outputs, down[0]),
    ):
        read = weight.nbytes * chosen // count
        yield Case(f"{name} {format.name}", sets, run, found, "moe_gemv_mxfp4", read)


GROUPS = {
    "hyper": hyper,
    "projections": projections,
    "rows": rows,
    "index": index,
    "attention": attention,
    "experts": experts,
}


def wrong(case: Case) -> str | None:
    """What is wrong with a kernel's results, None if they are its twin's."""
    for ours, expected in zip(case.outputs(False), case.outputs(True), strict=True):
        try:
            assert_close(ours.float(), expected.float(), case.tolerance)
        except AssertionError as error:
            return str(error)
    return None


def median_us(case: Case) -> float:
    """Microseconds of one launch, in a graph of one for each set of weights."""
    for i in range(case.sets):
        case.run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(case.sets):
            case.run(i)
    times = []
    for _ in range(REPEATS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / case.sets)
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--context", type=int, nargs="*", default=[1024, 32768])
    parser.add_argument("--only", nargs="*", choices=GROUPS, default=list(GROUPS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")
    torch.backends.cuda.matmul.allow_tf32 = False
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, V4-Flash")
    failed = 0
    seen: set[str] = set()
    for context in options.context:
        m = Maker(torch.device("cuda"), Sizes(), context)
        print(f"{f'context {context}':32} {'MB':>9} {'us':>9} {'GB/s':>8}")
        for group in options.only:
            for case in GROUPS[group](m):
                if case.name in seen and group not in ("index", "attention"):
                    continue  # does not depend on the context
                seen.add(case.name)
                problem = wrong(case)
                if problem:
                    failed += 1
                    print(f"{case.name:32} WRONG: {problem}")
                    continue
                us = median_us(case)
                size = case.read_bytes
                print(f"{case.name:32} {size / 1e6:9.3f} {us:9.2f} {size / us / 1e3:8.0f}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
