"""Sums over the sequences of packed rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.algorithm.ratios import sequence_means, sequence_sums

SEGMENTS = np.array(
    [
        [1, 1, 1, 2, 3, 3, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 0, 0, 0, 0],
        [5, 5, 2, 2, 2, 9, 9, 9],  # any numbering will do
        [1, 2, 3, 4, 5, 6, 7, 8],
    ]
)


def sums_by_loop(x, segment_ids):
    sums = np.zeros_like(x)
    for row, ids in enumerate(segment_ids):
        for segment in set(ids) - {0}:
            sums[row, ids == segment] = x[row, ids == segment].sum()
    return sums


def test_by_hand():
    x = np.array([[1.0, 2, 4, 8, 16, 32, 64, 128]], np.float32)
    expected = [[7, 7, 7, 8, 48, 48, 0, 0]]
    np.testing.assert_array_equal(sequence_sums(x, SEGMENTS[:1]), expected)


@pytest.mark.parametrize("length", [8, 37])
def test_equals_a_loop(length):
    rng = np.random.default_rng(length)
    segment_ids = np.sort(rng.integers(1, 6, (20, length)), axis=1)
    segment_ids = np.where(np.arange(length) < rng.integers(0, length + 1, (20, 1)), segment_ids, 0)
    x = rng.normal(size=segment_ids.shape).astype(np.float32)
    for function in (sequence_sums, jax.jit(sequence_sums)):
        np.testing.assert_allclose(
            function(x, segment_ids), sums_by_loop(x, segment_ids), rtol=1e-5, atol=1e-6
        )


def test_every_token_of_a_sequence_gets_the_same_bits():
    x = np.random.default_rng(0).normal(size=SEGMENTS.shape).astype(np.float32)
    sums = np.asarray(sequence_sums(x, SEGMENTS))
    for row, ids in enumerate(SEGMENTS):
        for segment in set(ids):
            assert len(set(sums[row, ids == segment].tolist())) == 1


def test_the_gradient_of_a_weighted_sum_is_the_sum_of_the_weights():
    """d/dx_s of sum_t w_t S_t is the sum of w over the sequence of s: the map is its own transpose."""
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(2, *SEGMENTS.shape)).astype(np.float32)
    grad = jax.grad(lambda x: jnp.sum(w * sequence_sums(x, SEGMENTS)))(x)
    np.testing.assert_allclose(grad, sums_by_loop(w, SEGMENTS), rtol=1e-5, atol=1e-6)


def test_means_are_over_completion_tokens():
    x = np.array([[9.0, 2, 4, 9, 5, 9, 9, 9]], np.float32)
    mask = np.array([[0, 1, 1, 0, 1, 0, 0, 0]], np.float32)
    segment_ids = np.array([[1, 1, 1, 2, 2, 3, 3, 0]])  # the third sequence has no completion token
    np.testing.assert_allclose(sequence_means(x, mask, segment_ids), [[3, 3, 3, 5, 5, 0, 0, 0]])
