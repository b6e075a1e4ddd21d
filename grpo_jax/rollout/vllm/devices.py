"""Which GPUs, and how much of their memory, go to the engines and how much stays with the trainer."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
from jax.sharding import Mesh

from grpo_jax.config import ConfigError, RolloutSection
from grpo_jax.rollout.vllm.check import installed_vllm
from grpo_jax.weight_sync import choose_transport

ENGINE_GPUS = "GRPO_JAX_ENGINE_GPUS"
"""Environment variable: the GPUs that `share_gpus` set aside for the engines, as in CUDA_VISIBLE_DEVICES."""


def share_gpus(section: RolloutSection) -> None:
    """Leaves the trainer all GPUs of this host but those of the engines, for `rollout.placement`=separate.

    CUDA_VISIBLE_DEVICES then names the trainer's, and `ENGINE_GPUS` the engines'. Where that has been done, it is
    not done again: the trainer would lose more GPUs. The engines of a cluster (`rollout.ray_address`) have GPUs of
    their own.

    Raises:
        ConfigError: no GPU would be left for the trainer.
    """
    if section.ray_address or ENGINE_GPUS in os.environ:
        return
    trainer, engines = split_gpus(section, visible_gpus())
    if engines:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(trainer)
        os.environ[ENGINE_GPUS] = ",".join(engines)


def share_memory(section: RolloutSection, trainer_share: float) -> None:
    """Leaves the engines their part of the memory of GPUs that both use, for `rollout.placement`=colocated.

    Args:
        trainer_share: part of a GPU's memory that JAX may take. What the user has set stays.
    """
    if section.sleep:
        # Both want most of the memory, one after the other: JAX must not keep what it does not need.
        os.environ.setdefault("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{trainer_share:.3f}")


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as in CUDA_VISIBLE_DEVICES."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    return [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def split_gpus(section: RolloutSection, gpus: Sequence[str]) -> tuple[list[str], list[str]]:
    """Splits the GPUs of this host into (those of the trainer, those of the engines), which are the last ones.

    Raises:
        ConfigError: no GPU would be left for the trainer.
    """
    replicas = max(1, section.num_replicas)
    wanted = replicas * section.tensor_parallel_size
    if gpus and wanted >= len(gpus):
        rule = (
            f"{wanted} GPU(s) for engines (num_replicas={replicas} x tensor_parallel_size="
            f"{section.tensor_parallel_size}) leave none of {len(gpus)} for the trainer; choose colocated"
        )
        raise ConfigError("rollout.placement", "separate", rule)
    num_left = max(0, len(gpus) - wanted)
    return list(gpus[:num_left]), list(gpus[num_left:])


def engine_gpus(section: RolloutSection) -> str:
    """CUDA_VISIBLE_DEVICES for engines that `share_gpus` set GPUs aside for; "" for others."""
    is_split = section.placement == "separate" and not section.ray_address
    return os.environ.get(ENGINE_GPUS, "") if is_split else ""


def plan_engines(section: RolloutSection, mesh: Mesh) -> tuple[str, int]:
    """Returns the transport of the weights and the number of engines, for the devices of this process.

    Raises:
        ConfigError: see `choose_transport`, `check_processes` and `num_replicas`.
    """
    trainer, engine_on_gpu = jax.default_backend(), not installed_vllm(section).is_cpu
    both_on_gpus = engine_on_gpu and trainer == "gpu"
    check_processes(section, jax.process_count(), both_on_gpus=both_on_gpus)
    transport = choose_transport(section, trainer=trainer, engine_on_gpu=engine_on_gpu)
    return transport, num_replicas(section, mesh, both_on_gpus=both_on_gpus)


def check_processes(section: RolloutSection, count: int, *, both_on_gpus: bool) -> None:
    """Args: count: processes of the run. Raises: ConfigError: their engines would not be where they can be."""
    if count == 1 or not both_on_gpus:
        return
    address = section.ray_address
    if section.placement == "separate" and not address:
        rule = f"a run of {count} processes with rollout.placement=separate has its engines in a Ray cluster"
        raise ConfigError("rollout.ray_address", address, f"{rule}: name it, or choose colocated")
    if section.placement == "colocated" and address:
        rule = f"a run of {count} processes has a Ray of its own for engines on its own GPUs"
        raise ConfigError("rollout.ray_address", address, f"{rule}: leave it empty, or choose separate")


def num_replicas(section: RolloutSection, mesh: Mesh, *, both_on_gpus: bool) -> int:
    """`rollout.num_replicas`, or as many engines as the trainer's GPUs have room for.

    Args:
        both_on_gpus: trainer and engines both run on GPUs.

    Raises:
        ConfigError: the engines are to share the trainer's GPUs, and ask for more than it has.
    """
    if section.placement == "separate" or not both_on_gpus:
        return max(1, section.num_replicas)
    gpus, size = mesh.devices.size, section.tensor_parallel_size
    local, count = len(mesh.local_devices), max(1, gpus // max(1, len(mesh.local_devices)))
    if size > local and count > 1:
        raise ConfigError(
            "rollout.tensor_parallel_size", size, f"each of {count} processes has {local} GPU(s)"
        )
    if section.num_replicas % count:
        rule = f"must be a multiple of the {count} processes: each has as many engines on its GPUs"
        raise ConfigError("rollout.num_replicas", section.num_replicas, rule)
    wanted = max(1, section.num_replicas) * size
    if wanted > gpus and not section.ray_address:
        key = "rollout.num_replicas" if section.num_replicas else "rollout.tensor_parallel_size"
        value = section.num_replicas or size
        raise ConfigError(
            key, value, f"asks for {wanted} GPUs (tensor_parallel_size={size}); the trainer has {gpus}"
        )
    return section.num_replicas or max(1, local // size) * count
