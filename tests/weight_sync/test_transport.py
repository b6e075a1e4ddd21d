"""Which way weights go, and the way through the host's memory from end to end."""

import contextlib
import dataclasses
import itertools
import os
import sys
import types
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from weight_sync_helpers import bits, mesh_of, raw, unpack

from grpo_jax.config import ConfigError
from grpo_jax.weight_sync import Destination, WeightSyncError, choose_transport, ipc, make_sender, nccl
from grpo_jax.weight_sync.buckets import make_push_plan, pack_buckets
from grpo_jax.weight_sync.host import HostReceiver, HostSender
from grpo_jax.weight_sync.wire import Relay, deadline_check

SHARED_MEMORY = Path("/dev/shm")
SPLIT = 24_576  # six blocks of 4,096 bytes: less than a layer of these models


# Which one

PLACEMENTS = {"ipc": "colocated", "nccl": "separate"}  # other combinations are refused with the configuration
ELSEWHERE = [("cpu", False), ("cpu", True), ("tpu", False), ("tpu", True), ("gpu", False)]


@pytest.mark.parametrize(
    ("weight_sync", "placement", "expected"),
    [
        ("auto", "colocated", "ipc"),
        ("auto", "separate", "nccl"),
        ("ipc", "colocated", "ipc"),
        ("nccl", "separate", "nccl"),
        ("host", "colocated", "host"),
        ("host", "separate", "host"),
    ],
)
def test_transport_between_gpus(rollout_section, weight_sync, placement, expected):
    section = rollout_section(weight_sync=weight_sync, placement=placement)
    assert choose_transport(section, trainer="gpu", engine_on_gpu=True) == expected


@pytest.mark.parametrize(("trainer", "engine_on_gpu"), ELSEWHERE)
@pytest.mark.parametrize("placement", ["colocated", "separate"])
def test_where_one_end_is_on_no_gpu_everything_goes_through_the_host(
    rollout_section, trainer, engine_on_gpu, placement
):
    for weight_sync in ("auto", "host"):
        section = rollout_section(weight_sync=weight_sync, placement=placement)
        assert choose_transport(section, trainer=trainer, engine_on_gpu=engine_on_gpu) == "host"


@pytest.mark.parametrize(("trainer", "engine_on_gpu"), ELSEWHERE)
@pytest.mark.parametrize("weight_sync", ["ipc", "nccl"])
def test_a_way_between_gpus_is_refused_where_there_are_none(
    rollout_section, trainer, engine_on_gpu, weight_sync
):
    section = rollout_section(weight_sync=weight_sync, placement=PLACEMENTS[weight_sync])
    with pytest.raises(ConfigError, match=rf"rollout\.weight_sync='{weight_sync}': needs.*host or auto"):
        choose_transport(section, trainer=trainer, engine_on_gpu=engine_on_gpu)


# Through the host's memory


def local_engine(num_workers):
    """A destination on this host: nothing may be relayed to it."""
    return Destination(num_workers)


def relay_nothing(*args):
    raise AssertionError("nothing is relayed on the trainer's own host")


def remote_engine(relay, prepare_relay=lambda: None):
    """A destination on another host, of one worker."""
    return Destination(1, Relay(prepare_relay, relay))


@pytest.fixture
def patient():
    return deadline_check(60, "the other end of this test did nothing")


@pytest.fixture
def opened():
    """Returns `opened(end)`, the end itself; it is closed whatever becomes of the test."""
    with contextlib.ExitStack() as stack:

        def later(end):
            stack.callback(end.close)
            return end

        yield later


def receive(receiver, layout, check):
    """The buckets as one worker reads them, copied out before each is given back."""
    taken = []
    for number, (bucket, release) in enumerate(receiver.buckets(layout, check)):
        assert bucket.dtype == torch.uint8 and len(bucket) == layout.sizes[number]
        typed = bucket.view(
            getattr(torch, layout.dtype)
        ).clone()  # as the receiver of vLLM's workers reads it
        release()
        taken.append(np.frombuffer(bits(typed), np.uint8))
    return taken


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_workers_get_every_push_whole(models, opened, patient, dtype):
    model, mesh = models("qwen2-untied"), mesh_of(2, 2, 2)
    config = dataclasses.replace(model.config, dtype=np.dtype(getattr(jax.numpy, dtype)))
    plan = make_push_plan(config, SPLIT)
    sender = opened(make_sender("host", plan.layout, mesh, [local_engine(1), local_engine(1)], timeout_s=60))
    assert isinstance(sender, HostSender)
    receivers = [opened(HostReceiver(link, 0, torch.device("cpu"))) for link in sender.links()]
    sender.connect(patient)
    params = model.params(2, 2, 2)
    with ThreadPoolExecutor(2) as pool:
        for scale in (1.0, 2.0):  # a power of two: exact in either type
            scaled = jax.tree.map(lambda x, scale=scale: x * scale, params)
            sender.reset(patient)
            readers = [pool.submit(receive, receiver, plan.layout, patient) for receiver in receivers]
            sender.send((flat for _, flat, _ in pack_buckets(scaled, plan, mesh)), patient)
            for reader in readers:
                got = unpack(plan.layout, reader.result())
                tensors = {name: (scale * t).to(getattr(torch, dtype)) for name, t in model.tensors.items()}
                assert got == {name: (tuple(t.shape), bits(t)) for name, t in tensors.items()}


def test_workers_of_one_replica_are_told_apart_by_their_ranks(models, opened, patient):
    """Tensor parallel: both open the same link. One of them alone does not free a slot."""
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    sender = opened(HostSender(plan.layout, [local_engine(2)]))
    (link,) = sender.links()
    receivers = [opened(HostReceiver(link, rank, torch.device("cpu"))) for rank in range(2)]
    waits = []
    with ThreadPoolExecutor(3) as pool:
        sending = pool.submit(sender.send, iter(flats), lambda: waits.append(1) or patient())
        first = pool.submit(receive, receivers[0], plan.layout, patient)
        while not waits:
            patient()
        assert not first.done() and not sending.done()
        second = receive(receivers[1], plan.layout, patient)
        for mine, other, flat in zip(first.result(), second, flats, strict=True):
            np.testing.assert_array_equal(mine, raw(flat))
            np.testing.assert_array_equal(other, raw(flat))
        sending.result()


def test_the_checks_of_either_end_are_heard(models, opened):
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    sender = opened(HostSender(plan.layout, [local_engine(1)]))
    receiver = opened(HostReceiver(sender.links()[0], 0, torch.device("cpu")))
    with pytest.raises(WeightSyncError, match="nobody reads within"):
        sender.send(iter(flats), deadline_check(0.05, "nobody reads"))
    sender.reset(deadline_check(60, "nothing to wait for"))
    with pytest.raises(WeightSyncError, match="nobody writes within"):
        receive(receiver, plan.layout, deadline_check(0.05, "nobody writes"))


def test_a_bucket_is_let_go_before_the_next_one_is_packed(models, opened, patient):
    """`Mailbox.send` deletes it for that; on a TPU it would be device memory."""
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    packed: list[weakref.ref] = []

    class Flat:
        def __init__(self, array):
            self.array = array

        def __array__(self, dtype=None, copy=None):
            return np.array(self.array)

    def buckets():
        for array in flats:
            held.append([ref() for ref in packed if ref() is not None])
            flat = Flat(array)
            packed.append(weakref.ref(flat))
            yield flat
            del flat

    held: list[list] = []
    sender = opened(HostSender(plan.layout, [local_engine(1)]))
    receiver = opened(HostReceiver(sender.links()[0], 0, torch.device("cpu")))
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(receive, receiver, plan.layout, patient)
        sender.send(buckets(), patient)
        reader.result()
    assert [len(alive) for alive in held] == [0] * len(flats)


# Between GPUs, without one: what the workers are told


class FakeBuffer:
    """Stands for memory of a GPU."""

    def __init__(self, ordinal, num_bytes):
        self.handle = f"{num_bytes} bytes of GPU {ordinal}"

    def close(self):
        pass


def test_workers_read_their_own_counters_and_the_memory_of_their_gpu(models, opened, patient, monkeypatch):
    layout = models("qwen2-tied").push(SPLIT)[0].layout
    monkeypatch.setattr(ipc.cuda, "SharedBuffer", FakeBuffer)
    monkeypatch.setattr(ipc.cuda, "device_uuid", lambda ordinal: f"uuid-{ordinal}")
    sender = opened(ipc.IpcSender(layout, [0, 1], [local_engine(2), local_engine(1)]))
    first, second = sender.links()
    assert (first["first_reader"], second["first_reader"]) == (0, 2)
    size = 2 * layout.bucket_bytes
    handles = {f"uuid-{n}": f"{size} bytes of GPU {n}" for n in (0, 1)}
    for link in (first, second):
        assert link["handles"] == handles and link["slot_bytes"] == layout.bucket_bytes
        assert (link["mailbox"]["num_readers"], link["mailbox"]["slot_bytes"]) == (3, 0)
    sender.connect(patient)
    assert Path(first["mailbox"]["path"]).exists()
    sender.reset(patient)  # by now all have it open
    assert not Path(first["mailbox"]["path"]).exists()


@dataclasses.dataclass(frozen=True, eq=False)
class FakeDevice:
    """Stands for a GPU of a process."""

    process_index: int
    local_hardware_id: int
    client: SimpleNamespace


def test_workers_join_the_groups_after_the_trainer(patient, monkeypatch):
    """One group for each device that sends, whichever process has it: the first process makes them all."""
    ids = map("group {}".format, itertools.count())
    monkeypatch.setattr(nccl, "unique_id", lambda: next(ids))
    joined = []
    monkeypatch.setattr(nccl, "join", lambda *args: joined.append(args[:4]) or SimpleNamespace(close=list))

    client = SimpleNamespace(process_index=lambda: here)  # which of them is under test
    devices = [FakeDevice(0, 0, client), FakeDevice(0, 1, client), FakeDevice(1, 0, client)]
    engines = [local_engine(2), remote_engine(relay_nothing), local_engine(4)]
    here = 0
    first = nccl.NcclSender(engines, devices, 7.0)
    uids = ["group 0", "group 1", "group 2"]
    assert first.uids == uids and first.links() == [
        {"uids": uids, "size": 8, "first_rank": rank, "timeout_s": 7.0} for rank in (1, 3, 4)
    ]
    here = 1
    second = nccl.NcclSender(engines, devices, 7.0, first.uids)
    first.connect(patient)
    assert joined == [("group 0", 0, 8, 0), ("group 1", 0, 8, 1)]
    joined.clear()
    second.connect(patient)
    assert joined == [("group 2", 0, 8, 0)]
    first.close()
    second.close()


# To other hosts


class FakeRay(types.ModuleType):
    """As much of Ray as a sender needs: an object is its own reference, a call has been made when it is."""

    def __init__(self):
        super().__init__("ray")
        self.put = lambda value: value
        self.wait = lambda calls, timeout: (calls[:1], calls[1:])

    def get(self, calls, timeout):
        for call in calls:
            if isinstance(call, Exception):
                raise call


def test_buckets_go_to_relays_and_to_workers_here_alike(models, opened, patient, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    relayed = [[], []]

    def relay_to(number_of_engine):
        return lambda number, bucket: relayed[number_of_engine].append((number, raw(bucket)))

    engines = [remote_engine(relay_to(0)), local_engine(1), remote_engine(relay_to(1))]
    sender = opened(HostSender(plan.layout, engines))
    first, link, last = sender.links()
    assert first is None and last is None
    receiver = opened(HostReceiver(link, 0, torch.device("cpu")))
    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(receive, receiver, plan.layout, patient)
        sender.send(iter(flats), patient)
        local = reader.result()
    for calls in relayed:
        assert [number for number, _ in calls] == list(range(len(flats)))
        for (_, got), mine, flat in zip(calls, local, flats, strict=True):
            np.testing.assert_array_equal(got, raw(flat))
            np.testing.assert_array_equal(mine, raw(flat))


def test_without_a_worker_on_this_host_there_is_no_shared_memory(models, opened, patient, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    relayed, prepared = [], []
    before = set(SHARED_MEMORY.iterdir())
    engine = remote_engine(
        lambda number, bucket: relayed.append(raw(bucket)), lambda: prepared.append(len(relayed))
    )
    sender = opened(HostSender(plan.layout, [engine]))
    assert not [file for file in set(SHARED_MEMORY.iterdir()) - before if str(os.getpid()) in file.name]
    sender.reset(patient)
    assert prepared == [0]  # before the first bucket
    sender.send(iter(flats), patient)
    for got, flat in zip(relayed, flats, strict=True):
        np.testing.assert_array_equal(got, raw(flat))


def test_what_a_relay_raises_reaches_the_trainer(models, opened, patient, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", FakeRay())
    plan, flats, _ = models("qwen2-tied").push(SPLIT)
    gone = WeightSyncError("the host is gone")
    sender = opened(HostSender(plan.layout, [remote_engine(lambda number, bucket: gone)]))
    with pytest.raises(WeightSyncError, match="the host is gone"):
        sender.send(iter(flats), patient)
    sender = opened(HostSender(plan.layout, [remote_engine(lambda number, bucket: None, lambda: gone)]))
    with pytest.raises(WeightSyncError, match="the host is gone"):
        sender.reset(patient)


def test_nothing_is_left_in_shared_memory_once_all_are_connected(models, opened, patient):
    """However the processes end: at the first push the workers have the mailbox open, and its name goes."""
    layout = models("qwen2-tied").push(SPLIT)[0].layout
    sender = opened(HostSender(layout, [local_engine(1)]))
    (link,) = sender.links()
    path = Path(link["mailbox"]["path"])
    opened(HostReceiver(link, 0, torch.device("cpu")))
    assert path.exists()
    sender.connect(patient)
    sender.reset(patient)
    assert not path.exists()
