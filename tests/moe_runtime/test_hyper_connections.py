"""Hyper-connections: what the mixing must be for any weights, apart from any model."""

import pytest
import torch

from moe_runtime.layers.hyper_connections import HyperWeights, merge_streams, mixing, sinkhorn
from tests.tolerances import assert_close

STREAMS, WIDTH, TOKENS = 4, 24, 9


def random_weights(rows, scales, seed=0):
    g = torch.Generator().manual_seed(seed)
    return HyperWeights(
        torch.randn(rows, STREAMS * WIDTH, generator=g) * 0.3,
        torch.randn(rows, generator=g),
        torch.rand(scales, generator=g) + 0.5,
    )


@pytest.fixture
def streams():
    return torch.randn(TOKENS, STREAMS, WIDTH, generator=torch.Generator().manual_seed(1))


def make(streams, weights, iterations=20):
    return mixing(streams, weights, iterations=iterations, eps=1e-6, norm_eps=1e-6)


def test_the_matrix_is_doubly_stochastic(streams):
    """After 20 iterations its columns sum to 1, after many more its rows too."""
    ones = torch.ones(TOKENS, STREAMS)
    matrix = make(streams, random_weights(24, 3)).matrix_TNN
    assert bool((matrix > 0).all())
    assert_close(matrix.sum(1), ones, "router")
    assert_close(make(streams, random_weights(24, 3), 300).matrix_TNN.sum(2), ones, "router")


def test_sinkhorn_begins_and_ends_with_columns():
    matrix = torch.tensor([[1.0, 3.0], [1.0, 1.0]])
    once = sinkhorn(matrix, iterations=1, eps=0.0)
    assert_close(once, torch.tensor([[0.5, 0.75], [0.5, 0.25]]), "rms_norm")
    twice = sinkhorn(matrix, iterations=2, eps=0.0)
    assert_close(twice.sum(0), torch.ones(2), "rms_norm")
    assert_close(twice, torch.tensor([[0.375, 0.6428571], [0.625, 0.3571429]]), "rms_norm")


def test_a_block_without_a_result_keeps_the_mean_of_the_streams(streams):
    """Because rows of the matrix sum to 1."""
    mix = make(streams, random_weights(24, 3), iterations=300)
    kept = mix.write(streams, torch.zeros(TOKENS, WIDTH))
    assert_close(kept.mean(1), streams.mean(1), "router")


def test_the_matrix_goes_from_row_to_column(streams):
    """Stream k gets the sum over j of matrix[j, k] * stream j, never the transpose."""
    mix = make(streams, random_weights(24, 3))
    result = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2))
    written = mix.write(streams, result)
    for k in range(STREAMS):
        expected = mix.post_TN[:, k, None] * result
        for j in range(STREAMS):
            expected = expected + mix.matrix_TNN[:, j, k, None] * streams[:, j]
        assert_close(written[:, k], expected, "router")


def test_the_size_of_the_streams_does_not_matter(streams):
    """The projection is divided by the RMS of all streams together."""
    weights = random_weights(24, 3)
    first, second = make(streams, weights), make(100 * streams, weights)
    assert_close(second.pre_TN, first.pre_TN, "router")
    assert_close(second.post_TN, first.post_TN, "router")


def test_merging_is_a_weighted_sum(streams):
    weights = HyperWeights(torch.zeros(STREAMS, STREAMS * WIDTH), torch.zeros(STREAMS),
                           torch.ones(1))  # fmt: skip
    merged = merge_streams(streams, weights, eps=0.0, norm_eps=1e-6)
    assert_close(merged, 0.5 * streams.sum(1), "rms_norm")
