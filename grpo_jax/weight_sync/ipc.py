"""Both ends of the transport for engines on the trainer's own GPUs: nothing leaves the card.

The trainer packs a bucket and copies it into one of two slots of device memory that both processes have open. It
packs the next one while the engine copies from the slot into its parameters. The counters of a `Mailbox` in shared
memory tell each side how far the other is: waiting costs microseconds and no remote call.
"""

import contextlib
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grpo_jax.weight_sync import cuda
from grpo_jax.weight_sync.wire import (
    Destination,
    Layout,
    Mailbox,
    WeightSyncError,
    first_workers,
    poll,
    wait_for_device,
)

NUM_SLOTS = 2


class IpcSender:
    """The trainer's end. Each of its devices has slots of its own, with every bucket whole."""

    uids = ()

    def __init__(self, layout: Layout, ordinals: list[int], destinations: Sequence[Destination]):
        """Args: ordinals: CUDA numbers of the trainer's devices."""
        self._slot_bytes = layout.bucket_bytes
        self._buffers: dict[int, cuda.SharedBuffer] = {}
        self._first_readers = first_workers(destinations)
        num_readers = sum(destination.num_workers for destination in destinations)
        with contextlib.ExitStack() as opened:  # where one of them fails, the others are not left behind
            for n in ordinals:
                self._buffers[n] = cuda.SharedBuffer(n, NUM_SLOTS * self._slot_bytes)
                opened.callback(self._buffers[n].close)
            self._mailbox = Mailbox.create(num_readers, NUM_SLOTS, 0)
            opened.pop_all()

    def links(self) -> list[dict[str, Any] | None]:
        """See `Sender.links`."""
        handles = {cuda.device_uuid(n): buffer.handle for n, buffer in self._buffers.items()}
        return [
            {
                "mailbox": self._mailbox.address,
                "first_reader": first_reader,
                "handles": handles,
                "slot_bytes": self._slot_bytes,
            }
            for first_reader in self._first_readers
        ]

    def connect(self, check: Callable[[], None]) -> None:
        """Nothing to join: the workers open the mailbox and the device memory."""

    def reset(self, check: Callable[[], None]) -> None:
        """See `Sender.reset`."""
        self._mailbox.unlink()
        self._mailbox.reset()

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """See `Sender.send`."""
        self._mailbox.send(lambda number, flat: self._put(number, flat, check), buckets, check)

    def _put(self, number: int, flat: Any, check: Callable[[], None]) -> None:
        poll(flat.is_ready, check)
        for shard in flat.addressable_shards:
            data = shard.data
            self._buffers[data.device.local_hardware_id].copy_from(
                data.unsafe_buffer_pointer(), data.nbytes, number % NUM_SLOTS * self._slot_bytes, check
            )

    def give_up(self) -> None:
        """See `Sender.give_up`."""
        self._mailbox.give_up()

    def close(self) -> None:
        """See `Sender.close`."""
        self._mailbox.close()
        for buffer in self._buffers.values():
            buffer.close()


class IpcReceiver:
    """The end of one engine worker."""

    def __init__(self, link: dict[str, Any], rank: int, device: Any):
        import torch

        torch.zeros(1, device=device)  # PyTorch's context, if this is its first use
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        uuid = cuda.device_uuid(ordinal)
        if uuid not in link["handles"]:
            raise WeightSyncError(
                f"this engine's GPU {uuid} is none of the trainer's; rollout.weight_sync=ipc needs "
                "rollout.placement=colocated"
            )
        self._ordinal, self._device, self._slot_bytes = ordinal, device, link["slot_bytes"]
        self._mailbox = Mailbox(**link["mailbox"], create=False)
        self._reader = link["first_reader"] + rank
        self._pointer = cuda.open_shared(ordinal, link["handles"][uuid])
        self._slots = as_tensor(self._pointer, NUM_SLOTS * self._slot_bytes, device)

    def buckets(self, layout: Layout, check: Callable[[], None]) -> Iterator[tuple[Any, Callable[[], None]]]:
        """Yields (bucket, release): [n] uint8 on this worker's device, and a function that frees its memory.

        Call `release` when all reading of the bucket is on the device's stream, before taking the next bucket.
        """
        for number, num_bytes in enumerate(layout.sizes):
            self._mailbox.wait_readable(number, check)
            start = number % NUM_SLOTS * self._slot_bytes

            def release(number: int = number) -> None:
                wait_for_device(self._device, check)
                self._mailbox.release(self._reader, number)

            yield self._slots[start : start + num_bytes], release

    def close(self) -> None:
        self._mailbox.close()
        del self._slots
        cuda.close_shared(self._ordinal, self._pointer)


def as_tensor(pointer: int, num_bytes: int, device: Any) -> Any:
    """Returns a uint8 tensor over device memory that another process owns."""
    import torch

    interface = {"shape": (num_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}
    memory = types.SimpleNamespace(__cuda_array_interface__=interface)
    return torch.as_tensor(memory, device=device)
