"""How long vLLM's part of a step should take on a card, counted from shapes.

A step of decoding is a sum: the matrix products, or reading the weights if that takes longer; reading the cache of
every sequence; and what was measured: a cost of each layer, for its kernels, and of each sequence, whose token is
drawn and handed over by Python.
"""

import dataclasses
import math

from grpo_jax.config import RolloutSection
from grpo_jax.model.cards import Card
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import active_weights, cache_bytes, head_weights, layer_weights
from grpo_jax.model.transformer import num_params
from grpo_jax.types import Workload

LAYER_S = 50e-6
"""Seconds of a step that a layer takes whatever the sizes are."""
NO_CACHE = 3e9
"""Bytes of the engine's memory that are neither weights nor cache: activations and CUDA graphs."""
PUSH_S = 0.019
"""Seconds of a push beside its buckets: checksums are compared, the prefix cache is emptied."""
PUSH_RATE = 88e9
"""Bytes/s of a push through `ipc`, on H100 and H200."""


def expected_seconds(
    section: RolloutSection, model: ModelConfig, card: Card, work: Workload, num_devices: int
) -> dict[str, float]:
    """See `rollout.expected_seconds`: "gen" and "update_weights", for engines on the trainer's own GPUs.

    An engine that is ahead or asleep, or is spread over GPUs, was not measured.
    """
    if (
        section.placement == "separate"
        or section.max_lag
        or section.sleep
        or section.tensor_parallel_size > 1
    ):
        return {}
    engines = section.num_replicas or num_devices
    share = dataclasses.replace(work, num_prompts=math.ceil(work.num_prompts / engines))
    # vLLM's kernels for experts take several times as long as what they read and multiply would.
    seconds = {} if model.num_experts else {"gen": gen_seconds(section, model, card, share)}
    if section.weight_sync in ("auto", "ipc"):
        seconds["update_weights"] = PUSH_S + 2 * num_params(model) / PUSH_RATE
    return seconds


def gen_seconds(section: RolloutSection, model: ModelConfig, card: Card, work: Workload) -> float:
    """Of all completions of one engine: the prompts, each read once, then a step for every token.

    Where they are not all at work at once, they come one wave after the other.
    """
    num = work.num_prompts * work.group_size
    most = min(num, section.max_num_seqs, room(section, model, card, work))
    prompts = 2 * active_weights(model) * work.num_prompts * work.prompt_tokens / card.products
    context = work.prompt_tokens + work.response_tokens / 2
    waves = num / most
    return prompts + waves * work.response_tokens * decode_seconds(model, card, most, context)


def decode_seconds(model: ModelConfig, card: Card, num_sequences: float, context: float) -> float:
    """Of one step. Args: context: tokens of a sequence in the mean."""
    head = head_weights(model)
    # Of many sequences, every expert has some.
    computed, read = active_weights(model) + head, layer_weights(model) + head
    products = max(2 * computed * num_sequences / card.products, 2 * read / card.copying)
    cache = num_sequences * context * cache_bytes(model) / card.copying
    return products + cache + LAYER_S * model.num_layers + card.sequence * num_sequences


def room(section: RolloutSection, model: ModelConfig, card: Card, work: Workload) -> float:
    """Sequences of full length that the cache holds, at least 1; those of a group share their prompt."""
    memory = section.gpu_memory_utilization * card.memory - NO_CACHE
    memory -= 2 * num_params(model)
    tokens = work.prompt_tokens / work.group_size + work.response_tokens
    return max(1.0, memory / (cache_bytes(model) * tokens))
