"""How long the trainer's phases of a step should take on a card, counted from shapes; no device is needed.

Every phase is a sum: matrix products at the card's sustained rate, attention at its own, and all that is read and
written around them at the rate of the card's memory; bytes that cross the bus or go to other devices at theirs.
"""

import dataclasses
import math

import jax.numpy as jnp

from grpo_jax.config import Config
from grpo_jax.learner.memory import held_bytes, held_in_all, kept_for_backward
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.model.cards import Card
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import dense_weights, experts_of_layer, grouped_weights, head_weights
from grpo_jax.model.fused_attention import max_sequences
from grpo_jax.model.grouped_product import TILES
from grpo_jax.model.lora import num_trained
from grpo_jax.model.transformer import num_params
from grpo_jax.types import Workload

FILL = 0.95
"""Of a row: tokens, where sequences of different lengths share rows."""
BACKWARD_ATTENTION = 2.5
"""Products of attention's backward pass, which computes the scores again, in multiples of the forward pass."""
SCORE_PASSES, UPDATE_PASSES = 3, 8
"""Times that the float32 logits of a chunk are written or read."""
KEPT_PASSES, KEPT_SCORE_PASSES = 3, 2
"""The same for what is kept for the backward pass: into its stack and out of it; into it only, where the same
program scores."""
GROUPED_RATE, GROUPED_READING = 0.64, 0.18
"""Of grouped experts, in multiples of the rates of plain products and of copying: products of whole blocks, and
what takes its time however few tokens there are, as if the experts were read so slowly. Fitted to 16,384 and 4,096
tokens of a layer of Qwen3-30B-A3B on an H200 (docs/families.md)."""
PLAIN_PASSES = 4
"""The same for the float32 scores of attention by plain products, in the forward pass."""
LAUNCHES_AHEAD, LAUNCHES_A_LAYER = 1024, 12
"""Kernels that wait for the device at most before the host has to, and those of a layer that is scored."""


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What one device computes for one mini-batch."""

    num_micro: int
    rows: int
    length: int
    """Of a row, tokens."""
    sequence: float
    """Tokens of a sequence in the mean."""

    @property
    def tokens(self) -> int:
        """All that is computed, padding included."""
        return self.num_micro * self.rows * self.length


def expected_seconds(
    config: Config, model: ModelConfig, mesh_shape: dict[str, int], card: Card, work: Workload
) -> dict[str, float]:
    """Seconds of a step by the timers' names: "old_log_prob", "ref", "update_actor", as far as there are any.

    {} where layers are split over "tensor", which nobody measured.

    Args: mesh_shape: devices by axis.
    """
    if mesh_shape["tensor"] > 1:
        return {}
    shapes = find_shapes(config, mesh_shape["data"] * mesh_shape["fsdp"], work)
    split = dict(mesh_shape)
    updates = config.updates_per_step
    minibatches = config.actor.num_minibatches
    score = minibatches * score_seconds(model, card, shapes, split)
    seconds = {}
    if config.needs_old_logprobs:
        seconds["old_log_prob"] = score
    if config.uses_reference:
        reference = held_in_all(config, model)[1].get("reference", 0)
        seconds["ref"] = score + reference / split["fsdp"] / card.bus
    update = updates * update_seconds(config, model, card, shapes, split)
    # The host hands over the update while the device still scores; the wait for these kernels is the update's.
    if seconds and config.algorithm.kl_in != "reward":
        ahead = LAUNCHES_AHEAD / (LAUNCHES_A_LAYER * model.num_layers)
        last = list(seconds)[-1]
        early = score * min(1.0, ahead / (minibatches * shapes.num_micro))
        seconds[last] -= early
        update += early
    return seconds | {"update_actor": update}


def find_shapes(config: Config, shards: int, work: Workload) -> Shapes:
    """What a device computes of a mini-batch of sequences whose lengths are spread around their mean."""
    rows, length = micro_batch_shape(config, config.completions_per_update, shards)
    sequence = min(work.prompt_tokens + work.response_tokens, length)
    a_row = min(max_sequences(length), max(1.0, FILL * length / sequence))
    num_rows = config.completions_per_update / a_row
    return Shapes(math.ceil(num_rows / rows), rows // shards, length, sequence)


def score_seconds(model: ModelConfig, card: Card, shapes: Shapes, split: dict[str, int]) -> float:
    """Of one mini-batch's log-probabilities."""
    weights = dense_weights(model) + head_weights(model)
    attention = attention_flops(model, shapes)
    logits = SCORE_PASSES * 4 * model.vocab_size * shapes.tokens
    kept = KEPT_SCORE_PASSES * shapes.num_micro * kept_for_backward(model, shapes.rows, shapes.length)
    read = shapes.num_micro * _parameter_bytes(model)
    gathered = read * (1 - 1 / split["fsdp"])
    return (
        _product_seconds(card, 2 * weights * shapes.tokens, attention)
        + grouped_seconds(model, card, shapes)
        + (forward_bytes(model, shapes) + kept + logits + read) / card.copying
        + gathered / card.link
    )


def update_seconds(
    config: Config, model: ModelConfig, card: Card, shapes: Shapes, split: dict[str, int]
) -> float:
    """Of one update: the gradients of all micro-batches, and the optimizer."""
    again = {"none": 0, "dots": 0, "attention": 1, "full": 1}[model.remat]
    layers, head = dense_weights(model), head_weights(model)
    # Forward, backward for the activations, and for what is trained; adapters' products are too few to count.
    passes_of_weights = 4 if model.lora else 6
    # The head's backward pass computes the logits again.
    products = (passes_of_weights + 2 * again) * layers + (passes_of_weights + 2) * head
    attention = attention_flops(model, shapes) * (1 + BACKWARD_ATTENTION + (model.remat == "full"))
    passes = 3 + (model.remat != "none")  # forward, backward as two, and what is computed again
    kept = shapes.num_micro * kept_for_backward(model, shapes.rows, shapes.length)
    moved = (
        passes * forward_bytes(model, shapes)
        + KEPT_PASSES * kept
        + UPDATE_PASSES * 4 * model.vocab_size * shapes.tokens
        + shapes.num_micro * gradient_bytes(config, model, again)
    )
    return (
        _product_seconds(card, products * shapes.tokens, attention)
        + (passes_of_weights / 2 + 1) * grouped_seconds(model, card, shapes)  # nothing of them is kept
        + moved / card.copying
        + shapes.num_micro * exchanged_bytes(model, split) / card.link
        + optimizer_seconds(config, model, card, split)
    )


def grouped_seconds(model: ModelConfig, card: Card, shapes: Shapes) -> float:
    """Of one pass of a mini-batch through grouped experts, as the forward one is; the backward pass is two."""
    if model.experts != "grouped":
        return 0.0
    rows = shapes.rows * shapes.length * model.experts_per_token
    filled = 1 + model.num_experts * TILES.rows / 2 / rows  # the last block of each expert is half full
    products = 2 * grouped_weights(model) * shapes.tokens * filled / (GROUPED_RATE * card.products)
    experts = model.num_layers * experts_of_layer(model) * jnp.dtype(model.dtype).itemsize
    return products + shapes.num_micro * experts / (GROUPED_READING * card.copying)


def attention_flops(model: ModelConfig, shapes: Shapes) -> float:
    """Of the forward pass: two products, half of each masked."""
    return 2 * model.num_layers * model.num_heads * model.head_dim * shapes.sequence * shapes.tokens


def forward_bytes(model: ModelConfig, shapes: Shapes) -> float:
    """Read and written between the products of a forward pass: norms, positions, attention, SwiGLU, sums."""
    heads = model.num_heads * model.head_dim
    projected = heads + 2 * model.num_kv_heads * model.head_dim
    hidden = model.intermediate_size * max(1, model.num_experts)
    if model.experts == "grouped":
        hidden = 0  # `grouped_seconds` has it
    numbers = 9 * model.hidden_size + 3 * projected + heads + 3 * hidden
    scores = 0
    if model.attention == "plain":
        scores = PLAIN_PASSES * 4 * model.num_heads * shapes.length
    a_token = jnp.dtype(model.dtype).itemsize * numbers + scores
    return model.num_layers * a_token * shapes.tokens


def gradient_bytes(config: Config, model: ModelConfig, again: int) -> int:
    """Read and written for each micro-batch, whatever its size: parameters, gradients and their sums."""
    computed = jnp.dtype(model.dtype).itemsize
    sums = jnp.dtype(config.optim.accumulator_dtype).itemsize
    # Parameters forward and backward, the gradients written and read, their sums read and written.
    return num_params(model) * (2 + again) * computed + num_trained(model) * (2 * computed + 2 * sums)


def exchanged_bytes(model: ModelConfig, split: dict[str, int]) -> float:
    """Sent by each device for each micro-batch: gradients summed over copies; parameters gathered over splits."""
    size, data, fsdp = _parameter_bytes(model), split["data"], split["fsdp"]
    gradients = num_trained(model) * jnp.dtype(model.dtype).itemsize
    gathered = (2 * size + gradients) * (
        1 - 1 / fsdp
    )  # forward, backward; the gradients in the other direction
    return gathered + 2 * gradients / fsdp * (1 - 1 / data)


def optimizer_seconds(config: Config, model: ModelConfig, card: Card, split: dict[str, int]) -> float:
    """The state read and written, over the bus where it is on the host; the gradients read twice."""
    held, host = held_bytes(config, model, num_trained(model), num_frozen=0)
    on_host = sum(size for name, size in host.items() if name != "reference")
    state = sum(size for name, size in held.items() if name != "reference") + on_host
    gradients = num_trained(model) * jnp.dtype(config.optim.accumulator_dtype).itemsize
    moved = 2 * state + 2 * gradients
    return (moved / card.copying + 2 * on_host / card.bus) / split["fsdp"]


def _parameter_bytes(model: ModelConfig) -> int:
    return num_params(model) * jnp.dtype(model.dtype).itemsize


def _product_seconds(card: Card, flops: float, attention: float) -> float:
    return flops / card.products + attention / card.attention
