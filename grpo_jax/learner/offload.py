"""Optimizer state and reference in the host's memory: `optim.offload` and `algorithm.ref_offload`.

With `optim.offload`, a device holds only the parameters from step to step, in the dtype of the computation. The
parameters in `model.trained_dtype` (the masters) and Adam's moments lie in pinned memory of the host. An update
copies the state of one parameter, all its layers, to the device, changes it there, and copies it back before the
next one: the device needs room for the largest only, and every byte of the state crosses the bus twice.
"""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from grpo_jax.config import OptimSection
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.optimizer import Apply, GradientCheck, Optimizer, read_leaf
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import abstract_trained, trained_shardings
from grpo_jax.model.sharding import abstract_like, replicated
from grpo_jax.types import Metrics, Params, TrainState

HOST = "pinned_host"


@flax.struct.dataclass
class LeafState:
    """The optimizer's state of one parameter."""

    master: Any
    """The parameter in `ModelConfig.trained_dtype`; None where the device holds it in that dtype."""
    inner: Any
    """The optax state of an optimizer of this parameter alone."""


def on_host(shardings: Any) -> Any:
    """The same split, in the host's memory."""
    return jax.tree.map(lambda s: s.with_memory_kind(HOST), shardings)


def on_device(shardings: Any) -> Any:
    """The same split, in the devices' memory."""
    return jax.tree.map(lambda s: s.with_memory_kind("device"), shardings)


def device_bytes(tree: Any) -> int:
    """Bytes on one device of arrays, or of `jax.ShapeDtypeStruct`s with shardings; 0 for those on the host."""
    on_device = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return sum(on_device(x) for x in jax.tree.leaves(tree) if x.sharding.memory_kind != HOST)


def to_host(tree: Any, shardings: Any, dtype: Any) -> Any:
    """Copies to the host, an array at a time. Args: shardings: on devices; dtype: to cast to before."""
    copy = lambda x, target: jax.block_until_ready(jax.device_put(x.astype(dtype), target))
    return jax.tree.map(copy, tree, on_host(shardings))


class HostOptimizer(Optimizer):
    """Masters and moments on the host, streamed through the devices a parameter at a time."""

    is_on_host = True

    @staticmethod
    def stored_model(model: ModelConfig) -> ModelConfig:
        """See `Optimizer`: in the dtype of the computation, if that is narrower."""
        is_narrower = jnp.dtype(model.dtype).itemsize < jnp.dtype(model.trained_dtype).itemsize
        return model.with_trained_dtype(model.dtype) if is_narrower else model

    @staticmethod
    def held_bytes(
        section: OptimSection, model: ModelConfig, num_params: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """See `Optimizer`."""
        held = num_params * jnp.dtype(HostOptimizer.stored_model(model).trained_dtype).itemsize
        masters = num_params * jnp.dtype(model.trained_dtype).itemsize
        moments = 2 * num_params * jnp.dtype(section.moments_dtype).itemsize
        on_the_host = {"master parameters": masters} if masters != held else {}
        return {"parameters": held}, on_the_host | {"Adam's moments": moments}

    @staticmethod
    def step_bytes(section: OptimSection, model: ModelConfig, leaf_sizes: list[int]) -> int:
        """A parameter's state and its new value, and the gradients that have not had their turn."""
        held, host = HostOptimizer.held_bytes(section, model, 1)
        state = held["parameters"] + sum(host.values())
        gradient = jnp.dtype(section.accumulator_dtype).itemsize
        sizes = sorted(leaf_sizes)
        return max(gradient * sum(sizes[i:]) + state * size for i, size in enumerate(sizes))

    def _init_leaf(self, param: jax.Array) -> LeafState:
        """The state of one parameter at step 0."""
        param = param.astype(self._model.trained_dtype)
        has_master = self.stored_model(self._model) != self._model
        return LeafState(param if has_master else None, self._adamw.init(param))

    def _abstract_leaves(self) -> Any:
        """Shape and dtype of every leaf of the state."""
        params = abstract_trained(self._model)
        return jax.eval_shape(lambda params: jax.tree.map(self._init_leaf, params), params)

    def shardings(self) -> TrainState:
        """See `Optimizer`: the state is in the host's memory, except for the counts of updates."""

        def of_leaf(param: Any, state: LeafState, sharding: Any) -> LeafState:
            place = lambda x: (
                sharding.with_memory_kind(HOST) if x.shape == param.shape else replicated(self._mesh)
            )
            return jax.tree.map(place, state)

        params = trained_shardings(self._model, self._mesh)
        moments = jax.tree.map(of_leaf, abstract_trained(self._model), self._abstract_leaves(), params)
        return self._state_shardings(params, moments)

    def abstract_state(self) -> TrainState:
        """See `Optimizer`."""
        params = abstract_trained(self.stored_model(self._model))
        return self._abstract_state(params, self._abstract_leaves())

    def init_state(self, params: Params) -> TrainState:
        """See `Optimizer`; read, made and put away a parameter at a time."""
        dtype, shardings = self.stored_model(self._model).trained_dtype, self.shardings()

        def make(param: Any, sharding: Any, target: LeafState) -> tuple[jax.Array, LeafState]:
            param = read_leaf(param)
            state = jax.jit(self._init_leaf, out_shardings=on_device(target))(param)
            state = jax.block_until_ready(jax.device_put(state, target))
            return jax.jit(lambda x: x.astype(dtype), out_shardings=sharding)(param), state

        tree: Any = jax.tree.structure(params)
        columns = (params, shardings.params, shardings.opt_state)
        made = [make(*leaves) for leaves in zip(*map(tree.flatten_up_to, columns), strict=True)]
        of = lambda part: tree.unflatten([both[part] for both in made])
        return self._first_state(of(0), of(1))

    def masters(self, state: TrainState) -> Params:
        """See `Optimizer`."""
        is_leaf = lambda x: isinstance(x, LeafState)
        master = lambda leaf, param: param if leaf.master is None else leaf.master
        return jax.tree.map(master, state.opt_state, state.params, is_leaf=is_leaf)

    def make_apply(self, check: GradientCheck) -> Apply:
        """See `Optimizer`. Waits for the device."""
        return _StreamedApply(jax.jit(check), self._leaf_updates(), jax.jit(self.next_scale))

    def compile_apply(self, apply: Apply, total: Any) -> dict[str, int]:
        """See `Optimizer`: one small program a parameter."""
        assert isinstance(apply, _StreamedApply)
        apply.compile(self.abstract_state(), total)
        return {}

    def _leaf_updates(self) -> Any:
        """A `_LeafUpdate` for every parameter."""
        shardings = self.shardings()
        make = lambda param, state: _LeafUpdate(self._adamw, param, state)
        return jax.tree.map(make, shardings.params, shardings.opt_state)


class _StreamedApply:
    """The optimizer's step: the smallest parameter of a device first.

    Each gradient is given back when its parameter is done: when the largest states come, no other gradients
    are left.
    """

    def __init__(self, check: Any, updates: Any, next_scale: Any):
        """Args: updates: a `_LeafUpdate` for each parameter; check, next_scale: jitted."""
        self._check, self._updates, self._next_scale = check, updates, next_scale

    def __call__(self, state: TrainState, total: Any) -> tuple[TrainState, Metrics]:
        scale, is_finite, metrics = self._check(total, state.step, state.loss_scale)
        tree: Any = jax.tree.structure(state.params)
        leaves = (self._updates, state.params, state.opt_state, total[0])
        each = list(zip(*map(tree.flatten_up_to, leaves), strict=True))
        new: dict[int, tuple[jax.Array, LeafState]] = {}
        size = lambda param: math.prod(param.sharding.shard_shape(param.shape))
        for i in sorted(range(len(each)), key=lambda i: size(each[i][1])):
            update, param, leaf, grad = each[i]
            new[i] = update(param, leaf, grad, scale, is_finite)
            grad.delete()
        take = lambda part: tree.unflatten([new[i][part] for i in range(len(each))])
        loss_scale = self._next_scale(state.loss_scale, is_finite)
        return TrainState(state.step + is_finite, take(0), take(1), loss_scale), metrics

    def compile(self, state: TrainState, total: Any) -> None:
        """Compiles every program for abstract arguments."""
        (scale, is_finite, _), _ = compile_ahead(self._check, total, state.step, state.loss_scale)
        tree: Any = jax.tree.structure(state.params)
        leaves = (self._updates, state.params, state.opt_state, total[0])
        for update, *rest in zip(*map(tree.flatten_up_to, leaves), strict=True):
            update.compile(*rest, scale, is_finite)


class _LeafUpdate:
    """The update of one parameter: `update(param, state, grad, scale, is_finite) -> (param, state)`.

    The gradient is multiplied by `scale`; without `is_finite`, nothing changes. Takes the first two arguments
    over.
    """

    def __init__(self, optimizer: optax.GradientTransformation, param: Any, state: LeafState):
        """Args: param, state: the shardings of the parameter, and of its state on the host."""
        self._optimizer, self._on_host, self._on_device = optimizer, state, on_device(state)
        outputs = (param, self._on_device)
        self._change = jax.jit(self._changed, donate_argnums=(0, 1), out_shardings=outputs)

    def _changed(
        self, param: jax.Array, state: LeafState, grad: jax.Array, scale: jax.Array, is_finite: jax.Array
    ) -> tuple[jax.Array, LeafState]:
        old = param if state.master is None else state.master
        updates, inner = self._optimizer.update(grad.astype(jnp.float32) * scale, state.inner, old)
        master = optax.apply_updates(old, updates)
        new = LeafState(None if state.master is None else master, inner)
        keep = lambda new, old: jnp.where(is_finite, new, old)
        return keep(master.astype(param.dtype), param), jax.tree.map(keep, new, state)

    def __call__(self, param: jax.Array, state: LeafState, *rest: jax.Array) -> tuple[jax.Array, LeafState]:
        brought = jax.block_until_ready(jax.device_put(state, self._on_device))
        # Its memory on the host is given back before the new state asks for as much.
        for old in jax.tree.leaves(state):
            if old.sharding.memory_kind == HOST:
                old.delete()
        param, changed = self._change(param, brought, *rest)
        # Waiting keeps the states of several parameters from being on the device at once.
        return param, jax.block_until_ready(jax.device_put(changed, self._on_host))

    def compile(self, param: Any, state: LeafState, *rest: Any) -> None:
        """Compiles for abstract arguments."""
        compile_ahead(self._change, param, abstract_like(state, self._on_device), *rest)
