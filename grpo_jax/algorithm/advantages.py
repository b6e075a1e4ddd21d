"""Rewards to advantages: how much better a completion is than others.

Rewards [P, G] and completion lengths [P, G] enter, advantages [P, G] leave; an estimator that is per token takes
rewards and gives advantages of tokens, [B, T]. Only array methods are used, so that numpy gives numpy (the
training loop, on the host, in the precision of the rewards) and JAX gives JAX (under `jax.jit` as well).

A new estimator is a function here and a row of `ADVANTAGE_ESTIMATORS`; one of your own is
`algorithm.adv_estimator`=FILE.py:NAME with the same arguments and result.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class AdvantageEstimator:
    """A function from rewards to advantages, and what it takes."""

    function: Callable[[Any, Any], Any]
    """(rewards, lengths) -> advantages, all [P, G]; where `is_per_token`: (token_rewards, completion_mask) ->
    advantages, all [B, T]."""
    is_per_token: bool = False

    def __call__(self, rewards: Any, lengths: Any) -> Any:
        return self.function(rewards, lengths)


def per_token(function: Callable[[Any, Any], Any]) -> AdvantageEstimator:
    """Decorates an estimator of your own that takes rewards and gives advantages of tokens, [B, T]."""
    return AdvantageEstimator(function, is_per_token=True)


STD_EPSILON = 1e-6
"""Added to the spread of a group, as in verl; it decides only where rewards differ by less than that."""

WHITENING_EPSILON = 1e-8
"""Added to the variance of a batch, as in verl."""


def _centred(rewards: Any) -> Any:
    """Returns r[p, g] - mean_g r[p], [P, G]; exactly 0 where a group's rewards are all equal.

    The mean of four times 0.1 is not 0.1 in floating point, and the residue, divided by a spread that is
    rounding as well, would be an advantage out of nothing. Differences to the group's first reward are
    exact zeros in that case, and a constant added to the group leaves them as they are.
    """
    differences = rewards - rewards[:, :1]
    return differences - differences.mean(axis=1, keepdims=True)


def _spread(centred: Any) -> Any:
    """The sample's standard deviation of each group (divisor G - 1), [P, 1]."""
    return centred.std(axis=1, ddof=1, keepdims=True)


def _whitened(values: Any, weights: Any) -> Any:
    """Shifts and scales a whole batch to mean 0 and variance 1.

    Args:
        values: floating point, of any shape.
        weights: of the same shape; how many tokens have this value (0: it counts nowhere).

    Returns:
        (x - mean) / sqrt(var + 1e-8), var with the divisor N - 1, N being all tokens; as verl's `masked_whiten`.
    """
    weights = weights.astype(values.dtype)
    num_tokens = weights.sum()
    values = values - values.max()  # equal values become exact zeros, as in `_centred`
    differences = values - (values * weights).sum() / num_tokens.clip(1)
    variance = (differences**2 * weights).sum() / (num_tokens - 1).clip(1)
    return differences / (variance + WHITENING_EPSILON) ** 0.5


def grpo_advantages(rewards: Any, lengths: Any) -> Any:
    """Centres each reward on its group and divides by the group's spread.

        A[p, g] = (r[p, g] - mean_g r[p]) / (std_g r[p] + 1e-6)

    GRPO, arXiv:2402.03300; std is the sample's (divisor G - 1), as in verl and TRL.

    Args:    rewards: [P, G] floating point, G >= 2; lengths: unread.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    centred = _centred(rewards)
    return (centred / (_spread(centred) + STD_EPSILON)).astype(np.float32)


def grpo_no_std_advantages(rewards: Any, lengths: Any) -> Any:
    """Centres each reward on its group: A[p, g] = r[p, g] - mean_g r[p].

    Dr. GRPO, arXiv:2503.20783: dividing by the spread would weigh very easy and very hard prompts more.

    Args:    rewards: [P, G] floating point; lengths: unread.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    return _centred(rewards).astype(np.float32)


def rloo_advantages(rewards: Any, lengths: Any) -> Any:
    """Compares each reward with the mean of the others of its group.

        A[p, g] = r[p, g] - mean_{h != g} r[p, h] = G / (G - 1) * (r[p, g] - mean_h r[p, h])

    RLOO, arXiv:2402.14740: the baseline does not depend on the completion, so the gradient is unbiased.

    Args:    rewards: [P, G] floating point, G >= 2; lengths: unread.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    group_size = rewards.shape[1]
    return (_centred(rewards) * (group_size / (group_size - 1))).astype(np.float32)


def rloo_std_advantages(rewards: Any, lengths: Any) -> Any:
    """The leave-one-out advantage, divided by the group's spread.

        A[p, g] = (r[p, g] - mean_{h != g} r[p, h]) / (std_h r[p, h] + 1e-6)

    The baseline is RLOO's, arXiv:2402.14740; the spread is GRPO's, of the whole group, arXiv:2402.03300.

    Args:    rewards: [P, G] floating point, G >= 2; lengths: unread.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    group_size = rewards.shape[1]
    centred = _centred(rewards)
    return (centred * (group_size / (group_size - 1)) / (_spread(centred) + STD_EPSILON)).astype(np.float32)


def opo_advantages(rewards: Any, lengths: Any) -> Any:
    """Compares each reward with the length-weighted mean of its group.

        A[p, g] = r[p, g] - sum_h l[p, h] r[p, h] / sum_h l[p, h]

    OPO, arXiv:2505.23585: the baseline of least variance, if the squared gradient of a completion grows
    as its length l and those of its tokens are uncorrelated.

    Args:    rewards: [P, G] floating point; lengths: [P, G] completion tokens, >= 1.
    Returns: [P, G] float32; a group whose rewards are all equal gives exact zeros.
    """
    lengths = lengths.astype(rewards.dtype)
    differences = rewards - rewards[:, :1]
    baseline = (lengths * differences).sum(axis=1, keepdims=True) / lengths.sum(axis=1, keepdims=True)
    return (differences - baseline).astype(np.float32)


def reinforce_plus_plus_baseline_advantages(rewards: Any, lengths: Any) -> Any:
    """Centres each reward on its group, then whitens over all tokens of the batch.

        A[p, g] = whiten(r[p, g] - mean_h r[p, h]),   each completion counted once for each of its tokens

    REINFORCE++ with baseline, arXiv:2501.03262. A group without spread is not zero after the second step: what
    the batch's mean token has is taken off it, too.

    Args:    rewards: [P, G] floating point; lengths: [P, G] completion tokens.
    Returns: [P, G] float32; zeros only if no group has any spread.
    """
    return _whitened(_centred(rewards), lengths).astype(np.float32)


def reinforce_plus_plus_advantages(token_rewards: Any, completion_mask: Any) -> Any:
    """What is still to come after each token, whitened over all tokens of the batch; no group takes part.

        A[b, t] = whiten(sum_{s >= t} r[b, s])

    REINFORCE++, arXiv:2501.03262: r is the completion's reward on its last token, less the KL penalty
    (`algorithm.kl_in` = "reward") on every token. Not discounted, as in the paper and verl's default.

    Args:
        token_rewards: [B, T] floating point, 0 outside the completions.
        completion_mask: [B, T] of 0 and 1, one completion a row.

    Returns:
        [B, T] float32, 0 outside the completions; zeros if all tokens have the same return.
    """
    returns = token_rewards[:, ::-1].cumsum(axis=1)[:, ::-1]
    # Before a completion stands the return of its first token. Put behind it as well, every value occurs within
    # a completion, and `_whitened`, which looks for the largest, sees no other.
    returns = completion_mask * returns + (1 - completion_mask) * returns[:, :1]
    return (_whitened(returns, completion_mask) * completion_mask).astype(np.float32)


ADVANTAGE_ESTIMATORS: dict[str, AdvantageEstimator] = {
    "grpo": AdvantageEstimator(grpo_advantages),
    "grpo_no_std": AdvantageEstimator(grpo_no_std_advantages),
    "rloo": AdvantageEstimator(rloo_advantages),
    "rloo_std": AdvantageEstimator(rloo_std_advantages),
    "opo": AdvantageEstimator(opo_advantages),
    "reinforce_plus_plus": AdvantageEstimator(reinforce_plus_plus_advantages, is_per_token=True),
    "reinforce_plus_plus_baseline": AdvantageEstimator(reinforce_plus_plus_baseline_advantages),
}
"""`algorithm.adv_estimator` -> estimator."""


def group_advantages(rewards: Array, lengths: Array, function: Callable[[Any, Any], Any]) -> Any:
    """Applies an estimator of completions, and checks its input and its output.

    Args:
        rewards: [P, G] floating point, one scalar a completion, G >= 2.
        lengths: [P, G] completion tokens, >= 1.
        function: (rewards, lengths) -> advantages [P, G].

    Returns:
        [P, G] float32; numpy for numpy, JAX for JAX.

    Raises:
        ValueError: the rewards are no groups; the function returns another shape.
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be [P, G] with G >= 2, have shape {rewards.shape}")
    return _checked(function(rewards, lengths), rewards.shape).astype(np.float32)


def _checked(advantages: Any, shape: tuple[int, ...]) -> Any:
    if np.shape(advantages) != shape:
        raise ValueError(
            f"algorithm.adv_estimator returned shape {np.shape(advantages)} for rewards of shape {shape}"
        )
    return advantages


def token_rewards(rewards: np.ndarray, completion_mask: np.ndarray, penalties: Any) -> np.ndarray:
    """Puts the reward of each completion on its last token, and takes off every token's penalty.

    Args:
        rewards: [P, G] float32.
        completion_mask: [B, T] float32 of 0 and 1, B = P * G rows in group order, each with a token or more.
        penalties: [B, T] float32, 0 outside the completions, or None.

    Returns:
        [B, T] float32.
    """
    last = completion_mask.shape[1] - 1 - completion_mask[:, ::-1].argmax(axis=1)
    placed = np.zeros(completion_mask.shape, np.float32)
    placed[np.arange(len(placed)), last] = rewards.ravel()
    return placed if penalties is None else placed - penalties


def estimate_advantages(
    rewards: np.ndarray,
    completion_mask: np.ndarray,
    penalties: np.ndarray | None,
    estimator: AdvantageEstimator,
) -> np.ndarray:
    """Advantages of a step, on the host.

    Args:
        rewards: [P, G] float32.
        completion_mask: [B, T] float32 of 0 and 1, B = P * G rows in group order.
        penalties: [B, T] float32, the KL penalty of every token, or None.

    Returns:
        [P, G] float32, or [B, T] float32 from an estimator that is per token. What is not finite stays: the update
        skips and counts it, and the run stops after too many.

    Raises:
        ValueError: as in `group_advantages`.
    """
    if estimator.is_per_token:
        placed = token_rewards(rewards, completion_mask, penalties)
        advantages = _checked(estimator(placed, completion_mask), placed.shape)
    else:
        if penalties is not None:
            rewards = rewards - penalties.sum(axis=1).reshape(rewards.shape)
        lengths = completion_mask.sum(axis=1).reshape(rewards.shape)
        advantages = group_advantages(rewards, lengths, estimator)
    return np.asarray(advantages, np.float32)


def frac_zero_std(rewards: Array) -> Any:
    """Returns the fraction of groups whose rewards are all equal: metric frac_reward_zero_std.

    Args:    rewards: [P, G].
    Returns: scalar from 0 to 1.
    """
    return 1 - (rewards.max(axis=1) != rewards.min(axis=1)).mean()
