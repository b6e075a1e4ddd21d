"""Corrections of the difference between sampler and trainer: importance weights, masks, rejection.

Tokens come from the engine's distribution p_sampler; the policy gradient wants them from the trainer's p_old.
Everything here is a constant factor of the policy loss, [R, T] float32, without a gradient; the KL and the entropy
are left alone, and the denominators of the loss as well: what gets the factor 0 still counts there.
"""

import math

import jax
import jax.numpy as jnp

from grpo_jax.algorithm.ratios import LOG_RATIO_BOUND, clamp, log_ratio, sequence_means, sequence_sums
from grpo_jax.config import AlgorithmSection


def importance_ratio(
    old_logprobs: jax.Array, sampler_logprobs: jax.Array, segment_ids: jax.Array, level: str
) -> jax.Array:
    """p_old / p_sampler of each token, or of its whole completion.

        token       p_old / p_sampler                 off-policy by the tokens before it, low variance
        sequence    prod_t p_old / p_sampler          unbiased, high variance

    Args:
        old_logprobs, sampler_logprobs: [R, T] float32, equal outside the completions.
        segment_ids: [R, T] int32.
        level: "token" or "sequence".

    Returns:
        [R, T] float32; the log is clamped to [-20, 20], as in verl.
    """
    if level == "token":
        return jnp.exp(log_ratio(old_logprobs, sampler_logprobs))
    of_sequence = sequence_sums(old_logprobs - sampler_logprobs, segment_ids)
    return jnp.exp(clamp(of_sequence, LOG_RATIO_BOUND))


def truncated(ratio: jax.Array, high: float) -> jax.Array:
    """min(ratio, high): truncated importance sampling (TIS), fengyao.notion.site/off-policy-rl."""
    return jax.lax.stop_gradient(jnp.minimum(ratio, high))


def masked(ratio: jax.Array, low: float, high: float) -> jax.Array:
    """The ratio within [low, high], and 0 outside: IcePop, ringtech.notion.site/icepop.

    A cap would still follow tokens on which sampler and trainer disagree; these are left out.
    """
    return jax.lax.stop_gradient(jnp.where((ratio >= low) & (ratio <= high), ratio, 0.0))


def kept_sequences(
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    *,
    statistic: str,
    low: float,
    high: float,
) -> jax.Array:
    """Which completions are near enough to what the trainer would have sampled: sequence rejection.

        seq_sum_k1     prod_t p_old / p_sampler            within [low, high]
        seq_mean_k1    the geometric mean of the ratios    within [low, high]: does not depend on the length

    richardli.xyz/rl-collapse. A completion is kept or rejected as a whole.

    Args:    as `importance_ratio`; mask: [R, T] float32, 1 on completion tokens; 0 < low < high.
    Returns: [R, T] float32 of 0 and 1.
    """
    log_ratios = old_logprobs - sampler_logprobs
    if statistic == "seq_sum_k1":
        of_sequence = sequence_sums(log_ratios * mask, segment_ids)
    else:
        of_sequence = sequence_means(log_ratios, mask, segment_ids)
    is_kept = (of_sequence >= math.log(low)) & (of_sequence <= math.log(high))
    return jax.lax.stop_gradient(is_kept.astype(jnp.float32))


def correction(
    old_logprobs: jax.Array,
    sampler_logprobs: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array,
    algorithm: AlgorithmSection,
    ages: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
    """The factor of the policy loss, as `rollout_is`, `rollout_rs` and `max_token_age` of the section want it.

    Args:
        old_logprobs, sampler_logprobs: [R, T] float32, 0 outside the completions.
        mask: [R, T] float32; segment_ids: [R, T] int32; ages: [R, T] int32, as `TrainBatch.token_ages`.

    Returns:
        The factor, [R, T] float32; arrays of that shape by metric name, to be averaged over completion tokens; and
        maxima by metric name.
    """
    factor, values, maxima = jnp.ones_like(old_logprobs), {}, {}
    if algorithm.rollout_is != "none":
        level, _, is_masked = algorithm.rollout_is.partition("_")
        low, high = algorithm.rollout_is_low, algorithm.rollout_is_threshold
        ratio = importance_ratio(old_logprobs, sampler_logprobs, segment_ids, level)
        if is_masked:
            factor = masked(ratio, low, high)
            values["rollout_corr/is_masked_frac"] = (factor == 0).astype(jnp.float32)
        else:
            factor = truncated(ratio, high)
            values["rollout_corr/is_clipped_frac"] = (factor >= high).astype(jnp.float32)
        values["rollout_corr/is_weight_mean"] = factor
        # Outside the completion the weight is 1, which may be more than any within.
        maxima["rollout_corr/is_weight_max"] = jnp.max(factor * mask)
    if algorithm.rollout_rs != "none":
        kept = kept_sequences(
            old_logprobs,
            sampler_logprobs,
            mask,
            segment_ids,
            statistic=algorithm.rollout_rs,
            low=algorithm.rollout_rs_low,
            high=algorithm.rollout_rs_high,
        )
        values["rollout_corr/rs_rejected_frac"] = 1 - kept
        factor *= kept
    if algorithm.max_token_age >= 0:
        assert ages is not None, "sampled tokens have an age"
        is_old = (ages > algorithm.max_token_age).astype(jnp.float32)
        values["rollout_corr/too_old_frac"] = is_old
        factor *= 1 - is_old
    return factor, values, maxima


def leaves_out(algorithm: AlgorithmSection) -> bool:
    """Whether the factor of a token may be 0."""
    is_masked = algorithm.rollout_is.endswith("_mask")
    return is_masked or algorithm.rollout_rs != "none" or algorithm.max_token_age >= 0
