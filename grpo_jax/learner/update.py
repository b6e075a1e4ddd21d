"""The jitted steps: score (log-probabilities of given tokens) and update (gradients, optimizer).

Both are pure: they take all they need, return all they made, and donate what they replace.
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
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.algorithm.loss import LossMetrics
from grpo_jax.config import OptimSection
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.optimizer import Apply, GradientCheck, Optimizer, Schedule
from grpo_jax.learner.packing import Places, pack
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.logprobs import token_logprobs
from grpo_jax.model.sharding import AXIS_RULES, num_batch_shards, replicated
from grpo_jax.model.transformer import forward, head_matrix, param_shardings
from grpo_jax.types import Metrics, Params, TrainBatch, TrainState

LossFn = Callable[[jax.Array, jax.Array, TrainBatch], tuple[jax.Array, LossMetrics]]
"""(logprobs, entropy, batch) -> (loss, metrics); the arrays are [R, T]."""


def to_micro_batches(
    batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
) -> tuple[list[TrainBatch], Places]:
    """Packs a host batch [B, T] into micro-batches of one shape [R, T] and splits their rows over the mesh."""
    micro_batches, places = pack(batch, *shape)
    return jax.device_put(micro_batches, NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))), places


@dataclasses.dataclass(frozen=True)
class ScoreStep:
    """`score(params, micro) -> [R, T]` float32: the log-probability of every token of a micro-batch."""

    step: Any
    """(params, tokens, positions, segment_ids), jitted: other fields of a batch may be there or not."""

    def __call__(self, params: Params, micro: TrainBatch) -> jax.Array:
        return self.step(params, micro.tokens, micro.positions, micro.segment_ids)

    def compile(self, params: Params, micro: TrainBatch) -> Any:
        """Compiles for arguments that may be abstract, and returns the abstract result."""
        return compile_ahead(self.step, params, micro.tokens, micro.positions, micro.segment_ids)[0]


def make_score_step(model: ModelConfig, mesh: Mesh, *, temperature: float, chunk_tokens: int) -> ScoreStep:
    """Returns the scoring step. Args: as `make_update_step`."""

    @jax.jit
    def score(params: Params, tokens: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        columns = _chunk_columns(chunk_tokens, tokens.shape[0], mesh)
        with jax.named_scope("score"):
            return token_scores(
                params, model, tokens, positions, segment_ids, temperature=temperature, chunk_columns=columns
            )[0]

    return ScoreStep(score)


def score_rows(
    score: ScoreStep, params: Params, batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
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

    Where the loss or a gradient is not finite, parameters and optimizer stay as they were, and the metric
    "actor/skipped_updates" is 1. The state is donated.
    """

    to_compute_dtype: Callable[[Params], Params]
    """Parameters -> those that the micro-batches compute with, in the dtype of the computation."""
    zeros: Any
    """(params, micro-batch) -> the empty sum of gradients and metrics; reads shapes only."""
    accumulate: Any
    """(params, sum, micro-batch) -> the sum with those of one micro-batch [R, T] added. The sum is donated."""
    apply: Apply

    def __call__(self, state: TrainState, micro_batches: Sequence[TrainBatch]) -> tuple[TrainState, Metrics]:
        params = self.to_compute_dtype(state.params)
        total = self.zeros(params, micro_batches[0])
        for micro in micro_batches:
            total = self.accumulate(params, total, micro)
        return self.apply(state, total)

    def compile_params(self, params: Params) -> Params:
        """Compiles `to_compute_dtype` for abstract parameters, and returns its abstract result."""
        is_jitted = hasattr(self.to_compute_dtype, "lower")
        return compile_ahead(self.to_compute_dtype, params)[0] if is_jitted else params

    def compile(self, optimizer: Optimizer, params: Params, micro: TrainBatch) -> dict[str, int]:
        """Compiles the other programs. Returns bytes by phase, as `Learner.compile`.

        Args: params: those that `to_compute_dtype` returns; both may be `jax.ShapeDtypeStruct`s with shardings.
        """
        total, _ = compile_ahead(self.zeros, params, micro)
        total, size = compile_ahead(self.accumulate, params, total, micro)
        return {"update": size} | optimizer.compile_apply(self.apply, total)


def make_update_step(
    model: ModelConfig,
    mesh: Mesh,
    optimizer: Optimizer,
    loss_fn: LossFn,
    *,
    optim: OptimSection,
    temperature: float,
    chunk_tokens: int,
) -> UpdateStep:
    """Returns the update.

    Args:
        optim: says how gradients are summed and clipped.
        temperature: of the sampler; divides the logits.
        chunk_tokens: tokens that a device projects to the vocabulary at once.
    """

    def gradients(params: Params, micro: TrainBatch) -> tuple[Params, LossMetrics]:
        columns = _chunk_columns(chunk_tokens, micro.tokens.shape[0], mesh)

        def loss(params: Params) -> tuple[jax.Array, LossMetrics]:
            tokens = (micro.tokens, micro.positions, micro.segment_ids)
            scores = token_scores(params, model, *tokens, temperature=temperature, chunk_columns=columns)
            return loss_fn(*scores, micro)

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

    sums = (param_shardings(model, mesh), replicated(mesh))
    return UpdateStep(
        to_compute_dtype=make_cast(optimizer.stored_model(model), mesh),
        zeros=jax.jit(zeros, out_shardings=sums),
        accumulate=jax.jit(accumulate, donate_argnums=1, out_shardings=sums),
        apply=optimizer.make_apply(make_gradient_check(optim, optimizer.schedule)),
    )


def make_gradient_check(optim: OptimSection, schedule: Schedule) -> GradientCheck:
    """Returns what looks at a sum of gradients and metrics before the optimizer gets it."""

    def check(total: Any, step: jax.Array) -> tuple[jax.Array, jax.Array, Metrics]:
        """The factor that clips the gradients' norm, whether loss and norm are finite, and the metrics."""
        grads, metrics = total
        norm = optax.tree.norm(jax.tree.map(lambda x: x.astype(jnp.float32), grads))
        is_finite = jnp.isfinite(metrics.loss) & jnp.isfinite(norm)
        summary = metrics.summary()
        summary["actor/grad_norm"] = norm
        summary["actor/lr"] = jnp.asarray(schedule(step), jnp.float32)
        summary["actor/skipped_updates"] = 1 - is_finite.astype(jnp.int32)
        return jnp.minimum(1, optim.max_grad_norm / norm), is_finite, summary

    return check


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
    model: ModelConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    *,
    temperature: float,
    chunk_columns: int,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability and entropy of every token of a micro-batch, [R, T] float32 each."""
    with jax.named_scope("forward"):
        hidden = forward(params, model, tokens, positions, segment_ids)
    with jax.named_scope("head"):
        return token_logprobs(
            hidden, head_matrix(params), tokens, temperature=temperature, chunk_columns=chunk_columns
        )
