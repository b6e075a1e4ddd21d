"""The jitted steps: score (log-probabilities of given tokens) and update (gradients, optimizer).

Both are pure: they take all they need and return all they made, and what they replace is donated.
A mini-batch enters as micro-batches, [R, T] each and all of one shape, which are computed one after the other;
the R rows of each are split over the batch axes of the mesh. The denominators of the loss belong to the whole
mini-batch, hence the gradients of its micro-batches simply add up.

Nothing here waits for a device: the calls return at once, and what they return is there when it is asked for.
Only an optimizer whose state is on the host does wait.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.algorithm.loss import LossMetrics
from grpo_jax.config import OptimSection
from grpo_jax.learner.batching import Places, pack
from grpo_jax.learner.offload import init_offloaded, make_streamed_update, offloaded_shardings, rounded
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.logprobs import token_logprobs
from grpo_jax.model.sharding import AXIS_RULES, num_batch_shards, replicated
from grpo_jax.model.transformer import abstract_params, forward, head_matrix, param_shardings
from grpo_jax.types import Metrics, Params, TrainBatch, TrainState

LossFn = Callable[[jax.Array, jax.Array, TrainBatch, jax.Array], tuple[jax.Array, LossMetrics]]
"""(logprobs, entropy, batch, weights) -> (loss, metrics); all arrays [R, T]."""

Schedule = Callable[[Any], Any]
"""Number of updates applied so far -> learning rate."""


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


def make_optimizer(section: OptimSection, schedule: Schedule) -> optax.GradientTransformation:
    """AdamW, moments stored in `moments_dtype`; weight decay on every parameter, as torch's (and verl's).

    The update clips the gradients before, by the norm of all of them: the rest looks at one parameter at a time.
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


def at_rest(config: ModelConfig, section: OptimSection) -> ModelConfig:
    """The model with the dtype in which the devices hold its parameters from step to step."""
    return rounded(config) if section.offload else config


def state_shardings(
    config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh, *, offload: bool
) -> TrainState:
    """`NamedSharding` of every leaf of the train state: moments live where their parameters do, or on the host."""
    params = param_shardings(config, mesh)
    if offload:
        moments = offloaded_shardings(config, optimizer, mesh)
        return TrainState(step=replicated(mesh), params=params, opt_state=moments)  # type: ignore[arg-type]
    abstract = jax.eval_shape(optimizer.init, abstract_params(config)[0])
    opt_state = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract, params, transform_non_params=lambda _: replicated(mesh)
    )
    return TrainState(step=replicated(mesh), params=params, opt_state=opt_state)  # type: ignore[arg-type]


def init_state(
    params: Params,
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    offload: bool,
) -> TrainState:
    """A train state at step 0. Takes `params` (of the model `at_rest`) over: the first update donates them."""
    if offload:
        opt_state = init_offloaded(params, config, optimizer, mesh)
    else:
        shardings = state_shardings(config, optimizer, mesh, offload=False)
        opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(np.int32(0), replicated(mesh))
    return TrainState(step=step, params=params, opt_state=opt_state)


def copy_params(params: Params, dtype: Any) -> Params:
    """A frozen copy, in `dtype`, that survives the donation of `params`."""
    return jax.jit(lambda p: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), p))(params)


def to_micro_batches(
    batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
) -> tuple[list[TrainBatch], Places]:
    """Packs a host batch [B, T] into micro-batches of one shape [R, T] and splits their rows over the mesh."""
    micro_batches, places = pack(batch, *shape)
    return jax.device_put(micro_batches, NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))), places


Score = Callable[[Params, TrainBatch], jax.Array]
"""(parameters, micro-batch [R, T]) -> [R, T] float32, the log-probability of every token."""


def make_score_step(config: ModelConfig, mesh: Mesh, *, temperature: float, chunk_tokens: int) -> Score:
    """Returns the function that scores a micro-batch. Only its tokens, positions and segments are read."""

    @jax.jit
    def score(params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        columns = _chunk_columns(chunk_tokens, tokens.shape[0], mesh)
        with jax.named_scope("score"):
            return token_scores(
                params, config, tokens, positions, segment_ids, temperature=temperature, chunk_columns=columns
            )[0]

    return lambda params, micro: score(params, micro.tokens, micro.positions, micro.segment_ids)


def score_rows(
    score: Score, params: Params, batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
) -> np.ndarray:
    """Log-probabilities of a host batch, [B, T] float32, on the host and 0 outside the completions.

    Args: shape: [R, T] of the micro-batches.
    """
    batch = dataclasses.replace(batch, old_logprobs=None, ref_logprobs=None, loss_weights=None)
    micro_batches, places = to_micro_batches(batch, shape, mesh)
    logprobs = np.concatenate(jax.device_get([score(params, micro) for micro in micro_batches]))
    unpacked = places.unpack(logprobs, batch.tokens.shape[1])
    return np.where(batch.completion_mask > 0, unpacked, np.float32(0))


@dataclasses.dataclass(frozen=True)
class UpdateStep:
    """One optimizer step on a mini-batch: `update(state, micro_batches) -> (state, metrics)`.

    A loss or gradient that is not finite leaves parameters and optimizer as they were; the metric
    "actor/skipped_updates" is 1 then. The state is donated.
    """

    cast: Callable[[Params], Params]
    """Parameters -> those that the micro-batches compute with, in the dtype of the computation."""
    zeros: Callable[[Params, TrainBatch], Any]
    """The empty sum of gradients and metrics; looks at shapes alone."""
    accumulate: Callable[[Params, Any, TrainBatch], Any]
    """Adds those of one micro-batch [R, T] to the sum, which is donated."""
    apply: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    """The optimizer's step with the sum; it takes both over."""

    def __call__(self, state: TrainState, micro_batches: Sequence[TrainBatch]) -> tuple[TrainState, Metrics]:
        params = self.cast(state.params)
        total = self.zeros(params, micro_batches[0])
        for micro in micro_batches:
            total = self.accumulate(params, total, micro)
        return self.apply(state, total)


def make_update_step(
    config: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    loss_fn: LossFn,
    *,
    optim: OptimSection,
    temperature: float,
    chunk_tokens: int,
) -> UpdateStep:
    """Returns the update.

    Args:
        optim: what `optimizer` was made from; here it says how to sum, to clip, and where the state lives.
        temperature: of the sampler; divides the logits.
        chunk_tokens: tokens a device projects to the vocabulary at once.
    """
    shardings = state_shardings(config, optimizer, mesh, offload=optim.offload)

    def gradients(params: Params, micro: TrainBatch) -> tuple[Params, LossMetrics]:
        def loss(params: Params) -> tuple[jax.Array, LossMetrics]:
            logprobs, entropy = token_scores(
                params, config, micro.tokens, micro.positions, micro.segment_ids,
                temperature=temperature, chunk_columns=_chunk_columns(chunk_tokens, micro.tokens.shape[0], mesh),
            )  # fmt: skip
            return loss_fn(logprobs, entropy, micro, micro.loss_weights)

        return jax.grad(loss, has_aux=True)(params)

    def zeros(params: Params, micro: TrainBatch) -> tuple[Params, LossMetrics]:
        grads, metrics = jax.eval_shape(gradients, params, micro)
        return (
            jax.tree.map(lambda x: jnp.zeros(x.shape, optim.accumulator_dtype), grads),
            jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics),
        )

    def accumulate(params: Params, total: Any, micro: TrainBatch) -> tuple[Params, LossMetrics]:
        with jax.named_scope("gradients"):
            grads, metrics = gradients(params, micro)
            add = lambda total, grad: (total.astype(jnp.float32) + grad).astype(total.dtype)
            return jax.tree.map(add, total[0], grads), total[1].merge(metrics)

    def judge(total: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Metrics]:
        """By what to multiply the gradients to clip their norm, whether all is finite, and the metrics."""
        grads, metrics = total
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), grads))
        is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm)
        summary = metrics.summary()
        summary["actor/grad_norm"] = norm
        summary["actor/lr"] = jnp.asarray(schedule(step), jnp.float32)
        summary["actor/skipped_updates"] = 1 - is_finite.astype(jnp.int32)
        return jnp.minimum(1, optim.max_grad_norm / norm), is_finite, summary

    def apply_at_once(state: TrainState, total: Any) -> tuple[TrainState, Metrics]:
        with jax.named_scope("optimizer"):
            scale, is_finite, summary = judge(total, state.step)
            grads = jax.tree.map(lambda x: x.astype(jnp.float32) * scale, total[0])
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new = TrainState(state.step + 1, params, opt_state)
            return jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state), summary

    sums = (shardings.params, replicated(mesh))
    apply: Callable[[TrainState, Any], tuple[TrainState, Metrics]]
    if optim.offload:
        apply = make_streamed_apply(jax.jit(judge), make_streamed_update(config, optimizer, mesh))
    else:
        apply = jax.jit(apply_at_once, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
    return UpdateStep(
        cast=make_cast(at_rest(config, optim), mesh),
        zeros=jax.jit(zeros, out_shardings=sums),
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=sums),
        apply=apply,
    )


def make_streamed_apply(judge: Any, update: Any) -> Callable[[TrainState, Any], tuple[TrainState, Metrics]]:
    """The optimizer's step where its state is on the host. Waits for the device."""

    def apply(state: TrainState, total: Any) -> tuple[TrainState, Metrics]:
        scale, is_finite, summary = judge(total, state.step)
        params, opt_state = update(state.params, state.opt_state, total[0], scale, is_finite)
        return TrainState(state.step + is_finite, params, opt_state), summary

    return apply


def _chunk_columns(chunk_tokens: int, rows: int, mesh: Mesh) -> int:
    """Columns of a micro-batch whose logits one device computes at once."""
    return max(1, chunk_tokens // (rows // num_batch_shards(mesh)))


def make_cast(config: ModelConfig, mesh: Mesh) -> Callable[[Params], Params]:
    """Returns the function that casts parameters once an update, and not once a micro-batch."""
    if config.dtype == config.param_dtype:
        return lambda params: params
    cast = lambda params: jax.tree.map(lambda x: x.astype(config.dtype), params)
    return jax.jit(cast, out_shardings=param_shardings(config, mesh))


def token_scores(
    params: Params,
    config: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    temperature: float,
    chunk_columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every token of a micro-batch, [R, T] float32 each."""
    with jax.named_scope("forward"):
        hidden = forward(params, config, tokens, positions, segment_ids)
    with jax.named_scope("head"):
        return token_logprobs(
            hidden, head_matrix(params), tokens, temperature=temperature, chunk_columns=chunk_columns
        )
