"""What looks after a run that stands still: it says in which phase and where, and ends it.

Waits for engines, rewards and pushes have limits of their own, shorter than this one. It is for the rest: a device
that never answers, a file system that hangs, user code in the trainer's own process.
"""

import faulthandler
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from grpo_jax.rollout.vllm.processes import family
from grpo_jax.run.metrics import Timers

logger = logging.getLogger(__name__)

LOOK_S = 1.0
END_S = 600.0
"""For a run that was told to end: to save its last whole step, and to close what it has opened."""
PY_SPY_S = 20.0


class PhaseTimedOut(RuntimeError):
    """A phase has taken longer than `trainer.phase_timeout_s`; raised in the main thread, wherever that is."""


class HangWatch:
    """A thread that compares the running phase with its limit. `close` it at the end."""

    def __init__(self, timers: Timers, folder: Path, limit_s: float):
        """Args: folder: for the report; limit_s: for one phase, seconds; 0: no limit, and no thread."""
        self._timers, self._folder, self._limit_s = timers, folder, limit_s
        self._is_closed = threading.Event()
        if not limit_s:
            return
        self._main = threading.main_thread().ident
        self._old = signal.signal(signal.SIGALRM, self._on_alarm)
        self._thread = threading.Thread(target=self._look, daemon=True, name="hang watch")
        self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        if self._limit_s:
            self._thread.join(LOOK_S + 1)
            signal.signal(signal.SIGALRM, self._old)

    def _look(self) -> None:
        while not self._is_closed.wait(min(LOOK_S, self._limit_s / 4)):
            phase, since = self._timers.running
            taken = time.monotonic() - since
            if taken > self._limit_s:
                self._end(phase, taken)
                return

    def _end(self, phase: str, taken: float) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        report = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{phase}.txt"
        with report.open("w") as file:
            write_report(file, f"phase {phase} has taken {taken:.0f} s, of at most {self._limit_s:g}")
        text = f"has taken {taken:.0f} s (trainer.phase_timeout_s={self._limit_s:g}); where all threads and"
        self._message = f"{text} processes of the run were then: {report}"
        assert self._main is not None
        signal.pthread_kill(self._main, signal.SIGALRM)
        if not self._is_closed.wait(END_S):
            # The main thread is where no signal reaches it.
            text = f"error: phase {phase}: {self._message}; it cannot be ended in order"
            print(text, file=sys.stderr, flush=True)
            os._exit(1)

    def _on_alarm(self, number: int, frame: Any) -> None:
        raise PhaseTimedOut(self._message)


def write_report(file: TextIO, head: str) -> None:
    """Writes `head`, the stacks of this process's threads, and what its children do."""
    file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {head}\n\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    py_spy = shutil.which("py-spy")
    for pid in family(os.getpid()).keys() - {os.getpid()}:
        file.write(f"\nprocess {pid}: {_about(pid)}\n")
        file.flush()
        if py_spy:
            command = [py_spy, "dump", "--pid", str(pid)]
            try:
                subprocess.run(command, stdout=file, stderr=subprocess.DEVNULL, timeout=PY_SPY_S, check=False)
            except subprocess.TimeoutExpired:
                file.write("py-spy gave no answer\n")
    if not py_spy:
        file.write("\nWith py-spy installed, the stacks of these processes would stand here too.\n")


def _about(pid: int) -> str:
    folder = Path("/proc") / str(pid)
    try:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        waits = (folder / "wchan").read_text(errors="replace").strip("0\n") or "nothing"
    except OSError:
        return "has ended"
    return f"{command[:300]}\n  state {state}, waits in the kernel for {waits}"
