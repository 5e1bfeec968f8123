"""Tiles of the persistent step: round trips, the documented places, and what reads them."""

from dataclasses import replace

import pytest
import torch

from kernels.persistent import multiply
from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import (
    mixed_projection,
    pack_dense,
    pack_experts,
    unpack_dense,
    unpack_experts,
)
from kernels.swiglu import Swiglu
from quant.codecs import decode, encode
from quant.e2m1 import E2M1_VALUES
from quant.formats import FORMATS, FP8_BLOCK128, FP8_ROW, MXFP4, NVFP4
from quant.tensor import QuantTensor
from tests.kernels.ptx_emulator import run_ptx
from tests.oracles.step_model import TINY

E2M1 = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)


def random_experts(experts, rows, columns):
    values = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(121, 127, (experts, rows, columns // 32), dtype=torch.uint8)
    weight = QuantTensor(values, scales, MXFP4, (experts, rows, columns))
    return weight, torch.randn(experts, rows).bfloat16()


def experts_in(format, experts, rows, columns):
    """Random weights whose sizes differ from group to group, and biases."""
    if format is MXFP4:
        return random_experts(experts, rows, columns)
    sizes = 2.0 ** torch.randint(-9, 2, (experts, rows, columns // 16, 1))
    plain = torch.randn(experts, rows, columns // 16, 16) * sizes
    return encode(plain.flatten(-2) * 0.02, format), torch.randn(experts, rows).bfloat16()


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(200, 352), (128, 320), (3, 5)])
def test_dense_there_and_back(shape, dtype, by_rows):
    weight = torch.randn(shape).to(dtype)
    tiles = pack_dense(weight, by_rows=by_rows)
    back = unpack_dense(tiles, *shape, dtype, by_rows=by_rows)
    assert torch.equal(back.view(torch.uint8), weight.view(torch.uint8))


def test_dense_weights_stand_where_the_tensor_core_reads_them():
    weight = torch.arange(256 * 640).view(256, 640).to(torch.float32).remainder(251)
    weight = weight.to(torch.uint8)
    tiles = pack_dense(weight.view(torch.float8_e4m3fn)).view(torch.uint8)
    for row, column in ((0, 0), (4, 3), (133, 17), (255, 639), (70, 400)):
        tile = column // 320 * 2 + row // 128
        r, c = row % 128, column % 320
        half = c % 32 // 16 ^ (r >> 2 & 1)
        assert tiles[tile, c // 32 * 4096 + r * 32 + half * 16 + c % 16] == weight[row, column]


@pytest.mark.parametrize("experts", [5, 96])
@pytest.mark.parametrize("fp8", [True, False])
def test_the_routers_rows_add_up_to_its_product_with_the_output_projection(fp8, experts):
    sizes = replace(TINY, fp8=fp8, experts=experts, programs=132)
    out = torch.randn(sizes.width, sizes.attention_width) * 0.05
    out = encode(out, FP8_ROW) if fp8 else out.bfloat16()
    bias, norm = torch.randn(2, sizes.width).bfloat16()
    router = torch.randn(experts, sizes.width).bfloat16()
    rows, scales, biases = mixed_projection(sizes, out, bias, router, norm)
    assert len(rows) == sizes.mixed_blocks * 128
    assert torch.equal(biases[: sizes.width], bias)
    whole = rows.double() * (scales.double()[:, None] if fp8 else 1)
    plain = (decode(out) if fp8 else out).double()
    torch.testing.assert_close(whole[: sizes.width], plain, rtol=1e-6, atol=0)
    assert not rows[sizes.width : sizes.out_blocks * 128].double().any()
    behind = slice(sizes.out_blocks * 128, None)
    padded = sizes.padded_experts
    terms = whole[behind].unflatten(0, (-1, padded)).sum(0)
    constant = biases[behind].double().unflatten(0, (-1, padded)).sum(0)
    weighted = router.double() * norm.double()
    expected = weighted @ plain
    error = (terms[:experts] - expected).abs().amax(1) / expected.abs().amax(1)
    assert error.max() < (2.0**-11 if fp8 else 2.0**-15)
    assert not terms[experts:].any() and not constant[experts:].any()
    wanted = weighted @ bias.double()
    torch.testing.assert_close(constant[:experts], wanted, rtol=2.0**-14, atol=1e-4)


@pytest.mark.parametrize("name", EXPERT_TILES)
@pytest.mark.parametrize("shape", [(3, 130, 352), (1, 128, 320), (2, 96, 32)])
def test_experts_there_and_back(shape, name):
    format = FORMATS[name]
    weight, bias = experts_in(format, *shape)
    tiles = pack_experts(weight, bias)
    assert tiles.shape[-1] == EXPERT_TILES[name].bytes == 256 * EXPERT_TILES[name].rows
    found, found_bias = unpack_experts(tiles, format, *shape[1:])
    assert torch.equal(found_bias, bias) and found.shape == weight.shape
    for part in ("values", "scales", "tensor_scale"):
        expected, actual = getattr(weight, part), getattr(found, part)
        assert (expected is None) == (actual is None), part
        if expected is not None:
            assert actual.dtype == expected.dtype and actual.shape == expected.shape, part
            assert torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (actual, expected))), part


def test_scales_of_zero_and_below_stand_in_the_codes():
    weight, bias = experts_in(NVFP4, 2, 128, 64)
    scales = weight.scales.view(torch.uint8)
    scales[:, :, 0], scales[:, 5, 1] = 0, 0x80
    scales[:, :, 2] = torch.arange(128) % 127 | 0x80
    scales[:, :, 3] = torch.arange(128) % 127
    found, _ = unpack_experts(pack_experts(weight, bias), NVFP4, 128, 64)
    assert torch.equal(decode(found), decode(weight))
    assert (found.scales.view(torch.uint8) < 128).all()


def test_experts_stand_as_the_words_are_described():
    weight, bias = random_experts(1, 256, 640)
    values, scales = weight.values, weight.scales
    tiles = pack_experts(weight, bias)[0].long()
    for row, column in ((0, 0), (8, 1), (133, 17), (255, 639), (70, 400)):
        code = int(values[0, row, column // 2]) >> (4 * (column % 2)) & 15
        tile = column // 320 * 2 + row // 128
        r, c = row % 128, column % 320
        warp, upper, r8 = r // 16, r % 16 // 8, r % 8
        q, c4, e = c % 64 // 16, c % 16 // 4, c % 4
        word = ((c // 64 * 8 + warp) * 8 + r8) * 16 + c4 * 4 + q
        byte = int(tiles[tile, word * 4 + e])
        lower = (byte >> 4 & 8) | (byte >> 2 & 7)
        high = (byte >> 2 & 8) | (byte >> 4 & 4) | (byte & 3)
        assert (high if upper else lower) == code
        group = c // 32
        word, byte = (group % 2, group // 2) if group < 8 else (2, group - 8)
        at = 5 * 4096 + word * 512 + r * 4 + byte
        assert tiles[tile, at] == scales[0, row, column // 32]
        if column < 320:
            two = tiles[tile, 5 * 4096 + 2 * 512 + r * 4 + 2 :][:2].to(torch.uint8)
            assert two.view(torch.bfloat16) == bias[0, row]
    assert not tiles[2:, 5 * 4096 + 1024 :].view(2, 128, 4)[..., 2:].any()


def every_byte():
    """Words with each byte at each place; codes [256, 2]: of rows r and r + 8."""
    byte = torch.arange(256)
    codes = torch.stack(
        [(byte >> 4 & 8) | (byte >> 2 & 7), (byte >> 2 & 8) | (byte >> 4 & 4) | (byte & 3)], 1
    )
    for place in range(4):
        bytes_ = [(byte * 37 + 11 * other) % 256 for other in range(4)]
        bytes_[place] = byte
        yield place, codes, sum(b << (8 * i) for i, b in enumerate(bytes_))


def test_the_steps_words_become_e4m3():
    for place, codes, words in every_byte():
        found = run_ptx(multiply._DECODE.value, {8 + i: words for i in range(4)}, 8)
        for i in range(4):
            for row in range(2):
                part = (found[2 * i + row] >> (8 * place) & 0xFF).to(torch.uint8)
                value = part.view(torch.float8_e4m3fn).double()
                assert torch.equal(value, E2M1[codes[:, row]] * 2.0**-6), (place, row)


@pytest.mark.parametrize("byte", range(4))
def test_words_of_nvfp4_have_the_described_scales(byte):
    """Groups of 16 columns by word and byte; and fp32 of the tensor behind them."""
    weight, bias = experts_in(NVFP4, 1, 256, 640)
    words = pack_experts(weight, bias)[0, :, 5 * 4096 :].view(4, 7, 128, 4)
    for tile, word in ((0, 0), (1, 3), (3, 1), (2, 2), (3, 4), (0, 5)):
        group = 8 * (word // 2) + 2 * byte + word % 2
        if group >= 20:
            continue
        rows = slice(tile % 2 * 128, tile % 2 * 128 + 128)
        stored = words[tile, word, :, byte].int()
        exponent, mantissa = stored >> 3, stored & 7
        value = (1 + mantissa / 8) * 2.0 ** (exponent - 23)
        assert torch.equal(value, weight.scales[0, rows, tile // 2 * 20 + group].float())
    assert (words[:, 6].contiguous().view(torch.float32) == weight.tensor_scale).all()


def test_words_of_blocks_have_the_described_scales():
    weight, bias = experts_in(FP8_BLOCK128, 1, 256, 640)
    words = pack_experts(weight, bias)[0, :, 10 * 4096 :].contiguous().view(torch.float32)
    words = words.view(4, 3, 128)
    for tile in range(4):
        assert (words[tile, 0] == 1).all()
        blocks = [(tile // 2 * 320 + 64 * i) // 128 for i in range(5)]
        assert torch.equal(words[tile, 1, :5], weight.scales[0, tile % 2, blocks])
