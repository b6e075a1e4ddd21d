"""Optimizer state and reference in the host's memory: what `optim.offload` and `algorithm.ref_offload` do.

With `optim.offload`, a device holds the parameters in the dtype of the computation from step to step, and nothing
else. What they are rounded from (the masters) and Adam's moments lie in pinned memory of the host. An update
brings over the state of one parameter, all layers of it, changes it on the device, and puts it back before the
next one comes: the device needs room for the largest, and every byte of the state crosses the bus twice.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import replicated
from grpo_jax.model.transformer import abstract_params, param_shardings
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


def to_host(tree: Any, shardings: Any, dtype: Any) -> Any:
    """Copies to the host, an array at a time. Args: shardings: on devices; dtype: to cast to before."""
    one = lambda x, there: jax.block_until_ready(jax.device_put(x.astype(dtype), there))
    return jax.tree.map(one, tree, on_host(shardings))


def rounded(config: ModelConfig) -> ModelConfig:
    """The model with parameters as the devices hold them: in the dtype of the computation, if that is narrower."""
    is_narrower = jnp.dtype(config.dtype).itemsize < jnp.dtype(config.param_dtype).itemsize
    return dataclasses.replace(config, param_dtype=config.dtype) if is_narrower else config


def leaf_state(optimizer: optax.GradientTransformation, master_dtype: Any, param: jax.Array) -> LeafState:
    """The state of one parameter at step 0."""
    master = None if param.dtype == master_dtype else param.astype(master_dtype)
    return LeafState(master, optimizer.init(param if master is None else master))


def abstract_offloaded(config: ModelConfig, optimizer: optax.GradientTransformation) -> Any:
    """Shape and dtype of every leaf of the offloaded state."""
    make = functools.partial(leaf_state, optimizer, config.param_dtype)
    return jax.eval_shape(lambda params: jax.tree.map(make, params), abstract_params(rounded(config))[0])


def offloaded_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> Any:
    """`NamedSharding` of every leaf of the offloaded state: in the host's memory but for the counts of updates."""

    def one(param: Any, state: LeafState, sharding: Any) -> LeafState:
        is_alike = lambda x: x.shape == param.shape
        place = lambda x: sharding.with_memory_kind(HOST) if is_alike(x) else replicated(mesh)
        return jax.tree.map(place, state)

    shapes = abstract_params(config)[0]
    return jax.tree.map(one, shapes, abstract_offloaded(config, optimizer), param_shardings(config, mesh))


def on_device(there: LeafState) -> LeafState:
    """The shardings of a parameter's state while it is changed."""
    return jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), there)


def init_offloaded(params: Params, config: ModelConfig, optimizer: Any, mesh: Mesh) -> Any:
    """The state to begin with, made and put away a parameter at a time."""
    make = functools.partial(leaf_state, optimizer, config.param_dtype)

    def one(param: jax.Array, there: LeafState) -> LeafState:
        made = jax.jit(make, out_shardings=on_device(there))(param)
        return jax.block_until_ready(jax.device_put(made, there))

    return jax.tree.map(one, params, offloaded_shardings(config, optimizer, mesh))


def make_streamed_update(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> Callable[..., tuple[Params, Any]]:
    """Returns `update(params, state, grads, scale, is_finite) -> (params, state)`; it takes the first three over.

    The gradients are multiplied by `scale`; without `is_finite`, nothing changes. The smallest parameter of a
    device comes first, and each gradient is given back: when the largest states come, no others are left.
    """
    make = functools.partial(_update_of_one, optimizer)
    there = offloaded_shardings(config, optimizer, mesh)
    steps = jax.tree.map(make, param_shardings(config, mesh), there)

    def update(
        params: Params, state: Any, grads: Params, scale: jax.Array, is_finite: jax.Array
    ) -> tuple[Params, Any]:
        tree: Any = jax.tree.structure(params)
        each = list(zip(*map(tree.flatten_up_to, (steps, params, state, grads)), strict=True))
        new: dict[int, tuple[jax.Array, LeafState]] = {}
        size = lambda param: math.prod(param.sharding.shard_shape(param.shape))
        for i in sorted(range(len(each)), key=lambda i: size(each[i][1])):
            step, param, leaf, grad = each[i]
            new[i] = step(param, leaf, grad, scale, is_finite)
            grad.delete()
        take = lambda part: tree.unflatten([new[i][part] for i in range(len(each))])
        return take(0), take(1)

    return update


def _update_of_one(
    optimizer: optax.GradientTransformation, sharding: Any, there: LeafState
) -> Callable[..., tuple[jax.Array, LeafState]]:
    """The update of one parameter. Args: sharding: of the parameter; there: of its state on the host."""
    here = on_device(there)

    @functools.partial(jax.jit, donate_argnums=(0, 1), out_shardings=(sharding, here))
    def change(
        param: jax.Array, state: LeafState, grad: jax.Array, scale: jax.Array, is_finite: jax.Array
    ) -> tuple[jax.Array, LeafState]:
        old = param if state.master is None else state.master
        updates, inner = optimizer.update(grad.astype(jnp.float32) * scale, state.inner, old)
        master = optax.apply_updates(old, updates)
        new = LeafState(None if state.master is None else master, inner)
        keep = lambda new, old: jnp.where(is_finite, new, old)
        return keep(master.astype(param.dtype), param), jax.tree.map(keep, new, state)

    def step(param: jax.Array, state: LeafState, *rest: jax.Array) -> tuple[jax.Array, LeafState]:
        brought = jax.block_until_ready(jax.device_put(state, here))
        # Its place on the host is given back before the new state asks for one of the same size.
        for old in jax.tree.leaves(state):
            if old.sharding.memory_kind == HOST:
                old.delete()
        param, changed = change(param, brought, *rest)
        # Waiting keeps the states of several parameters from being on the device at once.
        return param, jax.block_until_ready(jax.device_put(changed, there))

    return step
