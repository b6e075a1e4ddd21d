"""Ratios of probabilities, of tokens and of whole sequences: what losses, KL and corrections share.

Rows may hold several sequences, one after the other, which `segment_ids` number; every array is [R, T].
"""

import jax
import jax.numpy as jnp

LOG_RATIO_BOUND = 20.0
"""Log-ratios are clamped to [-20, 20], as in verl: exp(20) is 5e8, far from overflow."""


def clamp(x: jax.Array, bound: float) -> jax.Array:
    """Clamps to [-bound, bound]. The gradient on a bound is 1, as in PyTorch; `jnp.clip` gives 1/2 there."""
    return jnp.where(x > bound, bound, jnp.where(x < -bound, -bound, x))


def where_completion(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns `x` on completion tokens and 0 elsewhere, whatever `x` is there; so is its gradient."""
    return jnp.where(mask > 0, x, 0.0)


def log_ratio(logprobs: jax.Array, old_logprobs: jax.Array) -> jax.Array:
    """Returns log p - log p_old, clamped to [-20, 20]. All three are [R, T] float32."""
    return clamp(logprobs - old_logprobs, LOG_RATIO_BOUND)


def sequence_sums(x: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Gives each token the sum of `x` over its own sequence.

    Two scans of logarithmic depth: one adds up to the end of each sequence, the other carries that total back
    to its beginning. Every token of a sequence therefore gets the very same bits, and, without a scatter, the
    same bits each time.

    Args:
        x: [R, T] floating point, finite.
        segment_ids: [R, T] int; tokens of one sequence are neighbours and share an id, 0 is padding.

    Returns:
        [R, T], of the dtype of `x`; 0 on padding.
    """
    edge = segment_ids[:, 1:] != segment_ids[:, :-1]
    end = jnp.ones_like(segment_ids[:, :1], bool)
    is_first = jnp.concatenate([end, edge], axis=1)
    is_last = jnp.concatenate([edge, end], axis=1)

    def add(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0] + right[0]), left[1] | right[1]

    def carry(
        left: tuple[jax.Array, jax.Array], right: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        return jnp.where(right[1], right[0], left[0]), left[1] | right[1]

    running, _ = jax.lax.associative_scan(add, (x, is_first), axis=1)
    totals, _ = jax.lax.associative_scan(carry, (running, is_last), axis=1, reverse=True)
    return jnp.where(segment_ids > 0, totals, 0)


def sequence_means(x: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Gives each token the mean of `x` over the completion tokens of its own sequence.

    Args:    x, mask: [R, T] float32, the mask of 0 and 1; segment_ids: as in `sequence_sums`.
    Returns: [R, T] float32; 0 on padding and in a sequence without a completion token.
    """
    counts = sequence_sums(mask, segment_ids)
    return sequence_sums(x * mask, segment_ids) / jnp.maximum(counts, 1)
