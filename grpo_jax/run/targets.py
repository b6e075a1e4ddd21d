"""Devices that are only described, for who compiles for them: TPU slices, and H100s or H200s.

A TPU's compiler is in the package libtpu; that of GPUs comes with JAX's CUDA plugin. Neither needs the device.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import jax
from jax.experimental import topologies

from grpo_jax.config import ConfigError
from grpo_jax.model.cards import CARDS, slice_of

TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # or libtpu asks a cloud's metadata server, for a minute
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or two processes fail at its lock file
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # any: it only silences a warning
    "TPU_WORKER_HOSTNAMES": "localhost",
}
GPUS_OF_A_HOST = 8
CUDA_PLUGIN = "jax_cuda13_plugin"
CUDNN = 91200
"""The version that is compiled for: 9.12."""
HOPPER = dict(
    threads_per_block_limit=1024, threads_per_warp=32, threads_per_core_limit=2048, core_count=132,
    fpus_per_core=128, shared_memory_per_block=49152, shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448, registers_per_core_limit=65536, registers_per_block_limit=65536,
    block_dim_limit_x=2**31 - 1, block_dim_limit_y=65535, block_dim_limit_z=65535, clock_rate_ghz=1.98,
    l2_cache_size=50 * 2**20,
)  # fmt: skip
"""H100 and H200, in the fields of XLA's GpuDeviceInfoProto; they differ in their memory alone."""
RULE = (
    "is there for TPU slices (--device=v5e-16, or tpu-v5e with 4, 8, 16, ... devices), and for h100 and h200 with "
    "up to 8 or a multiple of 8"
)


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices, and who compiles for them."""

    devices: list[jax.Device]
    compiler: str
    """Names and versions."""


def describe(card: str, num_devices: int, num_slices: int = 1) -> Target:
    """So many devices of a card, which can compute nothing. What is computed on the way is, by the processor here.

    Args:   card: a name of `CARDS`; num_slices: of TPUs, that the devices are of, each the same number.
    Raises: ConfigError: there are no such devices to compile for, or the compiler is not installed.
    """
    chosen = slice_of(card, num_devices // num_slices)
    if chosen is None and (card not in ("h100", "h200") or 0 < num_devices % GPUS_OF_A_HOST < num_devices):
        raise ConfigError("compile", "True", RULE)
    package, extra = ("libtpu", "tpu") if chosen else (CUDA_PLUGIN, "gpu")
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            "compile", "True", f"needs {package}, of the extra {extra}; the devices need not be here"
        )
    if not jax.config.values["jax_platforms"]:
        jax.config.update("jax_platforms", "cpu")
    if chosen:
        for name, value in TPU_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        found = topologies.get_topology_desc(chosen.topology, "tpu", num_slices=num_slices)
    else:
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # CUDA's libraries may be absent
        hosts = -(-num_devices // GPUS_OF_A_HOST)
        topology = f"1x{hosts}x{num_devices // hosts}"
        found = topologies.get_topology_desc("", "cuda", target_config=_gpu_target(card), topology=topology)
    return Target(
        list(found.devices), f"jax {jax.__version__}, {package} {importlib.metadata.version(package)}"
    )


@contextlib.contextmanager
def kernels_of(devices: list[jax.Device]) -> Iterator[None]:
    """Traces for devices that are not here. JAX asks the cuDNN and the GPU at hand whether they have attention."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    asked = cudnn.check_cudnn_version, cudnn.check_compute_capability
    if devices[0].platform == "gpu":
        cudnn.check_cudnn_version = lambda: CUDNN
        cudnn.check_compute_capability = lambda *_, **__: True
    try:
        yield
    finally:
        cudnn.check_cudnn_version, cudnn.check_compute_capability = asked


def _gpu_target(card: str) -> str:
    """The text of XLA's GpuTargetConfigProto."""
    sizes = dict(device_memory_size=CARDS[card].memory, memory_bandwidth=round(CARDS[card].hbm))
    fields = " ".join(f"{key}: {value}" for key, value in (HOPPER | sizes).items())
    return (
        f"gpu_device_info {{ {fields} cuda_compute_capability {{ major: 9 }} }} platform_name: 'CUDA' "
        f"dnn_version_info {{ major: 9 minor: {CUDNN // 100 % 100} }} "
        f"device_description_str: 'NVIDIA {CARDS[card].name_in_jax}'"
    )
