"""A decoder of the Qwen2, Qwen3 and Llama 3 families in Flax linen, as pure functions of its parameters.

`forward` maps tokens to hidden states; `logprobs.py` maps hidden states to log-probabilities, since logits
[B, T, V] are never held. Every parameter names its logical axes where it is created.
"""

import dataclasses
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
    RMSNorm,
    RopeScaling,
    causal_segment_mask,
    parameter,
    project,
    rope_frequencies,
)
from grpo_jax.model.fused_attention import find_sequences, is_kept
from grpo_jax.model.sharding import constrain, tree_shardings
from grpo_jax.types import Params


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model, read from config.json by `hf.py`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | None = None
    dtype: Any = jnp.float32
    """Of activations and matmuls."""
    param_dtype: Any = jnp.float32
    remat: str = "none"
    scan_layers: bool = True
    attention: str = "plain"
    """Kernel for whole rows, as `fused_attention.choose_kernel` gives it."""


Cache = KVCache | tuple[KVCache, ...]
"""Of all layers in one, or one a layer as `split_layers` makes them."""

_policies = jax.checkpoint_policies
REMAT_POLICIES = {
    "dots": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, is_kept),
    "attention": is_kept,  # what attention gives; "dots": and the results of matmuls
    "full": None,  # keep nothing but each layer's input
}


class MLP(nn.Module):
    """SwiGLU, arXiv:2002.05202. x: [B, T, D] -> [B, T, D]."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        wide, narrow = (c.hidden_size, c.intermediate_size), (c.intermediate_size, c.hidden_size)
        gate = parameter(self, "gate", NORMAL, ("embed", "mlp"), wide, c.param_dtype)
        up = parameter(self, "up", NORMAL, ("embed", "mlp"), wide, c.param_dtype)
        down = parameter(self, "down", NORMAL, ("mlp", "embed"), narrow, c.param_dtype)
        h = jax.nn.silu(project(x, gate)) * project(x, up)
        return project(constrain(h, "batch", None, "mlp"), down)


class Block(nn.Module):
    """One pre-norm decoder layer, in the form `nn.scan` wants: (carry, per-layer, shared) -> (carry, None)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, carry: tuple[jax.Array, KVCache | None], layer: jax.Array | None, inputs: AttentionInputs
    ) -> tuple[tuple[jax.Array, KVCache | None], None]:
        c = self.config
        x, cache = carry
        h = RMSNorm(c.rms_norm_eps, c.param_dtype, "embed", name="attention_norm")(x)
        h, cache = Attention(c, name="attention")(h, inputs, cache, layer)
        x = constrain(x + h, "batch", None, None)
        h = RMSNorm(c.rms_norm_eps, c.param_dtype, "embed", name="mlp_norm")(x)
        x = constrain(x + MLP(c, name="mlp")(h), "batch", None, None)
        return (x, cache), None


class Transformer(nn.Module):
    """Tokens to final hidden states; the output head's matrix is created here and used in `logprobs.py`."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, tokens: jax.Array, inputs: AttentionInputs, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        axes, shape = ("vocab", "embed"), (c.vocab_size, c.hidden_size)
        embedding = parameter(self, "embedding", NORMAL, axes, shape, c.param_dtype)
        if not c.tie_embeddings:
            parameter(self, "lm_head", NORMAL, axes, shape, c.param_dtype)
        # Looked up whole in width: split rows of a split table would have to be gathered twice.
        table = constrain(embedding.astype(c.dtype), "vocab", None)
        x = constrain(table[tokens], "batch", None, None)
        layers = self._split_layers if isinstance(cache, tuple) else self._stacked_layers
        x, cache = layers(x, inputs, cache)  # type: ignore[arg-type]
        return RMSNorm(c.rms_norm_eps, c.param_dtype, "embed", name="final_norm")(x), cache

    def _stacked_layers(
        self, x: jax.Array, inputs: AttentionInputs, cache: KVCache | None
    ) -> tuple[jax.Array, KVCache | None]:
        """All layers, their parameters and caches stacked."""
        c = self.config
        block = Block
        if c.remat != "none" and cache is None:
            block = nn.remat(Block, prevent_cse=not c.scan_layers, policy=REMAT_POLICIES[c.remat])
        layers = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.num_layers,
            unroll=1 if c.scan_layers else c.num_layers,
            check_constancy_invariants=self.is_initializing(),
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, name="layers")
        (x, cache), _ = layers((x, cache), jnp.arange(c.num_layers), inputs)
        return x, cache

    def _split_layers(
        self, x: jax.Array, inputs: AttentionInputs, caches: tuple[KVCache, ...]
    ) -> tuple[jax.Array, tuple[KVCache, ...]]:
        """The layers one by one, with what `split_layers` gives."""
        filled: list[Any] = []
        for i, cache in enumerate(caches):
            (x, *rest), _ = Block(self.config, name=f"layer_{i}")((x, cache), None, inputs)
            filled += rest
        return x, tuple(filled)


def forward(
    params: Params, config: ModelConfig, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array
) -> jax.Array:
    """Final hidden states of whole sequences.

    Args:    tokens, positions, segment_ids: [B, T] int32, as in `TrainBatch`.
    Returns: [B, T, D] in `config.dtype`; those of padding mean nothing.
    """
    cos, sin = _rope_tables(config, positions)
    if config.attention == "plain":
        inputs = AttentionInputs(cos, sin, causal_segment_mask(segment_ids))
    else:
        inputs = AttentionInputs(cos, sin, None, sequences=find_sequences(segment_ids))
    hidden, _ = Transformer(config).apply({"params": params}, tokens, inputs, None)
    return hidden


def forward_cached(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    mask: jax.Array,
    cache: Cache,
    column: jax.Array | int,
) -> tuple[jax.Array, Cache]:
    """Hidden states of new tokens that see a cache; writes their keys and values from `column` on.

    Args:
        tokens, positions: [B, T] int32; T new tokens a row.
        mask: [B, 1, T, S] bool over the S columns of the cache.
        params, cache: as `init_params` and `init_cache` make them, or both as `split_layers` does.
    Returns: [B, T, D] and the cache.
    """
    cos, sin = _rope_tables(config, positions)
    inputs = AttentionInputs(cos, sin, mask, column)
    return Transformer(config).apply({"params": params}, tokens, inputs, cache)  # type: ignore[return-value]


def head_matrix(params: Params) -> jax.Array:
    """[V, D]: the output head, which is the embedding where the model ties them."""
    return params["lm_head"] if "lm_head" in params else params["embedding"]


def init_cache(config: ModelConfig, batch: int, columns: int) -> KVCache:
    shape = (config.num_layers, batch, config.num_kv_heads, columns, config.head_dim)
    axes = ("layers", "batch", "kv_heads", None, None)
    return KVCache(*(constrain(jnp.zeros(shape, config.dtype), *axes) for _ in range(2)))


def split_layers(params: Params, cache: Cache) -> tuple[Params, tuple[KVCache, ...]]:
    """Takes parameters and cache of every layer out of their stacks, for `forward_cached`.

    Worth a copy of the parameters before a decoding loop with unrolled layers: from a stack, each step would
    copy the layers' weights and caches again before it multiplies them.
    """
    assert isinstance(cache, KVCache)
    num_layers = len(cache.keys)
    rest = {name: leaf for name, leaf in params.items() if name != "layers"}
    layers = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(num_layers)}
    caches = (jax.tree.map(lambda x, i=i: x[i], cache) for i in range(num_layers))
    return rest | layers, tuple(caches)


def abstract_params(config: ModelConfig) -> tuple[Params, Params]:
    """Shapes (`jax.ShapeDtypeStruct`) and logical axes (`PartitionSpec` of names) of every parameter."""
    boxed = jax.eval_shape(lambda: _init_boxed(config, jax.random.key(0)))
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def param_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """`NamedSharding` of every parameter."""
    shapes, axes = abstract_params(config)
    return tree_shardings(axes, shapes, mesh)


def init_params(config: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """Random parameters, created in place on the mesh."""
    make = jax.jit(
        lambda key: nn.unbox(_init_boxed(config, key)), out_shardings=param_shardings(config, mesh)
    )
    return make(key)


def num_params(config: ModelConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)[0]))


def _init_boxed(config: ModelConfig, key: jax.Array) -> Params:
    tokens = jnp.zeros((1, 1), jnp.int32)
    cos, sin = _rope_tables(config, tokens)
    inputs = AttentionInputs(cos, sin, jnp.ones((1, 1, 1, 1), bool))
    return Transformer(config).init(key, tokens, inputs, None)["params"]


def _rope_tables(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    frequencies = rope_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)
