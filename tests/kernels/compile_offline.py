"""Compile every kernel for a GPU that need not be there, as its wrapper would launch it.

    python tests/kernels/compile_offline.py 90          one JSON line for each compiled kernel

LAUNCHES calls each wrapper with tensors on the meta device, in the sizes of gpt-oss-20b and, for
DeepSeek's kernels, of its models; a launch is caught, typed as Triton's launcher would type it, and
compiled for the architecture asked for. Adding a kernel is adding a row. It runs in a process of
its own: the tests of values have Triton's interpreter on, and that is decided when Triton is
imported.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from kernels import (
    compressed_rows,
    decode_blocks,
    gemv,
    grouped_router,
    hyper_connections,
    latent_attention,
    latent_cache,
    latent_index,
    moe_gemm,
    moe_gemv,
    moe_routing,
    read_bandwidth,
    rms_norm,
    rope_kv,
    router_topk,
    sampling,
    shared_row_attention,
    shared_rows,
    sink_attention_decode,
    sink_attention_prefill,
)
from kernels.moe_routing import Routing
from kernels.packed_vector import packed_vectors
from kernels.swiglu import Swiglu
from quant.formats import (
    BF16,
    FP8_BLOCK128,
    FP8_BLOCK128_E8M0,
    FP8_ROW,
    MXFP4,
    MXFP8,
    NVFP4,
    QuantFormat,
)
from quant.tensor import QuantTensor

META = torch.device("meta")
TYPES = {
    torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.uint8: "u8", torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip


@dataclass(frozen=True)
class Sizes:
    """Letters as everywhere: see kernels/."""

    D: int
    F: int
    H: int
    G: int
    C: int
    E: int
    K: int
    W: int
    V: int
    context: int


GPT_OSS_20B = Sizes(2880, 2880, 64, 8, 64, 32, 4, 128, 201088, 131072)


@dataclass(frozen=True)
class Compiled:
    """What the compiler says of one kernel."""

    launch: str  # row of LAUNCHES
    kernel: str
    registers: int  # of a thread
    stack_bytes: int  # of a thread; more than 0 is a spill or an indexed array
    shared_bytes: int
    num_warps: int


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def fp32(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float32)


def int32(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def experts_in(format: QuantFormat, experts: int, rows: int, columns: int) -> QuantTensor:
    shape = (experts, rows, columns)
    values = empty(experts, rows, columns // format.values_per_byte, dtype=format.value_dtype)
    if format.block is None or format.scale_dtype is None:
        return QuantTensor(values, None, format, shape)
    high, wide = format.block[0] or rows, format.block[1] or columns
    scales = empty(experts, -(-rows // high), -(-columns // wide), dtype=format.scale_dtype)
    return QuantTensor(values, scales, format, shape, fp32() if format.tensor_scale else None)


def run_rms_norm(s: Sizes) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        rms_norm.rms_norm(fp32(7, s.D), empty(s.D), 1e-5, dtype)


def run_rope(s: Sizes) -> None:
    tables = fp32(s.context, s.C // 2), fp32(s.context, s.C // 2)
    cache = empty(s.G, s.context, s.C)
    for dtype in (torch.bfloat16, torch.float32):
        qkv = empty(1, (s.H + 2 * s.G) * s.C, dtype=dtype)
        rope_kv.rope_and_cache(qkv, *tables, int32(1), cache, cache, empty(1, s.H, s.C))


def run_prefill_attention(s: Sizes) -> None:
    for tokens in (5, 2048):
        for window, slots in ((0, max(s.context, tokens)), (s.W, s.W + 2047)):
            cache, q = empty(s.G, slots, s.C), empty(tokens, s.H, s.C)
            out = empty(tokens, s.H * s.C)
            sink_attention_prefill.sink_attention_prefill(
                q, cache, cache, empty(s.H), int32(1), out, window=window
            )


def run_both_halves(s: Sizes, gate_up: QuantTensor, down: QuantTensor, block_rows: int) -> Tensor:
    routing = Routing(fp32(300, s.K), int32(40), int32(40, block_rows))
    activation = Swiglu(7.0, 1.702, 1.0, alternating=True)
    hidden = moe_gemm.moe_gemm_gate_up(
        empty(300, s.D), gate_up, empty(s.E, 2 * s.F), routing, activation
    )
    return moe_gemm.moe_gemm_down(hidden, down, empty(s.E, s.D), routing)


def run_moe_gemm(s: Sizes, format: QuantFormat = MXFP4) -> None:
    gate_up, down = experts_in(format, s.E, 2 * s.F, s.D), experts_in(format, s.E, s.D, s.F)
    for block_rows in moe_gemm.TILES if format is MXFP4 else [64]:
        outputs = run_both_halves(s, gate_up, down, block_rows)
    moe_gemm.add_expert_outputs(outputs, fp32(300, s.D))


def run_moe_routing(s: Sizes) -> None:
    for experts in (s.E, 4 * s.E):
        moe_routing.route_tokens(fp32(300, experts), s.K, 64)
    # the most experts that are published, as V4-Pro takes them
    moe_routing.route_chosen(int32(300, 6), fp32(300, 6), 384, 64)


def run_gemv(s: Sizes) -> None:
    for rows, columns in (((s.H + 2 * s.G) * s.C, s.D), (s.D, s.H * s.C), (s.V, s.D)):
        x, weight, out = fp32(columns), empty(rows, columns), fp32(rows)
        gemv.gemv(x, weight, out, norm=empty(columns), bias=empty(rows), eps=1e-5)
        gemv.gemv(x, weight, out, add=True)
    gemv.embedding(int32(1), empty(s.V, s.D), fp32(s.D))


def run_router(s: Sizes, format: QuantFormat = MXFP4) -> None:
    router_topk.router_topk(
        fp32(s.D), empty(s.D), empty(s.E, s.D), empty(s.E),
        eps=1e-5, logits=fp32(s.E), ticket=int32(1), expert_ids=int32(s.K),
        expert_weights=fp32(s.K), packed=packed_vectors(format, 1, s.D, META),
    )  # fmt: skip


def run_moe_gemv(s: Sizes, format: QuantFormat = MXFP4) -> None:
    hidden = packed_vectors(format, s.K, s.F, META)
    moe_gemv.moe_gate_up(
        packed_vectors(format, 1, s.D, META), experts_in(format, s.E, 2 * s.F, s.D),
        empty(s.E, 2 * s.F), int32(s.K), hidden, Swiglu(7.0, 1.702, 1.0, alternating=True),
    )  # fmt: skip
    down, bias = experts_in(format, s.E, s.D, s.F), empty(s.E, s.D)
    moe_gemv.moe_down(hidden, down, bias, int32(s.K), fp32(s.K), fp32(s.D))


def run_expert_formats(s: Sizes) -> None:
    """The tile that takes most registers; what is left out differs in a constant from these."""
    for format in (NVFP4, MXFP8, FP8_BLOCK128, BF16):
        run_router(s, format)
        run_moe_gemv(s, format)
        run_moe_gemm(s, format)
    # Scales in fp32 of rows that are shorter than a step.
    short = replace(s, D=32, F=32)
    gate_up, down = (experts_in(FP8_ROW, s.E, rows, 32) for rows in (64, 32))
    run_both_halves(short, gate_up, down, 64)


def run_decode_attention(s: Sizes) -> None:
    group = sink_attention_decode.head_group(s.H, s.G)
    acc = fp32(s.G, sink_attention_decode.SPLITS, group, s.C)
    for window, slots in ((0, s.context), (s.W, s.W + 2047)):
        cache = empty(s.G, slots, s.C)
        sink_attention_decode.sink_attention_decode(
            fp32((s.H + 2 * s.G) * s.C), (fp32(s.context, s.C // 2), fp32(s.context, s.C // 2)),
            cache, cache, empty(s.H), int32(1), fp32(s.H, s.C),
            window=window, acc=acc, stats=fp32(*acc.shape[:-1], 2),
        )  # fmt: skip


def run_sampling(s: Sizes) -> None:
    sampling.sample(fp32(s.V), sampling.make_state(s.V, s.context, META), filtered=False)


def run_read_bandwidth(s: Sizes) -> None:
    read_bandwidth.block_sums(int32(1 << 20))


DEEPSEEK_V3 = Sizes(7168, 2048, 128, 1, 576, 256, 8, 0, 129280, 4096)


def run_latent_attention(s: Sizes) -> None:
    """Attention over chosen rows takes more registers than over all."""
    s = DEEPSEEK_V3
    cache, position, query = empty(s.context, 576), int32(1), empty(s.H, 576)
    rope = fp32(s.context, 32), fp32(s.context, 32)
    projection = experts_in(FP8_BLOCK128, 1, s.H * 256, 512)[0]
    splits = latent_attention.num_splits(s.H)
    latent_cache.latent_query(
        fp32(s.H, 192), fp32(576), empty(512), projection, rope, position, cache, query, eps=1e-6
    )
    tokens = empty(300, s.H, 576)
    latent_cache.latent_cache(
        empty(300, s.H, 192), empty(300, 576), empty(512), rope, position, cache, tokens, eps=1e-6
    )
    latent_attention.latent_attention_decode(
        query, cache, position, projection, fp32(s.H, 128), scale=0.1,
        acc=fp32(s.H, splits, 512), stats=fp32(s.H, splits, 2), chosen=int32(2048),
    )  # fmt: skip
    latent_attention.latent_attention_prefill(
        tokens, cache, position, empty(300, s.H, 512), scale=0.1, chosen=int32(300, 2048)
    )


def run_latent_index(s: Sizes) -> None:
    context, position = 32768, int32(1)
    cache, query = empty(context, 128), empty(1, 64, 128)
    latent_index.index_rows(
        fp32(1, 64, 128), fp32(1, 128), fp32(128), fp32(128),
        (fp32(context, 32), fp32(context, 32)), position, cache, query,
    )  # fmt: skip
    scores, chosen = fp32(1, context), int32(1, 2048)
    latent_index.index_choose(query, fp32(1, 64), cache, position, scores, chosen)
    cut = latent_index.cut_scratch(context, META)
    latent_index.index_choose(query, fp32(1, 64), cache, position, scores, chosen, cut=cut)


V4_FLASH = Sizes(4096, 2048, 64, 1, 512, 256, 6, 128, 129280, 32768)


def run_shared_row_attention(s: Sizes) -> None:
    """V4-Flash's layers, with rows that are chosen and with all; the window alone takes less."""
    s = V4_FLASH
    slots, rope = s.W + 2048, (fp32(s.context, 32), fp32(s.context, 32))
    scratch = fp32(s.H, shared_row_attention.SPLITS, s.C), fp32(s.H, shared_row_attention.SPLITS, 2)
    for ratio, top in ((4, 512), (128, 0)):
        rows = empty(slots + 8192, s.C), int32(1), fp32(s.H), rope
        sizes = {"slots": slots, "window": s.W, "ratio": ratio}
        shared_row_attention.shared_row_attention_decode(
            empty(s.H, s.C), *rows, fp32(s.H, s.C), **sizes, acc=scratch[0], stats=scratch[1],
            chosen=int32(top) if top else None,
        )  # fmt: skip
        shared_row_attention.shared_row_attention_prefill(
            empty(300, s.H, s.C), *rows, empty(300, s.H, s.C), **sizes,
            chosen=int32(300, top) if top else None,
        )  # fmt: skip


def run_shared_rows(s: Sizes) -> None:
    """V4-Flash's queries, rows and compressors, for a token and for many."""
    s = V4_FLASH
    rope = fp32(s.context, 32), fp32(s.context, 32)
    for tokens, dtype in ((1, torch.float32), (300, torch.bfloat16)):
        shared_rows.shared_rows(
            empty(tokens, s.H, s.C, dtype=dtype), empty(tokens, s.C, dtype=dtype), empty(s.C),
            rope, int32(1), empty(s.W + 2048, s.C), empty(tokens, s.H, s.C), eps=1e-6,
            index_q=empty(tokens, 64, 128, dtype=dtype), index_query=empty(tokens, 64, 128),
        )  # fmt: skip
        for ratio, width in ((4, s.C), (128, s.C)):
            wide, parts = (2 * width, 3) if ratio == 4 else (width, 1)
            compressed_rows.compressed_rows(
                empty(tokens, 2 * wide, dtype=dtype), fp32(ratio, wide), empty(width), rope,
                int32(1), fp32(parts, 3, width), fp32(parts, 3, width), empty(8192, width),
                eps=1e-6,
            )  # fmt: skip


def run_hyper_connections(s: Sizes) -> None:
    """V4-Pro's width takes most; V4-Flash's, within the model and behind its last layer."""
    for width, functions in ((7168, (24,)), (4096, (24, 4))):
        for rows in functions:
            constants = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
            base, scale = fp32(rows), fp32(3 if rows > 4 else 1)
            partial = fp32(hyper_connections.num_programs(width), rows + 1)
            hyper_connections.hyper_step(
                fp32(4, width), fp32(width), fp32(20), fp32(rows, 4 * width), base, scale,
                fp32(width), first=False, partial=partial, ticket=int32(1), **constants,
            )  # fmt: skip
            streams, mix = fp32(300, 4, width), fp32(300, 20)
            hyper_connections.hyper_read(streams, fp32(300, rows), base, scale, mix, **constants)
        hyper_connections.hyper_write(streams, fp32(300, width), mix)


def run_v4_flash(s: Sizes) -> None:
    """Its projections, routers and experts, shared ones in FP8 and routed ones in FP4."""
    s = V4_FLASH
    for rows, columns, groups in (
        (1536, s.D, 1), (s.H * s.C + 8192, 1024, 1), (8192, s.D, 8), (s.D, 8192, 1)
    ):  # fmt: skip
        weight = experts_in(FP8_BLOCK128_E8M0, 1, rows, columns)[0]
        gemv.gemv(fp32(groups * columns), weight, fp32(rows), groups=groups)
    gemv.gemv(fp32(s.D), empty(2624, s.D), fp32(2624), norm=empty(s.D), eps=1e-6)
    fp4, fp8 = (packed_vectors(format, 1, s.D, META) for format in (MXFP4, FP8_BLOCK128_E8M0))
    for table in (None, empty(s.V, s.K, dtype=torch.int64)):
        grouped_router.grouped_router(
            fp32(s.D), empty(s.D), empty(s.E, s.D), fp32(s.E) if table is None else None, eps=1e-6,
            scores="sqrtsoftplus", num_groups=1, num_limited=1, normalized=True, scale=1.5,
            logits=fp32(s.E), ticket=int32(1), expert_ids=int32(s.K), expert_weights=fp32(s.K),
            packed=fp4, also=fp8, token=int32(1), table=table,
        )  # fmt: skip
    for format, experts, count, x in ((MXFP4, s.E, s.K, fp4), (FP8_BLOCK128_E8M0, 1, 1, fp8)):
        hidden = packed_vectors(format, count, s.F, META)
        gate_up = experts_in(format, experts, 2 * s.F, s.D)
        down = experts_in(format, experts, s.D, s.F)
        moe_gemv.moe_gate_up(
            x, gate_up, None, int32(count), hidden, Swiglu(10.0), in_order=experts == count
        )
        moe_gemv.moe_down(hidden, down, None, int32(count), fp32(count), fp32(s.D))


def run_grouped_router(s: Sizes) -> None:
    s = DEEPSEEK_V3
    packed = packed_vectors(FP8_BLOCK128, 1, s.D, META)
    grouped_router.grouped_router(
        fp32(s.D), empty(s.D), empty(s.E, s.D), fp32(s.E), eps=1e-6, scores="sigmoid", num_groups=8,
        num_limited=4, normalized=True, scale=2.5, logits=fp32(s.E), ticket=int32(1),
        expert_ids=int32(s.K), expert_weights=fp32(s.K), packed=packed,
    )  # fmt: skip
    grouped_router.norm_and_pack(fp32(s.D), empty(s.D), packed, eps=1e-6)


def run_fp8_blocks(s: Sizes) -> None:
    """Rows of two lengths; and plain rows that are longer than GPT-OSS has."""
    s = DEEPSEEK_V3
    weight = experts_in(FP8_BLOCK128, 1, 2112, s.D)[0]
    gemv.gemv(fp32(s.D), weight, fp32(2112), norm=empty(s.D), eps=1e-6)
    decode_blocks.decode_blocks(weight, empty(2112, s.D))
    weight = experts_in(FP8_BLOCK128_E8M0, 1, s.D, s.H * 128)[0]
    gemv.gemv(fp32(s.H * 128), weight, fp32(s.D), add=True)
    gemv.gemv(fp32(s.D), empty(s.V, s.D), fp32(s.V), norm=empty(s.D), eps=1e-6)


LAUNCHES: dict[str, Callable[[Sizes], None]] = {
    "rms_norm": run_rms_norm,
    "rope_kv": run_rope,
    "sink_attention_prefill": run_prefill_attention,
    "moe_routing": run_moe_routing,
    "moe_gemm": run_moe_gemm,
    "gemv": run_gemv,
    "router_topk": run_router,
    "moe_gemv": run_moe_gemv,
    "expert_formats": run_expert_formats,
    "sink_attention_decode": run_decode_attention,
    "latent_attention": run_latent_attention,
    "shared_row_attention": run_shared_row_attention,
    "shared_rows": run_shared_rows,
    "hyper_connections": run_hyper_connections,
    "v4_flash": run_v4_flash,
    "grouped_router": run_grouped_router,
    "latent_index": run_latent_index,
    "fp8_blocks": run_fp8_blocks,
    "sampling": run_sampling,
    "read_bandwidth": run_read_bandwidth,
}
# Further formats and DeepSeek's kernels, whose FP8 sm_80 has not: to be quick.
_ONLY_ON_90 = (
    "expert_formats", "latent_attention", "shared_row_attention", "shared_rows",
    "hyper_connections", "v4_flash", "latent_index", "grouped_router", "fp8_blocks",
)  # fmt: skip


def compile_all(arch: int, rows: list[str] | None = None) -> list[Compiled]:
    """Compile what the rows of LAUNCHES launch.

    rows: default all, on other architectures than sm_90 without _ONLY_ON_90
    """
    compiled: dict[str, Compiled] = {}

    def catch(kernel: JITFunction, *args, grid, warmup=False, **kwargs) -> None:
        if "EARLY" in kwargs:  # as kernels/dependent_launch.py decides on a GPU
            kwargs |= {"EARLY": arch >= 90, "launch_pdl": arch >= 90}
        source, options = describe(kernel, args, kwargs)
        key = f"{kernel.fn.__qualname__} {source.signature} {source.constants} {options}"
        if key not in compiled:
            compiled[key] = compile_one(row, kernel, source, options, arch)

    launch, JITFunction.run = JITFunction.run, catch
    try:
        for row in rows or [r for r in LAUNCHES if arch == 90 or r not in _ONLY_ON_90]:
            LAUNCHES[row](GPT_OSS_20B)
    finally:
        JITFunction.run = launch
    return list(compiled.values())


def describe(kernel: JITFunction, args: tuple, kwargs: dict) -> tuple[ASTSource, dict]:
    """The source as the launcher types it: what divides by 16 is marked, ones are folded."""
    names = [param.name for param in kernel.params]
    options = {name: value for name, value in kwargs.items() if name not in names}
    values = kernel.signature.bind(
        *args, **{name: value for name, value in kwargs.items() if name in names}
    )
    values.apply_defaults()
    signature, constants, aligned = {}, {}, {}
    for param in kernel.params:
        value = values.arguments[param.name]
        fold = value is None or (type(value) is int and value == 1 and not param.do_not_specialize)
        if param.is_constexpr or fold:
            signature[param.name] = "constexpr"
            constants[param.name] = getattr(value, "value", value)
            continue
        signature[param.name] = type_name(value)
        offset = (
            value.storage_offset() * value.element_size() if isinstance(value, Tensor) else value
        )
        if not param.do_not_specialize and not isinstance(offset, float) and offset % 16 == 0:
            aligned[(param.num,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, aligned), options


def type_name(value: object) -> str:
    """Triton's name of the type of a run-time argument."""
    if isinstance(value, Tensor):
        return "*" + TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if abs(value) < 2**31 else "i64"
    assert isinstance(value, float), value
    return "fp32"


def compile_one(
    row: str, kernel: JITFunction, source: ASTSource, options: dict, arch: int
) -> Compiled:
    """Compile, and read registers and stack from the binary."""
    result = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = resource_usage(result.asm["cubin"])
    return Compiled(
        row,
        kernel.fn.__name__,
        usage["REG"],
        usage["STACK"],
        result.metadata.shared,
        result.metadata.num_warps,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and others as cuobjdump, which comes with Triton, reads them."""
    tool = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return {name: int(value) for name, value in re.findall(r"([A-Z]+):(\d+)", done.stdout)}


def compile_gluon(
    kernel: JITFunction, signature: dict[str, str], constants: dict[str, Any], **options: Any
) -> dict[str, int]:
    """What the compiler says of a Gluon kernel for sm_90: registers, stack and shared memory in
    bytes.

    signature: "*bf16", "i32", "constexpr", .. by the name of an argument, in the kernel's order
    """
    from triton.experimental.gluon._runtime import GluonASTSource  # not with every Triton

    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    source = GluonASTSource(kernel, signature, constants, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    usage = resource_usage(made.asm["cubin"])
    return {
        "registers": usage["REG"],
        "stack_bytes": usage["STACK"],
        "shared_bytes": made.metadata.shared,
    }


if __name__ == "__main__":
    for entry in compile_all(int(sys.argv[1]), sys.argv[2:] or None):
        print(json.dumps(asdict(entry)))
