"""Just enough of PTX to run the kernels' inline code on a CPU, which Triton's interpreter cannot.

Registers are int64 tensors that hold the bits; every element is a thread of its own, and for
products of matrices there are 32 of them.
"""

import re
from collections.abc import Callable

import torch
from torch import Tensor

WORD = 0xFFFFFFFF


def run_ptx(code: str, inputs: dict[int, Tensor], outputs: int) -> list[Tensor]:
    """Bits of the first `outputs` operands after the code.

    inputs: operand number -> bits, int64 [n]
    """
    registers = {f"${number}": bits for number, bits in inputs.items()}
    for statement in code.strip().strip("{}").replace("\n", " ").split(";"):
        if not statement.strip() or statement.strip().startswith(".reg"):
            continue
        operation, _, operands = statement.strip().partition(" ")
        names = [name.strip() for name in re.split(r",(?![^{]*\})", operands)]
        _execute(operation, names, registers)
    return [registers[f"${number}"] for number in range(outputs)]


def _execute(operation: str, names: list[str], registers: dict[str, Tensor]) -> None:
    target, *rest = names
    if operation.startswith("mov") and target.startswith("{"):
        low, high = (name.strip() for name in target.strip("{}").split(","))
        width = int(operation.rpartition("b")[2]) // 2
        bits = registers[rest[0]]
        registers[low] = bits & ((1 << width) - 1)
        registers[high] = (bits >> width) & ((1 << width) - 1)
        return
    if operation.startswith("mma"):
        quads = [[registers[n.strip()] for n in name.strip("{}").split(",")] for name in rest]
        for name, bits in zip(target.strip("{}").split(","), _mma_s8(*quads), strict=True):
            registers[name.strip()] = bits
        return
    arguments = [registers[name] if name in registers else int(name, 0) for name in rest]
    registers[target] = _OPERATIONS[operation](*arguments)


def _lop3(a, b, c, table: int):
    result = 0
    for index in range(8):
        if table >> index & 1:
            term = (a if index & 4 else ~a) & (b if index & 2 else ~b) & (c if index & 1 else ~c)
            result = result | term
    return result & WORD


def _prmt(a, b, selector):
    """Bytes by the selector's nibbles; the fourth bit spreads the chosen byte's sign instead."""
    both, result = a | (b << 32), 0
    for i in range(4):
        byte = both >> (8 * (selector >> (4 * i) & 7)) & 0xFF
        sign = selector >> (4 * i + 3) & 1
        result = result | (byte * (1 - sign) + 0xFF * (byte >> 7) * sign) << (8 * i)
    return result


def _mma_s8(a: list[Tensor], b: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """m16n8k32 of signed bytes, the registers of 32 lanes as the PTX manual lays them out."""
    lane = torch.arange(32)
    row, quarter = lane // 4, lane % 4
    left, right = torch.zeros(16, 32, dtype=torch.int64), torch.zeros(32, 8, dtype=torch.int64)
    for byte in range(4):
        for i, (down, across) in enumerate(((0, 0), (8, 0), (0, 16), (8, 16))):
            left[row + down, across + 4 * quarter + byte] = _signed_byte(a[i], byte)
        for i in range(2):
            right[16 * i + 4 * quarter + byte, row] = _signed_byte(b[i], byte)
    product = left @ right
    return [(product[row + 8 * (i // 2), 2 * quarter + i % 2] + c[i]) for i in range(4)]


def _signed_byte(bits: Tensor, which: int) -> Tensor:
    return (bits >> (8 * which) & 0xFF).to(torch.uint8).view(torch.int8).long()


def _numbers(bits, dtype: torch.dtype) -> list:
    """Both halves of 32 bits as float64."""
    bits = bits if isinstance(bits, Tensor) else torch.tensor(bits)
    return [
        (bits >> s & 0xFFFF).to(torch.int32).to(torch.int16).view(dtype).double() for s in (0, 16)
    ]


def _bits(low: Tensor, high: Tensor, dtype: torch.dtype) -> Tensor:
    halves = [h.to(dtype).view(torch.int16).long() & 0xFFFF for h in (low, high)]
    return halves[0] | halves[1] << 16


def _fma(dtype: torch.dtype) -> Callable[..., Tensor]:
    def fma(a, b, c=0):
        values = zip(_numbers(a, dtype), _numbers(b, dtype), _numbers(c, dtype), strict=True)
        return _bits(*(x * y + z for x, y, z in values), dtype)

    return fma


def _fp32(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


_OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "mov.f32": lambda a: a,
    "shl.b32": lambda a, n: (a << n) & WORD,
    "shr.b32": lambda a, n: (a & WORD) >> n,
    "shr.u32": lambda a, n: (a & WORD) >> n,
    "and.b32": lambda a, b: a & b,
    "xor.b32": lambda a, b: a ^ b,
    "sub.s32": lambda a, b: a - b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "mad.lo.u32": lambda a, b, c: (a * b + c) & WORD,
    "cvt.rn.f32.s32": lambda a: a.float().view(torch.int32).long(),
    "fma.rn.f32": lambda a, b, c: (_fp32(a) * _fp32(b) + _fp32(c)).view(torch.int32).long(),
    "lop3.b32": _lop3,
    "prmt.b32": _prmt,
    "mul.rn.f16x2": _fma(torch.float16),
    "fma.rn.f16x2": _fma(torch.float16),
    "fma.rn.bf16x2": _fma(torch.bfloat16),
    "cvt.f32.f16": lambda a: _numbers(a, torch.float16)[0].float().view(torch.int32).long(),
    "add.f32": lambda a, b: (_fp32(a) + _fp32(b)).view(torch.int32).long(),
}
