"""DeepSeek V4's cached rows against their twins and the model's own layers, in fp32."""

from contextlib import nullcontext

import pytest
import torch

from kernels import compressed_rows as compress
from kernels import shared_rows as rows_kernel
from kernels.reference import compressed_rows as compress_twin
from kernels.reference import shared_rows as rows_twin
from kernels.reference.rms_norm import rms_norm
from moe_runtime.layers.compressed_attention import Compressor, rotate
from tests.tolerances import assert_close

POSITIONS = 400
WIDTH, ROTARY, EPS = 24, 8, 1e-6


@pytest.fixture(autouse=True)
def on_device(device):
    """Tensors are made where kernels run: on a GPU, or in the interpreter."""
    with torch.device(device) if device.type == "cuda" else nullcontext():
        yield


def random(seed, *shapes):
    g = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return [torch.randn(shape, generator=g) for shape in shapes]


def rope():
    angles = torch.arange(POSITIONS)[:, None] * 0.7 ** torch.arange(ROTARY // 2)
    return angles.cos().float(), angles.sin().float()


def at(position):
    return torch.tensor([position], dtype=torch.int32)


class Case:
    """A compressor's weights and a sequence of projected tokens."""

    def __init__(self, ratio, overlap, tokens, width=WIDTH):
        self.ratio, self.overlap = ratio, overlap
        wide = 2 * width if overlap else width
        projected, self.bias, norm = random(ratio, (tokens, 2 * wide), (ratio, wide), (width,))
        projected[:, wide:] *= 3.0  # gates that matter
        # As in the step: part of a wider matrix.
        self.projected = torch.cat((projected, torch.full((tokens, 5), float("nan"))), dim=1)
        self.projected = self.projected[:, : 2 * wide]
        self.norm = 1 + 0.2 * norm
        self.width = width

    def run(self, module, sizes, position=0, state=None):
        """In pieces of these sizes; returns rows and the state."""
        parts = 3 if self.overlap else 1
        state = torch.full((parts, 3, self.width), float("nan")) if state is None else state
        rows = torch.full((POSITIONS // self.ratio + 1, self.width), float("nan"))
        done = 0
        for size in sizes:
            piece = self.projected[done : done + size]
            after = state if size == 1 else torch.full_like(state, float("nan"))
            module.compressed_rows(
                piece, self.bias, self.norm, rope(), at(position + done), state, after, rows,
                eps=EPS,
            )  # fmt: skip
            state, done = after, done + size
        return rows, state

    def finished(self, tokens):
        """Rows as the model's own layer makes them."""
        own = Compressor.empty(self.ratio, self.width, overlap=self.overlap,
                               device=torch.get_default_device())  # fmt: skip
        values, gates = self.projected[:tokens].chunk(2, dim=1)
        gates = gates + self.bias[torch.arange(tokens) % self.ratio]
        rows = rms_norm(own.add_tokens(values, gates), self.norm, EPS)
        cos, sin = (table[: len(rows) * self.ratio : self.ratio] for table in rope())
        return rotate(rows, cos, sin)


@pytest.mark.parametrize(
    ("ratio", "overlap", "sizes"),
    [
        (4, True, [1] * 13),  # token by token, from the start of a sequence
        (4, True, [22]),
        (4, True, [3, 1, 1, 6, 2, 9, 4, 8]),  # pieces that end within windows and with them
        (16, False, [1] * 17),
        (16, False, [40, 7, 1, 1, 16]),
        (128, False, [130, 1, 125, 1]),
    ],
)
def test_rows_and_state(ratio, overlap, sizes):
    case = Case(ratio, overlap, sum(sizes))
    rows, state = case.run(compress, sizes)
    twin_rows, twin_state = case.run(compress_twin, sizes)
    done = sum(sizes) // ratio
    assert bool(rows[done:].isnan().all()), "rows of windows that have not ended"
    assert_close(rows[:done], twin_rows[:done], "attention")
    assert_close(twin_rows[:done], case.finished(sum(sizes)), "attention")
    known = twin_state.isfinite()
    assert torch.equal(known, state.isfinite())
    assert_close(state[known], twin_state[known], "attention")
    with pytest.raises(AssertionError, match="relative RMS"):
        moved = Case(ratio, overlap, sum(sizes))
        moved.bias *= 1.01
        assert_close(moved.run(compress, sizes)[0][:done], twin_rows[:done], "attention")


def test_nothing_of_a_sequence_before_is_seen():
    """The state is that of another sequence, within a window."""
    for ratio, overlap in ((4, True), (16, False)):
        case = Case(ratio, overlap, 18)
        fresh, _ = case.run(compress, [18])
        _, used = case.run(compress, [7], position=8)
        again, _ = case.run(compress, [18], state=used)
        done = 18 // ratio
        assert torch.equal(fresh[:done], again[:done])


@pytest.mark.parametrize(("tokens", "position"), [(1, 0), (1, 33), (5, 18)])
@pytest.mark.parametrize("indexed", [False, True])
def test_queries_and_rows(tokens, position, indexed):
    """Heads that do not fill a program, widths that are no power of two, a ring that wraps."""
    heads, index_heads, index_width, slots = 6, 20, 12, 20
    wide = heads * WIDTH + index_heads * index_width
    joined, row, norm = random(tokens, (tokens, wide), (tokens, WIDTH + 3), (WIDTH,))
    q = joined[:, : heads * WIDTH].unflatten(1, (heads, WIDTH))
    index_q = joined[:, heads * WIDTH :].unflatten(1, (index_heads, index_width))
    found = []
    for module in (rows_kernel, rows_twin):
        ring, query = torch.zeros(slots, WIDTH), torch.full((tokens, heads, WIDTH), float("nan"))
        index_query = torch.zeros(tokens, index_heads, index_width)
        index = {"index_q": index_q, "index_query": index_query} if indexed else {}
        module.shared_rows(q, row[:, 3:], norm, rope(), at(position), ring, query, eps=EPS, **index)
        found.append((query, ring, index_query) if indexed else (query, ring))
    for ours, expected in zip(*found, strict=True):
        assert_close(ours, expected, "gemv")
    cos, sin = (table[position : position + tokens] for table in rope())
    expected = rotate(rms_norm(row[:, 3:], norm, EPS), cos, sin)
    assert_close(found[1][1][(torch.arange(tokens) + position) % slots], expected, "gemv")
