"""Experts that every token takes beside the chosen ones, gate rows before up rows, no biases."""

from contextlib import nullcontext

import pytest
import torch

from kernels import moe_gemv as kernel
from kernels.packed_vector import activation_scale, packed_vectors, store_vector, unpack_vectors
from kernels.reference import moe_gemv as twin
from kernels.swiglu import Swiglu
from quant.codecs import decode, encode
from quant.formats import BF16, FP8_BLOCK128
from tests.tolerances import assert_close

D, F = 16, 16


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


def stack(format, experts, rows, columns, seed):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    sizes = 1 + torch.rand(experts, 1, 1, generator=g)
    return encode(torch.randn(experts, rows, columns, generator=g) * sizes, format)


@pytest.mark.parametrize("format", [BF16, FP8_BLOCK128], ids=lambda format: format.name)
def test_both_halves(format):
    gate_up, down = stack(format, 4, 2 * F, D, 0), stack(format, 4, D, F, 1)
    shared = stack(format, 2, 2 * F, D, 2), stack(format, 2, D, F, 3)
    assert kernel.can_join(gate_up, shared[0]) and kernel.can_join(down, shared[1])
    device = torch.get_default_device()
    x = packed_vectors(format, 1, D, device)
    token = torch.randn(D, generator=torch.Generator(device).manual_seed(4))
    store_vector(x, 0, token, 2.0**-10)
    ids = torch.tensor([3, 1], dtype=torch.int32)
    weights = torch.tensor([0.3, 1.7])
    found = []
    for module in (kernel, twin):
        hidden = packed_vectors(format, 4, F, device, 1 / activation_scale(None))
        module.moe_gate_up(x, gate_up, None, ids, hidden, Swiglu(), always=shared[0])
        out = torch.ones(D)
        module.moe_down(hidden, down, None, ids, weights, out, always=shared[1])
        found.append((unpack_vectors(hidden), out))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "moe_gemv_mxfp4")
    # the twin against plain torch, for the last shared expert
    gate, up = (decode(shared[0][1]) @ token).chunk(2)
    expected = torch.nn.functional.silu(gate) * up
    assert_close(found[1][0][3], expected, "moe_gemv_mxfp4")


@pytest.mark.parametrize("width", [16, 4624])
@pytest.mark.parametrize("format", [BF16, FP8_BLOCK128], ids=lambda format: format.name)
def test_weights_asked_for_ahead(format, width):
    """All experts in their order: all of a row's words before the wait, and not all of them."""
    gate_up, down = stack(format, 2, 2 * F, width, 0), stack(format, 2, 8, width, 1)
    device = torch.get_default_device()
    x = packed_vectors(format, 1, width, device)
    g = torch.Generator(device).manual_seed(4)
    store_vector(x, 0, torch.randn(width, generator=g) * width**-0.5, 2.0**-10)
    inner = packed_vectors(format, 2, width, device, 2.0**8)
    for slot in (0, 1):
        store_vector(inner, slot, torch.randn(width, generator=g) * width**-0.5, 2.0**-8)
    ids, weights = torch.arange(2, dtype=torch.int32), torch.tensor([0.3, 1.7])
    found = []
    for module in (kernel, twin):
        hidden = packed_vectors(format, 2, F, device, 1 / activation_scale(None))
        module.moe_gate_up(x, gate_up, None, ids, hidden, Swiglu(), in_order=True)
        out = module.moe_down(inner, down, None, ids, weights, torch.ones(8))
        found.append((unpack_vectors(hidden), out))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "moe_gemv_mxfp4")
