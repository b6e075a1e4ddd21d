"""Every wait of a transport ends in time, and what was waited for is left behind in order."""

import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from grpo_jax.weight_sync import Destination, WeightSyncError, cuda, ipc, nccl, wire
from grpo_jax.weight_sync.host import HostSender
from grpo_jax.weight_sync.wire import Layout, Mailbox, Piece, Relay, call_in_thread, deadline_check

LAYOUT = Layout("float32", {"w": (4, 256)}, ((Piece("w", 0, 4, 0, 4096),),), (4096,))

# Calls of a library that cannot be told to stop


def test_a_call_in_a_thread_returns_or_raises_as_it_would_here():
    patient = deadline_check(60, "this test")
    assert call_in_thread(lambda: 7, patient) == 7
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 // 0, patient)


def test_a_call_that_returns_after_it_was_given_up_is_undone():
    let_go, undone = threading.Event(), threading.Event()
    results = []

    def undo(result):
        results.append(result)
        undone.set()

    with pytest.raises(WeightSyncError, match=r"nothing came within 0\.2 s"):
        call_in_thread(lambda: let_go.wait(60) and "late", deadline_check(0.2, "nothing came"), undo=undo)
    let_go.set()
    assert undone.wait(60) and results == ["late"]


# NCCL's group

NOBODY_JOINS = """
    import threading
    from types import SimpleNamespace

    from grpo_jax.weight_sync import nccl
    from grpo_jax.weight_sync.wire import deadline_check

    nccl.unique_id = lambda: "an id"
    nccl.Communicator = lambda *args: threading.Event().wait()  # as ncclCommInitRank where a rank is missing
    client = SimpleNamespace(process_index=lambda: 0)
    device = SimpleNamespace(local_hardware_id=0, process_index=0, client=client)
    sender = nccl.NcclSender([], [device], 60.0)
    try:
        sender.connect(deadline_check(0.3, "an engine did not join"))
    except Exception as error:
        print(error, flush=True)
    sender.close()
"""


def test_a_group_that_does_not_come_about_holds_up_neither_the_run_nor_its_end():
    """No GPU: NCCL's call is replaced by one that never returns. The process has to end by itself."""
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NOBODY_JOINS)], capture_output=True, text=True, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "an engine did not join within 0.3 s\n"), result.stderr


class LateCommunicator:
    """Its group comes about after a second."""

    closed = threading.Event()

    def __init__(self, *args):
        time.sleep(1.0)

    def close(self):
        self.closed.set()


def test_a_group_that_comes_about_too_late_is_left_again(monkeypatch):
    monkeypatch.setattr(nccl, "Communicator", LateCommunicator)
    with pytest.raises(WeightSyncError, match="did not join within"):
        nccl.join("an id", 0, 2, 0, deadline_check(0.2, "an engine did not join"))
    assert LateCommunicator.closed.wait(60)


# Through shared memory


@pytest.fixture
def mailbox():
    mailbox = Mailbox.create(1, 2, 4096)
    yield mailbox
    mailbox.close()


def test_readers_are_told_that_a_push_was_given_up(mailbox):
    """They have minutes otherwise, in which their engine does nothing."""
    reader = Mailbox(**mailbox.address, create=False)
    mailbox.publish(0)
    reader.wait_readable(0, deadline_check(60, "nothing came"))
    mailbox.give_up()
    for bucket in (0, 1):
        with pytest.raises(WeightSyncError, match="gave this push up"):
            reader.wait_readable(bucket, deadline_check(60, "nothing came"))
    reader.close()


def test_counters_and_bytes_are_seen_in_their_order(mailbox, monkeypatch):
    """What a barrier does only ARM can show; here: it stands before a counter is written and after it is read."""
    seen = []
    monkeypatch.setattr(wire, "fence", lambda: seen.append(list(mailbox._counts)))
    check = deadline_check(60, "nothing came")
    mailbox.publish(0)
    mailbox.wait_readable(0, check)
    mailbox.release(0, 0)
    mailbox.wait_writable(2, check)
    assert seen == [[0, 0], [1, 0], [1, 0], [1, 1]]


class HungArray:
    """A bucket of a device that no longer answers."""

    def is_ready(self):
        return False

    def __array__(self, dtype=None, copy=None):
        threading.Event().wait()


def engine_elsewhere(relay=lambda number, bucket: None):
    return Destination(1, Relay(lambda: None, relay))


def test_a_device_that_hangs_is_not_waited_for_by_the_host_transport():
    sender = HostSender(LAYOUT, [Destination(1)])
    with pytest.raises(WeightSyncError, match=r"the push was not over within 0\.3 s"):
        sender.send(iter([HungArray()]), deadline_check(0.3, "the push was not over"))
    sender.close()


def test_an_object_store_that_is_full_is_not_waited_for(monkeypatch):
    """Ray's `put` waits for room, for as long as it takes."""
    import numpy as np

    full = SimpleNamespace(put=lambda value: threading.Event().wait())
    monkeypatch.setitem(sys.modules, "ray", full)
    sender = HostSender(LAYOUT, [engine_elsewhere()])
    with pytest.raises(WeightSyncError, match=r"the push was not over within 0\.3 s"):
        sender.send(iter([np.zeros(1024, np.float32)]), deadline_check(0.3, "the push was not over"))


# On a GPU that is not here


class Buffers:
    """Memory of two GPUs, the second of which has none."""

    def __init__(self):
        self.held = set()

    def __call__(self, ordinal, num_bytes):
        if ordinal == 1:
            raise cuda.CudaError("cuMemAlloc_v2: out of memory (2)")
        self.held.add(ordinal)
        return SimpleNamespace(close=lambda: self.held.discard(ordinal), copy_from=self.copy_from)

    def copy_from(self, pointer, num_bytes, offset, check):
        raise AssertionError("the array was not ready")


def test_a_sender_that_cannot_be_made_leaves_no_memory_taken(monkeypatch):
    buffers = Buffers()
    monkeypatch.setattr(ipc.cuda, "SharedBuffer", buffers)
    with pytest.raises(cuda.CudaError):
        ipc.IpcSender(LAYOUT, [0, 1], [])
    assert buffers.held == set()
    monkeypatch.setattr(Mailbox, "create", lambda *args: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        ipc.IpcSender(LAYOUT, [0], [])
    assert buffers.held == set()


def test_a_device_that_hangs_is_not_waited_for_on_the_way_to_a_slot(monkeypatch):
    monkeypatch.setattr(ipc.cuda, "SharedBuffer", Buffers())
    sender = ipc.IpcSender(LAYOUT, [0], [engine_elsewhere()])
    with pytest.raises(WeightSyncError, match=r"the push was not over within 0\.3 s"):
        sender.send(iter([HungArray()]), deadline_check(0.3, "the push was not over"))
    sender.close()


class Driver:
    """A stream of a GPU that is idle at the third look, or never."""

    def __init__(self, codes):
        self._codes, self.last = iter(codes), 0

    def cuStreamQuery(self, stream):
        self.last = next(self._codes, self.last)
        return self.last

    def cuGetErrorString(self, code, text):
        text._obj.value = b"an illegal memory access"


def test_a_stream_is_waited_for_until_it_is_idle_fails_or_time_is_up(monkeypatch):
    patient = deadline_check(60, "nothing came")
    driver = Driver([600, 600, 0])
    monkeypatch.setattr(cuda, "_library", lambda: driver)
    cuda.wait_for_stream(None, patient)
    assert driver.last == 0
    driver = Driver([600, 700])
    with pytest.raises(cuda.CudaError, match="an illegal memory access"):
        cuda.wait_for_stream(None, patient)
    driver = Driver([600])
    driver.last = 600
    with pytest.raises(WeightSyncError, match=r"the push was not over within 0\.3 s"):
        cuda.wait_for_stream(None, deadline_check(0.3, "the push was not over"))
