"""Both ends of the transport to engines on other GPUs: NCCL broadcasts, from several of the trainer's devices.

Each sender broadcasts its part of every bucket, in a group of NCCL that it has with all workers of all engines. So
no device of the trainer gathers a whole bucket, and all their links carry it. The trainer packs bucket k + 1 while
bucket k is on its way, and a receiver loads bucket k while the next one arrives in the other of its two buffers.

NCCL is called through ctypes, with the library that JAX's or PyTorch's wheels bring along, so that the trainer
needs no PyTorch. Both ends must find the same major version of NCCL.
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
    """The end of one of the trainer's processes: rank 0 in the group of each sender that it has."""

    def __init__(
        self,
        destinations: Sequence[Destination],
        devices: Sequence[Any],
        timeout_s: float,
        uids: Sequence[str] = (),
    ):
        """Args:
        destinations: all engines.
        devices: all JAX devices that send, those of other processes too.
        timeout_s: for a worker to join.
        uids: of the senders' groups; none: this is the first process, which makes them.
        """
        self._first_workers = first_workers(destinations)
        self._size = 1 + sum(destination.num_workers for destination in destinations)
        self._timeout_s, self.uids = timeout_s, list(uids) or [unique_id() for _ in devices]
        self._own = [
            (device, uid)
            for device, uid in zip(devices, self.uids, strict=True)
            if device.process_index == device.client.process_index()
        ]
        self._groups: dict[Any, Communicator] = {}

    def links(self) -> list[dict[str, Any] | None]:
        """See `Sender.links`."""
        return [
            {
                "uids": self.uids,
                "size": self._size,
                "first_rank": 1 + first,
                "timeout_s": self._timeout_s,
            }
            for first in self._first_workers
        ]

    def connect(self, check: Callable[[], None]) -> None:
        """See `Sender.connect`. Returns when all workers have joined, which they must do at the same time.

        They join one group after the other, in the order of the senders.
        """
        for device, uid in self._own:
            self._groups[device] = join(uid, 0, self._size, device.local_hardware_id, check)

    def reset(self, check: Callable[[], None]) -> None:
        """Nothing to reset: broadcasts keep no count."""

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """See `Sender.send`. Takes the next bucket while the one before is on its way: there are two at a time."""
        assert len(self._groups) == len(self._own), "connect comes before send"
        on_its_way = None
        for flat in buckets:
            poll(flat.is_ready, check)
            self._wait(check)
            on_its_way = flat  # the one before may go now
            for shard in flat.addressable_shards:
                if shard.device in self._groups:
                    self._groups[shard.device].broadcast(
                        shard.data.unsafe_buffer_pointer(), shard.data.nbytes
                    )
        self._wait(check)
        del on_its_way

    def _wait(self, check: Callable[[], None]) -> None:
        for group in self._groups.values():
            group.synchronize(check)

    def give_up(self) -> None:
        """See `Sender.give_up`. Workers notice by their own deadline."""
        self.close()

    def close(self) -> None:
        """See `Sender.close`."""
        while self._groups:
            self._groups.popitem()[1].close()


class NcclReceiver:
    """The end of one engine worker."""

    def __init__(self, link: dict[str, Any], rank: int, device: Any):
        import torch

        torch.zeros(1, device=device)
        self._device = device
        ordinal = torch.cuda.current_device() if device.index is None else device.index
        check = deadline_check(link["timeout_s"], "trainer and engines did not all join NCCL's groups")
        self._groups: list[Communicator] = []
        try:
            for uid in link["uids"]:
                self._groups.append(join(uid, link["first_rank"] + rank, link["size"], ordinal, check))
        except BaseException:
            self.close()
            raise

    def buckets(self, layout: Layout, check: Callable[[], None]) -> Iterator[tuple[Any, Callable[[], None]]]:
        """As `IpcReceiver.buckets`, but NCCL waits on the GPU: a bucket is there when the device gets to it.

        Whoever waits for the device gives up where `check` raises, and closes this. Buffers last one push.
        """
        import torch

        streams = [torch.cuda.Stream(self._device) for _ in self._groups]
        load = torch.cuda.current_stream()
        slots = [torch.empty(layout.bucket_bytes, dtype=torch.uint8, device=self._device) for _ in range(2)]
        received: list[list[Any]] = []
        loaded: list[Any] = []
        for number, num_bytes in enumerate(layout.sizes):
            check()
            for k in range(len(received), min(number + 2, len(layout.sizes))):
                parts = slots[k % 2][: layout.sizes[k]].chunk(len(self._groups))
                received.append(self._request(parts, streams, loaded[k - 2] if k >= 2 else None))
            for event in received[number]:
                load.wait_event(event)
            # Released on the device: the broadcasts into this slot wait for the event, and no host does.
            yield slots[number % 2][:num_bytes], lambda: loaded.append(load.record_event())

    def _request(self, parts: Sequence[Any], streams: Sequence[Any], is_free: Any) -> list[Any]:
        """Puts the broadcasts of a bucket on the streams. Args: is_free: the event after which they may begin."""
        events = []
        for part, stream, group in zip(parts, streams, self._groups, strict=True):
            if is_free is not None:
                stream.wait_event(is_free)
            group.broadcast(part.data_ptr(), part.nbytes, stream.cuda_stream)
            events.append(stream.record_event())
        return events

    def close(self) -> None:
        while self._groups:
            self._groups.pop().close()
