"""vLLM's engine arguments, from the configuration."""

import ast
from typing import Any

import numpy as np

from grpo_jax.config import RolloutSection
from grpo_jax.model.hf import ModelFolder

MIN_BATCHED_TOKENS = 8192
"""`max_num_batched_tokens`, unless one sequence may be longer. vLLM's own 2,048 let prompts wait."""
ADAPTER_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Which vLLM knows; an adapter of another rank takes the room of the next one."""
GRAPH_ARGUMENTS = {
    "cudagraph_capture_sizes", "max_cudagraph_capture_size", "compilation_config", "speculative_config"
}  # fmt: skip
"""Where `rollout.engine_args` has one of these, vLLM chooses the sizes of CUDA graphs itself."""


def engine_options(
    section: RolloutSection, folder: ModelFolder, max_model_len: int, *, adapter_rank: int = 0
) -> dict[str, Any]:
    """Fields of vLLM's `AsyncEngineArgs`. `rollout.engine_args` come last and win, `hf_overrides` key by key.

    Args:
        folder: of the model.
        max_model_len: tokens of the longest prompt and completion together.
        adapter_rank: of the adapters that the engine gets as such; 0: none.
    """
    options: dict[str, Any] = {
        "model": str(folder.path.absolute()),
        "dtype": str(np.dtype(folder.config.dtype)),
        "max_model_len": max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "tensor_parallel_size": section.tensor_parallel_size,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        "enforce_eager": section.enforce_eager,
        "enable_sleep_mode": section.sleep,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if adapter_rank:
        options |= {
            "enable_lora": True,
            "max_loras": num_adapters(section),
            "max_cpu_loras": num_adapters(section),
            "max_lora_rank": next(rank for rank in ADAPTER_RANKS if rank >= adapter_rank),
        }
    if overrides := _position_overrides(folder, max_model_len):
        options["hf_overrides"] = overrides
    if section.tensor_parallel_size > 1:
        # vLLM's workers run beside the actor, not as actors of their own.
        options["distributed_executor_backend"] = "mp"
    for argument in section.engine_args:
        name, _, value = argument.partition("=")
        read = _literal_or_word(value)
        is_added = name == "hf_overrides" and isinstance(read, dict)
        options[name] = options.get(name, {}) | read if is_added else read
    num_seqs = options["max_num_seqs"]
    options.setdefault("max_num_batched_tokens", max(MIN_BATCHED_TOKENS, max_model_len, num_seqs))
    if not options["enforce_eager"] and not GRAPH_ARGUMENTS & options.keys():
        options["cudagraph_capture_sizes"] = graph_sizes(num_seqs)
    return options


def num_adapters(section: RolloutSection) -> int:
    """How many versions of the adapters an engine holds: each that rollouts under way may have, and the next."""
    return section.max_lag + 2


def _position_overrides(folder: ModelFolder, max_model_len: int) -> dict[str, Any]:
    """What vLLM is told of config.json's fields on positions, so that it computes what the trainer does."""
    limit, config = folder.max_position, folder.config
    if limit is None:
        return {}
    kind = "default" if config.rope_scaling is None else config.rope_scaling.kind
    overrides: dict[str, Any] = {}
    if max_model_len > limit:
        # The configuration allows it; vLLM refuses it, and has no RoPE table for it either.
        overrides["max_position_embeddings"] = max_model_len
    elif kind == "yarn":
        # Some folders have it from before the scaling, and vLLM takes it for the end of the window.
        overrides["max_position_embeddings"] = limit
    if kind == "dynamic":
        # vLLM computes any sequence as one of the longest that scaling allows. Within the window, the rule of
        # transformers is that of no scaling, and sequences end there.
        overrides["rope_parameters"] = {"rope_type": "default", "rope_theta": config.rope_theta}
    return overrides


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of tokens to capture CUDA graphs for. The sequences of a step are padded to the next one.

    vLLM's own sizes end at 512. More sequences than that are launched kernel by kernel, which takes twice as long
    a token. Below 512 vLLM has twice as many sizes. Fewer sizes start sooner, at the price of padding: up to a
    quarter in small steps, which wait for the weights to be read anyway, and up to an eighth in large ones.
    """
    last = max(max_num_seqs, min(2 * max_num_seqs, 512))  # beyond max_num_seqs: steps that read prompts too
    steps = [*range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, last, 64)]
    return sorted({*(size for size in (1, 2, 4, *steps) if size < last), max_num_seqs, last})


def _literal_or_word(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
