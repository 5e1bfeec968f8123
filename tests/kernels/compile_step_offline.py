"""Compile the persistent step for sm_90 without a GPU; one JSON line a model.

    python tests/kernels/compile_step_offline.py gpt-oss-20b:fp8 gpt-oss-120b:bf16:nvfp4

Behind a model's name stands the format of its dense weights, then that of its experts if it is not
MXFP4.

In a process of its own, because the tests of values have Triton's interpreter on.
"""

import json
import pathlib
import sys

from triton.experimental.gluon import language as gl

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.sizes import StepSizes
from kernels.persistent.step import step_kernel
from tests.kernels.compile_offline import compile_gluon

SHARED_BYTES = 227 << 10  # that a program may have
MODELS = {"gpt-oss-20b": (24, 32), "gpt-oss-120b": (36, 128)}  # layers, experts
FP32 = (
    "qkv_scale", "out_scale", "head_scale", "cos", "sin", "logits", "settings", "logprobs",
)  # fmt: skip
OTHERS = {
    "token": "*i32", "position": "*i32", "counter": "*i32", "cache_table": "*i64",
    "sums": "*i64", "tagged": "*i64", "seed": "*i64", "step": "*i32", "seen": "*u8",
    "history": "*i32", "draws": "i32", "S": "constexpr",
}  # fmt: skip
COPIED = ("dense128", "dense32", "codes", "more_codes", "words")


def sizes(model: str, *, fp8: bool, experts_in: str = "mxfp4") -> StepSizes:
    """As moe_runtime/gpu/persistent.py makes them on an H100."""
    layers, experts = MODELS[model]
    found = StepSizes(
        layers=layers, width=2880, heads=64, kv_heads=8, head_width=64, experts=experts, top_k=4,
        hidden=2880, vocabulary=201088, window=128, eps=1e-5, limit=7.0, alpha=1.702, fp8=fp8,
        programs=132, tiles=EXPERT_TILES[experts_in],
    )  # fmt: skip
    return found.with_rings(SHARED_BYTES)


def compile_for(s: StepSizes, *, traced: bool = False) -> dict[str, int]:
    """What the compiler says: registers, stack and shared memory in bytes."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)
    heights = (128, 32, *s.tiles.boxes)
    signature = {}
    for name in step_kernel.arg_names:
        if name in COPIED:
            height = heights[COPIED.index(name)]
            signature[name] = f"tensordesc<u8[{height},256],{layout!r}>"
        elif name == "trace_ptr":
            signature[name] = "*i64" if traced else "constexpr"
        else:
            signature[name] = OTHERS.get(name, "*fp32" if name in FP32 else "*bf16")
    constants = {"S": s} | ({} if traced else {"trace_ptr": None})
    options = {"num_warps": 8, "launch_cooperative_grid": True}
    found = compile_gluon(step_kernel, signature, constants, **options)
    return found | {"planned_shared_bytes": s.shared_bytes}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, dense, *experts_in = argument.split(":")
        s = sizes(name, fp8=dense == "fp8", experts_in=experts_in[0] if experts_in else "mxfp4")
        found = compile_for(s)
        print(json.dumps({"model": argument} | found), flush=True)
