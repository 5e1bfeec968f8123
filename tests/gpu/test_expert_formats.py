"""Experts in every format on a GPU: kernels at full width against twins, models against reference.

Emulated PTX and the interpreter cover the arithmetic elsewhere; here is the compiled code.
"""

import pytest
import torch
import triton

from kernels import moe_gemm, moe_gemv
from kernels.compile_ahead import compile_ahead
from kernels.moe_routing import route_tokens
from kernels.packed_vector import activation_scale, packed_vectors, store_vector, unpack_vectors
from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.pack import TiledExperts, pack_experts
from kernels.reference import moe_gemm as gemm_twin
from kernels.reference import moe_gemv as gemv_twin
from kernels.swiglu import Swiglu
from kernels.tile_gemm import launch as tile_gemm
from kernels.tile_gemm.launch import x_order
from moe_runtime import MoeModel
from quant.codecs import CODECS
from quant.formats import FORMATS
from tests.oracles.expert_formats import write_with_experts
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

EXPERTS, TOP_K, WIDTH = 6, 4, 2880  # the width of gpt-oss, model and experts
ACTIVATION = Swiglu(7.0, 1.702, offset=1.0, alternating=True)


@pytest.fixture(scope="module", params=FORMATS)
def layer(request):
    """gate_up, its bias, down, its bias; rows and columns differ in size from block to block."""
    torch.manual_seed(0)

    def experts(rows):
        weight = torch.randn(EXPERTS, rows, WIDTH, device="cuda") * 0.02
        weight *= torch.exp2(torch.randint(-1, 2, (EXPERTS, rows, 1), device="cuda").float())
        weight *= torch.exp2(torch.arange(WIDTH, device="cuda") // 16 % 3).float()
        return CODECS[request.param].encode(weight)

    biases = (torch.randn(EXPERTS, rows, device="cuda").bfloat16() for rows in (2 * WIDTH, WIDTH))
    made = experts(2 * WIDTH), next(biases), experts(WIDTH), next(biases)
    with compile_ahead():  # on all processors, not one kernel after the other
        ids, mixing, hidden = one_token(made, moe_gemv)
        residual = torch.zeros(WIDTH, device="cuda")
        moe_gemv.moe_down(hidden, made[2], made[3], ids, mixing, residual)
        for block_rows in moe_gemm.TILES:
            x, routing = many_tokens(block_rows)
            hidden = moe_gemm.moe_gemm_gate_up(x, made[0], made[1], routing, ACTIVATION)
            moe_gemm.moe_gemm_down(hidden, made[2], made[3], routing)
    return made


def one_token(layer, module):
    """A token's choices, their weights, and the hidden vectors that a module makes."""
    gate_up, gate_up_bias, down, _ = layer
    torch.manual_seed(1)
    ids = torch.tensor([5, 1, 0, 3], dtype=torch.int32, device="cuda")
    mixing = torch.rand(TOP_K, device="cuda")
    packed = packed_vectors(gate_up.format, 1, WIDTH, ids.device)
    store_vector(packed, 0, torch.randn(WIDTH, device="cuda"), 2.0**-12)
    unscale = 1 / activation_scale(ACTIVATION.limit)
    hidden = packed_vectors(down.format, TOP_K, WIDTH, ids.device, unscale)
    module.moe_gate_up(packed, gate_up, gate_up_bias, ids, hidden, ACTIVATION)
    return ids, mixing, hidden


def many_tokens(block_rows, tokens=150):
    torch.manual_seed(2)
    x = torch.randn(tokens, WIDTH, device="cuda").bfloat16()
    return x, route_tokens(torch.randn(tokens, EXPERTS, device="cuda"), TOP_K, block_rows)


def test_one_token_at_full_width(layer):
    _, _, down, down_bias = layer
    ids, mixing, hidden = one_token(layer, moe_gemv)
    _, _, expected = one_token(layer, gemv_twin)
    assert_close(unpack_vectors(hidden), unpack_vectors(expected), "moe_gemv_mxfp4")
    residual = torch.randn(WIDTH, device="cuda")
    twin_residual = residual.clone()
    moe_gemv.moe_down(expected, down, down_bias, ids, mixing, residual)
    gemv_twin.moe_down(expected, down, down_bias, ids, mixing, twin_residual)
    assert_close(residual, twin_residual, "moe_gemv_mxfp4")


@pytest.mark.parametrize("block_rows", list(moe_gemm.TILES))
def test_many_tokens_at_full_width(layer, block_rows):
    gate_up, gate_up_bias, down, down_bias = layer
    x, routing = many_tokens(block_rows)
    hidden = moe_gemm.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    expected = gemm_twin.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
    assert_close(hidden, expected, "moe_gemm_mxfp4_bf16")
    outputs = moe_gemm.moe_gemm_down(expected, down, down_bias, routing)
    expected = gemm_twin.moe_gemm_down(expected, down, down_bias, routing)
    assert_close(outputs, expected, "moe_gemm_mxfp4_bf16")


@pytest.mark.parametrize("tokens", [40, 150])
def test_many_tokens_through_tiles(layer, tokens):
    """Of the persistent step, in blocks of 64 and of 128 pairs, some at most half full."""
    gate_up, gate_up_bias, down, down_bias = layer
    if gate_up.format.name not in EXPERT_TILES:
        pytest.skip("has no tiles")
    packed = pack_experts(gate_up, gate_up_bias), pack_experts(down, down_bias)
    tiles = torch.cat(packed, 1)
    tiled_up = TiledExperts(tiles, 0, gate_up.shape, gate_up.format)
    tiled_down = TiledExperts(tiles, packed[0].shape[1], down.shape, down.format)
    bits = tiled_up.facts.bits
    back = x_order(WIDTH, bits).argsort().to(tiles.device)
    for block_rows in (64, 128) if bits == 4 else (64,):
        x, routing = many_tokens(block_rows, tokens)
        hidden = tile_gemm.moe_gemm_gate_up(x, tiled_up, gate_up_bias, routing, ACTIVATION)
        outputs = tile_gemm.moe_gemm_down(hidden, tiled_down, down_bias, routing)
        rows = routing.block_rows.flatten()
        working = rows < len(outputs)
        activations = torch.empty_like(hidden[: len(outputs)])
        activations[rows[working].long()] = hidden[working][:, back]
        expected = gemm_twin.moe_gemm_gate_up(x, gate_up, gate_up_bias, routing, ACTIVATION)
        assert_close(activations, expected, "moe_gemm_mxfp4_bf16")
        expected = gemm_twin.moe_gemm_down(activations, down, down_bias, routing)
        assert_close(outputs, expected, "moe_gemm_mxfp4_bf16")


@pytest.mark.parametrize("format", FORMATS)
def test_tiny_models(tmp_path, monkeypatch, format):
    # As many experts as a token has: no bf16 rounding sends a token to others.
    shape = {"d": 160, "f": 96, "heads": 8, "kv": 2, "hd": 64, "window": 16, "experts": 4}
    write_with_experts(tmp_path, format, **shape)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    with (
        MoeModel.from_pretrained(tmp_path, device="cpu", backend="reference") as reference,
        MoeModel.from_pretrained(tmp_path, device="cuda", backend="triton") as model,
    ):
        compiled = []
        monkeypatch.setattr(
            triton.knobs.runtime, "jit_cache_hook", lambda **found: compiled.append(found["repr"])
        )
        expected = reference.logits(ids)
        assert_close(model.logits(ids), expected, "model_bf16_random")
        out = model.generate(ids, max_new_tokens=12, temperature=0.0, ignore_eos=True, logprobs=1)
        assert compiled == []
        logits = reference.logits(ids + out.token_ids)[len(ids) - 1 : -1]
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(out.token_ids)[:, None])[:, 0]
        actual = torch.tensor([entry.logprob for entry in out.logprobs])
        assert_close(actual.exp(), wanted.exp(), "model_bf16_random")
