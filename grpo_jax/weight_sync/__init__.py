"""How new weights reach the rollout engines: three transports behind one protocol.

`ipc` (engines on the trainer's GPUs), `nccl` (on other GPUs), `host` (through the host's memory). The engines'
workers import this file too, perhaps in an environment without JAX. It must stay light.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from grpo_jax.config import ConfigError
from grpo_jax.weight_sync.wire import Destination, Layout, WeightSyncError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from grpo_jax.config import RolloutSection

__all__ = ["Destination", "Sender", "WeightSyncError", "choose_transport", "make_sender", "num_parts"]


class Sender(Protocol):
    """The trainer's end of a transport. Where an engine is replaced, a new one is made.

    Its functions are called in the order in which they stand. `reset` and `send` make a push, and are called for
    each. A `check` is called while a function waits; it raises an error where waiting has become useless.
    """

    @property
    def uids(self) -> Sequence[str]:
        """What other processes need to send together with this one; none where each process sends for itself."""

    def links(self) -> list[dict[str, Any] | None]:
        """For each engine, what its workers need to open their end.

        None: the buckets will be relayed to it. Its actor opens a mailbox for its workers.
        """

    def connect(self, check: Callable[[], None]) -> None:
        """Joins the workers while they open their end, where the transport needs that."""

    def reset(self, check: Callable[[], None]) -> None:
        """Prepares for a push. All workers have opened their end, and none has been told of the push yet."""

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """Sends the buckets, flat arrays as `buckets.pack_buckets` makes them.

        Returns when they may be deleted. Takes the next bucket when it has let go of the one before; NCCL's takes
        it while that is on its way.
        """

    def give_up(self) -> None:
        """Ends a push that has failed, as far as receivers can be told. Only `close` comes after it."""

    def close(self) -> None:
        """Frees buffers and shared memory. The workers have closed their end, or are gone."""


def choose_transport(section: RolloutSection, *, trainer: str, engine_on_gpu: bool) -> str:
    """Returns the transport that `rollout.weight_sync` names; for "auto", the fastest that works.

    Args:
        trainer: JAX's name of the trainer's back end, as "gpu".

    Raises:
        ConfigError: the named one cannot work between trainer and engines.
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


def num_parts(transport: str, mesh: Mesh) -> int:
    """Of how many parts the buckets are: by "nccl" the trainer's devices send together."""
    if transport != "nccl":
        return 1
    from grpo_jax.weight_sync.buckets import senders

    return len(senders(mesh))


def make_sender(
    transport: str,
    layout: Layout,
    mesh: Mesh,
    destinations: Sequence[Destination],
    *,
    timeout_s: float,
    uids: Sequence[str] = (),
) -> Sender:
    """Makes the trainer's end of a transport.

    Args:
        transport: "ipc", "nccl" or "host".
        mesh: of the trainer's devices.
        destinations: one for each engine.
        timeout_s: for the engines to open their end, where that waits.
        uids: those of the first process's sender; none: this is the first process.
    """
    devices = mesh.local_devices
    if transport == "ipc":
        from grpo_jax.weight_sync.ipc import IpcSender

        return IpcSender(layout, [device.local_hardware_id for device in devices], destinations)
    if transport == "nccl":
        from grpo_jax.weight_sync.buckets import senders
        from grpo_jax.weight_sync.nccl import NcclSender

        return NcclSender(destinations, senders(mesh), timeout_s, uids)
    from grpo_jax.weight_sync.host import HostSender

    return HostSender(layout, destinations)
