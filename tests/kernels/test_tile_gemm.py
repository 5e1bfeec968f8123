"""The grouped GEMM over tiles, its program emulated on a CPU, against its plain-torch twin."""

import numpy as np
import pytest
import torch

from kernels.moe_routing import route_tokens
from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import TiledExperts, pack_experts
from kernels.reference import moe_gemm as twin
from kernels.swiglu import Swiglu
from kernels.tile_gemm import operands as operand_ptx
from kernels.tile_gemm.kernel import UNSCALE
from kernels.tile_gemm.launch import gathered, gemm_sizes, x_order
from quant.formats import FORMATS
from tests.kernels import gluon_on_cpu
from tests.kernels.gluon_on_cpu import BF16, Emulated, T, raw
from tests.kernels.ptx_emulator import run_ptx
from tests.kernels.test_persistent_pack import E2M1, every_byte, experts_in
from tests.tolerances import assert_close

ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)


def words_of(x):
    return torch.from_numpy(np.array(x)).flatten().long() & 0xFFFFFFFF


def int32(bits, shape):
    return T(bits.numpy().astype(np.uint32).view(np.int32).reshape(shape))


def inline_asm(operands):
    """The PTX of operands.py, run by the emulator, with the shapes of its elementwise calls."""

    def scale(ptx):
        def run(words, selector):
            bits = torch.full_like(words_of(raw(words)), int(raw(selector)))
            return int32(run_ptx(ptx, {1: words_of(raw(words)), 2: bits}, 1)[0], raw(words).shape)

        return run

    def e2m1(*arguments):
        shape = raw(arguments[0]).shape
        inputs = {4 + i: words_of(np.broadcast_to(raw(a), shape)) for i, a in enumerate(arguments)}
        return tuple(int32(bits, shape) for bits in run_ptx(operands._E2M1, inputs, 4))

    def e4m3(codes, scales):
        codes, scales = raw(codes), raw(scales)
        quads = np.ascontiguousarray(codes).view(np.int32)
        found = run_ptx(operands._E4M3, {2: words_of(quads), 3: words_of(scales[:, ::4])}, 2)
        pairs = torch.stack(found, -1).numpy().astype(np.uint32)
        return T(pairs.view(BF16).reshape(codes.shape))

    ptx = (operands._E8M0_FOR_E2M1, operands._E8M0_FOR_E4M3, operands._SMALL_FOR_E2M1)
    return {p: scale(p) for p in ptx} | {operands._E2M1: e2m1, operands._E4M3: e4m3}


@pytest.mark.parametrize("scales", [(2.0**-61, 2.0**65), (1.0, 1.75 * 2.0**8)])
def test_words_become_bf16(scales):
    """Every byte at every place of a word, exactly; UNSCALE is in the scales."""
    bits = [int(torch.tensor(s * 2.0**62).bfloat16().view(torch.int16)) * 0x10001 for s in scales]
    for place, codes, words in every_byte():
        operands = {4: words, 5: torch.full_like(words, bits[0])}
        operands[6] = torch.full_like(words, bits[1])
        found = run_ptx(operand_ptx._E2M1.value, operands, 4)
        for row in range(2):
            pair = found[2 * row + place // 2] >> (16 * (place % 2)) & 0xFFFF
            value = pair.to(torch.int32).to(torch.int16).view(torch.bfloat16).double()
            wanted = E2M1[codes[:, row]] * scales[row] / UNSCALE.value
            assert torch.equal(value, wanted), (place, row)


def test_codes_of_8_bits_become_bf16():
    codes = torch.arange(256)[torch.arange(256) % 128 != 127]
    words = codes | codes.roll(1) << 8 | codes.roll(2) << 16 | codes.roll(3) << 24
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
    for scale, exponent in ((1.0, 56), (2.0**-30, 26), (2.0**60, 116)):
        bits = torch.full_like(words, ((exponent + 127) << 7) * 0x10001)
        found = run_ptx(operand_ptx._E4M3.value, {2: words, 3: bits}, 2)
        for place in range(4):
            half = found[place // 2] >> (16 * (place % 2)) & 0xFFFF
            value = half.to(torch.int32).to(torch.int16).view(torch.bfloat16).double()
            assert torch.equal(value, values[codes.roll(place)] * scale / UNSCALE.value), place


@pytest.mark.parametrize(
    ("ptx", "exponent_of", "exponent", "mantissa"),
    [
        ("_E8M0_FOR_E2M1", 127, 62, 0),
        ("_E8M0_FOR_E4M3", 127, 56, 0),
        ("_SMALL_FOR_E2M1", 23, 62, 3),
    ],
)
def test_bytes_become_scales(ptx, exponent_of, exponent, mantissa):
    """bf16 in both halves, times the power of two in front, of any byte of a word."""
    code = torch.arange(256 if mantissa else 190)
    value = (1 + (code & 7) / 8 if mantissa else 1.0) * 2.0 ** (
        (code >> mantissa) - exponent_of + exponent
    ).double()
    for byte in range(4):
        words = torch.full_like(code, 0x12345678) & ~(0xFF << 8 * byte) | code << 8 * byte
        selector = torch.full_like(words, 0x4040 + byte * 0x101)
        (found,) = run_ptx(getattr(operand_ptx, ptx).value, {1: words, 2: selector}, 1)
        assert torch.equal(found >> 16, found & 0xFFFF)
        actual = (found & 0xFFFF).to(torch.int32).to(torch.int16).view(torch.bfloat16).double()
        assert torch.equal(actual, value), byte


@pytest.fixture(scope="module")
def kernel():
    asm = {}
    emulated = Emulated(asm)
    found = emulated.load_module("kernels.tile_gemm.kernel").gemm_kernel
    asm.update(inline_asm(emulated.load_module("kernels.tile_gemm.operands")))
    return found


def run(kernel, x, weight, bias, routing, out, activation, programs=3):
    m = routing.block_rows.shape[1]
    s = gemm_sizes(weight, m, out.shape[1], activation, programs)
    tensors = (
        weight.tiles, bias, routing.block_expert, routing.block_rows, routing.expert_weights,
        torch.zeros(1, dtype=torch.int32), out,
    )  # fmt: skip
    descs = (
        gluon_on_cpu.matrix_descriptor(x, [m // 2, 64]),
        gluon_on_cpu.descriptor(weight.tiles, s.chunk_rows),
        gluon_on_cpu.descriptor(weight.tiles, s.words_rows),
    )
    pointers = tuple(gluon_on_cpu.pointer(t.contiguous()) for t in tensors)
    sizes = (routing.expert_weights.numel(), len(routing.block_expert), s.groups)
    gluon_on_cpu.launch(kernel, programs, (*descs, *pointers, *sizes, s))


def layer(name, experts, width, expert_width):
    """Plain and tiled experts of both halves, and their biases."""
    torch.manual_seed(0)
    plain, biases, packed = [], [], []
    for shape in ((2 * expert_width, width), (width, expert_width)):
        weight, bias = experts_in(FORMATS[name], experts, *shape)
        plain.append(weight)
        biases.append(bias)
        packed.append(pack_experts(weight, bias))
    tiles, first = torch.cat(packed, 1), (0, packed[0].shape[1])
    tiled = [
        TiledExperts(tiles, f, w.shape, FORMATS[name]) for f, w in zip(first, plain, strict=True)
    ]
    return plain, tiled, biases


def both_halves(kernel, x, tiled, biases, routing, hidden_factor=1.0):
    """What the kernel makes of tokens: activations of each pair, and outputs."""
    working = routing.block_rows.flatten() < routing.expert_weights.numel()
    pair = routing.block_rows.flatten()[working].long()
    top_k = routing.expert_weights.shape[1]
    order = x_order(x.shape[1], tiled[0].facts.bits)
    rows = torch.full((working.numel(), x.shape[1]), float("nan"), dtype=torch.bfloat16)
    rows[working] = x[pair // top_k][:, order]
    width = tiled[1].shape[2]
    out = torch.full((len(rows), width), float("nan"), dtype=torch.bfloat16)
    run(kernel, rows, tiled[0], biases[0], routing, out, ACTIVATION)
    hidden = torch.empty(len(pair), width, dtype=torch.bfloat16)
    hidden[pair] = out[working][:, x_order(width, tiled[1].facts.bits).argsort()]
    outputs = torch.full((len(pair), tiled[1].shape[1]), float("nan"))
    run(kernel, out * hidden_factor, tiled[1], biases[1], routing, outputs, None)
    return hidden, outputs


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "expert_width", "block_rows", "name"),
    [(150, 3, 2, 416, 96, 128, "mxfp4"), (7, 6, 1, 352, 160, 64, "mxfp4")]
    + [(70, 3, 2, 352, 96, 64, name) for name in EXPERT_TILES],
)
def test_both_halves(kernel, tokens, experts, top_k, width, expert_width, block_rows, name):
    plain, tiled, biases = layer(name, experts, width, expert_width)
    x = torch.randn(tokens, width).bfloat16()
    logits = torch.randn(tokens, experts)
    logits[:, 0] += 2  # one expert with more than a block, others with half of one
    routing = route_tokens(logits, top_k, block_rows)
    hidden, outputs = both_halves(kernel, x, tiled, biases, routing)
    expected = twin.moe_gemm_gate_up(x, plain[0], biases[0], routing, ACTIVATION)
    assert_close(hidden, expected, "moe_gemm_mxfp4_bf16")
    expected = twin.moe_gemm_down(hidden, plain[1], biases[1], routing)
    assert_close(outputs, expected, "moe_gemm_mxfp4_bf16")


@pytest.mark.parametrize("bits", [4, 8])
def test_tokens_are_gathered(bits):
    x = torch.randn(20, 96).bfloat16()  # the interpreter rounds in a way of its own
    routing = route_tokens(torch.randn(20, 5), 2, 64)
    rows = gathered(x, routing, bits)
    pair = routing.block_rows.flatten()
    working = pair < 40
    assert torch.equal(rows[working], x[pair[working] // 2][:, x_order(96, bits)])
    assert x_order(96, bits).unique().numel() == 96


def test_one_percent_is_seen(kernel):
    plain, tiled, biases = layer("mxfp4", 3, 96, 96)
    x = torch.randn(20, 96).bfloat16()
    routing = route_tokens(torch.randn(20, 3), 2, 64)
    expected = twin.moe_gemm_gate_up(x, plain[0], biases[0], routing, ACTIVATION)
    hidden, _ = both_halves(kernel, x * 1.01, tiled, biases, routing)
    with pytest.raises(AssertionError):
        assert_close(hidden, expected, "moe_gemm_mxfp4_bf16")
    hidden, outputs = both_halves(kernel, x, tiled, biases, routing, hidden_factor=1.01)
    assert_close(hidden, expected, "moe_gemm_mxfp4_bf16")
    expected = twin.moe_gemm_down(hidden, plain[1], biases[1], routing)
    with pytest.raises(AssertionError):
        assert_close(outputs, expected, "moe_gemm_mxfp4_bf16")
