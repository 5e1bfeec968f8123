"""Prompts are padded, and what padding leaves behind is never seen."""

import warnings

import pytest
import torch

from moe_runtime.gpu.captured_prompts import LENGTHS, CapturedPrompts, padded_length

CPU = torch.device("cpu")


class Recorded:
    """Prompts that keep what they were given; the residual is the ids."""

    chunk = 2048
    may_pad = True

    def __init__(self):
        self.given = []

    def run(self, token_ids):
        self.given.append(token_ids.tolist())
        yield token_ids[:, None].float()


@pytest.mark.parametrize(
    ("tokens", "most", "padded"),
    [(1, 2048, 4), (4, 2048, 4), (5, 2048, 8), (512, 2048, 512), (513, 2048, 576), (5, 7, None)]
    + [(1030, 2048, 1152), (2048, 2048, 2048), (2049, 4096, None), (2048, 2040, None)],
)
def test_padded_length(tokens, most, padded):
    assert padded_length(tokens, most) == padded


def test_few_lengths_serve_all_prompts_of_a_chunk():
    assert {padded_length(n, 2048) for n in range(1, 2049)} == set(LENGTHS)
    assert all(padded_length(n, 2048) < 1.126 * n for n in range(512, 2049))


def test_the_last_token_is_repeated_and_its_rows_are_dropped():
    prompts = Recorded()
    captured = CapturedPrompts(prompts, 4096, CPU)
    (residual,) = captured.run(torch.tensor([7, 8, 9, 10, 11]))
    assert prompts.given == [[7, 8, 9, 10, 11, 11, 11, 11]]
    assert residual[:, 0].tolist() == [7, 8, 9, 10, 11]
    (residual,) = captured.run(torch.arange(2100))
    assert prompts.given[1] == list(range(2100)) and len(residual) == 2100


def test_a_context_without_room_for_padding():
    prompts = Recorded()
    (residual,) = CapturedPrompts(prompts, 5, CPU).run(torch.tensor([1, 2, 3, 4, 5]))
    assert prompts.given == [[1, 2, 3, 4, 5]] and len(residual) == 5


def test_too_little_memory_for_a_graph_is_said_once(monkeypatch):
    captured = CapturedPrompts(Recorded(), 4096, CPU)
    captured._needed[8] = 100 << 20
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (300 << 20, 80 << 30))
    with pytest.warns(RuntimeWarning, match="300 MB .* are free, .* takes up to 456 MB"):
        assert not captured._can_capture(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not captured._can_capture(8)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500 << 20, 80 << 30))
        assert captured._can_capture(8)
        assert not captured._can_capture(16)  # has not run yet
