"""The kernels of one token against their twins, in the interpreter or on the GPU.

Shapes are tiny and odd on purpose: widths that are no power of two, more heads than fill a tile,
windows that wrap the ring. Output buffers start as NaN, tickets must end at zero.
"""

import pytest
import torch

from kernels import gemv, moe_gemv, router_topk, sink_attention_decode
from kernels.packed_vector import packed_vectors, store_vector, unpack_vectors
from kernels.reference import gemv as gemv_twin
from kernels.reference import moe_gemv as moe_twin
from kernels.reference import router_topk as router_twin
from kernels.reference import sink_attention_decode as attention_twin
from kernels.swiglu import Swiglu
from quant.formats import FP8_ROW, MXFP4
from quant.tensor import QuantTensor
from tests.tolerances import assert_close

NAN = float("nan")


def random_mxfp4(experts: int, rows: int, columns: int, device) -> QuantTensor:
    values = torch.randint(0, 256, (experts, rows, columns // 2), dtype=torch.uint8, device=device)
    scales = torch.randint(118, 126, (experts, rows, columns // 32), device=device)
    shape = (experts, rows, columns)
    return QuantTensor(values, scales.to(torch.uint8), MXFP4, shape)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("columns", [64, 96, 1100])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("add", [False, True])
def test_gemv(device, rows, columns, norm, add):
    x = torch.randn(columns, device=device) * 3
    weight = torch.randn(rows, columns, device=device).bfloat16()
    bias = torch.randn(rows, device=device)
    start = torch.randn(rows, device=device) if add else torch.full((rows,), NAN, device=device)
    options = {"bias": bias, "add": add, "eps": 1e-5}
    if norm:
        options["norm"] = torch.rand(columns, device=device) + 0.5
    expected = gemv_twin.gemv(x, weight, start.clone(), **options)
    actual = gemv.gemv(x, weight, start.clone(), **options)
    assert_close(actual, expected, "gemv")


def test_embedding(device):
    table = torch.randn(11, 300, device=device).bfloat16()
    token = torch.tensor([10], dtype=torch.int32, device=device)
    out = torch.full((300,), NAN, device=device)
    assert torch.equal(gemv.embedding(token, table, out), table[10].float())


def router_buffers(experts: int, top_k: int, width: int, device, format=MXFP4) -> dict:
    return {
        "logits": torch.full((experts,), NAN, device=device),
        "ticket": torch.zeros(1, dtype=torch.int32, device=device),
        "expert_ids": torch.full((top_k,), -1, dtype=torch.int32, device=device),
        "expert_weights": torch.full((top_k,), NAN, device=device),
        "packed": packed_vectors(format, 1, width, device),
    }


@pytest.mark.parametrize(
    ("experts", "top_k", "width"), [(8, 4, 96), (1, 1, 64), (5, 3, 160), (130, 4, 64)]
)
@pytest.mark.parametrize(("size", "format"), [(1e-3, MXFP4), (1.0, FP8_ROW), (1e3, MXFP4)])
def test_router(device, experts, top_k, width, size, format):
    x = torch.randn(width, device=device) * size
    norm = torch.rand(width, device=device) + 0.5
    router = torch.randn(experts, width, device=device).bfloat16()
    bias = torch.randn(experts, device=device)
    actual = router_buffers(experts, top_k, width, device, format)
    expected = router_buffers(experts, top_k, width, device, format)
    router_topk.router_topk(x, norm, router, bias, eps=1e-5, **actual)
    router_twin.router_topk(x, norm, router, bias, eps=1e-5, **expected)
    assert torch.equal(actual["expert_ids"], expected["expert_ids"])
    assert torch.equal(actual["packed"].unscale, expected["packed"].unscale)
    assert int(actual["ticket"]) == 0
    for name in ("logits", "expert_weights"):
        assert_close(actual[name], expected[name], "router")
    packed = [unpack_vectors(found["packed"]) for found in (actual, expected)]
    assert_close(*packed, "packed_fp16")


def test_router_ties_take_the_lower_id(device):
    buffers = router_buffers(8, 4, 64, device)
    zeros = torch.zeros(8, 64, device=device)
    bias = torch.tensor([0.0, 1, 0, 1, 1, 0, 0, 1], device=device)
    x = torch.randn(64, device=device)
    router_topk.router_topk(x, torch.ones_like(x), zeros, bias, eps=1e-5, **buffers)
    assert buffers["expert_ids"].tolist() == [1, 3, 4, 7]
    assert buffers["expert_weights"].tolist() == [0.25] * 4


def test_router_of_nan_stays_among_its_experts(device):
    buffers = router_buffers(5, 3, 64, device)
    router, x = torch.zeros(5, 64, device=device), torch.full((64,), NAN, device=device)
    router_topk.router_topk(x, torch.ones_like(x), router, router[:, 0], eps=1e-5, **buffers)
    assert all(0 <= expert < 5 for expert in buffers["expert_ids"].tolist())


@pytest.mark.parametrize("format", [MXFP4, FP8_ROW])
def test_packing_has_an_inverse(device, format):
    x = torch.randint(-8192, 8192, (3, 96), device=device) / 4096.0
    packed = packed_vectors(format, 3, 96, device)
    for index in range(3):
        store_vector(packed, index, x[index])
    assert_close(unpack_vectors(packed), x, "packed_fp16")
    if packed.digits:
        assert torch.equal(unpack_vectors(packed), x)


@pytest.mark.parametrize("alternating", [True, False])
@pytest.mark.parametrize(("width", "expert_width"), [(64, 96), (352, 160)])
def test_experts(device, width, expert_width, alternating):
    experts, top_k = 6, 3
    activation = Swiglu(7.0, 1.702, 1.0, alternating=True) if alternating else Swiglu()
    ids = torch.tensor([4, 0, 5], dtype=torch.int32, device=device)
    mixing = torch.rand(top_k, device=device)
    packed = packed_vectors(MXFP4, 1, width, device)
    store_vector(packed, 0, torch.randn(width, device=device))
    gate_up = random_mxfp4(experts, 2 * expert_width, width, device)
    gate_up_bias = torch.randn(experts, 2 * expert_width, device=device) if alternating else None
    down = random_mxfp4(experts, width, expert_width, device)
    down_bias = torch.randn(experts, width, device=device) if alternating else None
    hidden, expected = (packed_vectors(MXFP4, top_k, expert_width, device) for _ in range(2))
    for module, out in ((moe_gemv, hidden), (moe_twin, expected)):
        module.moe_gate_up(packed, gate_up, gate_up_bias, ids, out, activation)
    assert_close(unpack_vectors(hidden), unpack_vectors(expected), "moe_gemv_mxfp4")
    residual = torch.randn(width, device=device)
    twin_residual = residual.clone()
    moe_gemv.moe_down(hidden, down, down_bias, ids, mixing, residual)
    moe_twin.moe_down(hidden, down, down_bias, ids, mixing, twin_residual)
    assert_close(residual, twin_residual, "moe_gemv_mxfp4")
    with pytest.raises(AssertionError, match="relative RMS"):
        assert_close(residual * 1.01, twin_residual, "moe_gemv_mxfp4")


def test_every_code_and_scale_of_the_experts(device):
    """One code and one scale at a time, exact: all others are zero."""
    ids = torch.zeros(1, dtype=torch.int32, device=device)
    weights = torch.ones(1, device=device)
    hidden = torch.zeros(32, device=device)
    hidden[13] = 1.0
    packed = packed_vectors(MXFP4, 1, 32, device)
    store_vector(packed, 0, hidden)
    values = torch.zeros(1, 16, 16, dtype=torch.uint8, device=device)
    values[0, :, 6] = torch.arange(16, device=device).to(torch.uint8) << 4
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]
    for byte in (1, 64, 127, 200, 250):
        scales = torch.full((1, 16, 1), byte, dtype=torch.uint8, device=device)
        down = QuantTensor(values, scales, MXFP4, (1, 16, 32))
        out = torch.zeros(16, device=device)
        moe_gemv.moe_down(packed, down, None, ids, weights, out)
        expected = torch.tensor(table) * 2.0 ** (byte - 127)
        fits = (expected.abs() >= 2.0**-126) | (expected == 0)
        assert torch.equal(out.cpu()[fits], expected[fits]), byte


@pytest.mark.parametrize(
    ("position", "window", "slots"),
    [(0, 0, 8), (5, 8, 16), (299, 0, 300), (250, 100, 300), (700, 128, 300), (64, 1, 100)],
)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 16), (6, 3, 32), (20, 1, 16)])
def test_attention(device, position, window, slots, heads, kv_heads, width):
    # fp32 caches in the interpreter, which gets bf16 arithmetic wrong; bf16 on a GPU.
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    qkv = torch.randn((heads + 2 * kv_heads) * width, device=device) * 2
    angles = torch.rand(position + 1, width // 2, device=device) * 6
    rope = (angles.cos(), angles.sin())
    k_cache = torch.randn(kv_heads, slots, width, device=device).to(dtype)
    v_cache = torch.randn(kv_heads, slots, width, device=device).to(dtype)
    k_cache[:, position % slots] = NAN  # written by the kernel before anything reads it
    v_cache[:, position % slots] = NAN
    sinks = torch.randn(heads, device=device) * 3
    group = sink_attention_decode.head_group(heads, kv_heads)
    shape = (kv_heads, sink_attention_decode.SPLITS, group)
    scratch = {
        "acc": torch.full((*shape, width), NAN, device=device),
        "stats": torch.full((*shape, 2), NAN, device=device),
    }
    where = torch.tensor([position], dtype=torch.int32, device=device)
    results = []
    for module in (attention_twin, sink_attention_decode):
        out = torch.full((heads, width), NAN, device=device)
        caches = k_cache.clone(), v_cache.clone()
        module.sink_attention_decode(
            qkv, rope, *caches, sinks, where, out, window=window, **scratch
        )
        results.append((out, *caches))
    expected, actual = results
    assert_close(
        actual[0], expected[0], "attention" if dtype == torch.float32 else "attention_bf16"
    )
    for cached, wanted in zip(actual[1:], expected[1:], strict=True):
        assert_close(cached, wanted, "gemv" if dtype == torch.float32 else "bf16")
