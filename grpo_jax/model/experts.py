"""A mixture of experts in the place of the MLP: a token's result is a weighted sum of those of a few experts.

    grouped   each expert computes the tokens that chose it; NVIDIA GPUs
    dense     every expert computes every token; any device

The first is `grouped_product.py`, between a sort of a device's tokens by expert and its reversal.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from grpo_jax.config import ConfigError
from grpo_jax.model.attention import NORMAL, linear, parameter
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.fused_attention import DeviceKind
from grpo_jax.model.grouped_product import TILES, grouped_product
from grpo_jax.model.sharding import constrain, partition_spec, split_over_devices, splitting_axes

GroupedProduct = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(x, kernels, sizes) -> y, as `grouped_product`."""


def choose_experts(wanted: str, model: ModelConfig, device: DeviceKind) -> str:
    """Returns how experts are computed, "grouped" or "dense", for what `model.experts` says.

    Raises: ConfigError: the device or this model cannot have them grouped; says why.
    """
    if wanted == "dense" or (wanted == "auto" and not model.num_experts):
        return "dense"
    obstacle = _why_not_grouped(model, device)
    if obstacle and wanted == "grouped":
        raise ConfigError("model.experts", wanted, obstacle)
    return "dense" if obstacle else "grouped"


def _why_not_grouped(model: ModelConfig, device: DeviceKind) -> str:
    if not model.num_experts:
        return "this model has no experts"
    if device.platform != "cuda" or device.compute_capability < 8:
        return "needs an NVIDIA GPU, Ampere (compute capability 8.0) or later"
    if jnp.dtype(model.dtype).itemsize != 2:
        return "needs model.dtype=bfloat16 or float16"
    widths = {model.hidden_size, model.intermediate_size}
    return "" if not any(w % 128 for w in widths) else f"needs widths that 128 divides, not {sorted(widths)}"


class Experts(nn.Module):
    """SwiGLU experts behind a router, as in Qwen3-MoE. x: [B, T, D] -> [B, T, D].

    Of what experts compute nothing is kept for the backward pass, which computes it again. The router has no
    auxiliary loss.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        sizes = dict(experts=c.num_experts, embed=c.hidden_size, mlp=c.intermediate_size)
        turned = dict(experts=c.num_experts, mlp=c.intermediate_size, embed=c.hidden_size)
        kernels = Kernels(
            parameter(self, "gate", c.param_dtype, NORMAL, **sizes),
            parameter(self, "up", c.param_dtype, NORMAL, **sizes),
            parameter(self, "down", c.param_dtype, NORMAL, **turned),
        )
        scores = linear(self, "router", x, dict(embed=c.hidden_size), dict(experts=c.num_experts))
        shares, chosen = jax.lax.top_k(jax.nn.softmax(scores.astype(jnp.float32)), c.experts_per_token)
        if c.norm_shares:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        shares = shares.astype(x.dtype)
        if c.experts == "dense":
            return dense(x, shares, chosen, kernels)
        product: GroupedProduct = grouped_product if isinstance(c.experts, str) else c.experts
        return grouped(product, x, shares, chosen, jax.tree.map(lambda w: w.astype(x.dtype), kernels))


class Kernels(NamedTuple):
    """Of all experts of a layer."""

    gate: Any
    """[E, D, F]."""
    up: Any
    """[E, D, F]."""
    down: Any
    """[E, F, D]."""


def dense(x: jax.Array, shares: jax.Array, chosen: jax.Array, kernels: Kernels) -> jax.Array:
    """Every expert computes every token, one after the other, and the shares, mostly 0, say what counts of it.

    That is E / K times the products that are needed, and no shape that depends on where tokens go.

    Args:
        x: [B, T, D].
        shares: [B, T, K] in x's dtype, of the experts `chosen`, [B, T, K] int32, in a token's result.
    Returns: [B, T, D] in x's dtype.
    """
    of_each = jax.nn.one_hot(chosen, len(kernels.gate), dtype=shares.dtype) * shares[..., None]
    of_each = jnp.sum(of_each, axis=2)

    @jax.checkpoint
    def add(total: jax.Array, expert: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        gate, up, down, share = expert
        h = constrain(jax.nn.silu(_product(x, gate)) * _product(x, up), "batch", None, "mlp")
        return total + _product(h * share[..., None], down).astype(jnp.float32), None

    start = constrain(jnp.zeros(x.shape, jnp.float32), "batch", None, None)
    experts = *kernels, jnp.moveaxis(of_each, -1, 0)
    return jax.lax.scan(add, start, experts)[0].astype(x.dtype)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """As `attention.project`. It has a batch dimension, of 1, lest model.remat="dots" keep the result of each."""
    rows = x.reshape(1, -1, x.shape[-1])
    of_batches = (((2,), (1,)), ((0,), (0,)))
    y = jax.lax.dot_general(rows, kernel[None].astype(x.dtype), of_batches)
    return y.reshape(*x.shape[:-1], -1)


def grouped(
    product: GroupedProduct, x: jax.Array, shares: jax.Array, chosen: jax.Array, kernels: Kernels
) -> jax.Array:
    """Each expert computes the tokens that chose it. As `dense`, but for the order of sums.

    Every device sorts its own tokens. With a mesh axis that splits the experts' width, it has a part of the width,
    and the sums are added up.

    Args: kernels: in x's dtype.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not splitting_axes(mesh):
        return _sorted(product, None, x, shares, chosen, kernels)
    rows = partition_spec(("batch",), x.shape[:1], mesh)
    wide = partition_spec((None, None, "mlp"), kernels.gate.shape, mesh)
    of_kernels = Kernels(wide, wide, PartitionSpec(None, wide[2], None))
    function = functools.partial(_sorted, product, wide[2])
    return split_over_devices(function, mesh, (rows, rows, rows, of_kernels), rows)(
        x, shares, chosen, kernels
    )


@functools.partial(jax.checkpoint, static_argnums=(0, 1))
def _sorted(
    product: GroupedProduct,
    width_axis: Any,
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    kernels: Kernels,
) -> jax.Array:
    """Those of one device. Args: width_axis: mesh axes that split F, to sum over; None: nothing does."""
    per_token, width = chosen.shape[-1], x.shape[-1]
    num_experts = len(kernels.gate)
    slots, sizes = _slots(chosen.reshape(-1), num_experts, TILES.rows)
    each = jnp.repeat(x.reshape(-1, width), per_token, axis=0)
    rows = jnp.zeros((num_slots(slots.size, num_experts), width), x.dtype).at[slots].set(each, **ONCE)
    h = jax.nn.silu(product(rows, kernels.gate, sizes)) * product(rows, kernels.up, sizes)
    y = product(h, kernels.down, sizes).at[slots].get(**ONCE)
    y = y.reshape(*chosen.shape, width).astype(jnp.float32)
    total = jnp.sum(y * shares[..., None].astype(jnp.float32), axis=-2)
    if width_axis:
        total = jax.lax.psum(total, width_axis)
    return total.astype(x.dtype)


ONCE: dict[str, Any] = dict(unique_indices=True, mode="promise_in_bounds")
"""No index comes twice: spares gradients atomic sums, whose order is another in each run."""


def num_slots(num_rows: int, num_experts: int) -> int:
    """Enough for so many rows, wherever they go, where the last block of each expert may hold but one."""
    return (-(-num_rows // TILES.rows) + num_experts) * TILES.rows


def _slots(experts: jax.Array, num_experts: int, block: int) -> tuple[jax.Array, jax.Array]:
    """Where rows go so that those of an expert lie together, in whole blocks, in their old order.

    Args:   experts: [R] int32, of each row.
    Returns: slots: [R] int32, each once. sizes: [E] int32, slots of each expert, multiples of `block`.
    """
    # `bincount` would add up one by one what falls on so few numbers.
    counts = jnp.sum(experts[:, None] == jnp.arange(num_experts)[None], axis=0, dtype=jnp.int32)
    sizes = -(-counts // block) * block
    shift = jnp.cumsum(sizes) - sizes - (jnp.cumsum(counts) - counts)
    order = jnp.argsort(experts, stable=True)
    rank = jnp.zeros_like(order).at[order].set(jnp.arange(order.size, dtype=order.dtype), **ONCE)
    return (rank + shift[experts]).astype(jnp.int32), sizes
