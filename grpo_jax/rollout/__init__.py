"""Rollout engines: where completions come from.

An engine is a module or a folder of this package. The functions below look up the module that
`rollout.engine` names and call its function of the same name; nothing else in the package asks for that name. So
a new engine is a new file with these functions, and one line in `ENGINES`.

The processes of an engine import this file too, perhaps in an environment without JAX. It must stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grpo_jax.rollout.base import (
    EngineError,
    Finding,
    RolloutEngine,
    SamplingParams,
    eval_sampling,
    rollout_sampling,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jax.sharding import AbstractMesh, Mesh

    from grpo_jax.config import Config, RolloutSection
    from grpo_jax.model.cards import Card
    from grpo_jax.model.config import ModelConfig
    from grpo_jax.model.hf import ModelFolder
    from grpo_jax.rollout.shared import Channel
    from grpo_jax.types import Params, Workload

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""A jitted function, its arguments, and its static ones."""

__all__ = [
    "ENGINES",
    "EngineError",
    "Finding",
    "RolloutEngine",
    "SamplingParams",
    "check_devices",
    "check_engine",
    "device_programs",
    "eval_sampling",
    "expected_seconds",
    "is_installed",
    "make_engine",
    "memory_rows",
    "memory_savers",
    "push_bytes",
    "rollout_sampling",
    "sampling_bytes",
    "share_devices",
    "shares_parameters",
    "trainer_share",
    "try_installation",
    "with_float32_head",
]

ENGINES = {"local": "grpo_jax.rollout.local", "vllm": "grpo_jax.rollout.vllm"}
"""`rollout.engine` -> the module with the functions of that engine."""


def _engine(section: RolloutSection) -> Any:
    return importlib.import_module(ENGINES[section.engine])


# Before any device is touched


def check_engine(section: RolloutSection) -> None:
    """Checks that the engine can run on this machine.

    Raises:
        ConfigError: something that it needs is missing, or has a version that does not work.
    """
    _engine(section).check_engine(section)


def is_installed(section: RolloutSection) -> bool:
    """Whether what the engine needs is there at all."""
    return _engine(section).is_installed(section)


def try_installation(section: RolloutSection) -> Iterator[Finding]:
    """Tries what the engine needs of this machine, as a run would use it, and says what mends what does not work.

    Raises:
        ConfigError: see `check_engine`.
    """
    return _engine(section).try_installation(section)


def share_devices(section: RolloutSection) -> None:
    """Sets environment variables so that JAX leaves the engine its GPUs, or its part of their memory.

    A memory fraction or an allocator that the user has set stays.

    Raises:
        ConfigError: no GPU would be left for the trainer.
    """
    _engine(section).share_devices(section)


def with_float32_head(section: RolloutSection) -> RolloutSection:
    """The settings of the same engine with its output head computed in float32.

    Raises:
        ConfigError: the engine has no such setting.
    """
    return _engine(section).with_float32_head(section)


# For plans of memory and time; no device is needed


def check_platform(section: RolloutSection, platform: str) -> None:
    """Checks that the engine runs beside a trainer on such devices, which need not be here.

    Args:
        platform: as `DeviceKind.platform`.

    Raises:
        ConfigError: it does not.
    """
    _engine(section).check_platform(section, platform)


def trainer_share(section: RolloutSection) -> float:
    """The part of a GPU's memory, between 0 and 1, that JAX may take in a run with this engine."""
    return _engine(section).trainer_share(section)


def push_bytes(section: RolloutSection) -> int:
    """Bytes that a push of weights takes on each of the trainer's devices, beside the parameters."""
    return _engine(section).push_bytes(section)


def sampling_bytes(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """What sampling takes on each of the trainer's devices beside parameters and output head, by name.

    {} for an engine with memory of its own.
    """
    return _engine(config.rollout).sampling_bytes(config, model, mesh)


def shares_parameters(section: RolloutSection) -> bool:
    """True where the engine computes with the trainer's own arrays: there is nothing to push or to compare."""
    return _engine(section).shares_parameters(section)


def memory_rows(section: RolloutSection) -> list[tuple[str, str]]:
    """What the engine takes of its devices' memory, as (name, text) rows of a table."""
    return _engine(section).memory_rows(section)


def memory_savers(section: RolloutSection) -> list[tuple[str, Any]]:
    """Settings of the engine that leave the trainer more memory and are not set yet, as (key, value)."""
    return _engine(section).memory_savers(section)


def expected_seconds(
    section: RolloutSection, model: ModelConfig, card: Card, work: Workload, num_devices: int
) -> dict[str, float]:
    """How long the engine's phases of a step should take, by the timers' names, as far as they are predicted.

    Args: card: of the trainer and of the engine; num_devices: the trainer's.
    """
    return _engine(section).expected_seconds(section, model, card, work, num_devices)


def device_programs(config: Config, model: ModelConfig, params: Params, mesh: Mesh) -> tuple[str, list[Call]]:
    """What the engine makes the trainer's devices do, to be compiled: the name of that phase, and its programs.

    Args: params: the trainer's, `jax.ShapeDtypeStruct`s with shardings; the devices of `mesh` need not be there.
    """
    return _engine(config.rollout).device_programs(config, model, params, mesh)


# On the devices


def check_devices(section: RolloutSection, mesh: Mesh) -> None:
    """Checks, before anything is computed, that the engine fits the trainer's devices.

    Raises:
        ConfigError: `rollout.weight_sync` cannot work between them, or more GPUs are asked for than there are.
    """
    _engine(section).check_devices(section, mesh)


def make_engine(
    section: RolloutSection,
    *,
    folder: ModelFolder,
    mesh: Mesh,
    tokenizer: Any,
    max_model_len: int,
    lora_push: str = "merged",
    channel: Channel | None = None,
) -> RolloutEngine:
    """Makes the engine. It may still be starting when this returns.

    Args:
        section: the `rollout` section of the configuration.
        folder: of the model. Its EOS ids stop completions; so do `rollout.stop_token_ids` and the tokenizer's EOS.
        mesh: the trainer's.
        tokenizer: decodes completions.
        max_model_len: tokens of the longest prompt and completion together.
        lora_push: as in the configuration; for engines with a copy of the parameters.
        channel: to the other processes of the run, which share the engine; None: there are none.
    """
    stops = {*folder.eos_token_ids, *section.stop_token_ids, tokenizer.eos_token_id} - {None}
    arguments = dict(
        folder=folder,
        mesh=mesh,
        tokenizer=tokenizer,
        stop_token_ids=tuple(sorted(stops)),
        max_model_len=max_model_len,
        lora_push=lora_push,
    )
    if channel is None:
        return _engine(section).make_engine(section, **arguments)
    return _engine(section).share_engine(section, channel, **arguments)
