"""A decoder of the families of `families.py` in Flax linen, as pure functions of its parameters.

`forward` maps tokens to hidden states. `logprobs.py` maps hidden states to log-probabilities without ever holding
all logits, [B, T, V]. Every parameter names its logical axes where it is declared.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.model.attention import (
    NORMAL,
    Attention,
    AttentionInputs,
    KVCache,
    Layer,
    RMSNorm,
    all_layers,
    causal_segment_mask,
    linear,
    one_layer,
    parameter,
)
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.experts import Experts
from grpo_jax.model.fused_attention import find_sequences, is_kept
from grpo_jax.model.rope import rope_frequencies, rope_tables
from grpo_jax.model.sharding import AXIS_RULES, constrain, tree_shardings
from grpo_jax.types import Params

Cache = KVCache | tuple[KVCache, ...]
"""One of all layers, or one for each layer, as from `split_layers`."""

_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, is_kept),
    "attention": is_kept,
    "full": None,
}
"""What is kept of a layer for its backward pass, beside its input. "attention": attention's output; "dots": also
the results of matrix products; "full": nothing."""


SEEN = "intermediates"
"""Flax's collection of what `largest_activations` looks at."""


def bucket_length(n: int) -> int:
    """Rounds the length of a row up to one of few, since every length is compiled separately.

    The lengths are the multiples of 16 up to 128, then four for each doubling (160, 192, 224, 256, 320, ...): 24
    lengths up to 2,048 tokens. Rows up to 128 get at most 15 tokens of padding, longer rows at most 25 %.
    """
    step = 16
    while n > 8 * step:
        step *= 2
    return -(-n // step) * step


ACTIVATIONS: dict[str, Any] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nn.Module):
    """SwiGLU, arXiv:2002.05202, or with another activation. x: [B, T, D] -> [B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        width, hidden = dict(embed=c.hidden_size), dict(mlp=c.intermediate_size)
        activation = ACTIVATIONS[c.activation]
        h = activation(linear(self, "gate", x, width, hidden)) * linear(self, "up", x, width, hidden)
        return linear(self, "down", constrain(h, "batch", None, "mlp"), hidden, width)


class Block(nn.Module):
    """One decoder layer, in the form `nn.scan` wants: (carry, per-layer, shared) -> (carry, None).

    Attention and MLP each have a norm before them (`pre_norms`), after them (`post_norms`), or both.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, KVCache | None], layer: Layer, inputs: AttentionInputs
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        c = self.config
        x, cache = carry
        h = self._norm(x, "attention_norm", c.pre_norms)
        h, cache = Attention(c, name="attention")(h, inputs, cache, layer)
        x = constrain(x + self._norm(h, "attention_post_norm", c.post_norms), "batch", None, None)
        h = self._norm(x, "mlp_norm", c.pre_norms)
        h = (Experts if c.num_experts else MLP)(c, name="mlp")(h)
        x = constrain(x + self._norm(h, "mlp_post_norm", c.post_norms), "batch", None, None)
        if self.is_mutable_collection(SEEN):
            self.sow(SEEN, "largest", jnp.max(jnp.abs(x.astype(jnp.float32))))
        return (x, cache), None

    def _norm(self, x: jax.Array, name: str, is_there: bool) -> jax.Array:
        return RMSNorm(self.config, "embed", name=name)(x) if is_there else x


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Returns the rows of a table [V, D] for tokens [B, T], [B, T, D], each device those of its own tokens.

    Where the width is split over devices, each looks up its part of it for the tokens of all, and they exchange
    what they found. To gather the table takes 1.1 GB of each device for Qwen2.5-7B; its gradient, as much again.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or all(mesh.shape[axis] == 1 for axis in AXIS_RULES["embed"]):
        return table[tokens]
    # In float32: so many tokens meet in one row of the gradient that sums in bfloat16 would lose them.
    found = table.astype(jnp.float32)[constrain(tokens, "rows_of_parts", None)]
    return constrain(constrain(found, "rows_of_parts", None, "embed"), "batch", None, None)


class Transformer(nn.Module):
    """Maps tokens to final hidden states. The output head's matrix is declared here and used in `logprobs.py`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, inputs: AttentionInputs, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        d, v = c.hidden_size, c.vocab_size
        embedding = parameter(self, "embedding", c.param_dtype, NORMAL, vocab=v, embed=d)
        if not c.tie_embeddings:
            parameter(self, "lm_head", c.param_dtype, NORMAL, vocab=v, embed=d)
        x = look_up(embedding, tokens).astype(c.dtype)
        if c.embedding_scale != 1:
            x = x * jnp.asarray(c.embedding_scale, c.dtype)
        x = constrain(x, "batch", None, None)
        layers = self._split_layers if isinstance(cache, tuple) else self._stacked_layers
        x, cache = layers(x, inputs, cache)  # type: ignore[arg-type]
        return RMSNorm(c, "embed", name="final_norm")(x), cache

    def _stacked_layers(
        self, x: jax.Array, inputs: AttentionInputs, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """Applies all layers, their parameters and caches stacked."""
        c = self.config
        block = Block
        if c.remat != "none" and cache is None:
            block = nn.remat(Block, prevent_cse=not c.scan_layers, policy=REMAT_POLICIES[c.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0, SEEN: 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            # The check traces a layer a second time. At first, it decides which random numbers are drawn.
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        (x, cache), _ = layers((x, cache), all_layers(c), inputs)
        return x, cache

    def _split_layers(
        self, x: jax.Array, inputs: AttentionInputs, caches: tuple[KVCache, ...]
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """Applies the layers one by one, with parameters and caches of `split_layers`."""
        filled: list[Any] = []
        for i, cache in enumerate(caches):
            layer = one_layer(self.config, i)
            (x, *rest), _ = Block(self.config, name=f"layer_{i}")((x, cache), layer, inputs)
            filled += rest
        return x, tuple(filled)


def forward(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Returns the final hidden states of whole sequences.

    Args:    tokens, positions, segment_ids: [B, T] int32, as in `TrainBatch`.
    Returns: [B, T, D] in `config.dtype`; the states of padding are arbitrary, but finite.
    """
    inputs = _whole_rows(config, positions, segment_ids)
    hidden, _ = Transformer(config).apply({"params": params}, tokens, inputs, None)
    return hidden


def _whole_rows(config: ModelConfig, positions: jax.Array, segment_ids: jax.Array) -> AttentionInputs:
    cos, sin = _rope_tables(config, positions)
    if config.attention == "plain":
        return AttentionInputs(cos, sin, causal_segment_mask(segment_ids))
    return AttentionInputs(cos, sin, None, sequences=find_sequences(segment_ids))


def largest_activations(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """The largest absolute value among the results of each layer, [N] float32; not finite after an overflow.

    Args: as `forward`.
    """
    inputs = _whole_rows(config, positions, segment_ids)
    _, seen = Transformer(config).apply({"params": params}, tokens, inputs, None, mutable=[SEEN])
    return seen[SEEN]["layers"]["largest"][0]


def forward_cached(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache,
    column: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Returns the hidden states of new tokens that see a cache, and the cache with their keys and values.

    Args:
        params, cache: as from `init_params` and `init_cache`, or both as from `split_layers`.
        tokens, positions: [B, T] int32; T new tokens in every row.
        mask: [B, 1, T, S] bool over the S columns of the cache.
        column: first column that is written.
    Returns: [B, T, D] and the cache.
    """
    cos, sin = _rope_tables(config, positions)
    inputs = AttentionInputs(cos, sin, mask, column)
    return Transformer(config).apply({"params": params}, tokens, inputs, cache)  # type: ignore[return-value]


def head_matrix(params: Params) -> jax.Array:
    """Returns the output head, [V, D]; with tied embeddings it is the embedding."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]


def init_cache(config: ModelConfig, batch: int, columns: int) -> KVCache:
    """Returns an empty cache of `batch` rows and `columns` columns."""
    shape = (config.num_layers, batch, config.num_kv_heads, columns, config.head_dim)
    axes = ("layers", "batch", "kv_heads", None, None)
    return KVCache(*(constrain(jnp.zeros(shape, config.dtype), *axes) for _ in range(2)))


def split_layers(params: Params, cache: Cache) -> tuple[Params, tuple[KVCache, ...]]:
    """Takes the parameters and the cache of every layer out of their stacks, for `forward_cached`.

    It copies the parameters once, before a decoding loop with unrolled layers. With stacks, every step of the loop
    would copy each layer's weights and cache before it multiplies them.
    """
    assert isinstance(cache, KVCache)
    num_layers = len(cache.keys)
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    caches = (jax.tree.map(lambda x, i=i: x[i], cache) for i in range(num_layers))
    return rest | layers, tuple(caches)


@functools.lru_cache(maxsize=16)  # traced once: a dozen places ask for it before the first step
def abstract_params(config: ModelConfig) -> tuple[Params, Params]:
    """Returns shape (`jax.ShapeDtypeStruct`) and logical axes (`PartitionSpec` of names) of every parameter."""
    boxed = jax.eval_shape(lambda: init_boxed(config, jax.random.key(0)))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Returns the `NamedSharding` of every parameter."""
    shapes, axes = abstract_params(config)
    return tree_shardings(axes, shapes, mesh)


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """Creates random parameters in their places on the mesh."""
    make = jax.jit(lambda key: nn.unbox(init_boxed(config, key)), out_shardings=param_shardings(config, mesh))
    return make(key)


def num_params(config: ModelConfig) -> int:
    """Returns how many numbers all parameters have together."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)[0]))


def init_boxed(config: ModelConfig, key: jax.Array) -> Params:
    """Random parameters with the names of their axes around them."""
    tokens = jnp.zeros((1, 1), jnp.int32)
    cos, sin = _rope_tables(config, tokens)
    inputs = AttentionInputs(cos, sin, jnp.ones((1, 1, 1, 1), bool))
    return Transformer(config).init(key, tokens, inputs, None)["params"]


def _rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine as `AttentionInputs` has them."""
    width = config.rotary_dim or config.head_dim
    frequencies = rope_frequencies(width, config.rope_theta, config.rope_scaling)
    tables = rope_tables(frequencies, positions, config.rope_scaling)
    if not config.other_rope_layers:
        return tables
    still = jnp.zeros_like(frequencies)
    other = rope_frequencies(width, config.other_rope_theta, None) if config.other_rope_theta else still
    cos, sin = (jnp.stack(both) for both in zip(tables, rope_tables(other, positions, None), strict=True))
    return cos, sin
