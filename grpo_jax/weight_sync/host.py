"""Both ends of the transport through the host's memory: for trainers on a CPU or a TPU, and between hosts.

On the trainer's own host a bucket is copied into a slot of shared memory, and every worker on that host reads it.
To engines on other hosts a bucket is relayed: Ray's object store moves it once to each host, and the engine's
actor puts it into a mailbox of its own host, which its workers read as they would read the trainer's.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.weight_sync.wire import (
    Destination,
    Layout,
    Mailbox,
    call_in_thread,
    first_workers,
    wait_for_device,
)

NUM_SLOTS = 2
ANSWER_S = 10.0  # for an answer that is there to arrive


class HostSender:
    """The trainer's end."""

    uids = ()

    def __init__(self, layout: Layout, destinations: Sequence[Destination]):
        local = [destination for destination in destinations if destination.relay is None]
        num_readers = sum(destination.num_workers for destination in local)
        self._mailbox = Mailbox.create(num_readers, NUM_SLOTS, layout.bucket_bytes) if local else None
        self._destinations, self._local = destinations, local
        self._relays = [destination.relay for destination in destinations if destination.relay is not None]

    def links(self) -> list[dict[str, Any] | None]:
        """See `Sender.links`."""
        address = self._mailbox.address if self._mailbox is not None else {}
        readers = iter(first_workers(self._local))
        return [
            {"mailbox": address, "first_reader": next(readers)} if destination.relay is None else None
            for destination in self._destinations
        ]

    def connect(self, check: Callable[[], None]) -> None:
        """Nothing to join: the workers open the mailbox."""

    def reset(self, check: Callable[[], None]) -> None:
        """See `Sender.reset`."""
        if self._relays:
            _wait_for([relay.prepare() for relay in self._relays], check)
        if self._mailbox is not None:
            self._mailbox.unlink()
            self._mailbox.reset()

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """See `Sender.send`."""
        on_host = self._to_host(buckets, check)
        if self._relays:
            self._send_everywhere(on_host, check)
        elif self._mailbox is not None:
            self._mailbox.send(self._put, on_host, check)

    def _to_host(self, buckets: Iterator[Any], check: Callable[[], None]) -> Iterator[np.ndarray]:
        for flat in buckets:
            bucket = call_in_thread(functools.partial(np.asarray, flat), check).view(np.uint8)
            del flat  # before the next one is made
            yield bucket

    def _put(self, number: int, bucket: np.ndarray) -> None:
        assert self._mailbox is not None
        np.copyto(self._mailbox.slot(number)[: len(bucket)], bucket)

    def _send_everywhere(self, buckets: Iterator[np.ndarray], check: Callable[[], None]) -> None:
        import ray

        for number, bucket in enumerate(buckets):
            # Where the object store is full, this waits for room.
            shared = call_in_thread(functools.partial(ray.put, bucket), check)
            calls = [relay.bring(number, shared) for relay in self._relays]
            if self._mailbox is not None:
                self._mailbox.wait_writable(number, check)
                self._put(number, bucket)
                self._mailbox.publish(number)
            _wait_for(calls, check)

    def give_up(self) -> None:
        """See `Sender.give_up`. Engines on other hosts give up their own mailboxes as they are disconnected."""
        if self._mailbox is not None:
            self._mailbox.give_up()

    def close(self) -> None:
        """See `Sender.close`."""
        if self._mailbox is not None:
            self._mailbox.close()


def _wait_for(calls: list[Any], check: Callable[[], None]) -> None:
    """Waits for calls of Ray and raises what one of them raised."""
    import ray

    while calls:
        done, calls = ray.wait(calls, timeout=1.0)
        ray.get(done, timeout=ANSWER_S)
        check()


class HostReceiver:
    """The end of one engine worker."""

    def __init__(self, link: dict[str, Any], rank: int, device: Any):
        self._mailbox = Mailbox(**link["mailbox"], create=False)
        self._reader, self._device = link["first_reader"] + rank, device

    def buckets(self, layout: Layout, check: Callable[[], None]) -> Iterator[tuple[Any, Callable[[], None]]]:
        """As `IpcReceiver.buckets`."""
        import torch

        for number, num_bytes in enumerate(layout.sizes):
            self._mailbox.wait_readable(number, check)

            def release(number: int = number) -> None:
                wait_for_device(self._device, check)
                self._mailbox.release(self._reader, number)

            yield torch.from_numpy(self._mailbox.slot(number)[:num_bytes]).to(self._device), release

    def close(self) -> None:
        self._mailbox.close()
