"""The one forward pass: log-probabilities and entropy of given tokens, for scoring and for gradients alike.

Reference, old and current log-probabilities of the same weights must be the same bits, or the KL and the ratio
begin with noise: in bfloat16, a program that only scores and one that also differentiates were seen to differ by
0.03 nats a token, since the compiler fuses and rounds them differently. So there is one program. It returns what
its backward pass needs as well; who only scores lets that go. The backward pass is a program of its own
(`update.py`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.learner.packing import Places, pack
from grpo_jax.learner.replicas import AXIS, OWN, ROWS, WHOLE, each
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.logprobs import token_logprobs
from grpo_jax.model.lora import join, split
from grpo_jax.model.sharding import batch_sharding, fetch, num_batch_shards, place
from grpo_jax.model.transformer import forward, head_matrix
from grpo_jax.types import Params, TrainBatch

Scores = tuple[jax.Array, jax.Array]
"""Log-probability and entropy of every token of a micro-batch, [R, T] float32 each."""

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]
"""`tokens`, `positions`, `segment_ids` and `drawable` of a micro-batch: other fields may be there or not."""


def inputs_of(micro: TrainBatch) -> Inputs:
    """What the forward pass reads of a micro-batch."""
    return micro.tokens, micro.positions, micro.segment_ids, micro.drawable


def to_micro_batches(
    batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
) -> tuple[list[TrainBatch], Places]:
    """Packs a host batch [B, T] into micro-batches of one shape [R, T] and splits their rows over the mesh."""
    micro_batches, places = pack(batch, *shape)
    return place(micro_batches, batch_sharding(mesh)), places


def abstract_micro_batches(batch: TrainBatch, shape: tuple[int, int], mesh: Mesh) -> list[TrainBatch]:
    """What `to_micro_batches` would return, as `jax.ShapeDtypeStruct`s: the devices need not be there."""
    abstract = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=batch_sharding(mesh))
    return jax.tree.map(abstract, pack(batch, *shape)[0])


@flax.struct.dataclass
class Kept:
    """What a forward pass keeps for its backward pass, beside the parameters."""

    arrays: list[jax.Array]
    pullback: Callable[[list[jax.Array], Params], Any] = flax.struct.field(pytree_node=False)
    """(arrays, parameters) -> the function from cotangents of the scores to the trained parameters' gradients, as
    of `jax.vjp`."""


@dataclasses.dataclass(frozen=True)
class ForwardStep:
    """`forward(params, micro) -> (scores, kept)`."""

    step: Any
    """(params, inputs), jitted."""

    def __call__(self, params: Params, micro: TrainBatch) -> tuple[Scores, Kept]:
        return self.step(params, inputs_of(micro))

    def score(self, params: Params, micro: TrainBatch) -> jax.Array:
        """The log-probability of every token of a micro-batch, [R, T] float32."""
        return self(params, micro)[0][0]

    def compile(self, params: Params, micro: TrainBatch) -> tuple[tuple[Scores, Kept], int]:
        """Compiles for arguments that may be abstract. Returns as `compile_ahead`."""
        return compile_ahead(self.step, params, inputs_of(micro))


def token_scores(
    params: Params,
    model: ModelConfig,
    inputs: Inputs,
    *,
    temperature: float,
    chunk_columns: int,
    head_dtype: Any = None,
) -> Scores:
    """Log-probability and entropy of every token of a micro-batch, [R, T] float32 each."""
    tokens, positions, segment_ids, drawable = inputs
    with jax.named_scope("forward"):
        hidden = forward(params, model, tokens, positions, segment_ids)
    with jax.named_scope("head"):
        return token_logprobs(
            hidden.astype(head_dtype or hidden.dtype),
            head_matrix(params),
            tokens,
            drawable,
            temperature=temperature,
            chunk_columns=chunk_columns,
            soft_cap=model.logits_soft_cap,
        )


def make_forward_step(
    model: ModelConfig,
    mesh: Mesh,
    *,
    temperature: float,
    chunk_tokens: int,
    head_dtype: Any = None,
) -> ForwardStep:
    """Returns the forward pass. Who compares the scores of two steps needs one and the same object for both.

    Args:
        temperature: of the sampler; divides the logits.
        chunk_tokens: tokens that a device projects to the vocabulary at once.
        head_dtype: of the output product; None: the model's.
    """

    num_row_parts = num_batch_shards(mesh) // mesh.shape[AXIS]

    def forward_pass(params: Params, inputs: Inputs) -> tuple[Scores, Kept]:
        rows = inputs[0].shape[0] // num_row_parts  # within a copy of the parameters
        columns = max(1, chunk_tokens // rows)  # whose logits one device computes at once

        frozen, trained = split(params)

        def scores(trained: Params) -> Scores:
            return token_scores(
                join(frozen, trained),
                model,
                inputs,
                temperature=temperature,
                chunk_columns=columns,
                head_dtype=head_dtype,
            )

        out, pullback = jax.vjp(scores, trained)
        return out, _without_params(pullback, params)

    return ForwardStep(jax.jit(each(forward_pass, mesh, (WHOLE, ROWS), (ROWS, OWN))))


def _without_params(pullback: Any, params: Params) -> Kept:
    """Takes out of a pullback the parameters that it holds, which are not to be returned with it."""
    leaves, tree = jax.tree.flatten(pullback)
    number = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}
    places = [number.get(id(leaf)) for leaf in leaves]

    def rebuild(arrays: list[jax.Array], params: Params) -> Any:
        rest, held = iter(arrays), jax.tree.leaves(params)
        return jax.tree.unflatten(tree, [next(rest) if place is None else held[place] for place in places])

    return Kept([leaf for leaf, place in zip(leaves, places, strict=True) if place is None], rebuild)


def score_rows(
    forward: ForwardStep, params: Params, batch: TrainBatch, shape: tuple[int, int], mesh: Mesh
) -> np.ndarray:
    """Log-probabilities of a host batch, [B, T] float32, on the host and 0 outside the completions.

    Args: shape: [R, T] of the micro-batches.
    """
    batch = dataclasses.replace(batch, old_logprobs=None, ref_logprobs=None, loss_weights=None)
    micro_batches, places = to_micro_batches(batch, shape, mesh)
    logprobs = np.concatenate(fetch([forward.score(params, micro) for micro in micro_batches]))
    unpacked = places.unpack(logprobs, batch.tokens.shape[1])
    return np.where(batch.completion_mask > 0, unpacked, np.float32(0))
