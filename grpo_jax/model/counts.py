"""Numbers and bytes of a model's parts, from its sizes."""

import jax.numpy as jnp

from grpo_jax.model.config import ModelConfig


def layer_weights(model: ModelConfig) -> int:
    """Numbers in the matrices of all layers: half of the FLOPs that a token costs where all are multiplied."""
    return _layer_weights(model, model.num_experts)


def active_weights(model: ModelConfig) -> int:
    """Those of them that a token's result depends on: with experts, not all."""
    return _layer_weights(model, model.experts_per_token)


def _layer_weights(model: ModelConfig, experts: int) -> int:
    heads, kv_heads = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    mlps = 3 * model.intermediate_size * (experts if model.num_experts else 1)
    return model.num_layers * model.hidden_size * (2 * heads + 2 * kv_heads + mlps + model.num_experts)


def experts_of_layer(model: ModelConfig) -> int:
    """Numbers in the matrices of all experts of one layer."""
    return model.num_experts * 3 * model.hidden_size * model.intermediate_size


def grouped_weights(model: ModelConfig) -> int:
    """Those of them that `grouped_product` multiplies a token by, of its experts. 0 where there are none."""
    if model.experts != "grouped":
        return 0
    return model.num_layers * model.experts_per_token * 3 * model.hidden_size * model.intermediate_size


def dense_weights(model: ModelConfig) -> int:
    """Those that every token is multiplied by in plain products, with `dense` experts all of theirs too."""
    of_all = active_weights if model.experts == "grouped" else layer_weights
    return of_all(model) - grouped_weights(model)


def head_weights(model: ModelConfig) -> int:
    """Numbers in the output head."""
    return model.vocab_size * model.hidden_size


def cache_bytes(model: ModelConfig) -> int:
    """Of the keys and values of one token, in `model.dtype`."""
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
