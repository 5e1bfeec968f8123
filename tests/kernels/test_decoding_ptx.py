"""The inline PTX of the expert kernels, emulated: every code at every place, exact."""

import pytest
import torch

from kernels import fp4_products, packed_dot, weight_tiles
from kernels.packed_vector import packed_vectors, store_vector, unpack_vectors
from quant.e2m1 import E2M1_VALUES
from quant.formats import MXFP4
from tests.kernels.ptx_emulator import run_ptx

E2M1 = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
# PTX of a GEMV, its codes, the bits of one, and the power of two that it leaves.
DOTS = {
    "e4m3": (packed_dot._DOT8_E4M3_PTX.value, E4M3, 8, 2.0**-12),
}
TILES = {
    "e2m1": (weight_tiles._E2M1_PTX.value, E2M1, 4, True),
    "e4m3, scaled": (weight_tiles._E4M3_SCALED_PTX.value, E4M3, 8, True),
    "e4m3": (weight_tiles._E4M3_PTX.value, E4M3, 8, False),
}


def all_codes(values, bits):
    """(place, codes, words): every finite code at each of eight places, others elsewhere."""
    codes = torch.arange(len(values))[values.isfinite()]
    for place in range(8):
        lanes = [codes[(torch.arange(len(codes)) * 7 + other) % len(codes)] for other in range(8)]
        lanes[place] = codes
        words = sum(lane << (bits * i) for i, lane in enumerate(lanes))
        yield place, torch.stack(lanes), words


@pytest.mark.parametrize("name", DOTS)
def test_dot_products(name):
    """x is one power of two at one place, so the result is that place's weight."""
    ptx, values, bits, unit = DOTS[name]
    for place, codes, words in all_codes(values, bits):
        one = int(torch.tensor(4096.0).half().view(torch.int16)) << (16 * (place // 4))
        planes = {
            2 + plane: torch.full_like(words, one * (place % 4 == plane)) for plane in range(4)
        }
        (result,) = run_ptx(ptx, {1: words, **planes}, 1)
        found = result.to(torch.int32).view(torch.float32).double()
        assert torch.equal(found, values[codes[place]] * 4096 * unit), place


@pytest.mark.parametrize("name", DOTS)
def test_the_largest_sums_are_finite(name):
    """Eight of the largest weights times the largest activation that is stored."""
    ptx, values, bits, unit = DOTS[name]
    largest = int(values.nan_to_num(0).argmax())
    words = torch.tensor([sum(largest << (bits * i) for i in range(8))])
    x = int(torch.tensor(60000.0).half().view(torch.int16)) * 0x10001
    (result,) = run_ptx(ptx, {1: words, **{i: torch.tensor([x]) for i in range(2, 6)}}, 1)
    found = float(result.to(torch.int32).view(torch.float32))
    assert found == pytest.approx(8 * 60000 * float(values[largest]) * unit, rel=1e-3)


@pytest.mark.parametrize("scale", [1.0, 2.0**-100, 1.875 * 2.0**8])
@pytest.mark.parametrize("name", TILES)
def test_tiles(name, scale):
    ptx, values, bits, scaled = TILES[name]
    scale_bits = int(torch.tensor(scale).bfloat16().view(torch.int16)) * 0x10001
    for place, codes, words in all_codes(values, bits):
        operands = {4: words, 5: torch.full_like(words, scale_bits)}
        pair = run_ptx(ptx, operands, 4)[place // 2] >> (16 * (place % 2)) & 0xFFFF
        found = pair.to(torch.int32).to(torch.int16).view(torch.bfloat16).double()
        assert torch.equal(found, values[codes[place]] * (scale if scaled else 1.0)), place


@pytest.mark.parametrize("scales_a_row", [1, 2])
def test_step_of_4_bit_weights(scales_a_row):
    """A warp's 16 rows and 4 groups of 32 columns, by the PTX that runs on tensor cores."""
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (16, 4, 32))
    x = torch.randn(4, 32) * 100
    packed = packed_vectors(MXFP4, 1, 128, x.device)
    store_vector(packed, 0, x.flatten())
    digits = packed.values[0].view(torch.uint8).long().view(2, 4, 8, 4)
    digits = (digits << (8 * torch.arange(4))).sum(-1)  # [2, 4 groups, 8 words]
    scales = torch.exp2(torch.randint(-9, 9, (16, 4, scales_a_row)).float())
    words = (codes.view(16, 4, 4, 8) << (4 * torch.arange(8))).sum(-1)  # [16, 4 groups, 4 words]
    lane = torch.arange(32)
    row, group, column = lane // 4, lane % 4, lane // 4
    own = group == column // 2
    inputs = {4 + i: words[row, group, i] for i in range(4)}
    inputs |= {8 + i: words[row + 8, group, i] for i in range(4)}
    inputs |= {12 + i: digits[column % 2, group, i] * own for i in range(8)}
    bits = scales.view(torch.int32).long()
    for which in range(scales_a_row):
        inputs[20 + 4 * which] = bits[row, group, which]
        inputs[20 + 4 * (scales_a_row + which)] = bits[row + 8, group, which]
    sums = 20 + 8 * scales_a_row
    inputs |= {sums + i: torch.zeros_like(lane) for i in range(2)}
    inputs |= {sums + 4: torch.full_like(lane, 0x03020100)}
    inputs |= {sums + 8: torch.full_like(lane, 0x0C080604)}
    found = run_ptx(fp4_products.step_ptx(scales_a_row), inputs, 2)
    found = [bits.to(torch.int32).view(torch.float32).double() for bits in found]
    vector = unpack_vectors(packed)[0].double() / packed.unscale[0].repeat_interleave(32)
    products = 2 * E2M1[codes] * vector.view(4, 32)  # of the integers
    expected = (products.unflatten(-1, (scales_a_row, -1)).sum(-1) * scales).sum(-1)
    torch.testing.assert_close(found[0], expected[row, group], rtol=1e-6, atol=1e-2)
    torch.testing.assert_close(found[1], expected[row + 8, group], rtol=1e-6, atol=1e-2)
