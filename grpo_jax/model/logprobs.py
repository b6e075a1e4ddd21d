"""Log-probabilities and entropy of given tokens, straight from hidden states, a chunk of columns at a time.

The logits of all tokens, [B, T, V], would be the largest array of the training step: those of one row of 1,024
tokens of Qwen2.5 take 0.6 GB in float32. Only one chunk of them exists at a time. The backward pass computes each
chunk again, and its gradient in the same pass, with the sums that the forward pass kept.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from grpo_jax.model.sharding import AXIS_RULES, constrain, splitting_axes

CUT = -1e30
"""The logit of a token that cannot be drawn. Finite: its probability is 0, and 0 * log 0 is 0 without a case."""

Scale = tuple[float, float]
"""(temperature, soft cap of the logits before they are divided by it, 0: none)"""


def token_logprobs(
    hidden: jax.Array,
    head: jax.Array,
    tokens: jax.Array,
    drawable: jax.Array | None = None,
    *,
    temperature: float,
    chunk_columns: int,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Returns the log-probability of each token given those before it, and the entropy of its distribution.

    Args:
        hidden: [B, T, D], final hidden states.
        head: [V, D].
        tokens: [B, T] int32.
        drawable: as in `TrainBatch`: the distribution is that over these tokens.
        temperature: divides the logits, as in the sampler.
        chunk_columns: columns whose logits may exist at once, >= 1.
        soft_cap: see `capped`.
    Returns:
        logprobs, entropy: [B, T] float32, aligned with `tokens`: column t is about tokens[:, t]; column 0 is 0.
    """
    chunks = _num_chunks(tokens.shape[1], chunk_columns)
    next_column = lambda x: jnp.roll(x, -1, axis=1)  # column t predicts t + 1; the last one is dropped below
    targets, drawable = jax.tree.map(next_column, (tokens, drawable))
    of_rows = functools.partial(_chosen, (temperature, soft_cap), chunks)
    mesh = jax.sharding.get_abstract_mesh()
    axes = () if mesh.empty else tuple(a for a in AXIS_RULES["batch"] if a in splitting_axes(mesh))
    if axes:
        # Each device sums the head's gradient over its own rows, and these sums are added once. Left to the
        # compiler, they would be added after every chunk.
        rows = PartitionSpec(axes)
        # Some compilers fail if any axis is left to them; axes of one device need not be.
        names = {*axes, *(axis for axis, size in mesh.shape.items() if size == 1)} - {*mesh.manual_axes}
        of_rows = jax.shard_map(
            of_rows,
            mesh=mesh,
            in_specs=(rows, PartitionSpec(), rows, rows),
            out_specs=(rows, rows),
            axis_names=names,
            check_vma=False,
        )
    logprobs, entropy = of_rows(hidden, head.astype(hidden.dtype), targets, drawable)
    shift = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return shift(logprobs), shift(entropy)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chosen(
    scale: Scale,
    chunks: int,
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    drawable: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns log-probability of `targets` [B, T] under softmax(hidden head^T / temperature), and entropy."""
    return _forward(scale, chunks, hidden, head, targets, drawable)[0]


def _forward(
    scale: Scale, chunks: int, hidden: jax.Array, head: jax.Array, targets: jax.Array, drawable: Any
) -> Any:
    def one_chunk(_: None, xs: Any) -> tuple[None, tuple[jax.Array, ...]]:
        hidden, targets, drawable = xs
        logits = _cut(_logits(hidden, head, scale), drawable)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        logp = logits - normalizer[..., None]
        # A sum instead of an index: the logits are read anyway.
        chosen = jnp.sum(jnp.where(_is_target(logits, targets), logp, 0), axis=-1)
        return None, (chosen, -jnp.sum(jnp.exp(logp) * logp, axis=-1), normalizer)

    columns = jax.tree.map(lambda x: _split(x, chunks), (hidden, targets, drawable))
    _, sums = jax.lax.scan(one_chunk, None, columns)
    logprobs, entropy, normalizer = (_join(x) for x in sums)
    return (logprobs, entropy), (hidden, head, targets, drawable, normalizer, entropy)


def _backward(scale: Scale, chunks: int, kept: Any, cotangents: tuple[jax.Array, jax.Array]) -> Any:
    """For one token with logits z, distribution p and entropy H:

    d log p[chosen] / dz = onehot(chosen) - p,        dH / dz = -p (log p + H)

    and of a logit capped at c, d c tanh(z / c) / dz = 1 - tanh(z / c)^2.
    """
    temperature, soft_cap = scale
    hidden, head, targets, drawable, normalizer, entropy = kept

    def one_chunk(d_head: jax.Array, xs: Any) -> tuple[jax.Array, jax.Array]:
        hidden, targets, drawable, normalizer, entropy, d_logprob, d_entropy = xs
        whole = _logits(hidden, head, scale)
        logits = _cut(whole, drawable)
        logp = logits - normalizer[..., None]
        pull = d_logprob[..., None] + d_entropy[..., None] * (logp + entropy[..., None])
        d_logits = jnp.where(_is_target(logits, targets), d_logprob[..., None], 0) - jnp.exp(logp) * pull
        d_logits = d_logits / temperature
        if soft_cap:
            d_logits = d_logits * (1 - jnp.square(whole * temperature / soft_cap))
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = jnp.einsum("bcv,vd->bcd", d_logits, head)
        return d_head + jnp.einsum(
            "bcv,bcd->vd", d_logits, hidden, preferred_element_type=jnp.float32
        ), d_hidden

    d_head = constrain(jnp.zeros(head.shape, jnp.float32), "vocab", None)
    columns = (hidden, targets, drawable, normalizer, entropy, *cotangents)
    d_head, d_hidden = jax.lax.scan(one_chunk, d_head, jax.tree.map(lambda x: _split(x, chunks), columns))
    return _join(d_hidden), d_head.astype(head.dtype), None, None


_chosen.defvjp(_forward, _backward)


def capped(logits: jax.Array, soft_cap: float) -> jax.Array:
    """Returns c tanh(logits / c), which lies between -c and c. Args: soft_cap: c; 0: the logits as they are."""
    return soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits


def _logits(hidden: jax.Array, head: jax.Array, scale: Scale) -> jax.Array:
    temperature, soft_cap = scale
    logits = jnp.einsum("bcd,vd->bcv", hidden, head, preferred_element_type=jnp.float32)
    return capped(constrain(logits, "batch", None, "vocab"), soft_cap) / temperature


def _cut(logits: jax.Array, drawable: jax.Array | None) -> jax.Array:
    """Sets to `CUT` what cannot be drawn. Args: logits: [B, C, V]; drawable: None or [B, C, ceil(V / 32)]."""
    return logits if drawable is None else jnp.where(unpack_bits(drawable, logits.shape[-1]), logits, CUT)


def num_words(vocab_size: int) -> int:
    """Words of `pack_bits` for a whole vocabulary."""
    return -(-vocab_size // 32)


def pack_bits(is_set: jax.Array) -> jax.Array:
    """[..., V] bool to [..., ceil(V / 32)] uint32: bit v % 32 of word v // 32."""
    size = is_set.shape[-1]
    padded = jnp.pad(is_set, ((0, 0),) * (is_set.ndim - 1) + ((0, -size % 32),))
    bits = padded.reshape(*is_set.shape[:-1], -1, 32).astype(jnp.uint32)
    return jnp.sum(bits << _places_of_bits(bits), axis=-1, dtype=jnp.uint32)


def unpack_bits(words: jax.Array, size: int) -> jax.Array:
    """Undoes `pack_bits` for a last dimension of `size`."""
    spread = jnp.repeat(words[..., None], 32, axis=-1)
    bits = (spread >> _places_of_bits(spread)) & 1
    return bits.reshape(*words.shape[:-1], -1)[..., :size].astype(bool)


def _places_of_bits(x: jax.Array) -> jax.Array:
    """0 to 31 along the last dimension."""
    return jax.lax.broadcasted_iota(jnp.uint32, x.shape, x.ndim - 1)


def _is_target(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1) == targets[..., None]


def _split(x: jax.Array, chunks: int) -> jax.Array:
    """[B, T, ...] to [chunks, B, T / chunks, ...]."""
    return jnp.moveaxis(x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]), 1, 0)


def _join(x: jax.Array) -> jax.Array:
    """Undoes `_split`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])


def _num_chunks(length: int, chunk_columns: int) -> int:
    """Returns the smallest number of equal chunks that are no wider than `chunk_columns`."""
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= max(1, chunk_columns))
