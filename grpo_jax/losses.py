"""The mathematics of one update: ratio, clipping, KL, aggregation.

Log-probabilities enter, never models, so that four numbers make a test; a scalar to differentiate leaves,
with the metrics of the update. The aggregated loss is

    L = sum_bt w[b, t] * (c[b, t] * surrogate[b, t] + kl_coef * KL[b, t] - entropy_coef * entropy[b, t])

where `loss_weights` takes w from the mask of the whole mini-batch, and c is 1 or, to correct the difference
between sampler and trainer, `sampler_correction`. Denominators live in w alone; hence the
losses of micro-batches, their gradients and their metrics add up to those of the mini-batch.

Columns outside the completion (prompt, padding, rows of padding) may hold anything, NaN and -inf included:
inputs are replaced there before any arithmetic, since 0 * NaN = NaN, forward and backward.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.config import AlgorithmSection
from grpo_jax.types import Metrics, TrainBatch

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to [-20, 20], as in verl: exp(20) is 5e8, far from overflow."""

K3_BOUND = 10.0
"""The k3 estimate is clamped to [-10, 10], as in verl: exp(log-ratio) is heavy-tailed."""

FIRST_UPDATE = "first_update:"
"""Begins the name of a metric that later updates of a step cannot measure, the policy having moved. Merging
the updates (`metrics.merge_updates`) takes the value of the first one and drops the prefix."""


@flax.struct.dataclass
class LossMetrics:
    """What one micro-batch adds to the metrics of its update. All zeros is the neutral element of `merge`."""

    loss: jax.Array
    """float32 scalar; L above."""
    tokens: jax.Array
    """float32 scalar; completion tokens."""
    token_sums: dict[str, jax.Array]
    """Metric name -> float32 scalar, summed over completion tokens."""
    token_maxima: dict[str, jax.Array]
    """Metric name -> float32 scalar >= 0, the largest among completion tokens."""

    def merge(self, other: "LossMetrics") -> "LossMetrics":
        """Returns the metrics of both micro-batches together."""
        summed = jax.tree.map(jnp.add, self, other)
        maxima = jax.tree.map(jnp.maximum, self.token_maxima, other.token_maxima)
        return dataclasses.replace(summed, token_maxima=maxima)

    def summary(self) -> Metrics:
        """Returns the metrics by name: the loss as "actor/loss", means over tokens, maxima."""
        tokens = jnp.maximum(self.tokens, 1)
        means = {name: value / tokens for name, value in self.token_sums.items()}
        return {"actor/loss": self.loss, **means, **self.token_maxima}


def _clamp(x: jax.Array, bound: float) -> jax.Array:
    """Clamps to [-bound, bound]. The gradient on a bound is 1, as in PyTorch; `jnp.clip` gives 1/2 there."""
    return jnp.where(x > bound, bound, jnp.where(x < -bound, -bound, x))


def _where_completion(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `x` on completion tokens and 0 elsewhere, whatever `x` is there; so is its gradient."""
    return jnp.where(mask > 0, x, 0.0)


def log_ratio(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
    """Returns log p - log p_old, clamped to [-20, 20]. All three are [B, T] float32."""
    return _clamp(logprobs - old_logprobs, LOG_RATIO_BOUND)


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The clipped policy loss of each token.

        r = p / p_old,   L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   where A < 0: min(L, -A c)

    PPO, arXiv:1707.06347 (7); clip_high above clip_low: DAPO, arXiv:2503.14476; c is `dual_clip`, a bound
    on the loss of a bad token that became likely: arXiv:1912.09729 (5).

    Args:
        logprobs, old_logprobs, advantages: [B, T] float32.
        clip_low: in (0, 1).
        clip_high: above 0.
        dual_clip: above 1; 0: no such bound.

    Returns:
        loss: [B, T] float32.
        clipped: [B, T] float32; 1 where the clipped ratio decides, and the gradient is 0.
        dual_clipped: [B, T] float32; 1 where `dual_clip` decides, and the gradient is 0.
    """
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs))
    loss = -advantages * ratio
    loss_clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    # `where` and not `maximum`, which halves gradients on a tie: a ratio on a bound is not clipped.
    clipped = loss_clipped > loss
    loss = jnp.where(clipped, loss_clipped, loss)
    if dual_clip == 0:
        return loss, clipped.astype(jnp.float32), jnp.zeros_like(loss)
    bound = -advantages * dual_clip
    dual_clipped = (advantages < 0) & (loss > bound)
    loss = jnp.where(dual_clipped, bound, loss)
    return loss, clipped.astype(jnp.float32), dual_clipped.astype(jnp.float32)


def sampler_correction(old_logprobs: jax.Array, sampler_logprobs: jax.Array, threshold: float) -> jax.Array:
    """The truncated importance weight of each token, a constant factor of its policy loss.

        c = stop_gradient(min(p_old / p_sampler, threshold))

    Tokens come from the engine's distribution p_sampler, the policy gradient wants them from the trainer's
    p_old; the cap trades a little bias for a bounded variance. Truncated importance sampling (TIS):
    fengyao.notion.site/off-policy-rl, and verl's `rollout_is=token`. The log-ratio is clamped as in `log_ratio`.

    Args:
        old_logprobs, sampler_logprobs: [B, T] float32.
        threshold: above 0.

    Returns:
        [B, T] float32 in (0, threshold].
    """
    ratio = jnp.exp(log_ratio(old_logprobs, sampler_logprobs))
    return jax.lax.stop_gradient(jnp.minimum(ratio, threshold))


# Estimators of KL(p || p_ref) from tokens sampled from p (joschu.net/blog/kl-approx.html).
# All take and return [B, T] float32.


def kl_k1(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """log(p / p_ref): unbiased, of either sign. As a loss its gradient has mean 0: it is for the reward."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """(log(p / p_ref))^2 / 2: biased, never negative, low variance."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def kl_k3(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """p_ref / p - 1 - log(p_ref / p): unbiased but for the clamps, never negative. arXiv:2402.03300 (4)."""
    log_inverse_ratio = log_ratio(ref_logprobs, logprobs)
    # expm1: near the reference, where a run begins, exp(x) - 1 would keep no correct digit of x^2 / 2.
    return _clamp(jnp.expm1(log_inverse_ratio) - log_inverse_ratio, K3_BOUND)


def kl_abs(logprobs: jax.Array, ref_logprobs: jax.Array) -> jax.Array:
    """|log(p / p_ref)|: biased, never negative."""
    return jnp.abs(logprobs - ref_logprobs)


KL_ESTIMATORS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "k1": kl_k1,
    "k2": kl_k2,
    "k3": kl_k3,
    "abs": kl_abs,
}
"""`algorithm.kl_estimator` -> function."""


def loss_weights(completion_mask: jax.Array, mode: str, norm: float) -> jax.Array:
    """The weight w of each token, such that sum(w * loss) aggregates the loss of a whole mini-batch.

        token-mean                 1 / (completion tokens)                          DAPO, arXiv:2503.14476
        seq-mean-token-sum         1 / (completions)
        seq-mean-token-mean        1 / (completions * tokens of this completion)    GRPO, arXiv:2402.03300
        seq-mean-token-sum-norm    1 / (completions * norm)                         Dr. GRPO, arXiv:2503.20783

    Args:
        completion_mask: [B, T] float32 of 0 and 1, one completion a row. Rows without completion tokens
            (padding) count nowhere.
        mode: one of the names above (`algorithm.loss_agg`).
        norm: tokens, above 0; read by the last mode only.

    Returns:
        [B, T] float32; 0 outside the completions, all 0 for a mask that is all 0.
    """
    lengths = jnp.sum(completion_mask, axis=1, keepdims=True)
    num_completions = jnp.maximum(jnp.sum(lengths > 0), 1)
    if mode == "token-mean":
        return completion_mask / jnp.maximum(jnp.sum(lengths), 1)
    if mode == "seq-mean-token-sum":
        return completion_mask / num_completions
    if mode == "seq-mean-token-mean":
        return completion_mask / (num_completions * jnp.maximum(lengths, 1))
    if mode == "seq-mean-token-sum-norm":
        return completion_mask / (num_completions * norm)
    raise ValueError(f"loss_agg={mode!r} is not an aggregation mode")


def grpo_loss(
    logprobs: jax.Array,
    entropy: jax.Array,
    batch: TrainBatch,
    weights: jax.Array,
    algorithm: AlgorithmSection,
) -> tuple[jax.Array, LossMetrics]:
    """The loss of a (micro-)batch of completions, as in the head of this module.

    Args:
        logprobs: [B, T] float32, of the policy that is differentiated.
        entropy: [B, T] float32, of its distribution at each token.
        batch: `old_logprobs` None means that the policy has not moved since: they are `logprobs`.
            `ref_logprobs` None means that there is no KL term.
        weights: [B, T] float32, this batch's rows of the mini-batch's `loss_weights`.
        algorithm: the `algorithm` section of the configuration.

    Returns:
        The loss, float32 scalar, and the metrics; together the arguments of `jax.grad(..., has_aux=True)`.
    """
    mask = batch.completion_mask
    logprobs = _where_completion(logprobs, mask)
    entropy = _where_completion(entropy, mask)
    if batch.old_logprobs is None:
        old_logprobs = jax.lax.stop_gradient(logprobs)
    else:
        old_logprobs = _where_completion(batch.old_logprobs, mask)
    sampler_logprobs = _where_completion(batch.sampler_logprobs, mask)

    per_token, clipped, dual_clipped = clipped_surrogate(
        logprobs,
        old_logprobs,
        _where_completion(batch.advantages, mask),
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        dual_clip=algorithm.dual_clip,
    )
    values = {
        "actor/entropy": entropy,
        "actor/pg_clipfrac": clipped,
        "actor/pg_clipfrac_lower": dual_clipped,
        "actor/ppo_kl": -log_ratio(logprobs, old_logprobs),
    }
    if algorithm.old_logprobs == "sampler":  # then only the first update still finds the policy that sampled
        mismatch, largest = _sampler_mismatch(jax.lax.stop_gradient(logprobs), sampler_logprobs, FIRST_UPDATE)
    else:
        mismatch, largest = _sampler_mismatch(old_logprobs, sampler_logprobs)
    values |= mismatch
    if algorithm.rollout_is == "token":
        cap = algorithm.rollout_is_threshold
        correction = sampler_correction(old_logprobs, sampler_logprobs, cap)
        per_token *= correction
        values["rollout_corr/is_weight_mean"] = correction
        values["rollout_corr/is_clipped_frac"] = (correction >= cap).astype(jnp.float32)
        # Outside the completion the weight is 1, which may be more than any within.
        largest["rollout_corr/is_weight_max"] = jnp.max(correction * mask)
    if batch.ref_logprobs is not None:
        kl_estimator = KL_ESTIMATORS[algorithm.kl_estimator]
        kl = kl_estimator(logprobs, _where_completion(batch.ref_logprobs, mask))
        values["kl/mean"] = kl
        if algorithm.kl_in == "loss":
            per_token += algorithm.kl_coef * kl
    if algorithm.entropy_coef:
        per_token -= algorithm.entropy_coef * entropy
    loss = jnp.sum(weights * per_token)
    sums = {name: jnp.sum(value * mask) for name, value in values.items()}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima=largest)


def _sampler_mismatch(
    trainer_logprobs: jax.Array, sampler_logprobs: jax.Array, prefix: str = ""
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """How far the trainer's probabilities are from those that the engine sampled with.

    The differences of probabilities are verl's metrics. exp |log p_trainer - log p_sampler|, 1 where both
    agree, is NeMo-RL's (docs.nvidia.com/nemo/rl, "Add New Models").

    Args:    both [B, T] float32, equal outside the completion; `prefix` begins each name.
    Returns: [B, T] float32 arrays by metric name, and maxima by metric name.
    """
    difference = jnp.abs(jnp.exp(trainer_logprobs) - jnp.exp(sampler_logprobs))
    values = {
        f"{prefix}training/rollout_probs_diff_mean": difference,
        f"{prefix}training/token_mult_prob_error": jnp.exp(jnp.abs(trainer_logprobs - sampler_logprobs)),
    }
    return values, {f"{prefix}training/rollout_probs_diff_max": jnp.max(difference)}


def nll_loss(
    logprobs: jax.Array, entropy: jax.Array, batch: TrainBatch, weights: jax.Array
) -> tuple[jax.Array, LossMetrics]:
    """Negative log-likelihood, for supervised fine-tuning: L = -sum_bt w[b, t] * logprobs[b, t].

    Args:    as `grpo_loss`, so that one update step serves both; `entropy` is only reported.
    Returns: as `grpo_loss`.
    """
    mask = batch.completion_mask
    loss = -jnp.sum(weights * _where_completion(logprobs, mask))
    sums = {"actor/entropy": jnp.sum(_where_completion(entropy, mask))}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima={})


def kl_penalized_rewards(
    rewards: jax.Array,
    old_logprobs: jax.Array,
    ref_logprobs: jax.Array,
    completion_mask: jax.Array,
    *,
    kl_coef: float,
    estimator: str,
) -> jax.Array:
    """Takes the KL penalty of a completion off its reward (`algorithm.kl_in` = "reward").

        r'[p, g] = r[p, g] - kl_coef * sum_t KL[p * G + g, t]        arXiv:1909.08593 (2), as verl does

    Args:
        rewards: [P, G] float32.
        old_logprobs, ref_logprobs, completion_mask: [B, T] float32 in group order; rows beyond P * G are
            padding and stay unread.
        kl_coef: factor, >= 0.
        estimator: key of `KL_ESTIMATORS`.

    Returns:
        [P, G] float32.
    """
    rewards = jnp.asarray(rewards, jnp.float32)
    if old_logprobs.shape[0] < rewards.size:
        raise ValueError(
            f"rewards {rewards.shape} need more rows than those of logprobs {old_logprobs.shape}"
        )
    kl = KL_ESTIMATORS[estimator](
        _where_completion(old_logprobs, completion_mask), _where_completion(ref_logprobs, completion_mask)
    )
    kl_of_completion = jnp.sum(kl * completion_mask, axis=1)[: rewards.size]
    return rewards - kl_coef * kl_of_completion.reshape(rewards.shape)
