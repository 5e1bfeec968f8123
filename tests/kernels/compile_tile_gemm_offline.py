"""Compile the grouped GEMM over tiles for sm_90 without a GPU; one JSON line a kernel.

    python tests/kernels/compile_tile_gemm_offline.py mxfp4:128 nvfp4:64 mxfp4:64:96

Behind the experts' format stands how many pairs a block has, then how wide model and experts are if
not as gpt-oss. In a process of its own, because the tests of values have Triton's interpreter on.
"""

import json
import pathlib
import sys

from triton.experimental.gluon import language as gl

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import tiles_of
from kernels.tile_gemm.kernel import gemm_kernel
from kernels.tile_gemm.sizes import GemmSizes
from tests.kernels.compile_offline import compile_gluon

EXPERTS, SHARED_BYTES = 32, 227 << 10
TYPES = {
    "tiles_ptr": "*u8", "bias_ptr": "*bf16", "block_expert": "*i32", "block_rows": "*i32",
    "expert_weights": "*fp32", "claims": "*i32", "pairs": "i32", "blocks": "i32", "groups": "i32",
    "S": "constexpr",
}  # fmt: skip


def sizes(experts_in: str, width: int, block_rows: int, *, gated: bool) -> GemmSizes:
    """As kernels/tile_gemm/launch.py makes them on an H100."""
    up, down = tiles_of(2 * width, width), tiles_of(width, width)
    return GemmSizes(
        rows=2 * width if gated else width, columns=width, experts=EXPERTS,
        tiles_per_expert=up + down, first_tile=0 if gated else up, tiles=EXPERT_TILES[experts_in],
        block_rows=block_rows, out_columns=width, gated=gated, limit=7.0, alpha=1.702, offset=1.0,
        programs=132,
    ).with_rings(SHARED_BYTES)  # fmt: skip


def compile_for(s: GemmSizes) -> dict[str, int]:
    """What the compiler says: registers, stack and shared memory in bytes."""
    plain = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=8, rank=2)
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    signature = {
        "x_desc": f"tensordesc<bf16[{s.block_rows // 2},64],{swizzled!r}>",
        "codes_desc": f"tensordesc<u8[{s.chunk_rows},256],{plain!r}>",
        "words_desc": f"tensordesc<u8[{s.words_rows},256],{plain!r}>",
        "out_ptr": "*bf16" if s.gated else "*fp32",
    } | TYPES
    signature = {name: signature[name] for name in gemm_kernel.arg_names}
    found = compile_gluon(gemm_kernel, signature, {"S": s}, num_warps=4)
    return found | {"planned_shared_bytes": s.shared_bytes}


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        name, block_rows, *width = argument.split(":")
        for gated in (True, False):
            s = sizes(name, int(width[0]) if width else 2880, int(block_rows), gated=gated)
            print(json.dumps({"experts": argument, "gated": gated} | compile_for(s)), flush=True)
