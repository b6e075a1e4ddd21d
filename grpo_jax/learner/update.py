"""The jitted update: gradients of a mini-batch, then the optimizer.

It is pure: it takes all it needs, returns all it made, and donates what it replaces.
A mini-batch enters as micro-batches of one shape [R, T], which are computed one after the other; the R rows of
each are split over the batch axes of the mesh. The denominators of the loss belong to the whole mini-batch, so the
gradients of its micro-batches simply add up.

The calls return at once, before the devices are done. Only an optimizer whose state is on the host waits for them.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from grpo_jax.algorithm.loss import LossMetrics
from grpo_jax.config import OptimSection
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.forward import ForwardStep, Kept, Scores
from grpo_jax.learner.offload import device_bytes
from grpo_jax.learner.optimizer import Apply, GradientCheck, Optimizer
from grpo_jax.learner.replicas import AXIS, OWN, ROWS, WHOLE, each, has_copies, own_shardings
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import NOTHING, join, split, trained_shardings
from grpo_jax.model.sharding import replicated
from grpo_jax.types import Metrics, Params, TrainBatch, TrainState

LossFn = Callable[[jax.Array, jax.Array, TrainBatch], tuple[jax.Array, LossMetrics]]
"""(logprobs, entropy, batch) -> (loss, metrics); the arrays are [R, T]."""


@dataclasses.dataclass(frozen=True)
class UpdateStep:
    """One optimizer step on a mini-batch: `update(state, micro_batches, frozen) -> (state, metrics)`.

    frozen: the parameters that are not in the state, in the dtype of the computation; see `lora.split`.

    Where the loss or a gradient is not finite, parameters and optimizer stay as they were, and the metric
    "actor/skipped_updates" is 1; or "actor/overflows", where only the scale of the loss was too large. The
    state is donated.
    """

    to_compute_dtype: Callable[[Params], Params]
    """Trained parameters -> those that the micro-batches compute with, in the dtype of the computation."""
    forward: ForwardStep
    zeros: Any
    """(params, micro-batch) -> the empty sum of gradients and metrics; reads shapes only."""
    backward: Any
    """(params, kept, scores, sum, micro-batch, loss scale) -> the sum with gradients and metrics of one
    micro-batch [R, T] added. The sum is donated. Each copy of the parameters has its own."""
    apply: Apply
    add_up: Any = None
    """(sums of all copies) -> the sum. They are donated. None: there is one copy."""
    weigh: Any = None
    """(log-probabilities, micro-batch) -> [R, T] bool, the tokens that weigh in the policy loss; None: all do."""

    def __call__(
        self, state: TrainState, micro_batches: Sequence[TrainBatch], frozen: Params = NOTHING
    ) -> tuple[TrainState, Metrics]:
        state, metrics, _, _ = self.accounted(state, micro_batches, frozen)
        return state, metrics

    def accounted(
        self, state: TrainState, micro_batches: Sequence[TrainBatch], frozen: Params
    ) -> tuple[TrainState, Metrics, list[jax.Array], list[jax.Array]]:
        """The update; the tokens of each micro-batch that weigh in the policy loss, []: all do; and the policy's
        log-probabilities of each micro-batch, [R, T] float32."""
        params, weighing, scored = join(frozen, self.to_compute_dtype(state.params)), [], []
        total = self.zeros(params, micro_batches[0])
        for micro in micro_batches:
            total, logprobs = self._add_gradients(params, total, micro, state)
            scored.append(logprobs)
            if self.weigh is not None:
                weighing.append(self.weigh(logprobs, micro))
        total = total if self.add_up is None else self.add_up(total)
        return *self.apply(state, total), weighing, scored

    def _add_gradients(
        self, params: Params, total: Any, micro: TrainBatch, state: TrainState
    ) -> tuple[Any, jax.Array]:
        # In a function of its own: what is kept is given back before the next micro-batch asks for as much.
        scores, kept = self.forward(params, micro)
        return self.backward(params, kept, scores, total, micro, state.loss_scale), scores[0]

    def compile_params(self, params: Params) -> Params:
        """Compiles `to_compute_dtype` for abstract trained parameters, and returns its abstract result."""
        is_jitted = hasattr(self.to_compute_dtype, "lower")
        return compile_ahead(self.to_compute_dtype, params)[0] if is_jitted else params

    def compile(self, optimizer: Optimizer, params: Params, micro: TrainBatch) -> dict[str, int]:
        """Compiles the other programs. Returns bytes by phase, as `Learner.compile`.

        Args: params: all, as the micro-batches compute with; both may be `jax.ShapeDtypeStruct`s with shardings.
        """
        loss_scale = optimizer.abstract_state().loss_scale
        total, _ = compile_ahead(self.zeros, params, micro)
        (scores, kept), forward = self.forward.compile(params, micro)
        sums = device_bytes(total)
        total, backward = compile_ahead(self.backward, params, kept, scores, total, micro, loss_scale)
        total, adding = (total, 0) if self.add_up is None else compile_ahead(self.add_up, total)
        sizes = {"update": max(forward + sums, backward, adding)}
        return sizes | optimizer.compile_apply(self.apply, total)


def make_update_step(
    model: ModelConfig,
    mesh: Mesh,
    optimizer: Optimizer,
    forward: ForwardStep,
    loss_fn: LossFn,
    *,
    optim: OptimSection,
    weigh: Callable[[jax.Array, TrainBatch], jax.Array] | None = None,
) -> UpdateStep:
    """Returns the update. Args: optim: says how gradients are summed and clipped; weigh: see `UpdateStep`."""

    def zeros(params: Params, micro: TrainBatch) -> tuple[Params, LossMetrics]:
        scores = jax.ShapeDtypeStruct(micro.tokens.shape, jnp.float32)
        metrics = jax.eval_shape(loss_fn, scores, scores, micro)[1]
        return (
            jax.tree.map(lambda x: jnp.zeros(x.shape, optim.accumulator_dtype), split(params)[1]),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics),
        )

    def backward(
        params: Params, kept: Kept, scores: Scores, total: Any, micro: TrainBatch, loss_scale: Any
    ) -> tuple[Params, LossMetrics]:
        with jax.named_scope("gradients"):
            of_scores = lambda logprobs, entropy: loss_fn(logprobs, entropy, micro)
            loss, of_loss, metrics = jax.vjp(of_scores, *scores, has_aux=True)
            one = jnp.ones_like(loss)
            cotangents: Any = of_loss(one if loss_scale is None else one * loss_scale.scale)
            [grads] = kept.pullback(kept.arrays, params)(cotangents)
            add = lambda total, grad: (total.astype(jnp.float32) + grad).astype(total.dtype)
            return jax.tree.map(add, total[0], grads), total[1].merge(metrics)

    sums = (trained_shardings(model, mesh), replicated(mesh))
    own = own_shardings(sums, mesh)
    return UpdateStep(
        to_compute_dtype=make_cast(optimizer.stored_model(model), mesh),
        forward=forward,
        zeros=jax.jit(each(zeros, mesh, (WHOLE, ROWS), OWN), out_shardings=own),
        backward=jax.jit(
            each(backward, mesh, (WHOLE, OWN, ROWS, OWN, ROWS, WHOLE), OWN),
            donate_argnums=3,
            out_shardings=own,
        ),
        apply=optimizer.make_apply(make_gradient_check(optim, optimizer)),
        add_up=make_add_up(sums, mesh) if has_copies(mesh) else None,
        weigh=None if weigh is None else jax.jit(weigh),
    )


def make_add_up(sums: Any, mesh: Mesh) -> Any:
    """Returns what adds up the gradients and metrics of all copies. Args: sums: shardings of the result."""

    def add_up(total: Any) -> Any:
        grads, metrics = total
        add = lambda x: jax.lax.psum(x.astype(jnp.float32), AXIS).astype(x.dtype)
        return jax.tree.map(add, grads), metrics.merge_over(AXIS)

    return jax.jit(each(add_up, mesh, (OWN,), WHOLE), donate_argnums=0, out_shardings=sums)


def make_gradient_check(optim: OptimSection, optimizer: Optimizer) -> GradientCheck:
    """Returns what looks at a sum of gradients and metrics before the optimizer gets it."""

    def check(total: Any, step: jax.Array, loss_scale: Any) -> tuple[jax.Array, jax.Array, Metrics]:
        """See `GradientCheck`."""
        grads, metrics = total
        unscale = 1.0 if loss_scale is None else 1 / loss_scale.scale
        norm = unscale * optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), grads))
        is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm)
        is_broken = ~is_finite
        summary = metrics.summary()
        if loss_scale is not None:
            assert optimizer.loss_scaling is not None
            is_overflow = is_broken & jnp.isfinite(metrics.loss) & optimizer.loss_scaling.explains(loss_scale)
            is_broken &= ~is_overflow
            summary["actor/loss_scale"] = loss_scale.scale
            summary["actor/overflows"] = is_overflow.astype(jnp.int32)
        summary["actor/grad_norm"] = norm
        summary["actor/lr"] = jnp.asarray(optimizer.schedule(step), jnp.float32)
        summary["actor/skipped_updates"] = is_broken.astype(jnp.int32)
        return unscale * jnp.minimum(1, optim.max_grad_norm / norm), is_finite, summary

    return check


def make_cast(config: ModelConfig, mesh: Mesh) -> Callable[[Params], Params]:
    """Returns the function that casts trained parameters once an update, and not once a micro-batch."""
    if config.dtype == config.trained_dtype:
        return lambda params: params

    def cast(params: Params) -> Params:
        return jax.tree.map(lambda x: x.astype(config.dtype), params)

    return jax.jit(cast, out_shardings=trained_shardings(config, mesh))
