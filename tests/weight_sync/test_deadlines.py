"""Every wait of a transport ends in time, and what was waited for is left behind in order."""

import subprocess
import sys
import textwrap
import threading
import time

import pytest

from grpo_jax.weight_sync import WeightSyncError, nccl
from grpo_jax.weight_sync.wire import call_in_thread, deadline_check

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
    sender = nccl.NcclSender([], SimpleNamespace(local_hardware_id=0), 60.0)
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
