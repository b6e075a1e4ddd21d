"""The KL divergence from the reference: estimators, the penalty in the reward, the adaptive coefficient.

Estimators of KL(p || p_ref) are of tokens sampled from p (joschu.net/blog/kl-approx.html).
All take and return [B, T] or [R, T] float32.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from grpo_jax.algorithm.ratios import clamp, log_ratio, where_completion

K3_BOUND = 10.0
"""The k3 estimate is clamped to [-10, 10], as in verl: exp(log-ratio) is heavy-tailed."""

ADAPTIVE_BOUND = 0.2
"""The relative error that the adaptive coefficient answers to, at most: arXiv:1909.08593 (section 2.2)."""

KLEstimator = Callable[[jax.Array, jax.Array], jax.Array]
"""(logprobs, ref_logprobs) -> KL of each token; all [R, T] float32, 0 outside the completions. One of your own is
`algorithm.kl_estimator`=FILE.py:NAME."""


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(p / p_ref): unbiased, of either sign. As a loss its gradient has mean 0: it is for the reward."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """(log(p / p_ref))^2 / 2: biased, never negative, low variance. On average its gradient is that of the KL."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """p_ref / p - 1 - log(p_ref / p): unbiased but for the clamps, never negative. arXiv:2402.03300 (4)."""
    log_inverse_ratio = log_ratio(ref_logprobs, logprobs)
    # expm1: near the reference, where a run begins, exp(x) - 1 would keep no correct digit of x^2 / 2.
    return clamp(jnp.expm1(log_inverse_ratio) - log_inverse_ratio, K3_BOUND)


def kl_abs(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """|log(p / p_ref)|: biased, never negative."""
    return jnp.abs(logprobs - ref_logprobs)


def straight_through(estimator: KLEstimator) -> KLEstimator:
    """The value of `estimator` with the gradient of k2: on average the KL's, as the value's own is not."""

    def estimate(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
        k2 = kl_k2(logprobs, ref_logprobs)
        value = jax.lax.stop_gradient(estimator(logprobs, ref_logprobs))
        return k2 - jax.lax.stop_gradient(k2) + value

    return estimate


KL_ESTIMATORS: dict[str, KLEstimator] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "abs": kl_abs,
    "k1+": straight_through(kl_k1),
    "k3+": straight_through(kl_k3),
    "abs+": straight_through(kl_abs),
}
"""`algorithm.kl_estimator` -> function. The names are verl's; "k2+" would be "k2"."""


def kl_of_tokens(
    logprobs: jax.Array, ref_logprobs: jax.Array, completion_mask: jax.Array, estimator: KLEstimator
) -> jax.Array:
    """The KL of each completion token, 0 elsewhere, whatever the log-probabilities are there; all [B, T] float32.

    Times the coefficient it is the penalty in the reward (`algorithm.kl_in` = "reward"), with the old
    log-probabilities as those of the policy: arXiv:1909.08593 (2), as verl does.
    """
    kl = estimator(
        where_completion(logprobs, completion_mask), where_completion(ref_logprobs, completion_mask)
    )
    return kl * completion_mask


def adapted_kl_coef(
    kl_coef: float, kl: float, *, target: float, horizon: float, num_completions: int
) -> float:
    """The adaptive coefficient of the next step: larger where the policy is further away than wanted.

        kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * num_completions / horizon)

    arXiv:1909.08593 (section 2.2), with verl's horizon: completions after which the coefficient may have
    changed by about a fifth of itself.

    Args:
        kl: KL of the step, nats a token. One that is not finite changes nothing.
        target: nats a token, above 0.
        horizon: completions, more than `num_completions` / 5.
        num_completions: of the step.
    """
    if not abs(kl) < float("inf"):
        return kl_coef
    error = min(max(kl / target - 1, -ADAPTIVE_BOUND), ADAPTIVE_BOUND)
    return kl_coef * (1 + error * num_completions / horizon)
