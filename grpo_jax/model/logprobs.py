"""Log-probabilities and entropy of given tokens, straight from hidden states, a chunk of columns at a time.

The logits of all tokens, [B, T, V], would be the largest array of the whole training step (one row of
1,024 tokens of Qwen2.5 takes 0.6 GB in float32). Only one chunk of them exists at a time, and the backward
pass computes each chunk again.
"""

import jax
import jax.numpy as jnp

from grpo_jax.model.sharding import constrain


def token_logprobs(
    hidden: jax.Array, head: jax.Array, tokens: jax.Array, *, temperature: float, chunk_columns: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each token given those before it, and the entropy of the distribution it came from.

    Args:
        hidden: [B, T, D], final hidden states.
        head: [V, D].
        tokens: [B, T] int32.
        temperature: divides the logits, as in the sampler.
        chunk_columns: columns whose logits may exist at once, >= 1.
    Returns:
        logprobs, entropy: [B, T] float32, aligned with `tokens`: column t is about tokens[:, t]; column 0 is 0.
    """
    batch, length, _ = hidden.shape
    chunks = _num_chunks(length, chunk_columns)
    targets = jnp.roll(tokens, -1, axis=1)  # column t predicts token t + 1; the last column is dropped below
    head = head.astype(hidden.dtype)

    @jax.checkpoint
    def one_chunk(hidden: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", None, "vocab") / temperature
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        entropy = normalizer - jnp.sum(jnp.exp(logits - normalizer[..., None]) * logits, axis=-1)
        return chosen - normalizer, entropy

    if chunks == 1:
        logprobs, entropy = one_chunk(hidden, targets)
    else:
        columns = length // chunks
        split = lambda x: jnp.moveaxis(x.reshape(batch, chunks, columns, *x.shape[2:]), 1, 0)
        _, (logprobs, entropy) = jax.lax.scan(
            lambda carry, xs: (carry, one_chunk(*xs)), None, (split(hidden), split(targets))
        )
        logprobs, entropy = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in (logprobs, entropy))
    shift = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return shift(logprobs), shift(entropy)


def _num_chunks(length: int, chunk_columns: int) -> int:
    """The smallest number of equal chunks that are no wider than `chunk_columns`."""
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= max(1, chunk_columns))
