"""A mixture of experts in the place of the MLP: a token's result is a weighted sum of those of a few experts."""

import jax
import jax.numpy as jnp
from flax import linen as nn

from grpo_jax.model.attention import NORMAL, linear, parameter
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import constrain


class Experts(nn.Module):
    """SwiGLU experts behind a router, as in Qwen3-MoE. x: [B, T, D] -> [B, T, D].

    Every expert computes every token, one after the other, and the router's shares, mostly 0, say what counts of
    it: E / K times the products that are needed, and no shape that depends on where tokens go. Nothing of it is
    kept for the backward pass, which computes it again. The router has no auxiliary loss.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        sizes = dict(experts=c.num_experts, embed=c.hidden_size, mlp=c.intermediate_size)
        turned = dict(experts=c.num_experts, mlp=c.intermediate_size, embed=c.hidden_size)
        gate = parameter(self, "gate", c.param_dtype, NORMAL, **sizes)
        up = parameter(self, "up", c.param_dtype, NORMAL, **sizes)
        down = parameter(self, "down", c.param_dtype, NORMAL, **turned)
        scores = linear(self, "router", x, dict(embed=c.hidden_size), dict(experts=c.num_experts))

        @jax.checkpoint
        def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
            gate, up, down, share = expert
            h = constrain(jax.nn.silu(_product(x, gate)) * _product(x, up), "batch", None, "mlp")
            return total + _product(h * share[..., None], down).astype(jnp.float32), None

        start = constrain(jnp.zeros(x.shape, jnp.float32), "batch", None, None)
        experts = gate, up, down, jnp.moveaxis(self._shares(scores), -1, 0)
        return jax.lax.scan(add, start, experts)[0].astype(x.dtype)

    def _shares(self, scores: jax.Array) -> jax.Array:
        """The share of each expert in a token's result, 0 for all but a few. [B, T, E], as the router's scores."""
        c = self.config
        shares, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), c.experts_per_token)
        if c.norm_shares:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        of_each = jax.nn.one_hot(chosen, c.num_experts) * shares[..., None]
        return jnp.sum(of_each, axis=2).astype(scores.dtype)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `attention.project`. It has a batch dimension, of 1, lest model.remat="dots" keep the result of each."""
    rows = x.reshape(1, -1, x.shape[-1])
    of_batches = (((2,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(rows, kernel[None].astype(x.dtype), of_batches)
    return y.reshape(*x.shape[:-1], -1)
