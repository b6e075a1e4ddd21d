"""The difference of sampler and trainer: weights, masks and rejection. Token weights are in test_losses.py too."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_helpers import ALGORITHM, array, grpo_loss, loss_and_grad, make_batch

from grpo_jax.algorithm import corrections
from grpo_jax.algorithm import loss as losses

# Two completions in one row, of two tokens and of one; p_old / p_sampler is 2 and 0.25, and 1.5.
MASK = array([[0, 1, 1, 0, 1, 0]])
SEGMENTS = jnp.array([[1, 1, 1, 2, 2, 0]])
OLD = np.log([[1, 0.4, 0.1, 1, 0.3, 1]]).astype(np.float32)
SAMPLER = np.log([[1, 0.2, 0.4, 1, 0.2, 1]]).astype(np.float32)
GEOMETRIC = math.sqrt(2 * 0.25)
AGES = jnp.array([[0, 2, 1, 0, 0, 0]])


def factor_of(**changes):
    algorithm = dataclasses.replace(ALGORITHM, **changes)
    factor, values, maxima = corrections.correction(OLD, SAMPLER, MASK, SEGMENTS, algorithm, AGES)
    means = {name: float(jnp.sum(value * MASK) / 3) for name, value in values.items()}
    return np.asarray(factor)[0, [1, 2, 4]], means | {name: float(value) for name, value in maxima.items()}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rollout_is": "token"}, [1.8, 0.25, 1.5]),
        ({"rollout_is": "sequence"}, [0.5, 0.5, 1.5]),
        ({"rollout_is": "sequence", "rollout_is_threshold": 1.2}, [0.5, 0.5, 1.2]),
        ({"rollout_is": "token_mask"}, [0, 0, 1.5]),
        (
            {"rollout_is": "token_mask", "rollout_is_low": 0.25},
            [0, 0.25, 1.5],
        ),  # a bound belongs to the interval
        ({"rollout_is": "sequence_mask", "rollout_is_low": 0.6}, [0, 0, 1.5]),
        ({"rollout_is": "sequence_mask", "rollout_is_threshold": 1.4, "rollout_is_low": 0.4}, [0.5, 0.5, 0]),
        ({"rollout_rs": "seq_sum_k1", "rollout_rs_low": 0.6}, [0, 0, 1]),
        ({"rollout_rs": "seq_sum_k1", "rollout_rs_low": 0.4, "rollout_rs_high": 1.4}, [1, 1, 0]),
        ({"rollout_rs": "seq_mean_k1", "rollout_rs_low": 0.6}, [1, 1, 1]),  # the geometric mean is 0.71
        ({"rollout_rs": "seq_mean_k1", "rollout_rs_low": 0.8}, [0, 0, 1]),
        ({"rollout_rs": "seq_mean_k1", "rollout_rs_low": 0.8, "rollout_is": "sequence"}, [0, 0, 1.5]),
        ({"max_token_age": 0}, [0, 0, 1]),
        ({"max_token_age": 1, "rollout_is": "token"}, [0, 0.25, 1.5]),
        ({"max_token_age": 2}, [1, 1, 1]),
        ({}, [1, 1, 1]),
    ],
)
def test_factors_by_hand(changes, expected):
    factor, _ = factor_of(**{"rollout_is_threshold": 1.8, "rollout_is_low": 0.5} | changes)
    np.testing.assert_allclose(factor, expected, rtol=1e-5)


def test_metrics_by_hand():
    _, metrics = factor_of(rollout_is="sequence", rollout_is_threshold=1.2)
    close = lambda name, number: np.testing.assert_allclose(metrics[name], number, rtol=1e-5)
    close("rollout_corr/is_weight_mean", (0.5 + 0.5 + 1.2) / 3)
    close("rollout_corr/is_weight_max", 1.2)
    close("rollout_corr/is_clipped_frac", 1 / 3)
    _, metrics = factor_of(rollout_is="token_mask", rollout_is_low=0.5, rollout_is_threshold=1.8)
    close("rollout_corr/is_masked_frac", 2 / 3)
    close("rollout_corr/is_weight_mean", 1.5 / 3)
    _, metrics = factor_of(rollout_rs="seq_mean_k1", rollout_rs_low=0.8)
    close("rollout_corr/rs_rejected_frac", 2 / 3)
    _, metrics = factor_of(max_token_age=1)
    close("rollout_corr/too_old_frac", 1 / 3)
    assert not factor_of()[1]  # off: no metric


def test_the_tokens_that_weigh_are_those_with_a_factor():
    batch = dataclasses.replace(
        make_batch(MASK, old=OLD, sampler=SAMPLER), segment_ids=SEGMENTS, token_ages=AGES
    )
    section = dataclasses.replace(
        ALGORITHM, rollout_is="token_mask", rollout_is_threshold=1.8, max_token_age=1
    )
    weigh = lambda section, batch: (
        np.asarray(losses.tokens_that_weigh(OLD, batch, section))[0].nonzero()[0].tolist()
    )
    assert weigh(section, batch) == [4]
    assert weigh(ALGORITHM, batch) == [1, 2, 4]
    # Without old log-probabilities they are the policy's own.
    assert weigh(section, dataclasses.replace(batch, old_logprobs=None)) == [4]
    changes = [{"rollout_is": "token_mask"}, {"rollout_is": "sequence_mask"}, {"rollout_rs": "seq_sum_k1"}]
    for change in [*changes, {"max_token_age": 0}]:
        assert corrections.leaves_out(dataclasses.replace(ALGORITHM, **change))
    assert not corrections.leaves_out(dataclasses.replace(ALGORITHM, rollout_is="sequence"))


@pytest.mark.parametrize("level", ["sequence", "sequence_mask"])
def test_weights_are_constants(level):
    algorithm = dataclasses.replace(ALGORITHM, rollout_is=level, rollout_rs="seq_sum_k1", rollout_rs_low=0.1)
    both = lambda old, sampler: corrections.correction(old, sampler, MASK, SEGMENTS, algorithm)[0].sum()
    for grad in jax.grad(both, argnums=(0, 1))(jnp.asarray(OLD), jnp.asarray(SAMPLER)):
        assert not np.asarray(grad).any()


# What they do where the sampler's log-probabilities are disturbed. The policy draws two independent tokens, a or b
# with 1/2 each; the sampler draws a with 3/4, b with 1/4, and of 16 completions exactly the expected ones:
# 9 aa, 3 ab, 3 ba, 1 bb. Only aa is good: A = 1, all others 0. With logits (x, 0) for both tokens,
# d log p(a) / dx = 1/2, so the policy gradient is P(aa) * A * (1/2 + 1/2) = 1/4.

DRAWN = [pair for pair in itertools.product([1, 0], repeat=2) for _ in range(3 ** sum(pair))]


def policy_gradient(**changes):
    """The gradient with respect to x of minus the loss, at x = 0, with one completion a row."""
    is_a = np.array(DRAWN)
    advantages = np.tile((is_a.sum(axis=1, keepdims=True) == 2).astype(np.float32), (1, 2))
    batch = make_batch(np.ones((16, 2)), advantages=advantages, sampler=np.log(np.where(is_a, 0.75, 0.25)))
    weights = losses.loss_weights(batch.completion_mask, "seq-mean-token-sum", 1)
    algorithm = dataclasses.replace(ALGORITHM, **changes)

    def loss(x):
        logprobs = jnp.where(is_a == 1, jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x))
        return grpo_loss(logprobs, jnp.zeros((16, 2)), batch, weights, algorithm)[0]

    return -jax.grad(loss)(0.0)


def test_the_disturbed_sampler_is_corrected():
    assert len(DRAWN) == 16
    # Uncorrected: the gradient of a policy that draws aa with 9/16.
    np.testing.assert_allclose(policy_gradient(), 9 / 16, rtol=1e-5)
    # Weight 2/3 for each a: unbiased for the token alone, not for the completion that it belongs to.
    np.testing.assert_allclose(
        policy_gradient(rollout_is="token", rollout_is_threshold=9.0), 6 / 16, rtol=1e-5
    )
    # Weight 4/9 for aa: exact. (bb would have 4, above any threshold below that.)
    np.testing.assert_allclose(
        policy_gradient(rollout_is="sequence", rollout_is_threshold=9.0), 1 / 4, rtol=1e-5
    )
    # Masks that leave aa out leave nothing; those that keep it are exact.
    kept = dict(rollout_is="sequence_mask", rollout_is_low=0.4, rollout_is_threshold=3.0)
    np.testing.assert_allclose(policy_gradient(**kept), 1 / 4, rtol=1e-5)
    assert policy_gradient(**kept | {"rollout_is_low": 0.5}) == 0
    assert policy_gradient(rollout_rs="seq_sum_k1", rollout_rs_low=0.5) == 0
    np.testing.assert_allclose(
        policy_gradient(rollout_rs="seq_sum_k1", rollout_rs_low=0.4), 9 / 16, rtol=1e-5
    )


@pytest.mark.parametrize("loss", ["clip", "cispo", "sapo", "policy_gradient"])
def test_one_token_that_went_wrong(loss):
    """The sampler reports e^-5 of the trainer's probability for one token: a cap still follows it twice as far,
    a mask not at all, and rejection leaves out its completion and no other."""
    logprobs = -np.arange(1.0, 7.0).reshape(2, 3) / 10
    sampler = logprobs.copy()
    sampler[0, 1] -= 5
    batch = make_batch(np.ones((2, 3)), advantages=[[1] * 3, [-1] * 3], sampler=sampler)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)

    def gradient(**changes):
        algorithm = dataclasses.replace(ALGORITHM, policy_loss=loss, **changes)
        return loss_and_grad(logprobs, batch, weights, algorithm)[2] * 6  # of each token, over its weight

    plain = np.array([[-1, -1, -1], [1, 1, 1]])
    np.testing.assert_allclose(gradient(), plain, rtol=1e-5)
    np.testing.assert_allclose(gradient(rollout_is="token"), plain * [[1, 2, 1], [1, 1, 1]], rtol=1e-5)
    np.testing.assert_allclose(gradient(rollout_is="token_mask"), plain * [[1, 0, 1], [1, 1, 1]], rtol=1e-5)
    np.testing.assert_allclose(gradient(rollout_rs="seq_sum_k1"), plain * [[0], [1]], rtol=1e-5)
