"""The processes of an engine, on their own host: which they are, and their end. Linux's /proc; no Ray, no vLLM."""

import contextlib
import os
import signal
import time
from pathlib import Path

GONE_S = 10.0  # for killed processes to be gone


def family(pid: int) -> dict[int, int]:
    """Returns a process and its descendants, each with the time of its start.

    The time, in ticks since the host's start, tells a process from a later one with the same number.
    """
    every = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    known = {number: about for number in every if (about := _stat(number))}
    found: dict[int, int] = {}
    parents = {pid} & known.keys()
    while parents:
        found.update({number: known[number][1] for number in parents})
        parents = {number for number, about in known.items() if about[0] in parents} - found.keys()
    return found


def are_gone(processes: dict[int, int]) -> bool:
    """True where none of a `family` runs any more."""
    return not any(_runs(pid, start) for pid, start in processes.items())


def end(processes: dict[int, int]) -> None:
    """Kills what is left of a `family`, and waits until it is gone, at most `GONE_S`."""
    for pid, start in processes.items():
        if _runs(pid, start):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
    limit = time.monotonic() + GONE_S
    while not are_gone(processes) and time.monotonic() < limit:
        time.sleep(0.02)


def _runs(pid: int, start: int) -> bool:
    about = _stat(pid)
    return about is not None and about[1] == start


def _stat(pid: int) -> tuple[int, int] | None:
    """(number of the parent, time of the start) of a process; None where it is gone or has ended."""
    try:
        # The name of the program, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else (int(fields[1]), int(fields[19]))
