"""Opening a model again on a GPU: with another length of the cache, nothing new is compiled."""

import pytest
import torch
import triton

from moe_runtime import MoeModel
from moe_runtime.start_times import PARTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_another_context_compiles_nothing(monkeypatch):
    # At least a window and a chunk of prefill: the rings of shorter caches are as short as they.
    with MoeModel.from_pretrained("demo", device="cuda", max_context=3000) as model:
        parts = model.start_times
        assert parts.keys() == {*PARTS}
    missing = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_cache_hook", lambda **found: missing.append(found["repr"])
    )
    with MoeModel.from_pretrained("demo", device="cuda", max_context=4000) as model:
        model.generate([5] * 100, max_new_tokens=3, temperature=0.0, ignore_eos=True)
    assert missing == []
