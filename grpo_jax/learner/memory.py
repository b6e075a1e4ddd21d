"""How much memory each phase of a step takes on one device, counted from shapes; no device is needed.

What is held is exact: parameters, Adam's moments, accumulators and the reference, as they are sharded. What the
forward pass keeps for the backward pass is counted from JAX's own list of it (`jax.vjp` of the traced model), for
any `model.remat` and any attention kernel. What the compiler adds within one layer and one chunk of the head is
estimated from their largest arrays.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, AxisType, Mesh

from grpo_jax.config import Config
from grpo_jax.learner import optimizer_class
from grpo_jax.learner.forward import token_scores
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import experts_of_layer
from grpo_jax.model.experts import num_slots
from grpo_jax.model.fused_attention import KEPT, Sequences
from grpo_jax.model.logprobs import num_words
from grpo_jax.model.lora import join, num_trained, split
from grpo_jax.model.sharding import MESH_AXES, num_batch_shards
from grpo_jax.model.transformer import abstract_params, num_params, param_shardings

COPY = "parameters to compute with"
"""A copy in `model.dtype`, where they are held in another."""


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes, of one device and of the host."""

    held: dict[str, int]
    """On one device from step to step, by name."""
    beside: dict[str, dict[str, int]]
    """Phase -> what is on one device besides when most is in use during it, by name."""
    host: dict[str, int]
    """In pinned memory of the host, for all its devices, by name."""

    def parts(self, phase: str) -> dict[str, int]:
        """All that is on one device during a phase, by name. A phase that is not planned has what is held."""
        return self.held | self.beside.get(phase, {})

    def need(self, phase: str) -> int:
        """The most that is in use on one device during a phase."""
        return sum(self.held.values()) + sum(self.beside.get(phase, {}).values())

    @property
    def phases(self) -> dict[str, int]:
        """Phase -> `need` of it."""
        return {phase: self.need(phase) for phase in self.beside}

    @property
    def fullest(self) -> str:
        """The phase that needs most."""
        return max(self.beside, key=self.need)

    @property
    def peak(self) -> int:
        return self.need(self.fullest)


def abstract_mesh(data: int, fsdp: int, tensor: int) -> AbstractMesh:
    """A mesh of so many devices that need not be there."""
    return AbstractMesh((data, fsdp, tensor), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def plan_memory(
    config: Config,
    model: ModelConfig,
    mesh: Mesh | AbstractMesh,
    *,
    push_bytes: int = 0,
    sampling: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Counts the memory of one device of a mesh.

    Args:
        model: with the attention kernel that the run will use.
        push_bytes: what a push of weights to the rollout engine takes on the device; 0: nothing is pushed.
        sampling: what an engine on the trainer's own arrays takes beside them, by name; None: there is none.
    """
    on_a_device = lambda sharding, leaf: math.prod(sharding.shard_shape(leaf.shape))
    frozen, sizes = split(jax.tree.map(on_a_device, param_shardings(model, mesh), abstract_params(model)[0]))
    parameters = sum(jax.tree.leaves(sizes))  # that are trained
    held, host = held_bytes(config, model, parameters, num_frozen=sum(jax.tree.leaves(frozen)))
    rows, length = micro_batch_shape(config, config.completions_per_update, num_batch_shards(mesh))
    rows //= num_batch_shards(mesh)
    computed = jnp.dtype(model.dtype).itemsize
    copy = {COPY: parameters * computed if held["parameters"] != parameters * computed else 0}
    optimizer = optimizer_class(config.optim).step_bytes(config.optim, model, jax.tree.leaves(sizes))
    kept, head = kept_for_backward(model, rows, length), head_bytes(model, mesh)
    in_update, in_score = _largest_at_once(config, model, mesh, rows, length)
    beside = {
        "update": copy
        | {
            "sums of gradients": parameters * jnp.dtype(config.optim.accumulator_dtype).itemsize,
            "gradients of a micro-batch": parameters * computed,
            "kept for the backward pass": kept,
            "which tokens could be drawn": drawable_bytes(config, model, rows, length),
        }
        | in_update,
        "optimizer": copy | {"gradients and what the optimizer adds": optimizer},
    }
    if config.uses_reference or config.needs_old_logprobs:
        # The one forward pass returns what a backward pass would need.
        scored = {"reference, copied": host.get("reference", 0), "kept, as for a backward pass": kept}
        beside["score"] = copy | scored | in_score
    if sampling:
        experts = {"experts of a layer": gathered_experts(model, mesh)}
        beside["sampling"] = copy | {"the head": 2 * head} | experts | dict(sampling)
    if push_bytes:
        beside["weight sync"] = {"buckets of a push": push_bytes}
    beside = {phase: {name: size for name, size in parts.items() if size} for phase, parts in beside.items()}
    return MemoryPlan(held, beside, {name: size * mesh.size for name, size in host.items()})


def head_bytes(model: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Of the output head, which a device gathers for its rows where its width is split over devices; else 0.

    The compiler may lay it out once more.
    """
    words = math.ceil(model.vocab_size / mesh.shape["tensor"])
    is_split = mesh.shape["fsdp"] > 1
    return words * model.hidden_size * jnp.dtype(model.dtype).itemsize if is_split else 0


def _largest_at_once(
    config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh, rows: int, length: int
) -> tuple[dict[str, int], dict[str, int]]:
    """The larger of a layer and the output head, which are not at work together: of an update, and of scoring."""
    words, head = math.ceil(model.vocab_size / mesh.shape["tensor"]), head_bytes(model, mesh)
    logits = min(rows * length, max(rows, config.actor.logits_chunk_tokens)) * words * 4
    layer = kept_for_backward(dataclasses.replace(model, remat="none"), rows, length) // model.num_layers
    once = 0 if model.remat == "none" else layer  # beside what is kept, which holds the layer then
    gathered = gathered_experts(model, mesh)
    gradient = 0 if model.lora else words * model.hidden_size * 4
    experts = experts_bytes(model, mesh, rows * length)
    in_update = {
        "a layer computed again": once + 3 * experts + 2 * gathered,  # and their gradients
        "logits, the head and its gradient": head + logits + logits // 2 + gradient,
    }
    in_score = {"a layer": once + 2 * experts + gathered, "logits and the head": head + max(head, logits)}
    return _largest(in_update), _largest(in_score)


def experts_bytes(model: ModelConfig, mesh: Mesh | AbstractMesh, num_tokens: int) -> int:
    """Of one row for each token of a device and expert that it chose, as wide as the model and an expert."""
    if model.experts != "grouped":
        return 0
    width = model.hidden_size + model.intermediate_size // mesh.shape["tensor"]
    slots = num_slots(num_tokens * model.experts_per_token, model.num_experts)
    return slots * width * jnp.dtype(model.dtype).itemsize


def gathered_experts(model: ModelConfig, mesh: Mesh | AbstractMesh) -> int:
    """Of a layer's grouped experts, which a device gathers for its rows where "fsdp" splits them; else 0."""
    if model.experts != "grouped" or mesh.shape["fsdp"] == 1:
        return 0
    return experts_of_layer(model) // mesh.shape["tensor"] * jnp.dtype(model.dtype).itemsize


def drawable_bytes(config: Config, model: ModelConfig, rows: int, length: int) -> int:
    """Of `TrainBatch.drawable` of a mini-batch, whose micro-batches [rows, length] are on a device all at once."""
    if not config.knows_drawable:
        return 0
    num_tokens = math.ceil(config.completions_per_update / rows) * rows * length
    return num_tokens * num_words(model.vocab_size) * 4


def _largest(sizes: dict[str, int]) -> dict[str, int]:
    """The largest of what is not there at the same time."""
    name = max(sizes, key=lambda name: sizes[name])
    return {name: sizes[name]}


def held_bytes(
    config: Config, model: ModelConfig, num_params: int, *, num_frozen: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes that parameters take from step to step, on the device and on the host, by name.

    Args: num_params: that are trained; num_frozen: that are not, which the reference shares.
    """
    held, host = optimizer_class(config.optim).held_bytes(config.optim, model, num_params)
    if num_frozen:
        held = {"frozen parameters": num_frozen * jnp.dtype(model.param_dtype).itemsize} | held
    if config.uses_reference:
        reference = num_params * jnp.dtype(model.dtype).itemsize
        (host if config.algorithm.ref_offload else held)["reference"] = reference
    return held, host


def held_in_all(config: Config, model: ModelConfig) -> tuple[dict[str, int], dict[str, int]]:
    """`held_bytes` of the whole model, as if one device had all of it."""
    trained = num_trained(model)
    return held_bytes(config, model, trained, num_frozen=num_params(model) - trained)


@functools.lru_cache(maxsize=64)
def kept_for_backward(model: ModelConfig, rows: int, length: int) -> int:
    """Bytes that the forward pass of one micro-batch [rows, length] keeps, the parameters not counted."""
    if model.attention == "cudnn":
        model = dataclasses.replace(model, attention=stand_in_for_cudnn)
    stored = dataclasses.replace(model, param_dtype=model.dtype).with_trained_dtype(model.dtype)
    params = abstract_params(stored)[0]
    tokens = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def pullback(params: Any, tokens: Any) -> Any:
        inputs = (tokens, tokens, tokens, None)
        frozen, trained = split(params)
        options: Any = dict(temperature=1.0, chunk_columns=1)
        return jax.vjp(
            lambda trained: token_scores(join(frozen, trained), model, inputs, **options), trained
        )[1]

    # As on one device, whatever mesh the caller is within: the rows are those of one device already.
    with jax.sharding.use_abstract_mesh(AbstractMesh((), ())):
        kept = jax.tree.leaves(jax.eval_shape(pullback, params, tokens))
    shapes = {leaf.shape for leaf in jax.tree.leaves(params)}
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept if leaf.shape not in shapes)


def stand_in_for_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences, **masking: Any
) -> jax.Array:
    """Keeps what cuDNN's kernel keeps, which depends on no window."""
    return kept_by_cudnn(q, k, v, sequences)


@jax.custom_vjp
def kept_by_cudnn(q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> jax.Array:
    """Stands in for cuDNN's kernel where memory is counted: keeps arrays of the same shapes and computes nothing.

    The kernel itself cannot be traced without an NVIDIA GPU: JAX looks for library and device while it traces.
    """
    return q


def _kept_by_cudnn_forward(q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> Any:
    shape = (*sequences.starts.shape, q.shape[2], q.shape[1])
    # Made from this layer's numbers: a constant would be kept once for all layers.
    sums = jnp.full(shape, q[0, 0, 0, 0], jnp.float32)
    out = checkpoint_name(q, KEPT)
    return out, (q, k, v, out, checkpoint_name(sums, KEPT))


def _kept_by_cudnn_backward(kept: Any, cotangent: jax.Array) -> Any:
    q, k, v, out, sums = kept
    return q + out + cotangent + sums.sum().astype(q.dtype), k, v, None  # depends on all that is kept


kept_by_cudnn.defvjp(_kept_by_cudnn_forward, _kept_by_cudnn_backward)


def largest_micro_batch(
    config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh, limit: float, *, push_bytes: int = 0
) -> int:
    """Most rows of full length that a data shard can hold at once; 0 if one is too many already.

    Args:
        limit: bytes of a device that may be taken.
        push_bytes: see `plan_memory`.
    """

    def fits(rows: int) -> bool:
        actor = dataclasses.replace(
            config.actor, micro_batch_size_per_device=rows, micro_batch_tokens_per_device=0
        )
        changed = dataclasses.replace(config, actor=actor)
        return plan_memory(changed, model, mesh, push_bytes=push_bytes).peak <= limit

    shards = num_batch_shards(mesh)
    most = -(-config.completions_per_update // shards)
    low, high = 0, max(1, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
