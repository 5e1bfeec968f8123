"""Weights read through pinned buffers into GPU memory equal those mapped on the CPU."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from loaders.checkpoint import open_folder
from loaders.errors import CheckpointError
from loaders.staging import Span, copy_spans
from loaders.weights import load_weights
from moe_runtime.models.registry import plan_model
from quant.tensor import QuantTensor
from tests.oracles.tiny_gpt_oss import write_tiny_gpt_oss

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def load(folder, device):
    checkpoint = open_folder(folder)
    model = plan_model(checkpoint)
    return load_weights(
        checkpoint, model.table, model.config.dims, model.config.num_layers,
        device=device, progress=False,
    )  # fmt: skip


@pytest.mark.parametrize("layout", ["huggingface", "original"])
def test_the_gpu_holds_what_the_cpu_maps(tmp_path, layout):
    write_tiny_gpt_oss(tmp_path, layout=layout, vocab=5000)
    mapped, on_gpu = load(tmp_path, "cpu"), load(tmp_path, "cuda")
    assert mapped.keys() == on_gpu.keys()
    for name, expected in mapped.items():
        found = on_gpu[name]
        if isinstance(expected, QuantTensor):
            assert torch.equal(found.values.cpu(), expected.values), name
            assert torch.equal(found.scales.cpu(), expected.scales), name
        else:
            assert found.is_cuda and torch.equal(found.cpu(), expected), name


def test_many_pieces_through_few_buffers(tmp_path):
    """Every buffer is used again many times while copies from it are still under way."""
    data = torch.randint(0, 256, (64 << 20,), dtype=torch.uint8)
    path = tmp_path / "data"
    with path.open("wb") as file:
        file.write(memoryview(data.numpy()))
    target = torch.zeros_like(data, device="cuda")
    copy_spans(
        [Span(path, 0, target)], device=target.device, on_bytes=lambda count: None,
        buffer_bytes=(1 << 18) - 3,
    )  # fmt: skip
    assert torch.equal(target.cpu(), data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.experts.down_proj_scales", 255),
        ("model.layers.2.self_attn.v_proj.bias", float("nan")),
    ],
)
def test_bad_values_are_found_on_the_gpu(tmp_path, name, value):
    write_tiny_gpt_oss(tmp_path, shards=1)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name}: found"):
        load(tmp_path, "cuda")
