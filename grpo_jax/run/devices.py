"""The environment of the trainer's process, and the mesh of its devices, made in the one right order."""

import logging
import math
import os
from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from grpo_jax.config import Config, ConfigError, ModelSection, RolloutSection, TrainerSection
from grpo_jax.learner.memory import held_in_all
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.peft import with_adapters
from grpo_jax.model.sharding import make_mesh
from grpo_jax.rollout import check_devices, share_devices

logger = logging.getLogger(__name__)

GIB = 2**30
JAX_HOST_LIMIT_GIB = 64
HOST_SLACK = 0.06
"""Of pinned memory: what lies idle between arrays of different sizes."""
STAGING_GIB = 2
"""Pinned memory that JAX copies through."""


def open_devices(
    config: Config, model: ModelConfig | None, *, engine: RolloutSection | None, num_processes: int = 1
) -> Mesh:
    """Prepares the process for the run, and returns the mesh of its devices. Nothing may have touched them before.

    Args:
        model: None: a random one, still to be made, which is small.
        engine: the engine that shares the devices; None: there is none.
        num_processes: of the run, each of which is on a host of its own.

    Raises: ConfigError: the mesh or the engine does not fit the devices, or they cannot compute what is
             configured.
    """
    prepare_process(config, model, engine=engine, num_processes=num_processes)
    set_products(config.model)
    mesh = open_mesh(config)
    if engine is not None and jax.process_index() == 0:  # the others need not have the engine
        check_devices(engine, mesh)
    _keep_compiled_programs(config.trainer)
    return mesh


def prepare_process(
    config: Config, model: ModelConfig | None, *, engine: RolloutSection | None, num_processes: int = 1
) -> None:
    """Sets what JAX reads from the environment when it first touches a device. Args: as `open_devices`."""
    _set_determinism(config.trainer)
    if engine is not None:
        share_devices(engine)
    make_room_on_host(config, model, num_processes)


def open_mesh(config: Config) -> Mesh:
    """The mesh of the run's devices.

    Raises: ConfigError: it does not fit them, or they cannot compute what is configured.
    """
    check_alike(find_devices())
    mesh = make_mesh(config.mesh)
    check_dtype(config.model.dtype, mesh)
    return mesh


def check_alike(devices: Sequence[jax.Device]) -> None:
    """Raises: ConfigError: the processes of the run have unlike devices."""
    of_process: dict[int, list[str]] = {}
    for device in devices:
        of_process.setdefault(device.process_index, []).append(device.device_kind)
    first = of_process[min(of_process)]
    for number, kinds in sorted(of_process.items()):
        if kinds != first:
            rule = f"all processes need the same devices: process 0 has {len(first)} x {first[0]}, "
            rule += f"process {number} has {len(kinds)} x {kinds[0]}"
            raise ConfigError("JAX_NUM_PROCESSES", len(of_process), rule)


def find_devices() -> list[jax.Device]:
    """The devices of this process.

    Raises: ConfigError: there are none of the kind that is asked for.
    """
    try:
        return jax.devices()
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        rule = f"JAX has no such devices here ({reason})"
        raise ConfigError("JAX_PLATFORMS", os.environ.get("JAX_PLATFORMS", ""), rule) from None


def check_dtype(dtype: str, mesh: Mesh) -> None:
    """Raises: ConfigError: the mesh cannot compute in this dtype. Other obstacles: `choose_kernel`."""
    if mesh.shape["tensor"] > 1 and dtype == "bfloat16" and jax.default_backend() == "cpu":
        rule = "needs mesh.tensor=1 on CPUs: XLA's compiler for them fails at sums of bfloat16 over that axis"
        raise ConfigError("model.dtype", "bfloat16", rule)


def set_products(section: ModelSection) -> None:
    """Has products of float32 computed in full: JAX's default on NVIDIA GPUs keeps 10 of 23 bits (TF32)."""
    if section.dtype == "float32":
        precision = "highest" if section.float32_products == "full" else None
        jax.config.update("jax_default_matmul_precision", precision)


def _set_determinism(section: TrainerSection) -> None:
    """Makes XLA's GPU compiler choose kernels that always give the same bits.

    Otherwise it times several kernels and takes the fastest, which differs from run to run and may add in any
    order.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if section.deterministic and "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def _keep_compiled_programs(section: TrainerSection) -> None:
    """Has JAX keep compiled programs for accelerators on disk, for the next run with the same shapes.

    A cache that the user has set, as by JAX_COMPILATION_CACHE_DIR, stays. Programs for a CPU depend on its exact
    model and compile quickly: they are not kept.
    """
    if (
        section.compile_cache
        and not jax.config.values["jax_compilation_cache_dir"]
        and jax.default_backend() != "cpu"
    ):
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(section.compile_cache))


def make_room_on_host(config: Config, model: ModelConfig | None, num_processes: int = 1) -> None:
    """Lets JAX pin as much of the host's memory as `optim.offload` and `algorithm.ref_offload` need.

    JAX's own limit is 64 GB. Its pool grows by doubling, up to the limit, so the limit is set to what is needed.

    Args: model: None: a random one, which is small; num_processes: over which the state is spread evenly.
    """
    if model is not None and not config.sft.num_steps:  # a warm start trains all parameters
        model = with_adapters(model, config.lora)
    copy_bytes = 0 if model is None else sum(held_in_all(config, model)[1].values())
    if not copy_bytes:
        return
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = copy_bytes * max(1, config.mesh.data) / num_processes
    if needed > host_bytes:
        text = "optim.offload and algorithm.ref_offload take %.0f GB of the host's memory, which has %.0f GB"
        logger.warning(text, needed / 1e9, host_bytes / 1e9)
    limit = math.ceil(needed * (1 + HOST_SLACK) / GIB) + STAGING_GIB
    if config.mesh.data == -1:  # as many copies as devices, which nobody has counted yet
        limit = host_bytes // GIB
    if limit > JAX_HOST_LIMIT_GIB:
        os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(limit))
