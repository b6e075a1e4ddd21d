"""The jitted steps: score (log-probabilities of given tokens) and update (gradients, optimizer).

Both are pure: they take all they need and return all they made, and the update's train state is donated.
A batch enters as micro-batches, [M, R, T]: M are computed one after the other, and the R rows of each are
split over the batch axes of the mesh. The denominators of the loss belong to the whole mini-batch, hence
the gradients of its micro-batches simply add up.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.batching import pad_rows, plan_micro_batches
from grpo_jax.config import ActorSection, OptimSection
from grpo_jax.losses import LossMetrics, loss_weights
from grpo_jax.model.logprobs import token_logprobs
from grpo_jax.model.sharding import AXIS_RULES, num_batch_shards, replicated
from grpo_jax.model.transformer import ModelConfig, abstract_params, forward, head_matrix, param_shardings
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
    """AdamW after clipping by the global norm; weight decay on every parameter, as torch's (and verl's)."""
    return optax.chain(
        optax.clip_by_global_norm(section.max_grad_norm),
        optax.adamw(schedule, b1=section.beta1, b2=section.beta2, weight_decay=section.weight_decay),
    )


def state_shardings(config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """`NamedSharding` of every leaf of the train state: moments live where their parameters do."""
    params = param_shardings(config, mesh)
    abstract = jax.eval_shape(optimizer.init, abstract_params(config)[0])
    opt_state = optax.tree_map_params(
        optimizer, lambda _, s: s, abstract, params, transform_non_params=lambda _: replicated(mesh)
    )
    return TrainState(step=replicated(mesh), params=params, opt_state=opt_state)  # type: ignore[arg-type]


def init_state(
    params: Params, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """A train state at step 0. Takes `params` over: the first update donates them."""
    shardings = state_shardings(config, optimizer, mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=shardings.opt_state)(params)
    step = jax.device_put(np.int32(0), replicated(mesh))
    return TrainState(step=step, params=params, opt_state=opt_state)


def copy_params(params: Params, dtype: Any) -> Params:
    """A frozen copy, in `dtype`, that survives the donation of `params`."""
    return jax.jit(lambda p: jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), p))(params)


def to_micro_batches(batch: TrainBatch, actor: ActorSection, mesh: Mesh) -> TrainBatch:
    """Pads a host batch [B, T] and places it on the mesh as [M, R, T], R over the batch axes."""
    num_rows, length = batch.tokens.shape
    shards = num_batch_shards(mesh)
    num_micro, rows = plan_micro_batches(num_rows, length, actor, shards)
    batch = pad_rows(batch, num_micro * rows * shards)
    sharding = NamedSharding(mesh, PartitionSpec(None, AXIS_RULES["batch"]))
    place = lambda x: jax.device_put(x.reshape(num_micro, rows * shards, length), sharding)
    return jax.tree.map(place, batch)


def make_score_step(
    config: ModelConfig, mesh: Mesh, *, temperature: float, chunk_tokens: int
) -> Callable[[Params, TrainBatch], jax.Array]:
    """Returns `score(params, batch) -> logprobs`: [M, R, T] float32, the log-probability of every token."""

    @jax.jit
    def score(params: Params, batch: TrainBatch) -> jax.Array:
        def one(micro: TrainBatch) -> jax.Array:
            return _logprobs(params, config, micro, mesh, temperature, chunk_tokens)[0]

        with jax.named_scope("score"):
            return jax.lax.map(one, batch)

    return score


def score_rows(
    score: Callable[[Params, TrainBatch], jax.Array],
    params: Params,
    batch: TrainBatch,
    actor: ActorSection,
    mesh: Mesh,
) -> np.ndarray:
    """Log-probabilities of a host batch, [B, T] float32, on the host and 0 outside the completions."""
    micro_batches = to_micro_batches(
        dataclasses.replace(batch, old_logprobs=None, ref_logprobs=None), actor, mesh
    )
    logprobs = np.asarray(score(params, micro_batches)).reshape(-1, batch.tokens.shape[1])
    return np.where(batch.completion_mask > 0, logprobs[: len(batch.tokens)], np.float32(0))


def make_update_step(
    config: ModelConfig,
    mesh: Mesh,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    loss_fn: LossFn,
    *,
    loss_agg: str,
    loss_norm: float,
    temperature: float,
    chunk_tokens: int,
) -> Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]:
    """Returns `update(state, batch) -> (state, metrics)`: one optimizer step on a mini-batch [M, R, T].

    A loss or gradient that is not finite leaves parameters and optimizer as they were; the metric
    "actor/skipped_updates" is 1 then. The state is donated.

    Args:
        loss_agg, loss_norm: as in `losses.loss_weights`.
        temperature: of the sampler; divides the logits.
        chunk_tokens: tokens a device projects to the vocabulary at once.
    """

    def micro_gradients(params: Params, micro: TrainBatch, weights: jax.Array) -> tuple[Params, LossMetrics]:
        def loss(params: Params) -> tuple[jax.Array, LossMetrics]:
            logprobs, entropy = _logprobs(params, config, micro, mesh, temperature, chunk_tokens)
            return loss_fn(logprobs, entropy, micro, weights)

        return jax.grad(loss, has_aux=True)(params)

    def gradients(params: Params, batch: TrainBatch) -> tuple[Params, LossMetrics]:
        mask = batch.completion_mask
        weights = loss_weights(mask.reshape(-1, mask.shape[-1]), loss_agg, loss_norm).reshape(mask.shape)
        if mask.shape[0] == 1:
            return micro_gradients(params, *jax.tree.map(lambda x: x[0], (batch, weights)))

        def add(total: Any, micro: tuple[TrainBatch, jax.Array]) -> tuple[Any, None]:
            grads, metrics = micro_gradients(params, *micro)
            return (jax.tree.map(jnp.add, total[0], grads), total[1].merge(metrics)), None

        first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), (batch, weights))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_gradients, params, *first)
        )
        return jax.lax.scan(add, zeros, (batch, weights))[0]

    def update(state: TrainState, batch: TrainBatch) -> tuple[TrainState, Metrics]:
        with jax.named_scope("gradients"):
            grads, metrics = gradients(state.params, batch)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            new = TrainState(state.step + 1, params, opt_state)
            new = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), new, state)
        summary = metrics.summary()
        summary["actor/grad_norm"] = norm
        summary["actor/lr"] = jnp.asarray(schedule(state.step), jnp.float32)
        summary["actor/skipped_updates"] = 1 - is_finite.astype(jnp.int32)
        return new, summary

    return jax.jit(
        update,
        donate_argnums=0,
        out_shardings=(state_shardings(config, optimizer, mesh), replicated(mesh)),
    )


def _logprobs(
    params: Params, config: ModelConfig, batch: TrainBatch, mesh: Mesh, temperature: float, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every token of a micro-batch [R, T]."""
    rows_per_device = batch.tokens.shape[0] // num_batch_shards(mesh)
    with jax.named_scope("forward"):
        hidden = forward(params, config, batch.tokens, batch.positions, batch.segment_ids)
    with jax.named_scope("head"):
        return token_logprobs(
            hidden,
            head_matrix(params),
            batch.tokens,
            temperature=temperature,
            chunk_columns=max(1, chunk_tokens // rows_per_device),
        )
