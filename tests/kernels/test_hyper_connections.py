"""Hyper-connections of one token and of many against their twins and the model's own layer."""

from contextlib import nullcontext

import pytest
import torch

from kernels import hyper_connections as kernel
from kernels.reference import hyper_connections as twin
from moe_runtime.layers.hyper_connections import HyperWeights, merge_streams, mixing
from tests.tolerances import assert_close

CONSTANTS = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


def random(seed, *shapes):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def weights(streams, width, rows):
    function, base, scale = random(rows, (rows, streams * width), (rows,), (3,))
    return function * (streams * width) ** -0.5, base, 1 + 0.3 * scale[: 3 if rows > streams else 1]


def rows_of(streams, last):
    return streams if last else streams * (2 + streams)


@pytest.mark.parametrize(
    ("streams", "width", "first", "last"),
    [(4, 72, True, False), (4, 72, False, False), (4, 40, False, True), (3, 33, False, False)],
)
def test_one_token(streams, width, first, last):
    rows = rows_of(streams, last)
    x, result, mix = random(1, (streams, width), (width,), (streams * (1 + streams),))
    if first:  # what a request before has left, and weights that overflowed in it
        x[:], mix[:] = float("nan"), float("inf")
    found = []
    for module in (kernel, twin):
        state = [t.clone() for t in (x, result, mix)]
        partial = torch.full((kernel.num_programs(width), rows + 1), float("nan"))
        ticket, out = torch.zeros(1, dtype=torch.int32), torch.full((width,), float("nan"))
        module.hyper_step(
            *state, *weights(streams, width, rows), out, first=first, partial=partial,
            ticket=ticket, **CONSTANTS,
        )  # fmt: skip
        assert int(ticket) == 0 and not state[1].any()
        found.append((out, state[0], state[2]) if not last else (out, state[0]))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")


@pytest.mark.parametrize(("streams", "width", "last"), [(4, 72, False), (4, 40, True)])
def test_many_tokens(streams, width, last):
    rows = rows_of(streams, last)
    x, result, mix = random(2, (3, streams, width), (3, width), (3, streams * (1 + streams)))
    function, base, scale = weights(streams, width, rows)
    found = []
    for module in (kernel, twin):
        after, new = module.hyper_write(x.clone(), result, mix), mix.clone()
        z = after.flatten(1) @ function.T
        out = module.hyper_read(after, z, base, scale, new, **CONSTANTS)
        found.append((after, new, out))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")
    # the twin against the model's layer
    after, new, out = found[1]
    of_model = HyperWeights(function, base, scale)
    if last:
        expected = merge_streams(after, of_model, eps=1e-6, norm_eps=1e-6)
    else:
        own = mixing(after, of_model, iterations=20, eps=1e-6, norm_eps=1e-6)
        expected = own.read(after)
        y = random(3, (3, width))[0]
        assert_close(kernel.hyper_write(after.clone(), y, new), own.write(after, y), "gemv")
    assert_close(out, expected, "gemv")


def test_an_error_of_one_percent_is_seen():
    """In every part of what makes the weights."""
    x, mix = random(4, (2, 4, 40), (2, 20))
    function, base, scale = weights(4, 40, 24)

    def run(base, scale, iterations=20):
        new = mix.clone()
        constants = CONSTANTS | {"iterations": iterations}
        out = kernel.hyper_read(x, x.flatten(1) @ function.T, base, scale, new, **constants)
        return torch.cat((out, new), dim=1)

    expected = run(base, scale)
    for part in (slice(0, 4), slice(4, 8), slice(8, 24)):
        moved = base.clone()
        moved[part] *= 1.01
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(run(moved, scale), expected, "gemv")
    for i in range(3):
        moved = scale.clone()
        moved[i] *= 1.01
        with pytest.raises(AssertionError, match="relative RMS"):
            assert_close(run(base, moved), expected, "gemv")
    with pytest.raises(AssertionError, match="gemv"):
        assert_close(run(base, scale, iterations=5), expected, "gemv")
