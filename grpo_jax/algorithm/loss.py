"""The mathematics of one update: policy loss, KL, entropy, aggregation.

Log-probabilities enter, never models, so that four numbers make a test; a scalar to differentiate leaves,
with the metrics of the update. The aggregated loss is

    L = sum_rt w[r, t] * (c[r, t] * policy_loss[r, t] + kl_coef * KL[r, t] - entropy_coef * entropy[r, t])

where `loss_weights` takes w from the mask of the whole mini-batch, the policy loss is one of `policy_losses.py`,
KL one of `kl.py`, and c is 1 or, to correct the difference between sampler and trainer, `corrections.correction`.
Denominators live in w alone; hence the losses of micro-batches, their gradients and their metrics add up to
those of the mini-batch.

A row may hold several sequences, one after the other, which `segment_ids` number; only `loss_weights` wants one
completion a row. Columns outside the completions (prompt, padding, rows of padding) may hold anything, NaN and
-inf included: inputs are replaced there before any arithmetic, since 0 * NaN = NaN, forward and backward.
"""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.algorithm.corrections import correction
from grpo_jax.algorithm.kl import KL_ESTIMATORS
from grpo_jax.algorithm.policy_losses import POLICY_LOSSES, PolicyTokens
from grpo_jax.algorithm.ratios import log_ratio, where_completion
from grpo_jax.config import AlgorithmSection
from grpo_jax.types import Metrics, TrainBatch

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
        logprobs: [R, T] float32, of the policy that is differentiated.
        entropy: [R, T] float32, of its distribution at each token.
        batch: `old_logprobs` None means that the policy has not moved since: they are `logprobs`.
            `ref_logprobs` None means that there is no KL term; `kl_coef` None, that its coefficient is the
            configuration's.
        weights: [R, T] float32, this batch's rows of the mini-batch's `loss_weights`.
        algorithm: the `algorithm` section of the configuration.

    Returns:
        The loss, float32 scalar, and the metrics; together the arguments of `jax.grad(..., has_aux=True)`.
    """
    mask, segment_ids = batch.completion_mask, batch.segment_ids
    logprobs = where_completion(logprobs, mask)
    entropy = where_completion(entropy, mask)
    if batch.old_logprobs is None:
        old_logprobs = jax.lax.stop_gradient(logprobs)
    else:
        old_logprobs = where_completion(batch.old_logprobs, mask)
    sampler_logprobs = where_completion(batch.sampler_logprobs, mask)
    advantages = where_completion(batch.advantages, mask)

    tokens = PolicyTokens(logprobs, old_logprobs, advantages, mask, segment_ids)
    per_token, clipped, clipped_lower = POLICY_LOSSES[algorithm.policy_loss](tokens, algorithm)
    values = {
        "actor/entropy": entropy,
        "actor/pg_clipfrac": clipped,
        "actor/pg_clipfrac_lower": clipped_lower,
        "actor/ppo_kl": -log_ratio(logprobs, old_logprobs),
    }
    if algorithm.old_logprobs == "sampler":  # then only the first update still finds the policy that sampled
        mismatch, largest = _sampler_mismatch(jax.lax.stop_gradient(logprobs), sampler_logprobs, FIRST_UPDATE)
    else:
        mismatch, largest = _sampler_mismatch(old_logprobs, sampler_logprobs)
    factor, corrected, maxima = correction(old_logprobs, sampler_logprobs, mask, segment_ids, algorithm)
    values, largest = values | mismatch | corrected, largest | maxima
    per_token *= factor
    if batch.ref_logprobs is not None:
        kl = KL_ESTIMATORS[algorithm.kl_estimator](logprobs, where_completion(batch.ref_logprobs, mask))
        values["kl/mean"] = kl
        if algorithm.kl_in == "loss":
            per_token += _kl_coef(batch, algorithm) * kl
    if algorithm.entropy_coef:
        per_token -= algorithm.entropy_coef * entropy
    loss = jnp.sum(weights * per_token)
    sums = {name: jnp.sum(value * mask) for name, value in values.items()}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima=largest)


def _kl_coef(batch: TrainBatch, algorithm: AlgorithmSection) -> jax.Array | float:
    """The coefficient of the KL: an array where it changes from step to step, which then compiles nothing anew."""
    if batch.kl_coef is None:
        return algorithm.kl_coef
    return where_completion(batch.kl_coef, batch.completion_mask)


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
    loss = -jnp.sum(weights * where_completion(logprobs, mask))
    sums = {"actor/entropy": jnp.sum(where_completion(entropy, mask))}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima={})
