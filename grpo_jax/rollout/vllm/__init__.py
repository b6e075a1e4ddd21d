"""The vLLM engine: rollouts from vLLM in Ray actors.

This file has the functions that `grpo_jax.rollout` calls. The actors import it too, perhaps in an environment
without JAX, so everything heavy is imported within a function.

    trainer's process       engine.py, the `RolloutEngine`, over requests.py, push.py, replicas.py and cluster.py;
                            only the last two know Ray. Beside it: processes.py. Before that: check.py,
                            devices.py, options.py, speed.py
    an actor's process      server.py, api.py
    vLLM's own processes    scheduler.py, worker.py
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from grpo_jax.config import Config, RolloutSection
    from grpo_jax.model.cards import Card
    from grpo_jax.model.config import ModelConfig
    from grpo_jax.model.hf import ModelFolder
    from grpo_jax.rollout.base import Finding, RolloutEngine
    from grpo_jax.rollout.shared import Channel
    from grpo_jax.types import Params, Workload

CONTEXT_SHARE = 0.07
"""Of a GPU's memory: CUDA contexts, kernels and buffers of a push, which no pool counts."""
OWN_SHARE = 0.75
"""Of a GPU's memory: what JAX takes of a GPU that it has for itself, its default."""
PUSH_BUCKETS = 4
"""Buckets on a GPU during a push through `ipc`, which takes most: two slots, one in JAX, one in the engine."""


def check_engine(section: RolloutSection) -> None:
    """See `rollout.check_engine`."""
    from grpo_jax.rollout.vllm.check import find_vllm

    find_vllm(section)


def is_installed(section: RolloutSection) -> bool:
    """See `rollout.is_installed`."""
    from grpo_jax.rollout.vllm import check

    return check.is_installed(section)


def try_installation(section: RolloutSection) -> Iterator[Finding]:
    """See `rollout.try_installation`. Starts a Ray, and ends it."""
    from grpo_jax.rollout.vllm import trial

    return trial.try_installation(section)


def share_devices(section: RolloutSection) -> None:
    """See `rollout.share_devices`."""
    from grpo_jax.rollout.vllm.devices import share_gpus, share_memory

    if section.placement == "separate":
        share_gpus(section)
    else:
        share_memory(section, trainer_share(section))


def with_float32_head(section: RolloutSection) -> RolloutSection:
    """See `rollout.with_float32_head`. A vLLM that ignores the setting does not start: see `server.py`."""
    argument = "hf_overrides={'head_dtype': 'float32'}"
    return dataclasses.replace(section, engine_args=(*section.engine_args, argument))


def check_platform(section: RolloutSection, platform: str) -> None:
    """See `rollout.check_platform`. The GPUs of a cluster need not be the trainer's."""
    from grpo_jax.config import ConfigError

    if platform != "cuda" and not section.ray_address:
        rule = (
            f"needs NVIDIA GPUs, here or in a cluster (rollout.ray_address), and the devices are {platform}: "
        )
        rule += "choose the JAX sampler with --config.rollout.engine=local"
        raise ConfigError("rollout.engine", "vllm", rule)


def trainer_share(section: RolloutSection) -> float:
    """See `rollout.trainer_share`."""
    if section.placement == "separate":
        return OWN_SHARE
    left = 1 if section.sleep else 1 - section.gpu_memory_utilization
    return max(0.05, left - CONTEXT_SHARE)


def push_bytes(section: RolloutSection) -> int:
    """See `rollout.push_bytes`."""
    return PUSH_BUCKETS * section.bucket_mb * 2**20


def sampling_bytes(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """See `rollout.sampling_bytes`. It has a share of the device of its own: `trainer_share`."""
    return {}


def shares_parameters(section: RolloutSection) -> bool:
    """See `rollout.shares_parameters`. The engine has a copy of its own."""
    return False


def memory_rows(section: RolloutSection) -> list[tuple[str, str]]:
    """See `rollout.memory_rows`."""
    return [("vLLM", f"{section.gpu_memory_utilization:.0%} of the memory of each of its GPUs")]


def memory_savers(section: RolloutSection) -> list[tuple[str, Any]]:
    """See `rollout.memory_savers`."""
    if section.placement == "separate":
        return []
    return [*([] if section.sleep else [("rollout.sleep", True)]), ("rollout.placement", "separate")]


def expected_seconds(
    section: RolloutSection, model: ModelConfig, card: Card, work: Workload, num_devices: int
) -> dict[str, float]:
    """See `rollout.expected_seconds`."""
    from grpo_jax.rollout.vllm import speed

    return speed.expected_seconds(section, model, card, work, num_devices)


def device_programs(config: Config, model: ModelConfig, params: Params, mesh: Mesh) -> tuple[str, list[Any]]:
    """See `rollout.device_programs`: packing the buckets of a push."""
    from grpo_jax.weight_sync.buckets import make_push_plan, packing_programs

    plan = make_push_plan(model, config.rollout.bucket_mb * 2**20)
    return "weight sync", packing_programs(params, plan, mesh)


def check_devices(section: RolloutSection, mesh: Mesh) -> None:
    """See `rollout.check_devices`."""
    from grpo_jax.rollout.vllm.devices import plan_engines

    plan_engines(section, mesh)


def make_engine(
    section: RolloutSection,
    *,
    folder: ModelFolder,
    mesh: Mesh,
    tokenizer: Any,
    stop_token_ids: tuple[int, ...],
    max_model_len: int,
    lora_push: str,
) -> RolloutEngine:
    """See `rollout.make_engine`."""
    from grpo_jax.rollout.vllm.engine import VllmEngine

    return VllmEngine(
        section,
        folder=folder,
        mesh=mesh,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids,
        max_model_len=max_model_len,
        lora_push=lora_push,
    )


def share_engine(
    section: RolloutSection,
    channel: Channel,
    *,
    folder: ModelFolder,
    mesh: Mesh,
    lora_push: str,
    **arguments: Any,
) -> RolloutEngine:
    """The engine of a run with several processes: the first one has it, and all take part in pushes."""
    from grpo_jax.rollout.shared import SharedEngine
    from grpo_jax.rollout.vllm.cargo import make_cargos
    from grpo_jax.rollout.vllm.crew import Crew, Member
    from grpo_jax.rollout.vllm.engine import VllmEngine

    def make(tell: Callable[[Any], bool]) -> RolloutEngine:
        crew = Crew(channel, tell, is_spread=section.placement == "colocated" and not section.ray_address)
        return VllmEngine(section, folder=folder, mesh=mesh, lora_push=lora_push, crew=crew, **arguments)

    def make_member() -> Member:
        make_all = functools.partial(make_cargos, section, folder.config, lora_push)
        return Member(channel, section, make_all, mesh)

    return SharedEngine(channel, make, make_member)
