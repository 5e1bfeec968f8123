"""NVFP4: the golden file, every code under every block scale, a shared tensor scale."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch

from quant import e2m1, nvfp4
from quant.formats import NVFP4
from quant.tensor import QuantTensor

GOLDEN = np.load(Path(__file__).parents[1] / "vectors" / "golden_fp4_fp8.npz")


def test_encode_equals_the_golden_file():
    encoded = nvfp4.encode(torch.from_numpy(GOLDEN["nvfp4_x"]))
    agreed = GOLDEN["nvfp4_agree"]
    assert agreed.sum() == 1441
    assert float(encoded.tensor_scale) == GOLDEN["nvfp4_global"]
    scales = encoded.scales.view(torch.uint8).numpy()
    assert np.array_equal(scales[agreed], GOLDEN["nvfp4_scale"][agreed])
    blocks = encoded.values.numpy().reshape(*agreed.shape, 8)
    assert np.array_equal(blocks[agreed], GOLDEN["nvfp4_packed"].reshape(blocks.shape)[agreed])


def test_every_code_under_every_block_scale():
    scale_bytes = torch.arange(127, dtype=torch.uint8)[:, None]
    codes = torch.arange(16, dtype=torch.uint8)
    values = e2m1.pack(codes)[None].expand(127, 8)
    stored = QuantTensor(
        values, scale_bytes.view(torch.float8_e4m3fn), NVFP4, (127, 16), torch.tensor(0.25)
    )
    table = np.array(e2m1.E2M1_VALUES + tuple(-v for v in e2m1.E2M1_VALUES))
    scales = scale_bytes.numpy().view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    assert np.array_equal(nvfp4.decode(stored).numpy(), table[None] * scales * 0.25)


def test_gate_and_up_share_one_tensor_scale():
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, 8, 32, generator=generator)
    shared = nvfp4.tensor_scale_for(gate, 3 * up)
    assert shared == max(gate.abs().max(), (3 * up).abs().max()) / (448 * 6)
    encoded = nvfp4.encode(gate, shared)
    assert encoded.tensor_scale is shared
    error = nvfp4.decode(encoded) - gate
    assert 10 * torch.log10(gate.square().mean() / error.square().mean()) > 18


def test_zero_tensors_and_blocks_have_scales():
    weight = torch.zeros(2, 32)
    assert nvfp4.decode(nvfp4.encode(weight)).abs().max() == 0
    weight[0, 0] = 5.0
    encoded = nvfp4.encode(weight)
    assert (encoded.scales.float() > 0).all()
    assert nvfp4.decode(encoded)[0, 0] == pytest.approx(5.0, rel=1e-6)


def test_refusals():
    with pytest.raises(ValueError, match="NVFP4 needs columns in multiples of 16, got 8"):
        nvfp4.encode(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="NaN or infinity as NVFP4"):
        nvfp4.encode(torch.full((1, 16), float("nan")))
