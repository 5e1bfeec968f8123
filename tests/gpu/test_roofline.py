"""The traced step on a GPU: its parts are its time, its bytes the plan's, tokens stay the same."""

import xml.etree.ElementTree as ET

import pytest
import torch

from moe_runtime import MoeModel
from moe_runtime.roofline import COMPONENTS, SOMETIMES, measure_roofline
from moe_runtime.timeline import timeline_svg

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def test_the_demo():
    with MoeModel.from_pretrained("demo", device="cuda", max_context=512) as model:
        prompt = {"prompt": list(range(100, 200)), "max_new_tokens": 20, "temperature": 0.0}
        before = model.generate(**prompt).token_ids
        found, trace = measure_roofline(model, 120, read_gbps=3000.0)
        rows = {row.component: row for row in found.components}
        assert set(rows) == set(COMPONENTS) - set(SOMETIMES)
        assert sum(row.us for row in rows.values()) == pytest.approx(found.step_us)
        assert found.read_bytes == sum(model.plan.decode_bytes(120).values())
        for name in ("qkv", "output projection", "router", "experts gate_up", "experts down"):
            assert rows[name].launches == model.config.num_layers
            assert rows[name].us > 0
        assert rows["head"].launches == 1
        # stamps cost something, not everything
        assert 0.5 * found.plain_step_us < found.step_us < 3 * found.plain_step_us
        ET.fromstring(timeline_svg(trace, "demo"))
        assert model.generate(**prompt).token_ids == before
