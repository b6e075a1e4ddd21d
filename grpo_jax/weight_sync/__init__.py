"""How new weights reach the rollout engine: three transports behind one protocol.

`ipc` (an engine on the trainer's GPU), `nccl` (on other GPUs), `host` (through the host's memory). Imported by the
engine's workers too: it must stay light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from grpo_jax.config import ConfigError
from grpo_jax.weight_sync.wire import Layout, WeightSyncError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from grpo_jax.config import RolloutSection

__all__ = ["Sender", "WeightSyncError", "choose_transport", "make_sender"]


class Sender(Protocol):
    """The trainer's end of a transport. Made anew when an engine was replaced."""

    def link(self, first_reader: int) -> dict[str, Any]:
        """What the workers of a replica, numbered from `first_reader` on, need to open their end."""

    def connected(self) -> None:
        """All workers have opened their end."""

    def reset(self) -> None:
        """Before each push, and before the workers are told of it."""

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """Sends flat device arrays; returns when their last bytes are out of the trainer's hands.

        Args: check: called while waiting; raises where waiting has no more sense.
        """

    def close(self) -> None:
        """Frees buffers and shared memory."""


def choose_transport(section: RolloutSection, *, trainer: str, engine_on_gpu: bool) -> str:
    """The transport that `rollout.weight_sync` names, or the one that fits.

    Args:   trainer: JAX's name of the trainer's back end.
    Raises: ConfigError: the named one cannot work here.
    """
    if section.weight_sync == "host":
        return "host"
    on_gpus = trainer == "gpu" and engine_on_gpu
    if section.weight_sync == "auto":
        if not on_gpus:
            return "host"
        return "ipc" if section.placement == "colocated" else "nccl"
    if not on_gpus:
        rule = f"needs trainer ({trainer}) and engine on NVIDIA GPUs; choose host or auto"
        raise ConfigError("rollout.weight_sync", section.weight_sync, rule)
    return section.weight_sync


def make_sender(
    transport: str,
    layout: Layout,
    mesh: Mesh,
    *,
    num_local: int,
    num_workers: int,
    relays: Sequence[Callable[[int, Any], Any]],
) -> Any:
    """The trainer's end of a transport.

    Args:
        num_local: engine workers on this host; num_workers: everywhere.
        relays: for `host`, see `HostSender`.
    """
    devices = list(mesh.devices.flat)
    if transport == "ipc":
        from grpo_jax.weight_sync.ipc import IpcSender

        return IpcSender(layout, [device.local_hardware_id for device in devices], num_local)
    if transport == "nccl":
        from grpo_jax.weight_sync.nccl import NcclSender

        return NcclSender(num_workers, devices[0])
    from grpo_jax.weight_sync.host import HostSender

    return HostSender(layout, num_local, relays)
