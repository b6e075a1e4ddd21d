"""Both ends of the transport through the host's memory: for trainers on a CPU or a TPU, and between hosts.

On the trainer's own host a bucket is copied into a slot of shared memory, and every worker there reads it. To
engines on other hosts a bucket goes through Ray's object store, which moves it once a host; the engine's actor
puts it into a mailbox of its own host, where its workers read it as they would the trainer's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from grpo_jax.weight_sync.wire import Layout, Mailbox, bucket_size

NUM_SLOTS = 2


class HostSender:
    """The trainer's end."""

    def __init__(self, layout: Layout, num_readers: int, relays: Sequence[Callable[[int, Any], Any]] = ()):
        """Args:
        num_readers: workers on this host.
        relays: one for each engine elsewhere: (number, bucket) -> handle of a call, `ray.get` waits for it.
        """
        self._mailbox = Mailbox.create(num_readers, NUM_SLOTS, layout.bucket_bytes) if num_readers else None
        self._relays = relays

    def link(self, first_reader: int) -> dict[str, Any]:
        """What the workers of a replica on this host need to open this end."""
        assert self._mailbox is not None
        return {"mailbox": self._mailbox.address, "first_reader": first_reader}

    def connected(self) -> None:
        """All workers have opened their end."""
        if self._mailbox is not None:
            self._mailbox.unlink()

    def reset(self) -> None:
        """Before each push, and before the workers are told of it."""
        if self._mailbox is not None:
            self._mailbox.reset()

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        on_host = self._to_host(buckets)
        if not self._relays:
            assert self._mailbox is not None
            self._mailbox.send(self._put, on_host, check)
            return
        self._send_everywhere(on_host, check)

    def _to_host(self, buckets: Iterator[Any]) -> Iterator[np.ndarray]:
        for flat in buckets:
            bucket = np.asarray(flat).view(np.uint8)
            del flat  # before the next one is made
            yield bucket

    def _put(self, number: int, bucket: np.ndarray) -> None:
        assert self._mailbox is not None
        np.copyto(self._mailbox.slot(number)[: len(bucket)], bucket)

    def _send_everywhere(self, buckets: Iterator[np.ndarray], check: Callable[[], None]) -> None:
        import ray

        for number, bucket in enumerate(buckets):
            shared = ray.put(bucket)
            calls = [relay(number, shared) for relay in self._relays]
            if self._mailbox is not None:
                self._mailbox.wait_writable(number, check)
                self._put(number, bucket)
                self._mailbox.publish(number)
            while calls:
                done, calls = ray.wait(calls, timeout=1.0)
                ray.get(done)  # raises what a relay raised
                check()

    def close(self) -> None:
        if self._mailbox is not None:
            self._mailbox.close()


class HostReceiver:
    """The end of one engine worker."""

    def __init__(self, link: dict[str, Any], rank: int, device: Any):
        self._mailbox = Mailbox(**link["mailbox"], create=False)
        self._reader, self._device = link["first_reader"] + rank, device

    def buckets(self, layout: Layout, check: Callable[[], None]) -> Iterator[tuple[Any, Callable[[], None]]]:
        """As `IpcReceiver.buckets`."""
        import torch

        for number, pieces in enumerate(layout.buckets):
            self._mailbox.wait_readable(number, check)

            def release(number: int = number) -> None:
                if self._device.type != "cpu":
                    torch.accelerator.synchronize()
                self._mailbox.release(self._reader, number)

            yield (
                torch.from_numpy(self._mailbox.slot(number)[: bucket_size(pieces)]).to(self._device),
                release,
            )

    def close(self) -> None:
        self._mailbox.close()
