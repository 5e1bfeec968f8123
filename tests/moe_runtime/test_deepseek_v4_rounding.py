"""The vendor's rounding of DeepSeek V4's activations: what is rounded, and to which numbers.

Held against the vendor's own inference code by hand once, with its kernels written to round: equal
to 2e-7 until the first number that falls on the other side of a rounding step.
"""

import pytest
import torch

from loaders.checkpoint import open_folder
from moe_runtime.backends import create_backend
from moe_runtime.layers.activation_rounding import rounded_to_e2m1, rounded_to_e4m3
from moe_runtime.models.registry import plan_model
from tests.oracles.tiny_deepseek_v4 import sizes_with, write_tiny_deepseek_v4

IDS = torch.randint(0, 256, (70,), generator=torch.Generator().manual_seed(2))
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
SIZES = sizes_with(ratios=(0, 4, 16), hash_layers=1, width=88, rotary=16)


def make_model(folder, activations):
    checkpoint = open_folder(folder)
    made = create_backend(
        checkpoint, plan_model(checkpoint), device="cpu", activations=activations, progress=False
    )
    return made.model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("v4")
    write_tiny_deepseek_v4(folder, SIZES)
    return folder


def test_e2m1_by_hand():
    x = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([[1.0], [1e-3], [1e4], [0.0], [6.0]])
    rounded = rounded_to_e2m1(x)
    for row, found in zip(x, rounded, strict=True):
        for group, out in zip(row.split(32), found.split(32), strict=True):
            scale = 2.0 ** torch.ceil(torch.log2(group.abs().max().clamp(min=1e-30) / 6))
            nearest = E2M1[(group.abs()[:, None] / scale - E2M1).abs().argmin(-1)]
            torch.testing.assert_close(out, nearest * scale * group.sign(), rtol=0, atol=1e-30)


def test_e4m3_in_blocks_of_64():
    x = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    halves = [rounded_to_e4m3(part, powers_of_two=True) for part in x.split(64, dim=-1)]
    assert torch.equal(rounded_to_e4m3(x, powers_of_two=True, block=64), torch.cat(halves, -1))


def test_inputs_of_what_is_in_fp8_and_fp4(folder, monkeypatch):
    model = make_model(folder, "vendor")
    seen, plain = set(), type(model)._input_of

    def spy(self, x, name):
        out = plain(self, x, name)
        if not torch.equal(out, x):
            seen.add(name)
        return out

    monkeypatch.setattr(type(model), "_input_of", spy)
    model.forward(IDS)
    assert seen == {name for name in model.rounded if not name.endswith("out_a")}
    assert {name.split(".", 2)[2] for name in seen} == {
        *(f"attention.{part}" for part in ("query_a", "query_b", "row", "out_b")),
        *("attention.indexer.query_b", "moe.gate_up", "moe.down"),
        *("moe.shared_gate", "moe.shared_up", "moe.shared_down"),
    }


def test_cached_rows(folder):
    """Window and compressed rows are in E4M3 but for their rotary part, the index in E2M1."""
    for activations, is_rounded in (("vendor", True), ("exact", False)):
        model = make_model(folder, activations)
        model.forward(IDS[:50])
        for token in IDS[50:]:
            model.forward(token[None])
        cache = model.caches[1]
        for rows in (cache.window_SC, cache.compressor.rows, model.caches[2].compressor.rows):
            still, turned = rows[:, :-16], rows[:, -16:]
            again = rounded_to_e4m3(still, powers_of_two=True, block=64)
            assert torch.equal(again, still) == is_rounded
            assert not torch.equal(rounded_to_e4m3(turned, powers_of_two=True, block=64), turned)
        rows = cache.indexer.rows
        assert len(rows) == 70 // 4
        assert torch.equal(rounded_to_e2m1(rows), rows) == is_rounded


def test_logits_move_by_percents(folder):
    exact, vendor = (
        model.head(model.forward(IDS))
        for model in (make_model(folder, "exact"), make_model(folder, "vendor"))
    )
    assert 2e-2 < float((vendor - exact).norm() / exact.norm()) < 1.0
