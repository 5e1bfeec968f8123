"""The persistent step on a Hopper GPU at the published widths, two layers, against its twins."""

import subprocess
import sys

import pytest
import torch

from kernels.persistent.formats import EXPERT_TILES
from kernels.persistent.sizes import PHASES, StepSizes
from kernels.sampling import make_state, sample
from quant.formats import FORMATS
from tests.oracles.step_model import expected_logits, step_model
from tests.tolerances import assert_close

hopper = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = pytest.mark.skipif(not hopper, reason="needs a Hopper GPU")

EXPERTS = {"gpt-oss-20b": 32, "gpt-oss-120b": 128}
CONTEXT = 16384


def sizes(experts: int, fp8: bool, experts_in: str = "mxfp4") -> StepSizes:
    found = StepSizes(
        layers=2, width=2880, heads=64, kv_heads=8, head_width=64, experts=experts, top_k=4,
        hidden=2880, vocabulary=201088, window=128, eps=1e-5, limit=7.0, alpha=1.702, fp8=fp8,
        programs=torch.cuda.get_device_properties(0).multi_processor_count,
        tiles=EXPERT_TILES[experts_in],
    )  # fmt: skip
    return found.with_rings(227 << 10)


class Step:
    """A model's kernel, ready to launch."""

    def __init__(self, model) -> None:
        from kernels.persistent import launch

        self.model, self._launch = model, launch
        self.state = make_state(model.sizes.vocabulary, 64, torch.device("cuda"))
        self.logits = torch.zeros(model.sizes.vocabulary, device="cuda")
        self._cache = model.cache.clone()
        self._tensors = launch.arguments(
            model.weights, model.buffers, self.state, model.rope, self._cache, model.table,
            self.logits,
        )  # fmt: skip
        self._descriptors = launch.descriptors(model.sizes, model.weights)

    def launch(self, *, draws: bool = False) -> None:
        self._launch.launch(self.model.sizes, self._tensors, self._descriptors, draws=draws)

    def at(self, position: int) -> torch.Tensor:
        self._cache.copy_(self.model.cache)  # without the rows that other positions wrote
        self.state.token.fill_(17)
        self.state.position.fill_(position)
        self.logits.fill_(float("nan"))
        self.launch()
        torch.cuda.synchronize()
        return self.logits.clone()


@pytest.fixture(scope="module", params=[("gpt-oss-20b", True), ("gpt-oss-120b", False)], ids=str)
def step(request):
    name, fp8 = request.param
    return Step(step_model(sizes(EXPERTS[name], fp8), fp8=fp8, device="cuda", context=CONTEXT))


@pytest.mark.parametrize("position", [0, 5, 127, 128, 300, 8191, 16000])
def test_it_is_its_twins(step, position):
    assert_close(step.at(position), expected_logits(step.model, position), "decode_step")


# Of formats whose tiles are alike one; all of them are held to twins on a CPU.
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("experts_in", ["nvfp4", "mxfp8", "fp8_block128"])
def test_every_format_of_experts(experts_in, fp8):
    """Twice the same bits, and those of the twins within the tolerance."""
    made = sizes(8, fp8, experts_in)
    step = Step(
        step_model(made, fp8=fp8, device="cuda", context=512, experts_in=FORMATS[experts_in])
    )
    for position in (5, 300):
        logits = step.at(position)
        assert_close(logits, expected_logits(step.model, position), "decode_step")
        assert torch.equal(step.at(position), logits)


def test_thousands_of_steps_have_the_same_bits(step):
    first = step.at(300)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            step.launch()
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        graph.replay()
        differing += (step.logits != first).any()
    assert differing.item() == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_it_draws_as_the_sampling_kernels_do(step, temperature):
    state = step.state
    state.settings.copy_(torch.tensor([temperature, 1.2, 0, 1, 0]))
    state.seed.fill_(7)
    state.step.zero_()
    step.at(300)
    other = make_state(step.model.sizes.vocabulary, 64, torch.device("cuda"))
    for i in range(20):
        for field in ("settings", "seed", "step", "position", "token", "seen"):
            getattr(other, field).copy_(getattr(state, field))
        step.launch(draws=True)
        sample(step.logits, other, filtered=False)
        for field in ("step", "position", "token", "seen"):
            assert torch.equal(getattr(state, field), getattr(other, field)), (i, field)
        assert float(state.logprobs[i]) == pytest.approx(float(other.logprobs[i]), abs=1e-4)


def test_the_traced_build_is_the_same_and_has_every_phase(step):
    from kernels.launch_trace import trace_launches

    expected = step.at(300)
    with trace_launches() as launches:
        assert torch.equal(step.at(300), expected)
    (launch,) = launches
    layers = step.model.sizes.layers
    assert launch.parts == PHASES * layers + ("head",)
    stamps = launch.stamps.cpu()
    did = stamps[..., 2] > 0
    assert did.any(0).all() and did[:, -1].all()
    begun, ready, ended = stamps[did].unbind(1)
    assert (begun <= ready).all() and (ready <= ended).all()


_HANG = """
import torch
from tests.gpu.test_persistent_step import Step, sizes
from tests.oracles.step_model import step_model
from kernels.persistent.launch import launch, phase_stamps, phases
from kernels.persistent.watch import where_programs_stand
step = Step(step_model(sizes(32, True), fp8=True, device="cuda", context=512))
step.at(5)
step.model.buffers.sums[step.model.buffers.sums.numel() // 2 + 70] += 1  # one contribution too many
stamps = phase_stamps(step.model.sizes)
try:
    launch(step.model.sizes, step._tensors, step._descriptors, stamps, draws=True)
    torch.cuda.synchronize()
except RuntimeError:
    print(where_programs_stand(stamps, phases(step.model.sizes)))
"""


def test_a_hang_ends_and_the_phase_is_named():
    done = subprocess.run(
        [sys.executable, "-c", _HANG], capture_output=True, text=True, timeout=300
    )
    assert "wait for what qkv of layer 0 reads" in done.stdout, done.stderr[-2000:]
