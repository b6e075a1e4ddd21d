"""A mixture of experts in the place of the MLP: a token's result is a weighted sum of those of a few experts."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from grpo_jax.model.attention import NORMAL, linear, parameter
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import constrain


class Experts(nn.Module):
    """SwiGLU experts behind a router, as in Qwen3-MoE. x: [B, T, D] -> [B, T, D].

    Every expert computes every token, and the router's weights, mostly 0, say what counts of it: E / K times the
    products that are needed, and no shape that depends on where tokens go. The router has no auxiliary loss.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        expert = dict(experts=c.num_experts, embed=c.hidden_size, mlp=c.intermediate_size)
        gate = parameter(self, "gate", c.param_dtype, NORMAL, **expert).astype(x.dtype)
        up = parameter(self, "up", c.param_dtype, NORMAL, **expert).astype(x.dtype)
        turned = dict(experts=c.num_experts, mlp=c.intermediate_size, embed=c.hidden_size)
        down = parameter(self, "down", c.param_dtype, NORMAL, **turned).astype(x.dtype)
        scores = linear(self, "router", x, dict(embed=c.hidden_size), dict(experts=c.num_experts))
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        h = constrain(h * self._weights(scores)[..., None], "batch", None, "experts", "mlp")
        return jnp.einsum("btef,efd->btd", h, down)

    def _weights(self, scores: jax.Array) -> jax.Array:
        """The share of each expert in a token's result, 0 for all but a few. [B, T, E], as the router's scores."""
        c = self.config
        shares, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), c.experts_per_token)
        if c.norm_shares:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        of_each = jax.nn.one_hot(chosen, c.num_experts) * shares[..., None]
        return jnp.sum(of_each, axis=2).astype(scores.dtype)
