"""Both ends of the transport to engines on other GPUs: NCCL broadcasts, from the trainer's first device.

A receiver loads bucket k while bucket k + 1 is packed and arrives in the other of its two buffers. NCCL is called
through ctypes, with the library that JAX's or PyTorch's wheels bring along, so that the trainer needs no PyTorch.
Both ends must find the same major version of NCCL.
"""

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.weight_sync import cuda
from grpo_jax.weight_sync.wire import (
    Destination,
    Layout,
    WeightSyncError,
    bucket_size,
    call_in_thread,
    deadline_check,
    first_workers,
    poll,
)

NCCL_UINT8 = 1


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_char * 128),)


@functools.cache
def _library() -> ctypes.CDLL:
    names = [os.environ["VLLM_NCCL_SO_PATH"]] if os.environ.get("VLLM_NCCL_SO_PATH") else []
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec else ():
        names += map(str, Path(folder).glob("*/lib/libnccl.so.2"))
    for name in [*names, "libnccl.so.2"]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise WeightSyncError("libnccl.so.2 cannot be loaded; pip install nvidia-nccl-cu13")


def _call(name: str, *args: object) -> None:
    function = getattr(_library(), name)
    code = function(*args)
    if code:
        _library().ncclGetErrorString.restype = ctypes.c_char_p
        raise WeightSyncError(f"{name}: {_library().ncclGetErrorString(code).decode()} ({code})")


def unique_id() -> str:
    """Returns the hexadecimal id of a new communicator, which all its ranks need."""
    uid = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(uid))
    return bytes(uid).hex()


class Communicator:
    """One rank of a group that rank 0 broadcasts to. All ranks must be created at the same time: see `join`."""

    def __init__(self, uid: str, rank: int, size: int, ordinal: int):
        self._ordinal, self._comm, self._stream = ordinal, ctypes.c_void_p(), ctypes.c_void_p()
        raw = _UniqueId.from_buffer_copy(bytes.fromhex(uid))
        _library().ncclCommInitRank.argtypes = [ctypes.c_void_p, ctypes.c_int, _UniqueId, ctypes.c_int]
        with cuda.on_device(ordinal):
            _call("ncclCommInitRank", ctypes.byref(self._comm), size, raw, rank)
            cuda.call("cuStreamCreate", ctypes.byref(self._stream), 1)  # 1: does not wait for stream 0
        self._open_connections()

    def _open_connections(self) -> None:
        """Broadcasts a byte: NCCL opens its connections with the first broadcast, which waits for the others."""
        pointer = ctypes.c_uint64()
        with cuda.on_device(self._ordinal):
            cuda.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(1))
            self.broadcast(pointer.value, 1)
            cuda.call("cuStreamSynchronize", self._stream)
            cuda.call("cuMemFree_v2", pointer)

    def broadcast(self, pointer: int, num_bytes: int, stream: int | None = None) -> None:
        """Broadcasts device memory from rank 0 to all, in place, on `stream` (None: the communicator's own)."""
        handle = self._stream if stream is None else ctypes.c_void_p(stream)
        data, count = ctypes.c_void_p(pointer), ctypes.c_size_t(num_bytes)
        with cuda.on_device(self._ordinal):
            _call("ncclBroadcast", data, data, count, NCCL_UINT8, 0, self._comm, handle)

    def synchronize(self, check: Callable[[], None]) -> None:
        """Waits for the communicator's own stream; `check` raises where waiting has become useless."""
        with cuda.on_device(self._ordinal):
            cuda.wait_for_stream(self._stream, check)

    def close(self) -> None:
        with cuda.on_device(self._ordinal):
            _call("ncclCommAbort", self._comm)  # never waits for a rank that is gone


def join(uid: str, rank: int, size: int, ordinal: int, check: Callable[[], None]) -> Communicator:
    """Makes a communicator when all its ranks have joined, or gives up where `check` raises.

    NCCL cannot be told to stop waiting; should the group come about later, it is left again.
    """
    return call_in_thread(
        lambda: Communicator(uid, rank, size, ordinal), check, undo=lambda late: late.close()
    )


class NcclSender:
    """The trainer's end: rank 0."""

    def __init__(self, destinations: Sequence[Destination], device: Any, timeout_s: float):
        """Args: device: the JAX device that broadcasts. timeout_s: for a worker to join."""
        self._first_workers = first_workers(destinations)
        self._size = 1 + sum(destination.num_workers for destination in destinations)
        self._uid, self._device, self._timeout_s = unique_id(), device, timeout_s
        self._communicator: Communicator | None = None

    def links(self) -> list[dict[str, Any] | None]:
        """See `Sender.links`."""
        return [
            {
                "uid": self._uid,
                "size": self._size,
                "first_rank": 1 + first,
                "timeout_s": self._timeout_s,
            }
            for first in self._first_workers
        ]

    def connect(self, check: Callable[[], None]) -> None:
        """See `Sender.connect`. Returns when all workers have joined, which they must do at the same time."""
        ordinal = self._device.local_hardware_id
        self._communicator = join(self._uid, 0, self._size, ordinal, check)

    def reset(self, check: Callable[[], None]) -> None:
        """Nothing to reset: broadcasts keep no count."""

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """See `Sender.send`."""
        assert self._communicator is not None, "connect comes before send"
        for flat in buckets:
            poll(flat.is_ready, check)
            (data,) = (shard.data for shard in flat.addressable_shards if shard.device == self._device)
            self._communicator.broadcast(data.unsafe_buffer_pointer(), data.nbytes)
            self._communicator.synchronize(check)
            del flat, data  # before the next one is made

    def give_up(self) -> None:
        """See `Sender.give_up`. Workers notice by their own deadline."""
        self.close()

    def close(self) -> None:
        """See `Sender.close`."""
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None


class NcclReceiver:
    """The end of one engine worker."""

    def __init__(self, link: dict[str, Any], rank: int, device: Any):
        import torch

        torch.zeros(1, device=device)
        self._device = device
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        check = deadline_check(link["timeout_s"], "trainer and engines did not all join NCCL's group")
        self._communicator = join(link["uid"], link["first_rank"] + rank, link["size"], ordinal, check)

    def buckets(self, layout: Layout, check: Callable[[], None]) -> Iterator[tuple[Any, Callable[[], None]]]:
        """As `IpcReceiver.buckets`, but NCCL waits on the GPU: a bucket is there when the device gets to it.

        Whoever waits for the device gives up where `check` raises, and closes this. Buffers last one push.
        """
        import torch

        receive, load = torch.cuda.Stream(self._device), torch.cuda.current_stream()
        slots = [torch.empty(layout.bucket_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        received = [torch.cuda.Event() for _ in layout.buckets]
        loaded: list[Any] = []
        for number, pieces in enumerate(layout.buckets):
            check()
            self._request(number, slots, layout, receive, received, loaded)
            load.wait_event(received[number])
            # Released on the device: the broadcast into this slot waits for the event, and no host does.
            yield slots[number % 2][: bucket_size(pieces)], lambda: loaded.append(load.record_event())

    def _request(
        self,
        number: int,
        slots: list[Any],
        layout: Layout,
        receive: Any,
        received: list[Any],
        loaded: list[Any],
    ) -> None:
        """Puts on the stream the broadcasts up to bucket `number` + 1, as far as their slots are free."""
        last = min(number + 1, len(layout.buckets) - 1)
        for k in ([0] if number == 0 else []) + list(range(number + 1, last + 1)):
            if k >= 2:
                receive.wait_event(loaded[k - 2])
            self._communicator.broadcast(
                slots[k % 2].data_ptr(), bucket_size(layout.buckets[k]), receive.cuda_stream
            )
            receive.record_event(received[k])

    def close(self) -> None:
        self._communicator.close()
