"""Rollout engines: where completions come from.

The engine's own processes import this file on their way to `vllm_server.py`, perhaps in an environment without
JAX: it must stay as light as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_jax.rollout.base import EngineError, RolloutEngine, SamplingParams, eval_sampling, rollout_sampling

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from grpo_jax.config import RolloutSection
    from grpo_jax.model.hf import ModelFolder

__all__ = [
    "EngineError",
    "RolloutEngine",
    "SamplingParams",
    "check_devices",
    "check_engine",
    "eval_sampling",
    "make_engine",
    "rollout_sampling",
]


def check_engine(section: RolloutSection) -> None:
    """Checks, before any device is touched, that the engine `section.engine` can be had here.

    Raises: ConfigError: what it needs is missing, or of a version that does not work.
    """
    if section.engine == "vllm":
        from grpo_jax.rollout.vllm.check import find_vllm

        find_vllm(section)


def check_devices(section: RolloutSection, mesh: Mesh) -> None:
    """Checks, before anything is computed, that the engine fits the trainer's devices.

    Raises: ConfigError: weights cannot travel as asked for, or more GPUs are asked for than there are.
    """
    if section.engine == "vllm":
        from grpo_jax.rollout.vllm.engine import plan_engines

        plan_engines(section, mesh)


def make_engine(
    section: RolloutSection, *, folder: ModelFolder, mesh: Mesh, tokenizer: Any, max_model_len: int
) -> RolloutEngine:
    """The engine that `section.engine` names. It may still be starting when this returns.

    Args:
        folder: of the model; its EOS ids stop completions, and so does the tokenizer's.
        tokenizer: decodes completions.
        max_model_len: tokens of the longest prompt and completion together.
    """
    stops = {*folder.eos_token_ids, *section.stop_token_ids, tokenizer.eos_token_id} - {None}
    stop_token_ids = tuple(sorted(stops))
    if section.engine == "vllm":
        from grpo_jax.rollout.vllm.engine import VllmEngine

        return VllmEngine(
            section,
            folder=folder,
            mesh=mesh,
            tokenizer=tokenizer,
            stop_token_ids=stop_token_ids,
            max_model_len=max_model_len,
        )
    from grpo_jax.rollout.local import LocalEngine

    return LocalEngine(folder.config, mesh, tokenizer, stop_token_ids, section.batch_size)


def share_devices(section: RolloutSection) -> None:
    """tmp"""


def push_bytes(section: RolloutSection) -> int:
    """tmp"""
    return 4 * section.bucket_mb * 2**20 if section.engine == "vllm" else 0


def shares_parameters(section: RolloutSection) -> bool:
    """tmp"""
    return section.engine == "local"


def trainer_share(section: RolloutSection) -> float:
    """tmp"""
    return 0.75
