"""Our codes and scales beside torchao's and compressed-tensors', bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant import fp8, mxfp4, mxfp8, nvfp4
from quant.e8m0 import SCALE_RULES, decode_e8m0

AO = "needs pip install torchao"
CT = "needs pip install compressed-tensors"


def weights() -> Tensor:
    """Rows whose size grows by powers of two, with ties and values on the grid in the last ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 512, generator=generator) * 2.0 ** torch.arange(-48, 48)[:, None]
    weight[-16:] = torch.randint(-28, 29, (16, 512), generator=generator) / 4
    return weight


def equal_bytes(ours: Tensor, theirs: Tensor) -> bool:
    return torch.equal(ours.view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_mx_equals_torchao(name, rule, dtype):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason=AO)
    weight = weights().to(dtype)
    codec = {"mxfp4": mxfp4, "mxfp8": mxfp8}[name]
    element = {"mxfp4": torch.float4_e2m1fn_x2, "mxfp8": torch.float8_e4m3fn}[name]
    scales, codes = mx.to_mx(weight, element, 32, mx.ScaleCalculationMode[rule.upper()])
    ours = codec.encode(weight, rule)
    assert equal_bytes(ours.scales, scales)
    assert equal_bytes(ours.values, codes)


def test_nvfp4_equals_torchao():
    library = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor", reason=AO)
    # A tensor's blocks lie within a factor of 2^10 here: torchao has another floor for tiny ones.
    weight = torch.cat((weights()[40:52], weights()[-16:]))
    whole = library.per_tensor_amax_to_scale(weight.abs().amax())
    scales, codes = library.nvfp4_quantize(weight, 16, whole)
    ours = nvfp4.encode(weight)
    assert torch.equal(ours.tensor_scale, whole)
    assert equal_bytes(ours.scales, scales)
    assert equal_bytes(ours.values, codes)


def test_fp8_blocks_equal_torchao():
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason=AO)
    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    scales = primitives._choose_scale_float8(weight, [128, 128])
    codes = primitives._quantize_affine_float8(weight, scales, torch.float8_e4m3fn)
    ours = fp8.encode_block128(weight)
    assert torch.equal(ours.scales, scales)
    assert equal_bytes(ours.values, codes)


def test_fp8_blocks_equal_compressed_tensors():
    library = pytest.importorskip("compressed_tensors.quantization", reason=CT)
    from compressed_tensors.quantization.lifecycle.forward import quantize  # as above
    from compressed_tensors.quantization.utils import calculate_qparams  # as above

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(1))
    wanted = library.QuantizationArgs(
        type="float", symmetric=True, num_bits=8, strategy="block", block_structure=[128, 128]
    )
    tiles = weight.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
    scales, zero = calculate_qparams(tiles.amin((1, 3)), tiles.amax((1, 3)), wanted)
    codes = quantize(weight, scales, zero, wanted)
    ours = fp8.encode_block128(weight)
    assert torch.equal(ours.scales, scales)
    assert torch.equal(ours.values.float(), codes.float())


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "fp8_row"])
def test_equals_compressed_tensors(name):
    library = pytest.importorskip("compressed_tensors.quantization", reason=CT)
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8  # as above
    from compressed_tensors.quantization.lifecycle.forward import quantize  # as above
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam  # as above

    group, scale_dtype = {"mxfp4": (32, torch.uint8), "nvfp4": (16, torch.float8_e4m3fn)}.get(
        name, (512, None)
    )
    arguments = {
        "mxfp4": {"num_bits": 4, "strategy": "group", "group_size": 32},
        "nvfp4": {"num_bits": 4, "strategy": "tensor_group", "group_size": 16},
        "fp8_row": {"num_bits": 8, "strategy": "channel"},
    }[name]
    kinds = {"scale_dtype": scale_dtype, "zp_dtype": scale_dtype} if scale_dtype else {}
    wanted = library.QuantizationArgs(type="float", symmetric=True, **arguments, **kinds)
    weight = weights()[40:52]
    groups = weight.unflatten(-1, (-1, group))
    whole = generate_gparam(weight.amin(), weight.amax()) if name == "nvfp4" else None
    scales, zero = calculate_qparams(groups.amin(-1), groups.amax(-1), wanted, global_scale=whole)
    codes = quantize(
        weight, scales, zero if name == "fp8_row" else None, wanted, global_scale=whole
    )
    if name == "fp8_row":
        ours = fp8.encode_row(weight)
        assert torch.equal(ours.scales, scales)
        assert torch.equal(ours.values.float(), codes.float())
        return
    ours = mxfp4.encode(weight, "even") if name == "mxfp4" else nvfp4.encode(weight)
    found = decode_e8m0(ours.scales) if name == "mxfp4" else ours.scales.float()
    assert torch.equal(found, scales.float())
    assert torch.equal(ours.values, pack_fp4_to_uint8(codes))
