"""Tiles of the persistent step: round trips, the documented places, and what reads them."""

import pytest
import torch

from kernels import moe_gemm, weight_tiles
from kernels.moe_routing import route_tokens
from kernels.persistent import multiply
from kernels.persistent.pack import (
    EXPERT_TILE_BYTES,
    TiledExperts,
    pack_dense,
    pack_experts,
    unpack_dense,
    unpack_experts,
)
from kernels.reference import moe_gemm as twin
from kernels.swiglu import Swiglu
from quant.e2m1 import E2M1_VALUES
from quant.formats import MXFP4
from quant.tensor import QuantTensor
from tests.kernels.ptx_emulator import run_ptx
from tests.tolerances import assert_close

E2M1 = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float64)
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)


def random_experts(experts, rows, columns):
    values = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8)
    scales = torch.randint(121, 127, (experts, rows, columns // 32), dtype=torch.uint8)
    return values, scales, torch.randn(experts, rows).bfloat16()


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


@pytest.mark.parametrize("shape", [(3, 130, 352), (1, 128, 320), (2, 96, 32)])
def test_experts_there_and_back(shape):
    packed = random_experts(*shape)
    tiles = pack_experts(*packed)
    assert tiles.shape[-1] == EXPERT_TILE_BYTES
    for found, expected in zip(unpack_experts(tiles, *shape[1:]), packed, strict=True):
        assert torch.equal(found, expected)


def test_experts_stand_as_the_words_are_described():
    values, scales, bias = random_experts(1, 256, 640)
    tiles = pack_experts(values, scales, bias)[0].long()
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


@pytest.mark.parametrize("scales", [(1.0, 2.0**-100), (2.0**9, 1.0)])
def test_prefills_words_become_bf16(scales):
    bits = [int(torch.tensor(s).bfloat16().view(torch.int16)) * 0x10001 for s in scales]
    for place, codes, words in every_byte():
        operands = {4: words, 5: torch.full_like(words, bits[0])}
        operands[6] = torch.full_like(words, bits[1])
        found = run_ptx(weight_tiles._CHUNK_PTX.value, operands, 4)
        for row in range(2):
            pair = found[2 * row + place // 2] >> (16 * (place % 2)) & 0xFFFF
            value = pair.to(torch.int32).to(torch.int16).view(torch.bfloat16).double()
            assert torch.equal(value, E2M1[codes[:, row]] * scales[row]), (place, row)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "expert_width", "block_rows"),
    [(45, 3, 2, 96, 64, 64), (7, 6, 1, 352, 96, 64), (30, 5, 4, 160, 96, 128)],
)
def test_prefill_reads_tiles(device, tokens, experts, top_k, width, expert_width, block_rows):
    torch.manual_seed(0)
    shapes = {"gate_up": (2 * expert_width, width), "down": (width, expert_width)}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    plain, biases, packed = [], [], []
    for shape in shapes.values():
        values, scales, bias = random_experts(experts, *shape)
        plain.append(QuantTensor(values, scales, MXFP4, (experts, *shape)).to(device))
        biases.append(bias.to(device))
        packed.append(pack_experts(values, scales, bias))
    tiles = torch.cat(packed, 1).to(device)
    gate_up = TiledExperts(tiles, 0, plain[0].shape)
    down = TiledExperts(tiles, packed[0].shape[1], plain[1].shape)
    x = torch.randn(tokens, width, device=device).to(dtype)
    routing = route_tokens(torch.randn(tokens, experts, device=device), top_k, block_rows)
    name = "moe_gemm_mxfp4" if device.type == "cpu" else "moe_gemm_mxfp4_bf16"
    hidden = moe_gemm.moe_gemm_gate_up(x, gate_up, biases[0], routing, ACTIVATION)
    expected = twin.moe_gemm_gate_up(x, plain[0], biases[0], routing, ACTIVATION)
    assert_close(hidden, moe_gemm.in_chunk_order(expected), name)
    outputs = moe_gemm.moe_gemm_down(moe_gemm.in_chunk_order(expected), down, biases[1], routing)
    assert_close(outputs, twin.moe_gemm_down(expected, plain[1], biases[1], routing), name)
