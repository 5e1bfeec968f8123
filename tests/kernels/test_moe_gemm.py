"""The grouped MXFP4 expert GEMM against its twin, the twin against loops, every code exact."""

from dataclasses import replace

import pytest
import torch

from kernels import moe_gemm as kernel
from kernels.moe_routing import route_tokens
from kernels.reference import moe_gemm as twin
from kernels.swiglu import Swiglu
from quant.codecs import decode
from quant.formats import MXFP4
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

CODES = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def working_dtype(device):
    """fp32 in the interpreter, which gets bf16 arithmetic wrong; bf16 on a GPU."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def tolerance(device):
    return "moe_gemm_mxfp4" if device.type == "cpu" else "moe_gemm_mxfp4_bf16"


def random_mxfp4(device, experts, rows, columns):
    values = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
    # 2^-6 to 2^-1: the clamps of SwiGLU are reached
    scales = torch.randint(121, 127, (experts, rows, columns // 32), device=device)
    return QuantTensor(values, scales.to(torch.uint8), MXFP4, (experts, rows, columns))


def random_layer(device, experts, width, expert_width):
    """gate_up, its bias, down, its bias."""
    gate_up = random_mxfp4(device, experts, 2 * expert_width, width)
    down = random_mxfp4(device, experts, width, expert_width)
    biases = (
        torch.randn(experts, 2 * expert_width, device=device).bfloat16(),
        torch.randn(experts, width, device=device).bfloat16(),
    )
    return gate_up, biases[0], down, biases[1]


@pytest.mark.parametrize("block_rows", [16, 64, 128])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "width", "expert_width"),
    [(1, 4, 4, 64, 96), (45, 3, 2, 96, 64), (7, 6, 1, 32, 32), (30, 5, 4, 160, 96)],
)
def test_both_halves(device, tokens, experts, top_k, width, expert_width, block_rows):
    gate_up, gate_up_bias, down, down_bias = random_layer(device, experts, width, expert_width)
    x = torch.randn(tokens, width, device=device).to(working_dtype(device))
    logits = torch.randn(tokens, experts, device=device) * 2
    logits[:, -1] = -50.0 if experts > top_k else 0.0  # an expert that nobody chooses
    routing = route_tokens(logits, top_k, block_rows)
    hidden = kernel.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    expected = twin.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    assert_close(hidden, expected, tolerance(device))
    outputs = kernel.moe_gemm_down(expected, down, down_bias, routing)
    expected = twin.moe_gemm_down(expected, down, down_bias, routing)
    assert outputs.dtype == torch.float32
    assert_close(outputs, expected, tolerance(device))
    residual = torch.randn(tokens, width, device=device)
    summed = kernel.add_expert_outputs(expected, residual.clone())
    assert_close(summed, twin.add_expert_outputs(expected, residual.clone()), "moe_gemm_mxfp4")


def test_twin_is_the_published_formula(device):
    tokens, experts, top_k, width, expert_width = 9, 4, 2, 64, 32
    gate_up, gate_up_bias, down, down_bias = random_layer(device, experts, width, expert_width)
    x = torch.randn(tokens, width, device=device)
    logits = torch.randn(tokens, experts, device=device)
    routing = route_tokens(logits, top_k, 16)
    hidden = twin.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    outputs = twin.moe_gemm_down(hidden, down, down_bias, routing)
    actual = twin.add_expert_outputs(outputs, torch.zeros(tokens, width, device=device))
    for t in range(tokens):
        total = torch.zeros(width, device=device)
        best = logits[t].sort(descending=True).indices[:top_k]
        for expert, weight in zip(best.tolist(), logits[t][best].softmax(0), strict=True):
            u = decode(gate_up[expert]) @ x[t] + gate_up_bias[expert].float()
            gate, up = u[::2].clamp(max=7.0), u[1::2].clamp(-7.0, 7.0)
            act = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            total += weight * (decode(down[expert]) @ act + down_bias[expert].float())
        assert_close(actual[t], total, "moe_gemm_mxfp4")


@pytest.mark.parametrize("power", [0, 40])
@pytest.mark.parametrize("block_rows", list(kernel.TILES))
def test_every_code_and_scale_byte_is_exact(device, block_rows, power):
    """Row r has code r % 16 and scale byte r // 16 in one column, zeros in all others.

    An activation of 1 there brings out the weight itself; 2^40 brings out those so small that their
    own product with 1 is an fp32 subnormal. What bf16 cannot hold (above 2^128) is left out.
    """
    rows, columns = 16 * 255, 64
    codes = torch.arange(16, device=device).repeat(255).to(torch.uint8)
    scale_bytes = torch.arange(255, device=device).repeat_interleave(16).to(torch.uint8)
    scales = scale_bytes[None, :, None].expand(1, -1, columns // 32).contiguous()
    exact = torch.tensor(CODES, dtype=torch.float64).repeat(255)
    exact *= 2.0 ** (scale_bytes.cpu().double() - 127)
    result = exact * 2.0**power
    fits = (exact.abs() < 2.0**128) & (result.abs() < 2.0**128)
    fits &= (result.abs() >= 2.0**-126) | (result == 0)
    routing = route_tokens(torch.zeros(1, 1, device=device), 1, block_rows)
    bias = torch.zeros(1, rows, device=device)
    for column in (13, 38):
        values = torch.zeros(1, rows, columns // 2, dtype=torch.uint8, device=device)
        values[0, :, column // 2] = codes << (4 * (column % 2))
        weight = QuantTensor(values, scales, MXFP4, (1, rows, columns))
        hidden = torch.zeros(1, columns, dtype=working_dtype(device), device=device)
        hidden[0, column] = 2.0**power
        actual = kernel.moe_gemm_down(hidden, weight, bias, routing)[0].cpu()
        assert torch.equal(actual.double()[fits], result[fits])


def test_blocks_cover_few_and_many_tokens():
    assert kernel.rows_per_block(1, 4, 32) == 16
    assert kernel.rows_per_block(2048, 4, 32) == 128
    assert all(
        kernel.rows_per_block(tokens, 4, experts) in kernel.TILES
        for tokens in (1, 10, 100, 300, 1000, 5000)
        for experts in (4, 32, 128)
    )


def test_planted_errors_of_one_percent_are_caught(device):
    tokens, experts, top_k, width, expert_width = 12, 3, 2, 64, 64
    gate_up, gate_up_bias, down, down_bias = random_layer(device, experts, width, expert_width)
    x = torch.randn(tokens, width, device=device).to(working_dtype(device))
    routing = route_tokens(torch.randn(tokens, experts, device=device), top_k, 16)
    arguments = (gate_up, gate_up_bias, routing)
    expected = twin.moe_gemm_gate_up(x, *arguments, ACTIVATION)
    for wrong in (
        kernel.moe_gemm_gate_up(x * 1.01, *arguments, ACTIVATION),
        kernel.moe_gemm_gate_up(x, *arguments, replace(ACTIVATION, limit=7.0 * 1.01)),
    ):
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(wrong, expected, tolerance(device))
    outputs = kernel.moe_gemm_down(expected * 1.01, down, down_bias, routing)
    expected = twin.moe_gemm_down(expected, down, down_bias, routing)
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(outputs, expected, tolerance(device))


def test_experts_without_bias_whose_gate_rows_come_first(device):
    gate_up, _, down, _ = random_layer(device, 3, 64, 96)
    x = torch.randn(20, 64, device=device).to(working_dtype(device))
    routing = route_tokens(torch.randn(20, 3, device=device), 2, 16)
    hidden = kernel.moe_gemm_gate_up(x, gate_up, None, routing, Swiglu())
    expected = twin.moe_gemm_gate_up(x, gate_up, None, routing, Swiglu())
    assert_close(hidden, expected, tolerance(device))
    outputs = kernel.moe_gemm_down(expected, down, None, routing)
    assert_close(outputs, twin.moe_gemm_down(expected, down, None, routing), tolerance(device))
    # the twin against plain torch, for the first token
    expert = int(routing.block_expert[(routing.block_rows == 0).any(1)][0])
    gate, up = (decode(gate_up[expert]) @ x[0].float()).chunk(2)
    assert_close(expected[0].float(), torch.nn.functional.silu(gate) * up, tolerance(device))
