"""When a program is in which phase: written only by the build that is traced."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kernels.persistent import sizes

# Phases of a layer, and times of a phase, as the trace has them.
QKV, ATTENTION, OUT, ROUTER, GATE_UP, DOWN = (gl.constexpr(i) for i in range(6))
PHASES = gl.constexpr(len(sizes.PHASES))
BEGINS, READY, ENDS = gl.constexpr(0), gl.constexpr(1), gl.constexpr(2)
CLOCK = gl.constexpr("mov.u64 $0, %globaltimer; // $1")


@gluon.jit
def stamp(trace, layer, phase, which: gl.constexpr, on, S: gl.constexpr):
    """Write the time in ns to trace [programs, layers * PHASES + 1, 3] if `on`: a phase's begin,
    when what it waits for is there, its end. Nothing if trace is None, as it is but for the time
    line; the head is phase 0 of a layer behind the last."""
    if trace is not None:
        now = gl.inline_asm_elementwise(
            CLOCK, "=l,r", [gl.program_id(0)], dtype=gl.int64, is_pure=False, pack=1
        )  # fmt: skip
        row = gl.program_id(0) * (S.layers * PHASES + 1) + layer * PHASES + phase
        gl.store(trace + row * 3 + which, now, mask=on)
