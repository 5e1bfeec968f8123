"""Weights put together again from the names and shapes of every producer we read.

The parts are written by hand from the formats' definitions, and each weight must decode to the
numbers that they stand for.
"""

import json

import pytest
import torch
from safetensors.torch import save_file

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError, UnsupportedModelError
from loaders.logical import logical_tensors, read_tensor
from loaders.tensor_rows import RowReader
from quant.codecs import decode
from quant.tensor import QuantTensor

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
ROWS, COLUMNS = 192, 160  # blocks of 128 are partial on both sides


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def fp4(generator, *shape):
    """Packed codes [.., columns / 2] and their values [.., columns]."""
    codes = torch.randint(0, 16, shape, generator=generator)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    return packed, E2M1[codes]


def fp8(generator, *shape):
    codes = torch.randn(*shape, generator=generator).to(torch.float8_e4m3fn)
    return codes, codes.float()


def powers(generator, *shape):
    """E8M0 bytes and their values."""
    scale_bytes = torch.randint(120, 134, shape, generator=generator, dtype=torch.uint8)
    return scale_bytes, torch.exp2(scale_bytes.float() - 127)


def wide(scales, rows=ROWS, columns=COLUMNS, block=(128, 128)):
    return scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[
        ..., :rows, :columns
    ]


def compressed_mxfp4(g):
    packed, values = fp4(g, ROWS, COLUMNS)
    scales, numbers = powers(g, ROWS, COLUMNS // 32)
    parts = {"x.weight_packed": packed, "x.weight_scale": scales}
    return parts, "mxfp4", values * wide(numbers, block=(1, 32))


def compressed_nvfp4(g):
    packed, values = fp4(g, ROWS, COLUMNS)
    scales, numbers = fp8(g, ROWS, COLUMNS // 16)
    whole = torch.tensor([8.0])  # it divides
    parts = {"x.weight_packed": packed, "x.weight_scale": scales, "x.weight_global_scale": whole}
    return parts, "nvfp4", values * wide(numbers, block=(1, 16)) / 8


def modelopt_nvfp4(g):
    packed, values = fp4(g, ROWS, COLUMNS)
    scales, numbers = fp8(g, ROWS, COLUMNS // 16)
    parts = {"x.weight": packed, "x.weight_scale": scales, "x.weight_scale_2": torch.tensor(8.0)}
    parts["x.input_scale"] = torch.tensor(1.0)
    return parts, "nvfp4", values * wide(numbers, block=(1, 16)) * 8


def modelopt_fp8(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    return {"x.weight": codes, "x.weight_scale": torch.tensor(0.5)}, "fp8_row", values / 2


def compressed_mxfp8(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    scales, numbers = powers(g, ROWS, COLUMNS // 32)
    parts = {"x.weight": codes, "x.weight_scale": scales}
    return parts, "mxfp8", values * wide(numbers, block=(1, 32))


def compressed_channel(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    scales = torch.rand(ROWS, 1, generator=g).bfloat16()
    return {"x.weight": codes, "x.weight_scale": scales}, "fp8_row", values * scales.float()


def compressed_block(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    scales = torch.rand(2, 2, generator=g)
    return {"x.weight": codes, "x.weight_scale": scales}, "fp8_block128", values * wide(scales)


def deepseek_fp8(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    scales = torch.rand(2, 2, generator=g).bfloat16()
    parts = {"x.weight": codes, "x.weight_scale_inv": scales}
    return parts, "fp8_block128", values * wide(scales.float())


def deepseek_v4_fp8(g):
    codes, values = fp8(g, ROWS, COLUMNS)
    scales, numbers = powers(g, 2, 2)
    parts = {"x.weight": codes, "x.scale": scales.view(torch.float8_e8m0fnu)}
    return parts, "fp8_block128_e8m0", values * wide(numbers)


def deepseek_v4_fp4(g):
    packed, values = fp4(g, ROWS, COLUMNS)
    scales, numbers = powers(g, ROWS, COLUMNS // 32)
    scales = scales.view(torch.float8_e8m0fnu)
    parts = {"x.weight": packed.view(torch.int8), "x.scale": scales}
    return parts, "mxfp4", values * wide(numbers, block=(1, 32))


def stacked_fp8(g):
    codes, values = fp8(g, 3, ROWS, COLUMNS)
    scales = torch.rand(3, 2, 2, generator=g)
    return {"x": codes, "x_scale_inv": scales}, "fp8_block128", values * wide(scales)


def gpt_oss_mxfp4(g):
    packed, values = fp4(g, 3, ROWS, COLUMNS)
    scales, numbers = powers(g, 3, ROWS, COLUMNS // 32)
    parts = {"x_blocks": packed.view(3, ROWS, COLUMNS // 32, 16), "x_scales": scales}
    return parts, "mxfp4", values * wide(numbers, block=(1, 32))


def original_mxfp4(g):
    parts, format, values = gpt_oss_mxfp4(g)
    return {name.replace("_", "."): part for name, part in parts.items()}, format, values


def plain_bf16(g):
    weight = torch.randn(ROWS, COLUMNS, generator=g).bfloat16()
    return {"x.weight": weight}, None, weight.float()


PRODUCERS = (
    *(compressed_mxfp4, compressed_nvfp4, compressed_mxfp8, compressed_channel, compressed_block),
    *(modelopt_nvfp4, modelopt_fp8, deepseek_fp8, deepseek_v4_fp8, deepseek_v4_fp4, stacked_fp8),
    *(gpt_oss_mxfp4, original_mxfp4, plain_bf16),
)


def write(folder, parts, **config):
    save_file({name: part.contiguous() for name, part in parts.items()},
              folder / "model.safetensors")  # fmt: skip
    (folder / "config.json").write_text(json.dumps({"model_type": "any", **config}))
    return open_folder(folder)


@pytest.mark.parametrize("producer", PRODUCERS)
def test_reads_what_a_producer_writes(tmp_path, producer):
    parts, format, values = producer(draw())
    checkpoint = write(tmp_path, parts)
    found = {tensor.name: tensor for tensor in logical_tensors(checkpoint)}
    name = "x.weight" if values.dim() == 2 else "x"
    weight = found.pop(name)
    assert weight.shape == tuple(values.shape)
    assert (weight.format.name if weight.format else None) == format
    read = read_tensor(checkpoint, weight)
    numbers = decode(read) if isinstance(read, QuantTensor) else read.float()
    assert torch.equal(numbers, values)
    # every tensor of the file belongs to exactly one weight
    assert set(found) == {name for name in parts if name.endswith("input_scale")}
    owned = [info.name for t in (weight, *found.values()) for info in t.parts.values()]
    assert sorted(owned) == sorted(parts)
    assert weight.nbytes + sum(t.nbytes for t in found.values()) == checkpoint.total_bytes


@pytest.mark.parametrize("producer", PRODUCERS)
def test_rows_are_those_of_the_whole(tmp_path, producer):
    parts, _, values = producer(draw(1))
    checkpoint = write(tmp_path, parts)
    reader = RowReader(checkpoint.path)
    weight = next(t for t in logical_tensors(checkpoint) if t.name in ("x", "x.weight"))
    matrices = values.reshape(-1, ROWS, COLUMNS)
    for matrix in range(len(matrices)):
        for start, stop in ((0, ROWS), (128, 192), (0, 128)):
            rows = reader.rows(weight, matrix, start, stop)
            found = decode(rows) if isinstance(rows, QuantTensor) else rows.float()
            assert torch.equal(found, matrices[matrix, start:stop])
        numbers = reader.decoded_rows(weight, matrix, 5, 150)  # inside of blocks
        assert torch.equal(numbers.float(), matrices[matrix, 5:150])
    reader.close()


def test_gpt_oss_without_quantization_is_turned_around(tmp_path):
    gate_up = torch.randn(2, 96, 64, generator=draw()).bfloat16()
    down = torch.randn(2, 64, 64, generator=draw(1)).bfloat16()  # square: gate_up decides
    name = "model.layers.0.mlp.experts."
    parts = {name + "gate_up_proj": gate_up.mT.contiguous(), name + "down_proj": down.mT}
    checkpoint = write(tmp_path, parts, model_type="gpt_oss", hidden_size=64)
    reader = RowReader(checkpoint.path)
    for tensor in logical_tensors(checkpoint):
        expected = gate_up if "gate_up" in tensor.name else down
        assert tensor.shape == tuple(expected.shape)
        assert torch.equal(read_tensor(checkpoint, tensor), expected)
        assert torch.equal(reader.rows(tensor, 1, 3, 9), expected[1, 3:9])


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"x.weight_packed": torch.uint8}, "codes without scales"),
        ({"x.weight": torch.float8_e4m3fn}, "codes without scales"),
        ({"x.weight_scale": torch.float32}, "scales without the codes"),
        ({"x_scales": torch.uint8}, "scales without the codes"),
        ({"x.weight": torch.float8_e4m3fn, "x.weight_scale_inv": torch.float32}, "does not fit"),
        ({"x.weight_packed": torch.uint8, "x.weight_scale": torch.float8_e4m3fn}, "does not fit"),
    ],
)
def test_halves_of_weights_are_refused(tmp_path, parts, expected):
    checkpoint = write(tmp_path, {n: torch.zeros(64, 64).to(t) for n, t in parts.items()})
    with pytest.raises(CheckpointError, match=expected):
        logical_tensors(checkpoint)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("x.qweight", torch.int32), ("x.weight_packed", torch.int32), ("x.absmax", torch.float32)],
)
def test_formats_that_are_not_read_are_named(tmp_path, name, dtype):
    checkpoint = write(tmp_path, {name: torch.zeros(8, 8, dtype=dtype)})
    with pytest.raises(UnsupportedModelError, match=f"{name}: "):
        logical_tensors(checkpoint)


def test_other_block_sizes_are_not_taken_for_128(tmp_path):
    parts = {"x.weight": torch.zeros(64, 64).to(torch.float8_e4m3fn),
             "x.weight_scale_inv": torch.ones(2, 2)}  # fmt: skip
    checkpoint = write(tmp_path, parts, quantization_config={"weight_block_size": [32, 32]})
    with pytest.raises(UnsupportedModelError, match=r"blocks of \[32, 32\]"):
        logical_tensors(checkpoint)


def test_a_weight_in_two_forms_is_refused(tmp_path):
    parts, _, _ = compressed_mxfp4(draw())
    checkpoint = write(tmp_path, {**parts, "x.weight": torch.zeros(4, 4)})
    with pytest.raises(CheckpointError, match=r"x\.weight is there twice"):
        logical_tensors(checkpoint)
