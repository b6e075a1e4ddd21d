"""Ends reward workers with all that their functions started: `python -m grpo_jax.rewards.keeper PARENT MARKER`.

Killing a worker's process group misses children with a session of their own, and a trainer that is killed with
SIGKILL kills nobody. So each worker has a marker in its environment, which whatever it starts inherits, and a
keeper beside the trainer waits until the trainer is gone, then ends everything that has one.

Not `prctl(PR_SET_PDEATHSIG)`: it fires when the *thread* that started the worker ends, and the worker's own
children would stay. Not `PR_SET_CHILD_SUBREAPER`: nobody would reap what the worker inherits.

Standard library only, as `worker.py`. Without /proc (macOS) process groups are all there is.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable

VARIABLE = "GRPO_JAX_REWARD_WORKER"
"""Of the environment; its value begins with the marker."""
LOOK_S = 0.5
"""Seconds between two looks whether the trainer is there."""
END_S = 5.0
"""Seconds after which `end_family` looks for no more processes: some start new ones faster than it finds them."""
START_S = 1.0
"""In which a process that has just been started has its environment."""
PROC = "/proc"
KERNEL_THREAD, ENVIRONMENT_END = 0x00200000, 48
"""PF_KTHREAD, of a process's flags; and a field of its stat, counted from 0 behind the name (proc(5))."""


def main(parent: int, marker: str) -> None:
    """Waits until the process `parent`, which started this one, is gone; then ends the family of `marker`."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # systemd and Slurm send them to every process of a job
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    for _ in range(4):  # a worker that was just being started has its environment a moment later
        end_family(marker)
        time.sleep(LOOK_S)


def end_family(marker: str, roots: Iterable[int] = ()) -> None:
    """Kills the processes whose `VARIABLE` begins with `marker`, `roots`, and all that descend from them.

    Descendants without the variable, whose environment was cleared, are found through their parents. They are
    all stopped first, so that none is born or loses its parent meanwhile.

    Args: roots: process ids, not yet waited for: others may have been given to strangers.
    """
    _wait_for_starts()
    roots, found, end = set(roots), set[int](), time.monotonic() + END_S
    while new := _family(marker, roots) - found:
        for pid in new:
            _send(pid, signal.SIGSTOP)
        found |= new
        if time.monotonic() > end:
            break
    for pid in found:
        _send(pid, signal.SIGKILL)


def _wait_for_starts() -> None:
    """Waits for processes that are being started.

    Linux shows their environment a moment after whoever started one has gone on: and may have ended.
    """
    end = time.monotonic() + START_S
    waiting = {pid for pid in _all_processes() if _is_starting(pid)}
    while waiting and time.monotonic() < end:
        time.sleep(0.001)
        waiting = set(filter(_is_starting, waiting))


def _is_starting(pid: int) -> bool:
    """Whether Linux does not know yet where a process's environment ends, be that empty or not."""
    try:
        fields = _fields(pid)
        is_there = fields[0] not in b"ZX" and not int(fields[6]) & KERNEL_THREAD
        # Of another user's processes it is not told; they cannot be read.
        return is_there and int(fields[ENVIRONMENT_END]) == 0 and _read(pid, "environ") == b""
    except (OSError, ValueError, IndexError):
        return False


def _family(marker: str, roots: set[int]) -> set[int]:
    family, children = set(roots), dict[int, list[int]]()
    for pid in _all_processes():
        try:
            state, parent = _fields(pid)[:2]
        except (OSError, ValueError):
            continue  # it has just ended
        children.setdefault(int(parent), []).append(pid)
        with contextlib.suppress(OSError):  # another user's
            if state not in b"ZX" and f"\0{VARIABLE}={marker}".encode() in b"\0" + _read(pid, "environ"):
                family.add(pid)
    waiting = list(family)
    while waiting:
        born = [child for child in children.get(waiting.pop(), ()) if child not in family]
        family.update(born)
        waiting += born
    return family - {os.getpid()}


def _all_processes() -> list[int]:
    try:
        return [int(name) for name in os.listdir(PROC) if name.isdigit()]
    except FileNotFoundError:
        return []


def _read(pid: int, name: str) -> bytes:
    with open(f"{PROC}/{pid}/{name}", "rb") as file:
        return file.read()


def _fields(pid: int) -> list[bytes]:
    """Of its stat, behind the name, which may hold anything."""
    return _read(pid, "stat").rpartition(b")")[2].split()


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
