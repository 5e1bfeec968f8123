"""The vendor's rounding of activations: against transformers whose linear layers round the same.

Two runs that round nearly equal numbers part at some of them, and such a token can change an
expert: so rows are compared by their median, and against what rounding moves at all.
"""

import pytest
import torch
from transformers import AutoModelForCausalLM

from loaders.checkpoint import open_folder
from moe_runtime import MoeModel
from moe_runtime.backends import create_backend
from moe_runtime.layers.activation_rounding import hadamard, rounded_to_e4m3
from moe_runtime.models.registry import plan_model
from tests.oracles.tiny_deepseek import Sizes, write_tiny_deepseek
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

IDS = torch.randint(0, 256, (60,), generator=torch.Generator().manual_seed(2)).tolist()
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
E4M3 = E4M3[E4M3.isfinite()]


def by_hand(row, powers_of_two):
    """One row, block by block, each number to the nearest of all E4M3 values."""
    out = []
    for block in row.split(128):
        scale = block.abs().max() / 448
        if powers_of_two:
            scale = 2.0 ** torch.ceil(torch.log2(scale))
        nearest = (block[:, None] / scale - E4M3).abs().argmin(-1)
        out.append(E4M3[nearest] * scale)
    return torch.cat(out)


@pytest.mark.parametrize("powers_of_two", [False, True])
def test_rounding_by_hand(powers_of_two):
    x = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [1e-3], [1e4]]
    )
    expected = torch.stack([by_hand(row, powers_of_two) for row in x])
    rounded = rounded_to_e4m3(x, powers_of_two=powers_of_two)
    torch.testing.assert_close(rounded, expected, rtol=1e-6, atol=0)
    assert not torch.equal(rounded, x)


def test_a_row_of_zeros_stays():
    assert torch.equal(
        rounded_to_e4m3(torch.zeros(2, 130), powers_of_two=True), torch.zeros(2, 130)
    )


def test_hadamard_is_orthogonal():
    matrix = hadamard(8, torch.device("cpu"))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(8))
    assert matrix.abs().unique().numel() == 1
    with pytest.raises(ValueError, match="a power of two, got 12"):
        hadamard(12, torch.device("cpu"))


def their_rounded_logits(folder, monkeypatch, powers_of_two):
    """transformers on the decoded twin, rounding before every weight that the file has in FP8."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    parameters = dict(model.named_parameters())
    not_rounded = ("lm_head", "mlp.gate.", "kv_b_proj", "embed")
    begins = [
        (p.data_ptr(), p.data_ptr() + 4 * p.numel())
        for name, p in parameters.items()
        if p.dim() > 1 and not any(part in name for part in not_rounded)
    ]
    plain = torch.nn.functional.linear

    def rounding(x, weight, bias=None):
        inside = any(begin <= weight.data_ptr() < end for begin, end in begins)
        if inside:
            rows = [by_hand(row, powers_of_two) for row in x.flatten(0, -2)]
            x = torch.stack(rows).view(x.shape)
        return plain(x, weight, bias)

    with torch.no_grad():
        exact = model(torch.tensor([IDS])).logits[0]
        monkeypatch.setattr(torch.nn.functional, "linear", rounding)
        return exact, model(torch.tensor([IDS])).logits[0]


def our_logits(folder, activations):
    checkpoint = open_folder(folder)
    made = create_backend(
        checkpoint, plan_model(checkpoint), device="cpu", activations=activations, progress=False
    )
    return made.logits(IDS)


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
def test_rounded_as_transformers_would(tmp_path, monkeypatch, scale_fmt):
    sizes = Sizes(layers=2, experts=4, groups=2, limited_groups=1, experts_per_token=2, f=96)
    format = "fp8_e8m0" if scale_fmt else "fp8"
    write_tiny_deepseek(tmp_path / "ours", sizes, format=format, twin=tmp_path / "theirs")
    exact, theirs = their_rounded_logits(tmp_path / "theirs", monkeypatch, scale_fmt == "ue8m0")
    monkeypatch.undo()
    ours = our_logits(tmp_path / "ours", "vendor")

    def median_error(a, b):
        return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())

    assert median_error(theirs, exact) > 2e-2
    assert median_error(ours, theirs) < 1e-3


def test_the_indexer_is_rounded_too(tmp_path):
    write_tiny_deepseek(tmp_path, Sizes("deepseek_v32", index_topk=20))
    exact, rounded = our_logits(tmp_path, "exact"), our_logits(tmp_path, "vendor")
    assert 1e-2 < float((exact - rounded).norm() / exact.norm()) < 1.0


def test_nothing_is_rounded_before_bf16(tmp_path):
    write_tiny_deepseek(tmp_path, format="bf16")
    assert torch.equal(our_logits(tmp_path, "exact"), our_logits(tmp_path, "vendor"))


def test_what_is_not_there_is_refused(tmp_path):
    write_tiny_gpt_oss(tmp_path, layers=1)
    for activations, message in (
        ("vendor", "activations='vendor' is not there for gpt_oss in the reference backend"),
        ("fp8", "activations must be exact or vendor, got 'fp8'"),
    ):
        with pytest.raises(ValueError, match=message):
            MoeModel.from_pretrained(
                tmp_path, device="cpu", activations=activations, progress=False
            )
