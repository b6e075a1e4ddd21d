"""The optimizer: AdamW, its learning rate, and where its state lives.

`learner.make_optimizer` gives one of two objects with the same functions: `DeviceOptimizer` below, whose state
lives beside the parameters, or `offload.HostOptimizer`, whose state lives in the host's memory. Nothing else asks
which.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config import OptimSection
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.loss_scale import LossScaling
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import abstract_trained, trained_shardings
from grpo_jax.model.sharding import abstract_like, place, replicated
from grpo_jax.types import LossScale, Metrics, Params, TrainState

Schedule = Callable[[Any], Any]
"""Number of updates applied so far -> learning rate."""

GradientCheck = Callable[[Any, jax.Array, Any], tuple[jax.Array, jax.Array, Metrics]]
"""(sum of gradients and metrics, updates applied, `LossScale` or None) -> (factor that undoes the scale and clips
the gradients' norm, whether loss and norm are finite, metrics)."""

Apply = Callable[[TrainState, Any], tuple[TrainState, Metrics]]
"""(train state, sum of gradients and metrics) -> (new train state, metrics). Takes both arguments over."""


class Optimizer(abc.ABC):
    """AdamW over the parameters of one model that are trained."""

    is_on_host: ClassVar[bool]
    """Whether the state is in the host's memory, with no room for a copy of it there."""

    def __init__(
        self,
        adamw: optax.GradientTransformation,
        schedule: Schedule,
        model: ModelConfig,
        mesh: Mesh | AbstractMesh,
        loss_scaling: LossScaling | None = None,
    ):
        """Args: adamw: with this schedule; loss_scaling: None: the loss is differentiated as it is."""
        self.schedule, self.loss_scaling = schedule, loss_scaling
        self._adamw, self._model, self._mesh = adamw, model, mesh

    @staticmethod
    @abc.abstractmethod
    def stored_model(model: ModelConfig) -> ModelConfig:
        """The model with the dtype in which the devices hold its parameters from step to step."""

    @staticmethod
    @abc.abstractmethod
    def held_bytes(
        section: OptimSection, model: ModelConfig, num_params: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes from step to step of parameters and state, by name: on the device, and in the host's memory.

        Args: num_params: that are trained.
        """

    @staticmethod
    @abc.abstractmethod
    def step_bytes(section: OptimSection, model: ModelConfig, leaf_sizes: list[int]) -> int:
        """The most that one optimizer step takes on a device beside what is held, its gradients included.

        Args: leaf_sizes: numbers of each parameter on one device.
        """

    @abc.abstractmethod
    def shardings(self) -> TrainState:
        """`NamedSharding` of every leaf of the train state."""

    @abc.abstractmethod
    def abstract_state(self) -> TrainState:
        """Shape, dtype and sharding of every leaf of the train state."""

    @abc.abstractmethod
    def init_state(self, params: Params) -> TrainState:
        """A train state at step 0.

        Args: params: arrays, which the first update may donate, or functions that read them (`hf.param_readers`),
            so that no more are held at once than have to be. In `trained_dtype`: what is rounded stays so.
        """

    @abc.abstractmethod
    def masters(self, state: TrainState) -> Params:
        """The parameters as the optimizer changes them, in `trained_dtype`: on the devices or the host."""

    @abc.abstractmethod
    def make_apply(self, check: GradientCheck) -> Apply:
        """Returns the optimizer's step. Where `check` finds something that is not finite, it changes nothing."""

    @abc.abstractmethod
    def compile_apply(self, apply: Apply, total: Any) -> dict[str, int]:
        """Compiles `apply` for the abstract sum `total`. Returns bytes by phase, as `Learner.compile`."""

    def _first_state(self, params: Params, opt_state: Any) -> TrainState:
        step = place(np.int32(0), replicated(self._mesh))
        scale = None if self.loss_scaling is None else self.loss_scaling.init(self._mesh)
        return TrainState(step, params, opt_state, scale)

    def _state_shardings(self, params: Params, opt_state: Any) -> TrainState:
        one: Any = replicated(self._mesh)
        return TrainState(one, params, opt_state, None if self.loss_scaling is None else LossScale(one, one))

    def _abstract_state(self, params: Params, opt_state: Any) -> TrainState:
        """`jax.ShapeDtypeStruct`s with shardings, from shapes."""
        step: Any = jax.ShapeDtypeStruct((), np.int32)
        scale = None if self.loss_scaling is None else self.loss_scaling.abstract()
        return abstract_like(TrainState(step, params, opt_state, scale), self.shardings())

    def next_scale(self, now: LossScale | None, is_finite: jax.Array) -> LossScale | None:
        """The loss's scale after an update; None where there is none."""
        return None if self.loss_scaling is None or now is None else self.loss_scaling.next(now, is_finite)


def read_leaf(param: Any) -> jax.Array:
    """A parameter that is there, or the result of the function that reads it."""
    return param() if callable(param) else param


def make_schedule(section: OptimSection, num_updates: int) -> Schedule:
    """Linear warm-up, then constant, or linear or cosine decay to 0 at `num_updates`."""
    peak, warmup = section.learning_rate, section.warmup_steps
    decay_steps = max(1, num_updates - warmup)
    after: Schedule = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
    }[section.schedule]
    if not warmup:
        return after
    # The first update of w gets peak / w: a learning rate of 0 would waste it.
    rise = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([rise, after], [warmup])


def make_adamw(section: OptimSection, schedule: Schedule) -> optax.GradientTransformation:
    """AdamW, moments stored in `moments_dtype`; weight decay on every parameter, as torch's (and verl's).

    The update clips the gradients by the norm of all of them before; the rest looks at one parameter at a time.
    """
    adamw = optax.adamw(schedule, b1=section.beta1, b2=section.beta2, weight_decay=section.weight_decay)

    def stored(state: Any, dtype: Any) -> Any:
        # `optax.tree_map_params` looks at the state with placeholders in it, which have no dtype.
        is_moment = lambda x: jnp.issubdtype(getattr(x, "dtype", int), jnp.floating)
        return jax.tree.map(lambda x: x.astype(dtype) if is_moment(x) else x, state)

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        updates, new = adamw.update(grads, stored(state, jnp.float32), params)
        return updates, stored(new, section.moments_dtype)

    return optax.GradientTransformation(
        lambda params: stored(adamw.init(params), section.moments_dtype), update
    )


class DeviceOptimizer(Optimizer):
    """Parameters and state on the devices: moments are sharded as their parameters are."""

    is_on_host = False

    @staticmethod
    def stored_model(model: ModelConfig) -> ModelConfig:
        """See `Optimizer`: as the optimizer changes them."""
        return model

    @staticmethod
    def held_bytes(
        section: OptimSection, model: ModelConfig, num_params: int
    ) -> tuple[dict[str, int], dict[str, int]]:
        """See `Optimizer`."""
        moments = 2 * num_params * jnp.dtype(section.moments_dtype).itemsize
        parameters = num_params * jnp.dtype(model.trained_dtype).itemsize
        return {"parameters": parameters, "Adam's moments": moments}, {}

    @staticmethod
    def step_bytes(section: OptimSection, model: ModelConfig, leaf_sizes: list[int]) -> int:
        """See `Optimizer`: the gradients; parameters and state are replaced in place."""
        return sum(leaf_sizes) * jnp.dtype(section.accumulator_dtype).itemsize

    def shardings(self) -> TrainState:
        """See `Optimizer`."""
        params = trained_shardings(self._model, self._mesh)
        abstract = jax.eval_shape(self._adamw.init, abstract_trained(self._model))
        opt_state = optax.tree_map_params(
            self._adamw,
            lambda _, s: s,
            abstract,
            params,
            transform_non_params=lambda _: replicated(self._mesh),
        )
        return self._state_shardings(params, opt_state)

    def abstract_state(self) -> TrainState:
        """See `Optimizer`."""
        params = abstract_trained(self._model)
        return self._abstract_state(params, jax.eval_shape(self._adamw.init, params))

    def init_state(self, params: Params) -> TrainState:
        """See `Optimizer`."""
        params = jax.tree.map(read_leaf, params)
        opt_state = jax.jit(self._adamw.init, out_shardings=self.shardings().opt_state)(params)
        return self._first_state(params, opt_state)

    def masters(self, state: TrainState) -> Params:
        """See `Optimizer`."""
        return state.params

    def make_apply(self, check: GradientCheck) -> Apply:
        """See `Optimizer`."""

        def apply(state: TrainState, total: Any) -> tuple[TrainState, Metrics]:
            with jax.named_scope("optimizer"):
                scale, is_finite, metrics = check(total, state.step, state.loss_scale)
                grads = jax.tree.map(lambda x: x.astype(jnp.float32) * scale, total[0])
                updates, opt_state = self._adamw.update(grads, state.opt_state, state.params)
                params = optax.apply_updates(state.params, updates)
                new = TrainState(state.step + 1, params, opt_state, state.loss_scale)
                kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
                scale_after = self.next_scale(state.loss_scale, is_finite)
                return dataclasses.replace(kept, loss_scale=scale_after), metrics

        return jax.jit(apply, donate_argnums=0, out_shardings=(self.shardings(), replicated(self._mesh)))

    def compile_apply(self, apply: Apply, total: Any) -> dict[str, int]:
        """See `Optimizer`."""
        return {"optimizer": compile_ahead(apply, self.abstract_state(), total)[1]}
