"""Optimizer state and reference in the host's memory: what `optim.offload` and `algorithm.ref_offload` do.

With `optim.offload`, a device holds the parameters in the dtype of the computation from step to step, and nothing
else. What they are rounded from (the masters) and Adam's moments lie in pinned memory of the host. An update
brings over the state of one parameter, all layers of it, changes it on the device, and puts it back before the
next one comes: the device needs room for the largest, and 24 bytes a parameter cross the bus.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax.model.sharding import replicated
from grpo_jax.model.transformer import ModelConfig, abstract_params, param_shardings
from grpo_jax.types import Params

HOST = "pinned_host"


@flax.struct.dataclass
class LeafState:
    """The optimizer's state of one parameter."""

    master: Any
    """The parameter in `ModelConfig.param_dtype`; None where it is in that dtype itself."""
    inner: Any
    """The optax state of an optimizer with this parameter alone."""


def on_host(shardings: Any) -> Any:
    """The same split, in the host's memory."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)


def to_host(tree: Any, shardings: Any, dtype: Any = None) -> Any:
    """Copies to the host, an array at a time. Args: shardings: on devices; dtype: to cast to before."""

    def one(x: jax.Array, sharding: Any) -> jax.Array:
        x = x if dtype is None else x.astype(dtype)
        return jax.block_until_ready(jax.device_put(x, sharding.with_memory_kind(HOST)))

    return jax.tree.map(one, tree, shardings)


def leaf_state(optimizer: optax.GradientTransformation, master_dtype: Any, param: jax.Array) -> LeafState:
    """The state of one parameter at step 0."""
    master = None if param.dtype == master_dtype else param.astype(master_dtype)
    return LeafState(master, optimizer.init(param if master is None else master))


def offloaded_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """`NamedSharding` of every leaf of the offloaded state: in the host's memory but for the counts of updates."""

    def one(param: Any, state: LeafState, sharding: Any) -> LeafState:
        is_alike = lambda x: x.shape == param.shape
        place = lambda x: sharding.with_memory_kind(HOST) if is_alike(x) else replicated(mesh)
        return jax.tree.map(place, state)

    shapes = abstract_params(config)[0]
    return jax.tree.map(one, shapes, abstract_offloaded(config, optimizer), param_shardings(config, mesh))


def abstract_offloaded(config: ModelConfig, optimizer: optax.GradientTransformation) -> Any:
    """Shape and dtype of every leaf of the offloaded state."""
    params = abstract_params(dataclasses.replace(config, param_dtype=config.dtype))[0]
    make = functools.partial(leaf_state, optimizer, config.param_dtype)
    return jax.eval_shape(lambda params: jax.tree.map(make, params), params)


def init_offloaded(params: Params, config: ModelConfig, optimizer: Any, mesh: Mesh) -> Any:
    """The state to begin with, made and put away a parameter at a time."""
    make = jax.jit(functools.partial(leaf_state, optimizer, config.param_dtype))
    one = lambda param, there: jax.block_until_ready(jax.device_put(make(param), there))
    return jax.tree.map(one, params, offloaded_shardings(config, optimizer, mesh))


def make_streamed_update(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[Params, Any]]:
    """Returns `update(params, state, grads, scale, is_finite) -> (params, state)`, which takes its first two over.

    The gradients are multiplied by `scale`; without `is_finite`, nothing changes.
    """
    there = offloaded_shardings(config, optimizer, mesh)
    here = jax.tree.map(lambda s: s.with_memory_kind("device"), there)
    shardings = param_shardings(config, mesh)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def change(
        param: jax.Array, state: LeafState, grad: jax.Array, scale: jax.Array, is_finite: jax.Array
    ) -> tuple[jax.Array, LeafState]:
        old = param if state.master is None else state.master
        updates, inner = optimizer.update(grad.astype(jnp.float32) * scale, state.inner, old)
        master = optax.apply_updates(old, updates)
        new = LeafState(None if state.master is None else master, inner)
        keep = lambda new, old: jnp.where(is_finite, new, old)
        return keep(master.astype(param.dtype), param), jax.tree.map(keep, new, state)

    def one(
        facts: tuple[jax.Array, jax.Array],
        param: jax.Array,
        state: LeafState,
        grad: jax.Array,
        sharding: Any,
        here: LeafState,
        there: LeafState,
    ) -> tuple[jax.Array, LeafState]:
        brought = jax.block_until_ready(jax.device_put(state, here))
        # Its place on the host is given back before the new state asks for one of the same size.
        for old in jax.tree.leaves(state):
            if old.sharding.memory_kind == HOST:
                old.delete()
        param, brought = change(param, brought, grad, *facts)
        # Waiting keeps the states of several parameters from being on the device at once.
        return jax.device_put(param, sharding), jax.block_until_ready(jax.device_put(brought, there))

    def update(
        params: Params, state: Any, grads: Params, scale: jax.Array, is_finite: jax.Array
    ) -> tuple[Params, Any]:
        facts = (scale, is_finite)
        pairs = jax.tree.map(functools.partial(one, facts), params, state, grads, shardings, here, there)
        is_pair = lambda x: isinstance(x, tuple)
        take = lambda i: jax.tree.map(lambda pair: pair[i], pairs, is_leaf=is_pair)
        return take(0), take(1)

    return update
