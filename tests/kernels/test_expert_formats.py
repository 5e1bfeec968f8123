"""Expert kernels in every format against their twins, and every code exact.

What is particular to MXFP4, and the shapes, is in test_decode_kernels.py and test_moe_gemm.py.
"""

import pytest
import torch

from kernels import moe_gemm, moe_gemv
from kernels.moe_routing import route_tokens
from kernels.packed_vector import activation_scale, packed_vectors, store_vector, unpack_vectors
from kernels.reference import moe_gemm as gemm_twin
from kernels.reference import moe_gemv as gemv_twin
from kernels.swiglu import Swiglu
from quant.codecs import CODECS, decode
from quant.formats import FORMATS, FP8_BLOCK128_E8M0, FP8_ROW, MXFP8, NVFP4
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

OTHERS = [name for name in FORMATS if name != "mxfp4"]
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)
# 352 columns: whole and partial blocks of 128, and steps past the end of a row.
# 32 columns: one step is the whole row.
EXPERTS, WIDTH, EXPERT_WIDTH, TOP_K = 4, 352, 32, 2


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random_experts(format, rows, columns, device):
    """Weights whose blocks differ in size, so that a scale of another block shows."""
    shape = (EXPERTS, rows, columns)
    weight = torch.randn(shape) * torch.exp2(torch.randint(-3, 2, shape[:2]).float())[..., None]
    weight *= torch.exp2(torch.arange(columns) // 16 % 3).float()
    return CODECS[format].encode(weight * 0.05).to(device)


@pytest.fixture(params=OTHERS)
def layer(request, device):
    """gate_up, its bias, down, its bias in one format."""
    gate_up = random_experts(request.param, 2 * EXPERT_WIDTH, WIDTH, device)
    down = random_experts(request.param, WIDTH, EXPERT_WIDTH, device)
    gate_up_bias = torch.randn(EXPERTS, 2 * EXPERT_WIDTH, device=device)
    return gate_up, gate_up_bias, down, torch.randn(EXPERTS, WIDTH, device=device)


def test_one_token(layer, device, monkeypatch):
    if device.type == "cpu":  # the interpreter's time is programs, not rows
        monkeypatch.setattr(moe_gemv, "GATE_UP_ROWS", 64)
        monkeypatch.setattr(moe_gemv, "DOWN_ROWS", 64)
    gate_up, gate_up_bias, down, down_bias = layer
    ids = torch.tensor([3, 1], dtype=torch.int32, device=device)
    mixing = torch.rand(TOP_K, device=device)
    packed = packed_vectors(gate_up.format, 1, WIDTH, device)
    store_vector(packed, 0, torch.randn(WIDTH, device=device), 2.0**-12)
    unscale = 1 / activation_scale(ACTIVATION.limit)
    hidden, expected = (
        packed_vectors(down.format, TOP_K, EXPERT_WIDTH, device, unscale) for _ in range(2)
    )
    for module, out in ((moe_gemv, hidden), (gemv_twin, expected)):
        module.moe_gate_up(packed, gate_up, gate_up_bias, ids, out, ACTIVATION)
    assert_close(unpack_vectors(hidden), unpack_vectors(expected), "moe_gemv_mxfp4")
    residual = torch.randn(WIDTH, device=device)
    twin_residual = residual.clone()
    moe_gemv.moe_down(hidden, down, down_bias, ids, mixing, residual)
    gemv_twin.moe_down(hidden, down, down_bias, ids, mixing, twin_residual)
    assert_close(residual, twin_residual, "moe_gemv_mxfp4")


def test_many_tokens(layer, device):
    gate_up, gate_up_bias, down, down_bias = layer
    # fp32 in the interpreter, which gets bf16 arithmetic wrong; bf16 on a GPU.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    name = "moe_gemm_mxfp4" if device.type == "cpu" else "moe_gemm_mxfp4_bf16"
    x = torch.randn(11, WIDTH, device=device).to(dtype)
    routing = route_tokens(torch.randn(11, EXPERTS, device=device), TOP_K, 16)
    hidden = moe_gemm.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    expected = gemm_twin.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    assert_close(hidden, expected, name)
    outputs = moe_gemm.moe_gemm_down(expected, down, down_bias, routing)
    expected = gemm_twin.moe_gemm_down(expected, down, down_bias, routing)
    assert_close(outputs, expected, name)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(outputs * 1.01, expected, name)


def e4m3_codes():
    """Every finite code: all bytes but the two NaN."""
    codes = torch.arange(256)
    return codes[(codes & 127) != 127].to(torch.uint8)


def one_code_a_row(codes, columns, column):
    """Values [1, rows, columns] of E4M3, zero but for one column."""
    values = torch.zeros(1, len(codes), columns, dtype=torch.uint8)
    values[0, :, column] = codes
    return values.view(torch.float8_e4m3fn)


def exact_weights():
    """(name, weight): one code in one column of each row; scales that bf16 holds exactly."""
    codes = torch.cat((e4m3_codes(), torch.tensor([8, 9], dtype=torch.uint8)))
    rows, columns = len(codes), 256
    found = []
    for column in (37, 229):
        values = one_code_a_row(codes, columns, column)
        for scale_byte in (0, 1, 127, 200):
            bytes_ = torch.full((1, rows, columns // 32), scale_byte, dtype=torch.uint8)
            found.append((MXFP8.name, QuantTensor(values, bytes_, MXFP8, values.shape)))
        bytes_ = torch.tensor([[[120, 130], [3, 180]]], dtype=torch.uint8)
        found.append(("blocks", QuantTensor(values, bytes_, FP8_BLOCK128_E8M0, values.shape)))
        scales = torch.exp2(torch.randint(-20, 20, (1, rows, 1)).float()) * 1.5
        found.append((FP8_ROW.name, QuantTensor(values, scales, FP8_ROW, values.shape)))
        # NVFP4: every scale code with code 5 (3.0) of E2M1
        packed = torch.zeros(1, rows, columns // 2, dtype=torch.uint8)
        packed[0, :, column // 2] = 5 << (4 * (column % 2))
        scales = codes[None, :, None].expand(1, -1, columns // 16).contiguous()
        whole = torch.tensor(2.0**-5)
        weight = QuantTensor(
            packed, scales.view(torch.float8_e4m3fn), NVFP4, (1, rows, columns), whole
        )
        found.append((NVFP4.name, weight))
    return found


def test_every_code_and_scale_is_exact(device, monkeypatch):
    if device.type == "cpu":
        monkeypatch.setattr(moe_gemv, "DOWN_ROWS", 256)
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    one = torch.ones(1, device=device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    routing = route_tokens(torch.zeros(1, 1, device=device), 1, 16)
    for name, weight in exact_weights():
        expected = decode(weight)[0].sum(-1)
        weight = weight.to(device)
        rows, columns = weight.shape[1:]
        bias = torch.zeros(1, rows, device=device)
        hidden = torch.ones(1, columns, device=device)
        # Sums on a GPU flush nothing here: what is an fp32 subnormal is left out on both sides.
        fits = (expected.abs() >= 2.0**-126) | (expected == 0)
        actual = moe_gemm.moe_gemm_down(hidden.to(dtype), weight, bias, routing)[0].cpu()
        assert torch.equal(actual[fits], expected[fits]), name
        out = torch.zeros(rows, device=device)
        packed = packed_vectors(weight.format, 1, columns, device)
        store_vector(packed, 0, hidden[0], 2.0**-10)
        moe_gemv.moe_down(packed, weight, bias, ids, one, out)
        assert torch.equal(out.cpu()[fits], expected[fits]), name
