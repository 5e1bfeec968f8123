"""Attention and head packed to FP8, on a GPU: kernels and models against twin and reference."""

import pytest
import torch
import triton

from kernels import gemv
from kernels.reference import gemv as gemv_twin
from moe_runtime import MoeModel
from moe_runtime.dense_format import knows_fp8
from quant.codecs import encode
from quant.formats import FP8_ROW
from quant.tensor import QuantTensor
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss
from tests.tolerances import assert_close

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and knows_fp8(torch.device("cuda"))),
    reason="needs a CUDA GPU of compute capability 8.9 or more",
)


@pytest.mark.parametrize(("rows", "columns"), [(5120, 2880), (2880, 4096), (201088, 2880)])
def test_gemv_at_full_width(rows, columns):
    torch.manual_seed(0)
    weight = encode(torch.randn(rows, columns, device="cuda") * 0.02, FP8_ROW)
    x, norm = torch.randn(columns, device="cuda") * 3, torch.rand(columns, device="cuda") + 0.5
    bias = torch.randn(rows, device="cuda")
    options = {"norm": norm, "bias": bias, "eps": 1e-5}
    actual = gemv.gemv(x, weight, torch.empty(rows, device="cuda"), **options)
    expected = gemv_twin.gemv(x, weight, torch.empty(rows, device="cuda"), **options)
    assert_close(actual, expected, "gemv")


def check(folder, ids, tolerance, monkeypatch):
    """Prefill and decode against the reference; nothing compiles; the plan's bytes are held."""
    with MoeModel.from_pretrained(folder, device="cpu", dense_format="fp8") as reference:
        before = torch.cuda.memory_allocated()
        with MoeModel.from_pretrained(folder, device="cuda", dense_format="fp8") as model:
            assert torch.cuda.memory_allocated() - before <= model.plan.total_bytes
            compiled = []
            monkeypatch.setattr(
                triton.knobs.runtime,
                "jit_cache_hook",
                lambda **found: compiled.append(found["repr"]),
            )
            assert_close(model.logits(ids), reference.logits(ids), tolerance)
            out = model.generate(
                ids, max_new_tokens=60, temperature=0.0, ignore_eos=True, logprobs=1
            )
            assert compiled == []
            weights = model._backend._step.weights
            packed = [weights.head, *(w for x in weights.layers for w in (x.qkv, x.out))]
            assert all(isinstance(weight, QuantTensor) for weight in packed)
        logits = reference.logits(ids + out.token_ids)[len(ids) - 1 : -1]
    wanted = logits.log_softmax(-1).gather(-1, torch.tensor(out.token_ids)[:, None])[:, 0]
    actual = torch.tensor([entry.logprob for entry in out.logprobs])
    assert_close(actual.exp(), wanted.exp(), tolerance)


def test_demo(monkeypatch):
    ids = torch.randint(0, 1000, (300,), generator=torch.Generator().manual_seed(0)).tolist()
    check("demo", ids, "model_bf16", monkeypatch)


def test_random_tiny_model(tmp_path, monkeypatch):
    write_tiny_gpt_oss(tmp_path, d=96, f=160, heads=8, kv=2, hd=64, window=16)
    ids = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    check(tmp_path, ids, "model_bf16_random", monkeypatch)
