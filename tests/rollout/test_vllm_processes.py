"""Which processes an engine consists of, and their end."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from grpo_jax.rollout.vllm import processes

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


@pytest.fixture
def parent():
    """(a process, the number of its child)"""
    process = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process, child
    for pid in (process.pid, child):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_children_outlive_a_parent_that_was_killed_and_are_ended(parent):
    process, child = parent
    family = processes.family(process.pid)
    assert set(family) == {process.pid, child} and next(iter(family)) == process.pid
    process.kill()
    process.wait()
    assert not processes.are_gone(family)  # the child is left
    begin = time.monotonic()
    processes.end(family)
    assert processes.are_gone(family) and time.monotonic() - begin < processes.GONE_S


def test_another_process_of_the_same_number_is_left_alone(parent):
    process, child = parent
    earlier = {pid: start - 1 for pid, start in processes.family(process.pid).items()}
    processes.end(earlier)
    assert set(processes.family(process.pid)) == {process.pid, child}


def test_a_process_that_is_gone_has_no_family(parent):
    process, _ = parent
    process.kill()
    process.wait()
    assert processes.family(process.pid) == {}
