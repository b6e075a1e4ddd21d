import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax import config
from grpo_jax.advantages import ADVANTAGE_ESTIMATORS, frac_zero_std, group_advantages

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_verl_0.9.1.json").read_text())
ESTIMATORS = tuple(ADVANTAGE_ESTIMATORS)


def test_registry_holds_what_the_configuration_offers():
    assert set(ADVANTAGE_ESTIMATORS) == set(config.CHOICES["algorithm.adv_estimator"])


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_equals_verl(estimator):
    rewards = np.array(GOLDEN["rewards"]).reshape(GOLDEN["P"], GOLDEN["G"])
    advantages = group_advantages(rewards, estimator).reshape(-1, 1) * np.array(GOLDEN["mask"])
    np.testing.assert_allclose(advantages, GOLDEN["advantages"][estimator], atol=1e-5, rtol=0)


def test_values_by_hand():
    rewards = np.array([[0.0, 0.0, 3.0], [1.0, 2.0, 6.0]])
    # Means 1 and 3. Sample variances (1 + 1 + 4) / 2 = 3 and (4 + 1 + 9) / 2 = 7.
    centred = np.array([[-1.0, -1.0, 2.0], [-2.0, -1.0, 3.0]])
    std = np.array([[math.sqrt(3)], [math.sqrt(7)]])
    np.testing.assert_allclose(group_advantages(rewards, "grpo_no_std"), centred, rtol=1e-6)
    np.testing.assert_allclose(group_advantages(rewards, "grpo"), centred / (std + 1e-6), rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.1, 1 / 3, -0.7, 0.0, 1e30, 123456.789])
@pytest.mark.parametrize("group_size", [2, 3, 4, 7, 10])
def test_equal_rewards_give_exact_zeros(estimator, dtype, value, group_size):
    rewards = np.full((2, group_size), value, dtype)
    assert not group_advantages(rewards, estimator).any()
    assert not np.asarray(jax.jit(group_advantages, static_argnums=1)(jnp.asarray(rewards), estimator)).any()


def test_the_mean_of_equal_rewards_does_leave_a_residue():
    """What the test above guards against is real: without it, no implementation could fail."""
    sizes_with_residue = [n for n in range(2, 11) if np.full(n, 0.1, np.float32).mean() != np.float32(0.1)]
    assert sizes_with_residue


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_constant_added_to_a_group_changes_nothing(estimator):
    rewards = np.array([[0.0, 0.25, 1.0, 1.0], [0.5, 0.0, 0.0, 0.75]])
    shifted = rewards + np.array([[3.0], [-8.0]])  # exact in binary, so the result is the same to the bit
    np.testing.assert_array_equal(group_advantages(shifted, estimator), group_advantages(rewards, estimator))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numpy_equals_jax_and_jit(estimator):
    rewards = np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32)
    on_host = group_advantages(rewards, estimator)
    in_jax = group_advantages(jnp.asarray(rewards), estimator)
    jitted = jax.jit(group_advantages, static_argnums=1)(rewards, estimator)
    assert isinstance(on_host, np.ndarray) and isinstance(in_jax, jax.Array)
    assert on_host.dtype == in_jax.dtype == jitted.dtype == np.float32
    np.testing.assert_allclose(in_jax, on_host, atol=1e-6)
    np.testing.assert_allclose(jitted, on_host, atol=1e-6)


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_refuses_what_is_not_groups(shape):
    with pytest.raises(ValueError, match=r"\[P, G\].*" + str(shape).replace("(", r"\(").replace(")", r"\)")):
        group_advantages(np.zeros(shape), "grpo")


def test_frac_zero_std():
    rewards = np.array([[0.1, 0.1, 0.1], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.5, 1.0]])
    assert frac_zero_std(rewards) == 0.5
    assert frac_zero_std(jnp.asarray(rewards)) == 0.5
