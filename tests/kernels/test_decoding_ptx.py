"""The inline PTX of the expert kernels, emulated: every code at every place, exact."""

import pytest
import torch

from kernels import moe_gemv, packed_dot, weight_tiles
from quant.e2m1 import E2M1_VALUES
from tests.kernels.ptx_emulator import run_ptx

E2M1 = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
E4M3 = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
# PTX of a GEMV, its codes, the bits of one, and the power of two that it leaves.
DOTS = {
    "e2m1": (moe_gemv._DOT8_PTX.value, E2M1, 4, 2.0**-14),
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
