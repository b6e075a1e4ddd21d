import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.algorithm.advantages import (
    ADVANTAGE_ESTIMATORS,
    PER_TOKEN,
    estimate_advantages,
    frac_zero_std,
    group_advantages,
    has_spread,
    token_rewards,
)
from grpo_jax.learner.batching import add_advantages
from grpo_jax.types import TrainBatch

GOLDEN = json.loads((pathlib.Path(__file__).parents[1] / "data" / "golden_verl_0.9.1.json").read_text())
OF_GROUPS = tuple(name for name in ADVANTAGE_ESTIMATORS if name not in PER_TOKEN)
WITHIN_GROUPS = tuple(name for name in OF_GROUPS if name != "reinforce_plus_plus_baseline")
"""Estimators for which no group concerns another."""

# Two groups, and lengths. Means 1 and 3, means of the others (1.5, 1.5, 0) and (4, 3.5, 1.5); sample variances
# (1 + 1 + 4) / 2 = 3 and (4 + 1 + 9) / 2 = 7; length-weighted means (0 + 0 + 6) / 4 and (3 + 2 + 6) / 5.
REWARDS = np.array([[0.0, 0.0, 3.0], [1.0, 2.0, 6.0]])
LENGTHS = np.array([[1, 1, 2], [3, 1, 1]])
CENTRED = np.array([[-1.0, -1.0, 2.0], [-2.0, -1.0, 3.0]])
LEFT_OUT = np.array([[-1.5, -1.5, 3.0], [-3.0, -1.5, 4.5]])
STD = np.array([[math.sqrt(3)], [math.sqrt(7)]])


def apply(name, rewards, lengths):
    return group_advantages(rewards, lengths, ADVANTAGE_ESTIMATORS[name])


def lengths_for(rewards):
    return np.arange(rewards.size).reshape(rewards.shape) % 5 + 1


def test_registry_holds_what_the_configuration_offers():
    assert tuple(ADVANTAGE_ESTIMATORS) == config.KEYS["algorithm.adv_estimator"].choices
    assert set(ADVANTAGE_ESTIMATORS) >= PER_TOKEN


@pytest.mark.parametrize("name", list(GOLDEN["advantages"]))
def test_equals_verl(name):
    rewards = np.array(GOLDEN["rewards"]).reshape(GOLDEN["P"], GOLDEN["G"])
    mask = np.array(GOLDEN["mask"])
    advantages = estimate_advantages(rewards, mask, None, name, ADVANTAGE_ESTIMATORS[name])
    if name not in PER_TOKEN:
        advantages = advantages.reshape(-1, 1) * mask
    np.testing.assert_allclose(advantages, GOLDEN["advantages"][name], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("grpo_no_std", CENTRED),
        ("grpo", CENTRED / (STD + 1e-6)),
        ("rloo", LEFT_OUT),
        ("rloo_std", LEFT_OUT / (STD + 1e-6)),
        ("opo", REWARDS - np.array([[1.5], [2.2]])),
    ],
)
def test_values_by_hand(name, expected):
    np.testing.assert_allclose(apply(name, REWARDS, LENGTHS), expected, rtol=1e-6)


def test_reinforce_plus_plus_baseline_by_hand():
    # Tokens: -1, -1, 2, 2 of the first group, -2 three times, -1 and 3 of the second. Their sum is -2, their
    # number 9; squares 1 + 1 + 4 + 4 + 12 + 1 + 9 = 32, so the variance is (32 - 9 * (2 / 9)^2) / 8.
    variance = (32 - 4 / 9) / 8
    expected = (CENTRED + 2 / 9) / math.sqrt(variance + 1e-8)
    np.testing.assert_allclose(apply("reinforce_plus_plus_baseline", REWARDS, LENGTHS), expected, rtol=1e-6)


def test_reinforce_plus_plus_by_hand():
    """Rewards 1 and 0 on the last tokens, penalties of 0.25 and 0.5 before: returns 0.75, 1 and -0.5."""
    mask = np.array([[0, 1, 1, 0], [0, 0, 1, 0]], np.float32)
    penalties = np.array([[0, 0.25, 0, 0], [0, 0, 0.5, 0]], np.float32)
    rewards = np.array([[1.0, 0.0]], np.float32)
    np.testing.assert_array_equal(
        token_rewards(rewards, mask, penalties), [[0, -0.25, 1, 0], [0, 0, -0.5, 0]]
    )
    name = "reinforce_plus_plus"
    got = estimate_advantages(rewards, mask, penalties, name, ADVANTAGE_ESTIMATORS[name])
    mean = 1.25 / 3
    variance = ((0.75 - mean) ** 2 + (1 - mean) ** 2 + (0.5 + mean) ** 2) / 2
    expected = (np.array([[0, 0.75, 1, 0], [0, 0, -0.5, 0]]) - mean) / math.sqrt(variance + 1e-8) * mask
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_penalty_in_the_reward_counts_by_completion(name):
    """Half a point off every token: that is half the length off the reward of a completion."""
    mask = (np.arange(4) < LENGTHS.reshape(-1, 1)).astype(np.float32)
    got = estimate_advantages(REWARDS, mask, 0.5 * mask, name, ADVANTAGE_ESTIMATORS[name])
    np.testing.assert_allclose(got, apply(name, REWARDS - 0.5 * LENGTHS, LENGTHS), rtol=1e-6)


# Properties


@pytest.mark.parametrize("name", OF_GROUPS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 0.0, 1e30, 123456.789])
@pytest.mark.parametrize("group_size", [2, 3, 4, 7, 10])
def test_equal_rewards_give_exact_zeros(name, dtype, value, group_size):
    rewards = np.full((2, group_size), value, dtype)
    lengths = lengths_for(rewards)
    assert not apply(name, rewards, lengths).any()
    jitted = jax.jit(lambda r, n: apply(name, r, n))
    assert not np.asarray(jitted(jnp.asarray(rewards), jnp.asarray(lengths))).any()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e30])
def test_equal_returns_give_exact_zeros(value):
    mask = (np.arange(4) < np.array([[1], [4], [2]])).astype(np.float32)
    name = "reinforce_plus_plus"
    rewards = np.full((1, 3), value, np.float32)
    assert not estimate_advantages(rewards, mask, None, name, ADVANTAGE_ESTIMATORS[name]).any()


def test_the_mean_of_equal_rewards_does_leave_a_residue():
    """What the test above guards against is real: without it, no implementation could fail."""
    sizes_with_residue = [n for n in range(2, 11) if np.full(n, 0.1, np.float32).mean() != np.float32(0.1)]
    assert sizes_with_residue


@pytest.mark.parametrize("name", WITHIN_GROUPS)
def test_a_group_without_spread_teaches_nothing_whatever_the_others_do(name):
    rewards = np.array([[0.1] * 4, [0.0, 1.0, 0.0, 0.0]], np.float32)
    advantages = apply(name, rewards, lengths_for(rewards))
    assert not advantages[0].any() and advantages[1].all()


@pytest.mark.parametrize("name", OF_GROUPS)
def test_a_constant_added_to_a_group_changes_nothing(name):
    rewards = np.array([[0.0, 0.25, 1.0, 1.0], [0.5, 0.0, 0.0, 0.75]])
    shifted = rewards + np.array([[3.0], [-8.0]])  # exact in binary, so the result is the same to the bit
    lengths = lengths_for(rewards)
    np.testing.assert_array_equal(apply(name, shifted, lengths), apply(name, rewards, lengths))


def test_without_a_group_baseline_only_a_constant_for_all_changes_nothing():
    mask = (np.arange(4) < np.array([[1], [4], [2], [3]])).astype(np.float32)
    rewards = np.array([[0.0, 0.25], [1.0, 0.5]], np.float32)
    function = ADVANTAGE_ESTIMATORS["reinforce_plus_plus"]
    get = lambda r: estimate_advantages(r.astype(np.float32), mask, None, "reinforce_plus_plus", function)
    np.testing.assert_array_equal(get(rewards + 4), get(rewards))
    assert np.abs(get(rewards + np.array([[4.0], [0.0]])) - get(rewards)).max() > 0.1


@pytest.mark.parametrize("name", OF_GROUPS)
def test_numpy_equals_jax_and_jit(name):
    rewards = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    lengths = lengths_for(rewards)
    on_host = apply(name, rewards, lengths)
    in_jax = apply(name, jnp.asarray(rewards), jnp.asarray(lengths))
    jitted = jax.jit(lambda r, n: apply(name, r, n))(rewards, lengths)
    assert isinstance(on_host, np.ndarray) and isinstance(in_jax, jax.Array)
    assert on_host.dtype == in_jax.dtype == jitted.dtype == np.float32
    np.testing.assert_allclose(in_jax, on_host, atol=1e-6)
    np.testing.assert_allclose(jitted, on_host, atol=1e-6)


def test_advantages_of_tokens_reach_their_tokens_and_no_others():
    mask = np.array([[0, 1, 1, 0], [0, 0, 1, 0]], np.float32)
    batch = TrainBatch(**{f.name: mask for f in dataclasses.fields(TrainBatch)})
    given = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(add_advantages(batch, given).advantages, [[0, 1, 2, 0], [0, 0, 6, 0]])


# Bad input


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_refuses_what_is_not_groups(shape):
    with pytest.raises(ValueError, match=r"\[P, G\].*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        apply("grpo", np.zeros(shape), np.ones(shape))


def test_refuses_what_an_estimator_must_not_return():
    mask, rewards = np.ones((4, 3), np.float32), np.array([[0.0, 1.0], [0.0, 1.0]])
    with pytest.raises(ValueError, match=r"returned shape \(2,\) for rewards of shape \(2, 2\)"):
        estimate_advantages(rewards, mask, None, "my.py:f", lambda r, n: r.mean(axis=1))


def test_frac_zero_std():
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    assert has_spread(rewards).tolist() == [False, True, False, True]
    assert frac_zero_std(rewards) == 0.5
    assert frac_zero_std(jnp.asarray(rewards)) == 0.5
