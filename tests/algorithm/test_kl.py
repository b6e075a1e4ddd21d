"""The coefficient of the KL, and estimators within the loss; their values are tested in test_losses.py."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_helpers import ALGORITHM, array, grpo_loss, loss_and_grad, make_batch, random_batch

from grpo_jax.algorithm import loss as losses
from grpo_jax.algorithm.kl import adapted_kl_coef

MASK = [[0, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (0.1, 0.5),  # on target
        (0.11, 0.5 * (1 + 0.1 * 256 / 1000)),
        (0.05, 0.5 * (1 - 0.2 * 256 / 1000)),  # -0.5, cut
        (7.0, 0.5 * (1 + 0.2 * 256 / 1000)),
        (-3.0, 0.5 * (1 - 0.2 * 256 / 1000)),  # k1 may be negative
        (math.nan, 0.5),
        (math.inf, 0.5),
    ],
)
def test_the_adaptive_coefficient_by_hand(kl, expected):
    got = adapted_kl_coef(0.5, kl, target=0.1, horizon=1000.0, num_completions=256)
    assert got == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("estimator", ["k1+", "k3+", "abs+"])
def test_straight_through_in_the_loss(estimator):
    """p / p_ref is 2, 1 and 1/2: the gradient of each token's KL is log of that, the value is the estimator's."""
    logprobs = np.log([[1, 0.4, 0.6], [1, 1, 0.2]])
    ref = np.log([[1, 0.2, 0.6], [1, 1, 0.4]])
    batch = make_batch(MASK, ref=ref)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    algorithm = dataclasses.replace(ALGORITHM, kl_coef=0.3, kl_estimator=estimator)
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, algorithm)
    log2 = math.log(2)
    mean = {"k1+": 0.0, "abs+": 2 * log2 / 3, "k3+": (0.5 - 1 + log2 + 2 - 1 - log2) / 3}[estimator]
    np.testing.assert_allclose(metrics["kl/mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(value, 0.3 * mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(grad, np.array([[0, log2, 0], [0, 0, -log2]]) * 0.1, rtol=1e-5, atol=1e-8)


def test_a_coefficient_in_the_batch_is_the_configurations_and_compiles_nothing_anew():
    logprobs, entropy, batch = random_batch(21)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
    fixed = dataclasses.replace(ALGORITHM, kl_coef=0.3)
    other = dataclasses.replace(ALGORITHM, kl_coef=99.0)  # not to be read
    step = jax.jit(jax.value_and_grad(functools.partial(grpo_loss, algorithm=other), has_aux=True))
    for coef in (0.3, 0.4):
        expected, _, expected_grad = loss_and_grad(
            logprobs, batch, weights, dataclasses.replace(fixed, kl_coef=coef)
        )
        # Outside the completions it may hold anything, as all fields.
        field = jnp.where(batch.completion_mask > 0, jnp.float32(coef), jnp.nan)
        (value, _), grad = step(logprobs, entropy, batch.replace(kl_coef=field), weights)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-8)
    assert step._cache_size() == 1
