"""The loss of one update: policy loss, KL, entropy, aggregation, and the metrics that go with them.

Log-probabilities enter, never models, so that four numbers make a test. A scalar to differentiate leaves, with the
metrics of the update. The aggregated loss is

    L = sum_rt w[r, t] * (c[r, t] * policy_loss[r, t] + kl_coef * KL[r, t] - entropy_coef * entropy[r, t])

where `loss_weights` makes w from the mask of the whole mini-batch, the policy loss is one of `policy_losses.py`,
KL one of `kl.py`, and c is 1 or, to correct the difference between sampler and trainer, `corrections.correction`.
Only w has denominators, so the losses of micro-batches, their gradients and their metrics add up to those of the
mini-batch.

A row may hold several sequences, one after the other, numbered by `segment_ids`; only `loss_weights` wants one
completion a row. Columns outside the completions (prompt, padding, rows of padding) may hold anything, NaN and
-inf included: inputs are replaced there before any arithmetic, since 0 * NaN = NaN, forward and backward.
"""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.corrections import correction
from grpo_jax.algorithm.policy_losses import PolicyTokens
from grpo_jax.algorithm.ratios import log_ratio, where_completion
from grpo_jax.config import AlgorithmSection
from grpo_jax.types import Metrics, TrainBatch

MISMATCH_MEANS = ("training/rollout_probs_diff_mean", "training/token_mult_prob_error")
MISMATCH_MAX = "training/rollout_probs_diff_max"
SUMMED = ("actor/skipped_updates", "actor/overflows")
MAXIMA = (MISMATCH_MAX, "rollout_corr/is_weight_max")
"""How the metrics of several updates become those of a step: sums, maxima, and means for all others."""


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

    def merge_over(self, axis: str) -> "LossMetrics":
        """Returns the metrics of all devices along a mesh axis together, within `jax.shard_map`."""
        summed = jax.lax.psum(self, axis)
        return dataclasses.replace(summed, token_maxima=jax.lax.pmax(self.token_maxima, axis))

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
    logprobs: jax.Array, entropy: jax.Array, batch: TrainBatch, algorithm: Algorithm
) -> tuple[jax.Array, LossMetrics]:
    """The loss of a (micro-)batch of completions, by the equation at the head of this module.

    Args:
        logprobs: [R, T] float32, of the policy that is differentiated.
        entropy: [R, T] float32, of its distribution at each token.
        batch: with `loss_weights`, those of the whole mini-batch. `old_logprobs` None: the policy has not moved
            since, so they are `logprobs`. `ref_logprobs` None: no KL term. `kl_coef` None: its coefficient is
            `algorithm.kl_coef`.

    Returns:
        The loss, float32 scalar, and the metrics: the result that `jax.grad(..., has_aux=True)` wants.
    """
    section, mask, segment_ids = algorithm.section, batch.completion_mask, batch.segment_ids
    logprobs = where_completion(logprobs, mask)
    entropy = where_completion(entropy, mask)
    old_logprobs, sampler_logprobs = _fixed_logprobs(logprobs, batch)
    tokens = _policy_tokens(logprobs, old_logprobs, batch)
    per_token, clipped, clipped_lower = algorithm.policy_loss(tokens, section)
    values = {
        "actor/entropy": entropy,
        "actor/pg_clipfrac": clipped,
        "actor/pg_clipfrac_lower": clipped_lower,
        "actor/ppo_kl": -log_ratio(logprobs, old_logprobs),
    }
    trainer_logprobs = jax.lax.stop_gradient(logprobs) if section.old_logprobs == "sampler" else old_logprobs
    mismatch, largest = _sampler_mismatch(trainer_logprobs, sampler_logprobs)
    fixed = (old_logprobs, sampler_logprobs, mask, segment_ids)
    factor, corrected, maxima = correction(*fixed, section, batch.token_ages)
    values, largest = values | mismatch | corrected, largest | maxima
    per_token *= factor
    if batch.ref_logprobs is not None:
        kl = algorithm.kl(logprobs, where_completion(batch.ref_logprobs, mask))
        values["kl/mean"] = kl
        if section.kl_in == "loss":
            per_token += _kl_coef(batch, section) * kl
    if section.entropy_coef:
        per_token -= section.entropy_coef * entropy
    loss = jnp.sum(batch.loss_weights * per_token)
    sums = {name: jnp.sum(value * mask) for name, value in values.items()}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima=largest)


def tokens_that_weigh(logprobs: jax.Array, batch: TrainBatch, section: AlgorithmSection) -> jax.Array:
    """[R, T] bool: the tokens with a factor above 0 in the policy loss. Args: as `grpo_loss`."""
    mask, segment_ids = batch.completion_mask, batch.segment_ids
    fixed = _fixed_logprobs(where_completion(logprobs, mask), batch)
    factor, *_ = correction(*fixed, mask, segment_ids, section, batch.token_ages)
    return (factor > 0) & (mask > 0)


def tokens_clipped(logprobs: jax.Array, batch: TrainBatch, algorithm: Algorithm) -> jax.Array:
    """[R, T] bool: the tokens where a bound has changed the policy loss. Args: as `grpo_loss`."""
    logprobs = where_completion(logprobs, batch.completion_mask)
    tokens = _policy_tokens(logprobs, _fixed_logprobs(logprobs, batch)[0], batch)
    _, clipped, clipped_lower = algorithm.policy_loss(tokens, algorithm.section)
    return (clipped + clipped_lower > 0) & (batch.completion_mask > 0)


def _policy_tokens(logprobs: jax.Array, old_logprobs: jax.Array, batch: TrainBatch) -> PolicyTokens:
    """What the policy loss reads. Args: both 0 outside the completions."""
    mask, advantages = batch.completion_mask, where_completion(batch.advantages, batch.completion_mask)
    return PolicyTokens(logprobs, old_logprobs, advantages, mask, batch.segment_ids, batch.token_ages)


def _fixed_logprobs(logprobs: jax.Array, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
    """The old and the sampler's log-probabilities. Args: logprobs: the policy's, 0 outside the completions."""
    mask, old = batch.completion_mask, batch.old_logprobs
    old_logprobs = jax.lax.stop_gradient(logprobs) if old is None else where_completion(old, mask)
    return old_logprobs, where_completion(batch.sampler_logprobs, mask)


def _kl_coef(batch: TrainBatch, section: AlgorithmSection) -> jax.Array | float:
    """The coefficient of the KL: an array where it changes from step to step, which compiles nothing again."""
    if batch.kl_coef is None:
        return section.kl_coef
    return where_completion(batch.kl_coef, batch.completion_mask)


def _sampler_mismatch(
    trainer_logprobs: jax.Array, sampler_logprobs: jax.Array
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """How far the trainer's probabilities are from those that the engine sampled with.

    The differences of probabilities are verl's metrics. exp |log p_trainer - log p_sampler|, 1 where both
    agree, is NeMo-RL's (docs.nvidia.com/nemo/rl, "Add New Models").

    Args:    both [R, T] float32, equal outside the completions.
    Returns: [R, T] float32 arrays by metric name, and maxima by metric name.
    """
    difference = jnp.abs(jnp.exp(trainer_logprobs) - jnp.exp(sampler_logprobs))
    error = jnp.exp(jnp.abs(trainer_logprobs - sampler_logprobs))
    means = dict(zip(MISMATCH_MEANS, (difference, error), strict=True))
    return means, {MISMATCH_MAX: jnp.max(difference)}


def merge_updates(updates: Sequence[Metrics], section: AlgorithmSection) -> Metrics:
    """The metrics of several updates as those of one step: means, `SUMMED`, and the largest of `MAXIMA`.

    Where the sampler's log-probabilities are the old ones, only the first update meets the policy that sampled:
    the mismatch of sampler and trainer is the first update's.
    """
    first_alone = (*MISMATCH_MEANS, MISMATCH_MAX) if section.old_logprobs == "sampler" else ()
    merged: Metrics = {}
    for name in updates[0]:
        values = np.array([float(update[name]) for update in updates])
        if name in first_alone:
            merged[name] = float(values[0])
        else:
            combine = np.sum if name in SUMMED else np.max if name in MAXIMA else np.mean
            merged[name] = float(combine(values))
    return merged


def nll_loss(logprobs: jax.Array, entropy: jax.Array, batch: TrainBatch) -> tuple[jax.Array, LossMetrics]:
    """Negative log-likelihood, for supervised fine-tuning: L = -sum_rt w[r, t] * logprobs[r, t].

    Args:    as `grpo_loss`, so that one update step serves both; `entropy` is only reported.
    Returns: as `grpo_loss`.
    """
    mask = batch.completion_mask
    loss = -jnp.sum(batch.loss_weights * where_completion(logprobs, mask))
    sums = {"actor/entropy": jnp.sum(where_completion(entropy, mask))}
    return loss, LossMetrics(loss=loss, tokens=jnp.sum(mask), token_sums=sums, token_maxima={})
