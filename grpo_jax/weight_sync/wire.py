"""What both ends of a push agree on: layout of the buckets, checksums, and the mailbox in shared memory.

Imported by the trainer and by the engine's workers, which need not have JAX: standard library and numpy only.
"""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import mmap
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

BLOCK_BYTES = 4096
"""Tensors start on multiples of this, and each such block gets a checksum."""
BLOCK_WORDS = BLOCK_BYTES // 4
WORD_WEIGHTS = (2 * np.arange(BLOCK_WORDS) + 1).astype(np.uint32)
"""Odd, hence invertible mod 2^32: no change of a single word goes unseen."""
HEADER_BYTES = 4096
SPINS = 2000  # one or two milliseconds
POLL_S = 5e-5
CHECK_EVERY = 128  # polls
GIVEN_UP = -1
CHECK_S = 0.1  # between two checks of a call in a thread

T = TypeVar("T")
_FENCE = threading.Lock()


class WeightSyncError(RuntimeError):
    """A push that failed, or weights that did not arrive as they were sent."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor, or a run of its rows, within a bucket."""

    name: str
    first_row: int
    num_rows: int
    offset: int
    """Bytes from the start of the bucket."""
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class Relay:
    """The way of buckets to an engine on another host. What its functions return, `ray.get` waits for."""

    prepare: Callable[[], Any]
    """Makes the engine ready for the buckets of a push."""
    bring: Callable[[int, Any], Any]
    """(number of a bucket, the bucket) -> brings it to the engine's host."""


@dataclasses.dataclass(frozen=True)
class Destination:
    """An engine that weights are sent to, as the trainer sees it."""

    num_workers: int
    relay: Relay | None = None
    """None: it is on the trainer's host."""


def first_workers(destinations: Sequence[Destination]) -> list[int]:
    """The number of the first worker of each engine, where the workers of all engines are counted through."""
    counts = [destination.num_workers for destination in destinations]
    return list(itertools.accumulate(counts, initial=0))[:-1]


@dataclasses.dataclass(frozen=True)
class Layout:
    """All that a receiver has to know about the buckets of a model."""

    dtype: str
    tensors: dict[str, tuple[int, ...]]
    """Hugging Face name -> shape."""
    buckets: tuple[tuple[Piece, ...], ...]
    sizes: tuple[int, ...]
    """Bytes of each bucket, whole blocks."""

    @property
    def bucket_bytes(self) -> int:
        """Size of the largest bucket."""
        return max(self.sizes)

    def to_dict(self) -> dict[str, Any]:
        """As JSON and msgpack can carry it."""
        buckets = [[list(dataclasses.astuple(piece)) for piece in pieces] for pieces in self.buckets]
        tensors = [[name, list(shape)] for name, shape in self.tensors.items()]
        return {"dtype": self.dtype, "tensors": tensors, "buckets": buckets, "sizes": list(self.sizes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Layout":
        tensors = {name: tuple(shape) for name, shape in values["tensors"]}
        buckets = tuple(tuple(Piece(*piece) for piece in pieces) for pieces in values["buckets"])
        return cls(values["dtype"], tensors, buckets, tuple(values["sizes"]))


def piece_checksums(blocks: np.ndarray, pieces: Sequence[Piece]) -> list[int]:
    """One number for each piece of a bucket.

        c = sum_k (2 k + 1) sum_j (2 j + 1) w[k, j]   mod 2^32,   w the 32-bit words of block k of the bucket

    Integers, so that the order of summation does not matter and both ends get the same bits.

    Blocks behind a piece that belong to no other are 0, and count as its own.

    Args: blocks: [n / BLOCK_BYTES] of a bucket of n bytes, the inner sums mod 2^32.
    """
    weighted = blocks.astype(np.uint64) * (2 * np.arange(len(blocks), dtype=np.uint64) + 1)
    starts = [piece.offset // BLOCK_BYTES for piece in pieces]
    return [int(total) & 0xFFFFFFFF for total in np.add.reduceat(weighted & 0xFFFFFFFF, starts)]


def compare_checksums(
    layout: Layout, sent: Sequence[Sequence[int]], received: Sequence[Sequence[int]]
) -> None:
    """Compares the checksums of every piece of every bucket.

    Raises:
        WeightSyncError: names the first tensors that differ.
    """
    wrong = [
        piece.name
        for pieces, ours, theirs in zip(layout.buckets, sent, received, strict=True)
        for piece, a, b in zip(pieces, ours, theirs, strict=True)
        if a != b
    ]
    if wrong:
        names = list(dict.fromkeys(wrong))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise WeightSyncError(f"weights differ between trainer and engine: {', '.join(names[:3])}{more}")


class Mailbox:
    """Slots for buckets in shared memory of one host. One process writes, several read, without a lock.

    A header counts the buckets that were written, and the buckets that each reader is done with. Bucket k lies in
    slot k % num_slots. A counter is written after what it counts, and read before that: see `fence`. A transport
    that moves the bytes in another way uses the counters alone (`slot_bytes` 0).
    """

    def __init__(self, path: str, num_readers: int, num_slots: int, slot_bytes: int, *, create: bool):
        self.path, self._create = path, create
        self._size = HEADER_BYTES + num_slots * slot_bytes
        self._num_slots, self._slot_bytes = num_slots, slot_bytes
        try:
            fd = os.open(path, os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        except OSError as error:
            raise WeightSyncError(f"{path}: shared memory cannot be used ({error.strerror})") from None
        try:
            if create:
                # Where /dev/shm is full this is an error; without it writing would crash the process.
                os.posix_fallocate(fd, 0, self._size)
            self._map = mmap.mmap(fd, self._size)
        except OSError as error:
            if create:
                os.unlink(path)
            raise WeightSyncError(
                f"/dev/shm has no room for {self._size >> 20} MiB ({error.strerror}); lower rollout.bucket_mb"
            ) from None
        finally:
            os.close(fd)
        self._counts = np.frombuffer(self._map, np.int64, 1 + num_readers)

    @classmethod
    def create(cls, num_readers: int, num_slots: int, slot_bytes: int) -> "Mailbox":
        path = f"/dev/shm/grpo_jax-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        return cls(path, num_readers, num_slots, slot_bytes, create=True)

    @property
    def address(self) -> dict[str, Any]:
        """Arguments with which a reader opens the same mailbox."""
        return {
            "path": self.path,
            "num_readers": len(self._counts) - 1,
            "num_slots": self._num_slots,
            "slot_bytes": self._slot_bytes,
        }

    def slot(self, bucket: int) -> np.ndarray:
        """The bytes of the slot of bucket number `bucket`, [slot_bytes] uint8."""
        start = HEADER_BYTES + bucket % self._num_slots * self._slot_bytes
        return np.frombuffer(self._map, np.uint8, self._slot_bytes, start)

    def reset(self) -> None:
        """Sets the counters to 0, before a push, while nobody reads."""
        self._counts[:] = 0

    def wait_writable(self, bucket: int, check: Callable[[], None]) -> None:
        """Waits until every reader is done with what the slot of `bucket` held before."""
        poll(lambda: self._counts[1:].min() > bucket - self._num_slots, check)
        fence()

    def publish(self, bucket: int) -> None:
        """Tells the readers that `bucket` is in its slot."""
        fence()
        self._counts[0] = bucket + 1

    def give_up(self) -> None:
        """Ends a push that has failed: readers stop waiting. The mailbox is of no further use."""
        self._counts[0] = GIVEN_UP

    def wait_readable(self, bucket: int, check: Callable[[], None]) -> None:
        """Waits until `bucket` is in its slot. Raises: WeightSyncError: the other end has given up."""
        poll(lambda: self._counts[0] > bucket or self._counts[0] == GIVEN_UP, check)
        if self._counts[0] == GIVEN_UP:
            raise WeightSyncError("the trainer gave this push up")
        fence()

    def release(self, reader: int, bucket: int) -> None:
        """Tells the writer that a reader is done with `bucket`."""
        fence()
        self._counts[1 + reader] = bucket + 1

    def send(
        self, put: Callable[[int, Any], None], buckets: Iterable[Any], check: Callable[[], None]
    ) -> None:
        """Writes each bucket with `put(number, bucket)` when its slot is free. Returns when all were read.

        Args:
            check: called while waiting; raises where waiting has become useless.
        """
        number = 0
        for bucket in buckets:
            self.wait_writable(number, check)
            put(number, bucket)
            del bucket  # before the next one is made
            self.publish(number)
            number += 1
        self.wait_writable(number - 1 + self._num_slots, check)

    def unlink(self) -> None:
        """Removes the file's name. Once all have it open, nothing is left behind, however the processes end."""
        if self._create:
            Path(self.path).unlink(missing_ok=True)

    def close(self) -> None:
        """Closes this end; the creator's removes the file. Views that are still held keep their memory."""
        self._counts = np.zeros(1, np.int64)
        with contextlib.suppress(BufferError):
            self._map.close()
        self.unlink()


def deadline_check(seconds: float, what: str) -> Callable[[], None]:
    """Returns a check that raises `WeightSyncError` once `seconds` have passed."""
    end = time.monotonic() + seconds

    def check() -> None:
        if time.monotonic() > end:
            raise WeightSyncError(f"{what} within {seconds:g} s")

    return check


def call_in_thread(
    call: Callable[[], T], check: Callable[[], None], *, undo: Callable[[T], Any] = lambda result: None
) -> T:
    """Makes a library's call that waits and cannot be told to stop. Gives it up where `check` raises.

    Its thread is a daemon's, so that nobody waits for it at the process's end; a thread of a pool is waited for.

    Args:
        undo: called with the result of a call that returns although it was given up.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while not concurrent.futures.wait([future], timeout=CHECK_S).done:
            check()
    except BaseException:
        future.add_done_callback(lambda late: late.exception() or undo(late.result()))
        raise
    thread.join()  # it has nothing left to do but to let go of its arguments
    return future.result()


def wait_for_device(device: Any, check: Callable[[], None]) -> None:
    """Waits for what is on PyTorch's current stream of a worker's device."""
    import torch

    if device.type != "cpu":
        poll(torch.accelerator.current_stream(device).query, check)


def fence() -> None:
    """Orders what this thread read and wrote before it and what it does after it, as other processes see it.

    x86 does so by itself, ARM does not. Python has no other barrier than a lock: what comes before its release
    stays before it, and what comes after its next acquisition after that.
    """
    for _ in range(2):
        with _FENCE:
            pass


def poll(is_true: Callable[[], Any], check: Callable[[], None]) -> None:
    """Waits, at first without sleeping: mostly the other end needs some tenths of a millisecond."""
    spins = 0
    while not is_true():
        spins += 1
        if spins > SPINS:
            time.sleep(POLL_S)
            if spins % CHECK_EVERY == 0:
                check()
