"""Pushes that several processes make together: one is a thread here, and what an engine reads is real."""

import contextlib
import queue
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from weight_sync_helpers import bits, mesh_of, unpack

from grpo_jax.rollout.vllm.cargo import Cargo
from grpo_jax.rollout.vllm.crew import Crew, CrewSender, Member
from grpo_jax.weight_sync import Destination, make_sender, nccl
from grpo_jax.weight_sync.buckets import make_push_plan
from grpo_jax.weight_sync.host import HostReceiver
from grpo_jax.weight_sync.wire import deadline_check

SPLIT = 24_576  # several buckets, more than a mailbox has slots
END = {"task": "end"}


class Channel:
    """One of two processes, which hear from one another as by the hub: what one says, the other may take later."""

    count, address = 2, "here"

    def __init__(self, rank, given, said):
        self.rank, self._given, self._said = rank, given, said

    @property
    def is_called(self):
        return not self._given.empty()

    def from_first(self, make):
        if self.rank:
            return self._given.get(timeout=60)
        value = make()
        self._given.put(value)
        return value

    def from_all(self, value):
        self._said[self.rank].put(value)
        other = self._said[1 - self.rank].get(timeout=60)
        return [value, other] if self.rank == 0 else [other, value]


@pytest.fixture
def patient():
    return deadline_check(60, "what a test waits for did not come")


@pytest.fixture
def crew(models, rollout_section):
    """(the first process's `CrewSender`, Cargo, parameters, mesh, model). The other process has an engine."""
    model, mesh = models("qwen2-untied"), mesh_of(1, 1, 1)
    cargo = Cargo("push", make_push_plan(model.config, SPLIT), lambda params: params)
    params = model.params(1, 1, 1)
    with following(rollout_section(timeout_s=1000.0), cargo, params, mesh) as (channel, tell):
        own = make_sender("host", cargo.plan.layout, mesh, [], timeout_s=60)
        sender = CrewSender(Crew(channel, tell, is_spread=True), "host", "push", own, [[], [{}]])
        sender.links()  # opens the other one's
        yield sender, cargo, params, mesh, model
        sender.close()


@contextlib.contextmanager
def following(section, cargo, params, mesh):
    """(channel of the first process, its `tell`), while a thread is the second one."""
    given, said = queue.Queue(), [queue.Queue(), queue.Queue()]
    first, second = (Channel(rank, given, said) for rank in range(2))

    def follow():
        member = Member(second, section, lambda num_parts: [cargo], mesh)
        while (command := second.from_first(lambda: None)) != END:
            member(command, params)
        member.close()

    def tell(command):
        first.from_first(lambda: command)
        return True

    follower = threading.Thread(target=follow)
    follower.start()
    yield first, tell
    tell(END)
    follower.join()


def packed(cargo, params, mesh):
    return (flat for _, flat, _ in cargo.pack(params, mesh))


def take(receiver, cargo, patient):
    taken = []
    for bucket, release in receiver.buckets(cargo.plan.layout, patient):
        taken.append(np.frombuffer(bits(bucket), np.uint8).copy())
        release()
    return taken


class Group:
    """Stands for a group of NCCL, which needs GPUs: notes how many bytes are broadcast."""

    def __init__(self):
        self.sent = []

    def broadcast(self, pointer, num_bytes):
        self.sent.append(num_bytes)

    def synchronize(self, check):
        check()

    def close(self):
        pass


def test_all_processes_send_by_nccl_in_the_groups_of_the_first(models, rollout_section, monkeypatch, patient):
    """To an engine of two workers: one group for the one device there is, in which each process sends."""
    joined = []

    def join(*args):
        joined.append((*args[:4], Group()))
        return joined[-1][-1]

    monkeypatch.setattr(nccl, "unique_id", lambda: "an id")
    monkeypatch.setattr(nccl, "join", join)
    model, mesh = models("qwen2-untied"), mesh_of(1, 1, 1)
    cargo = Cargo("push", make_push_plan(model.config, SPLIT), lambda params: params)
    section = rollout_section(timeout_s=60.0, tensor_parallel_size=2)
    params = model.params(1, 1, 1)
    with following(section, cargo, params, mesh) as (channel, tell):
        own = make_sender("nccl", cargo.plan.layout, mesh, [Destination(2)], timeout_s=60)
        sender = CrewSender(Crew(channel, tell, is_spread=False), "nccl", "push", own, [[{}], []])
        assert sender.links() == [{"uids": ["an id"], "size": 3, "first_rank": 1, "timeout_s": 60}]
        sender.connect(patient)
        sender.reset(patient)
        sender.send(packed(cargo, params, mesh), patient)
        sender.close()
    assert [entry[:4] for entry in joined] == [("an id", 0, 3, 0)] * 2
    assert [group.sent for *_, group in joined] == [list(cargo.plan.layout.sizes)] * 2


def test_an_engine_that_dies_beside_another_process_is_known_there(crew, patient):
    """What the first process hears of the engine's call ends the wait of the process that sends to it."""
    sender, cargo, params, mesh, model = crew
    died = threading.Event()

    def check():
        patient()
        if died.is_set():
            raise ConnectionError("the engine is gone")

    threading.Timer(0.3, died.set).start()
    begin = time.monotonic()
    with pytest.raises(ConnectionError, match="the engine is gone"):
        sender.send(packed(cargo, params, mesh), check)
    assert 0.3 <= time.monotonic() - begin < 30
    # The next push comes through: nothing that was said in the last one is left over.
    sender.give_up()
    [link] = sender.links()
    receiver = HostReceiver(link, 0, torch.device("cpu"))
    sender.reset(patient)
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(take, receiver, cargo, patient)
        sender.send(packed(cargo, params, mesh), patient)
        assert unpack(cargo.plan.layout, taking.result()) == {
            name: (tuple(t.shape), bits(t)) for name, t in model.tensors.items()
        }
    receiver.close()
