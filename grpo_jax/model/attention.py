"""Attention: masks, and grouped-query attention with an optional key/value cache.

Whole rows, which may hold several sequences one after the other, go through a fused kernel if the device has one
(`fused_attention.py`). Everything else, such as decoding from a cache, goes through `attend`.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from grpo_jax.model.config import FIRST_OF_FUSED, ModelConfig
from grpo_jax.model.fused_attention import KEPT, Sequences, fused_attention
from grpo_jax.model.rope import apply_rope
from grpo_jax.model.sharding import constrain


@flax.struct.dataclass
class KVCache:
    """Keys and values of all layers, [N, B, K, S, Dh], or of one, [B, K, S, Dh]. All rows share the S columns."""

    keys: jax.Array
    values: jax.Array


@flax.struct.dataclass
class AttentionInputs:
    """The inputs of attention that are the same for all layers."""

    cos: jax.Array
    """[B, T, 1, Dr/2] float32; [2, B, T, 1, Dr/2] where layers rotate by one of two tables."""
    sin: jax.Array
    mask: jax.Array | None
    """[B, 1, T, S] bool; True where the query may see the key. None with `sequences`."""
    cache_column: jax.Array | int = 0
    """First column of the cache that this call writes."""
    sequences: Sequences | None = None
    """For a fused kernel, which takes whole rows and no cache, and needs no mask."""


@flax.struct.dataclass
class Layer:
    """What one layer has of its own. `nn.scan` gets that of all layers, stacked, and compiles one block."""

    index: jax.Array | None = None
    """int32 scalar, the layer's index in the cache. None: the cache is of this layer alone."""
    window: jax.Array | None = None
    """int32 scalar, how many tokens a token sees, itself included; 0: all. None: no layer has a window."""
    table: jax.Array | None = None
    """int32 scalar, by which of the two tables it rotates. None: there is one."""


def all_layers(config: ModelConfig) -> Layer:
    """Returns the `Layer`s of a model, stacked."""
    own = lambda values: jnp.asarray(values, jnp.int32) if values else None
    return Layer(jnp.arange(config.num_layers), own(config.windows), own(config.other_rope_layers))


def one_layer(config: ModelConfig, number: int) -> Layer:
    """Returns the `Layer` of a layer that has a cache of its own."""
    own = lambda values: jnp.int32(values[number]) if values else None
    return Layer(None, own(config.windows), own(config.other_rope_layers))


def project(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies x [B, T, in] by a kernel [in, out], in the dtype of x.

    x is reshaped to a matrix of B * T rows. With three dimensions, XLA's CPU backend transposes the activations to
    form the kernel's gradient, which takes as long as the products themselves (measured 2026-11, jaxlib 0.10.2).
    """
    batch, length, width = x.shape
    return (x.reshape(-1, width) @ kernel.astype(x.dtype)).reshape(batch, length, -1)


def _project_again(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The same, but what remat "dots" computes again: it keeps no product with a batch dimension, and here is one.

    Kept, what an adapter adds would be as large as what it is added to, for a product of r columns.
    """
    batch, length, width = x.shape
    rows, dimensions = x.reshape(1, -1, width), (((2,), (1,)), ((0,), (0,)))
    return jax.lax.dot_general(rows, kernel.astype(x.dtype)[None], dimensions).reshape(batch, length, -1)


def causal_segment_mask(segment_ids: jax.Array) -> jax.Array:
    """Returns a mask that is True where key column <= query column and both belong to the same sequence.

    Args:    segment_ids: [B, T] int32, 0 for padding.
    Returns: [B, 1, T, T] bool; the rows of padding queries are all False.
    """
    length = segment_ids.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (causal[None] & same & (segment_ids > 0)[:, None, :])[:, None]


def within_window(mask: jax.Array, window: jax.Array, column: jax.Array | int) -> jax.Array:
    """Takes from a mask what is out of sight for a layer with a window.

    Columns that lie next to each other hold tokens that follow each other, in rows and in caches alike.

    Args:
        mask: [B, 1, T, S] bool.
        window: int32 scalar, see `Layer`.
        column: of the cache, in which the first query stands.
    """
    queries, keys = mask.shape[2:]
    distance = (column + jnp.arange(queries))[:, None] - jnp.arange(keys)[None]
    return mask & ((distance < window) | (window == 0))[None, None]


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array, divisor: float | None = None
) -> jax.Array:
    """Softmax attention in which H / K query heads share each of K key/value heads. The softmax is in float32.

    The query heads of a key/value head become rows of one matrix. Both products are then plain batched products,
    and nothing is transposed or repeated, the cache in particular. On a CPU, a decoding step takes a fifth of the
    time of `jax.nn.dot_product_attention`, which wants heads last (measured 2026-11, jaxlib 0.10.2).

    Args:
        q: [B, T, H, Dh].
        k, v: [B, K, S, Dh].
        mask: [B, 1, T, S] bool. A query that may see no key gets the mean of all values.
        divisor: of the scores. None: the root of Dh.
    Returns: [B, T, H, Dh] in the dtype of v.
    """
    batch, length, heads, width = q.shape
    kv_heads, group = k.shape[1], heads // k.shape[1]
    rows = jnp.moveaxis(q.reshape(batch, length, kv_heads, group, width), 1, 3)
    rows = rows.reshape(batch, kv_heads, group * length, width)
    scores = jnp.matmul(rows, jnp.swapaxes(k, 2, 3), preferred_element_type=jnp.float32)
    scores = scores / (divisor or math.sqrt(width))
    scores = scores.reshape(batch, kv_heads, group, length, -1)
    scores = jnp.where(mask[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.matmul(weights.reshape(batch, kv_heads, group * length, -1), v)
    out = jnp.moveaxis(out.reshape(batch, kv_heads, group, length, width), 3, 1)
    return out.reshape(batch, length, heads, width)


NORMAL, ONES, ZEROS = nn.initializers.normal(0.02), nn.initializers.ones, nn.initializers.zeros


def _uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """What peft begins A of an adapter with: kaiming_uniform with a=sqrt(5). Args: shape: (inputs..., r)."""
    bound = 1 / math.sqrt(math.prod(shape[:-1]))
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def parameter(module: nn.Module, name: str, dtype: Any, initializer: Any, **axes: int) -> jax.Array:
    """Declares a parameter of `module`. Args: axes: size of each dimension by its logical axis, in order."""
    partitioned = nn.with_logical_partitioning(initializer, tuple(axes))
    return module.param(name, partitioned, tuple(axes.values()), dtype)  # type: ignore[return-value]


def linear(
    module: nn.Module, name: str, x: jax.Array, inputs: Mapping[str, int], outputs: Mapping[str, int]
) -> jax.Array:
    """Declares a kernel of `module`, with the dtype of its `config`, and multiplies by it. All layers' kernels do.

    A kernel among the targets of `config.lora` has an adapter beside it, "NAME_lora_a" (*inputs, r) and
    "NAME_lora_b" (r, *outputs), whose product is added: x W + scale (x A) B. Kernels that are stored as one tensor
    share the A of the first of them, which must be declared before the others.

    Args:
        x: [B, T, ...], its last dimensions those of `inputs`, or these as one.
        inputs, outputs: size of each dimension of the kernel by its logical axis, in order.
    Returns: [B, T, *outputs].
    """
    config: ModelConfig = module.config
    kernel = parameter(module, name, config.param_dtype, NORMAL, **inputs, **outputs)
    rows = x.shape[:2]
    width = math.prod(inputs.values())
    x = x.reshape(*rows, width)
    y = project(x, kernel.reshape(width, -1))
    lora = config.lora
    if lora is not None and name in lora.targets:
        rank = {"lora_rank": lora.rank}
        if config.is_fused and name in FIRST_OF_FUSED:
            a = nn.unbox(module.get_variable("params", f"{FIRST_OF_FUSED[name]}_lora_a"))
        else:
            a = parameter(module, f"{name}_lora_a", lora.param_dtype, _uniform, **inputs, **rank)
        b = parameter(module, f"{name}_lora_b", lora.param_dtype, ZEROS, **rank, **outputs)
        y = y + lora.scale * _project_again(project(x, a.reshape(width, -1)), b.reshape(lora.rank, -1))
    return y.reshape(*rows, *outputs.values())


class Attention(nn.Module):
    """Grouped-query attention; QKV bias (Qwen2), norms of queries and keys, windows and RoPE as configured."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: KVCache | None, layer: Layer
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns the output, [B, T, D], and the cache with the columns of this call written.

        Args: x: [B, T, D].
        """
        c = self.config
        q = self._project(x, "q", heads=c.num_heads)
        k = self._project(x, "k", kv_heads=c.num_kv_heads)
        v = self._project(x, "v", kv_heads=c.num_kv_heads)
        q, k = self._norm(q, "q", "heads"), self._norm(k, "k", "kv_heads")
        cos, sin = inputs.cos, inputs.sin
        if layer.table is not None:
            cos, sin = cos[layer.table], sin[layer.table]
        q = constrain(apply_rope(q, cos, sin), "batch", None, "heads", None)
        k = constrain(apply_rope(k, cos, sin), "batch", None, "kv_heads", None)
        if inputs.sequences is not None:
            out = self._fused(q, k, v, inputs.sequences, layer)
        else:
            k, v = jnp.swapaxes(k, 1, 2), jnp.swapaxes(v, 1, 2)
            if cache is not None:
                cache = _write(cache, k, v, layer.index, inputs.cache_column)
                k, v = cache.keys, cache.values
                if layer.index is not None:
                    k, v = k[layer.index], v[layer.index]
            mask = inputs.mask
            assert mask is not None
            if layer.window is not None:
                mask = within_window(mask, layer.window, inputs.cache_column)
            out = checkpoint_name(attend(q, k, v, mask, c.score_divisor), KEPT)
        heads, width = dict(heads=c.num_heads, head_dim=c.head_dim), dict(embed=c.hidden_size)
        return linear(self, "o", out, heads, width), cache

    def _fused(
        self, q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences, layer: Layer
    ) -> jax.Array:
        """Attention of whole rows by a kernel, to which a window is a constant: one for each that there is."""
        c = self.config
        scale = {} if c.score_divisor is None else {"divisor": c.score_divisor}

        def of(window: int) -> Any:
            masking = scale | ({"window": window} if window else {})
            return lambda q, k, v: fused_attention(c.attention, q, k, v, sequences, **masking)

        sizes = sorted(set(c.windows)) or [0]
        if layer.window is None or len(sizes) == 1:
            return of(sizes[0])(q, k, v)
        which = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), layer.window)
        return jax.lax.switch(which, [of(size) for size in sizes], q, k, v)

    def _norm(self, x: jax.Array, name: str, axis: str) -> jax.Array:
        """Returns queries or keys, [B, T, heads, Dh], normed each for itself, or all of a token together."""
        c = self.config
        if c.qk_norm:
            return RMSNorm(c, "head_dim", name=f"{name}_norm")(x)
        if c.qk_norm_whole:
            return RMSNorm(c, axis, name=f"{name}_norm")(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
        return x

    def _project(self, x: jax.Array, name: str, **heads: int) -> jax.Array:
        """Returns x in heads, [B, T, heads, Dh]. Args: heads: their number, by the name of their axis."""
        c = self.config
        outputs = dict(**heads, head_dim=c.head_dim)
        y = linear(self, name, x, dict(embed=c.hidden_size), outputs)
        if c.qkv_bias:
            bias = parameter(self, f"{name}_bias", c.param_dtype, ZEROS, **outputs)
            y = y + bias.astype(x.dtype)[None, None]
        return y


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dimension, in float32. arXiv:1910.07467."""

    config: ModelConfig
    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        initial = ZEROS if c.norm_plus_one else ONES
        scale = parameter(self, "scale", c.param_dtype, initial, **{self.axis: x.shape[-1]})
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + c.rms_norm_eps)
        of_rows = lambda scale: scale.reshape((1,) * (x.ndim - 1) + (-1,))
        # Rounded after it is scaled, or before, as in transformers, so that bfloat16 logits agree.
        if c.norm_plus_one or c.norm_in_float32:
            start = 1.0 if c.norm_plus_one else 0.0
            return (normed * of_rows(start + scale.astype(jnp.float32))).astype(x.dtype)
        return normed.astype(x.dtype) * of_rows(scale.astype(x.dtype))


def _write(cache: KVCache, k: jax.Array, v: jax.Array, layer: jax.Array | None, column: Any) -> KVCache:
    """Writes k and v, [B, K, T, Dh], into the layer's cache, from `column` on."""

    def write(cache: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(cache.dtype)
        if layer is None:
            return jax.lax.dynamic_update_slice(cache, new, (0, 0, column, 0))
        return jax.lax.dynamic_update_slice(cache, new[None], (layer, 0, 0, column, 0))

    return KVCache(write(cache.keys, k), write(cache.values, v))
