"""Rewards to advantages: how much better a completion is than the other completions of its prompt.

Rewards [P, G] enter, advantages [P, G] leave. Only array methods are used, so that numpy gives numpy (the
training loop, on the host, in the precision of the rewards) and JAX gives JAX (under `jax.jit` as well).
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray

STD_EPSILON = 1e-6
"""Added to the spread of a group, as in verl; it decides only where rewards differ by less than that."""


def _centred(rewards: Any) -> Any:
    """Returns r[p, g] - mean_g r[p], [P, G]; exactly 0 where a group's rewards are all equal.

    The mean of four times 0.1 is not 0.1 in floating point, and the residue, divided by a spread that is
    rounding as well, would be an advantage out of nothing. Differences to the group's first reward are
    exact zeros in that case, and a constant added to the group leaves them as they are.
    """
    differences = rewards - rewards[:, :1]
    return differences - differences.mean(axis=1, keepdims=True)


def grpo_advantages(rewards: Any) -> Any:
    """Centres each reward on its group and divides by the group's spread.

        A[p, g] = (r[p, g] - mean_g r[p]) / (std_g r[p] + 1e-6)

    GRPO, arXiv:2402.03300; std is the sample's (divisor G - 1), as in verl and TRL.

    Args:    rewards: [P, G] floating point, G >= 2.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    centred = _centred(rewards)
    spread = centred.std(axis=1, ddof=1, keepdims=True)
    return (centred / (spread + STD_EPSILON)).astype(np.float32)


def grpo_no_std_advantages(rewards: Any) -> Any:
    """Centres each reward on its group: A[p, g] = r[p, g] - mean_g r[p].

    Dr. GRPO, arXiv:2503.20783: dividing by the spread would weigh very easy and very hard prompts more.

    Args:    rewards: [P, G] floating point.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    return _centred(rewards).astype(np.float32)


ADVANTAGE_ESTIMATORS: dict[str, Callable[[Any], Any]] = {
    "grpo": grpo_advantages,
    "grpo_no_std": grpo_no_std_advantages,
}
"""`algorithm.adv_estimator` -> function."""


def group_advantages(rewards: Array, estimator: str) -> Any:
    """Applies one of `ADVANTAGE_ESTIMATORS`, after checking the shape.

    Args:
        rewards: [P, G] floating point, one scalar a completion, G >= 2.
        estimator: key of `ADVANTAGE_ESTIMATORS`.

    Returns:
        [P, G] float32; numpy for numpy, JAX for JAX.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [P, G] with G >= 2, have shape {rewards.shape}")
    return ADVANTAGE_ESTIMATORS[estimator](rewards)


def frac_zero_std(rewards: Array) -> Any:
    """Returns the fraction of groups without any spread, which teach nothing: metric frac_reward_zero_std.

    Args:    rewards: [P, G].
    Returns: scalar from 0 to 1.
    """
    return (rewards.max(axis=1) == rewards.min(axis=1)).mean()
