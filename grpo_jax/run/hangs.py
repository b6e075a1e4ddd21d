"""What looks after a run that stands still: it says in which phase and where, and ends it.

Waits for engines, rewards and pushes have limits of their own, shorter than this one. It is for the rest: a device
that never answers, a file system that hangs, user code in the trainer's own process. docs/reliability.md has a
table of all waits.
"""

import contextlib
import faulthandler
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from grpo_jax.rollout.vllm.processes import family
from grpo_jax.run.metrics import Timers

PACKAGE = str(Path(__file__).parents[1])
STDERR = 2
"""Not `sys.stderr`, which may be no file."""

LOOK_S = 1.0
END_S = 600.0
"""For a run that was told to end: to save its last whole step, and to close what it has opened."""
REPORT_S = 60.0
"""For the stacks to be written, perhaps to the disk that hangs."""
SOON_S = 10.0
"""Within which most runs have ended; of others a line says that they are still at it."""
PY_SPY_S = 20.0
ASK_S = 10.0
"""For the processes of a run to find out which of them holds the others up."""
NOTICE_S, CLOSE_S = 5.0, 15.0
"""When another process of the run is gone: for the main thread to take notice, and then to close. All are to have
ended 30 s after that process."""


class PhaseTimedOut(BaseException):
    """A phase has taken longer than its limit; raised in the main thread, wherever that is.

    No `Exception`, so that nothing takes it for an error of its own.
    """

    code = 1
    """To exit with."""

    def __init__(self, phase: str, text: str):
        super().__init__(text)
        self.phase = phase
        self.is_told = False
        """Whether people have been told."""


class PeerLost(PhaseTimedOut):
    """Another process of the run has died, failed or stands still: this one cannot go on, and not save either."""

    def __init__(self, phase: str, text: str, code: int):
        super().__init__(phase, text)
        self.code = code


def hang_behind(error: BaseException | None) -> PhaseTimedOut | None:
    """The hang that an error comes from: C code in which it was raised may have made another error of it."""
    while error is not None and not isinstance(error, PhaseTimedOut):
        error = error.__cause__ or error.__context__
    return error


@contextlib.contextmanager
def watched(
    timers: Timers, folder: Path | None, limit_s: float, key: str = "trainer.phase_timeout_s"
) -> Iterator["HangWatch"]:
    """Looks after what is done within. Args: as `HangWatch`.

    Raises: SystemExit: 1, a phase has taken too long; one line on stderr says which.
    """
    watch = HangWatch(timers, folder, limit_s, key)
    try:
        yield watch
    except (Exception, PhaseTimedOut) as error:
        hang = hang_behind(error)
        if hang is None:
            raise
        if watch.is_heard():
            print(f"error: phase {hang.phase}: {hang}", file=sys.stderr)
            hang.is_told = True
        raise SystemExit(hang.code) from None
    finally:
        watch.close()


class HangWatch:
    """A thread that compares the running phase with its limit. `close` it at the end.

    The thread itself may be stopped, by a library that waits and lets no Python run. So it asks `faulthandler`,
    which needs none, to end the process in case that it does not ask again.
    """

    def __init__(
        self, timers: Timers, folder: Path | None, limit_s: float, key: str = "trainer.phase_timeout_s"
    ):
        """Args:
        folder: for the stacks; None: they go to stderr.
        limit_s: for one phase, seconds; 0: no limit, and no thread.
        key: that sets the limit.
        """
        self._timers, self._folder, self._limit_s, self._key = timers, folder, limit_s, key
        self.is_heard: Callable[[], bool] = lambda: True
        """Whether this process speaks for the run."""
        self.suffix = ""
        """Of the file with the stacks, where each process of a run writes one."""
        self.ask: Callable[[str], None] | None = None
        """Where the run has several processes: has the one found that holds the others up, and `end` called."""
        self._is_closed, self._is_ending = threading.Event(), threading.Event()
        self._is_noticed, self._lock = threading.Event(), threading.Lock()
        faulthandler.cancel_dump_traceback_later()  # of the command's start
        main = threading.main_thread().ident
        assert main is not None
        self._main = main
        self._old = signal.signal(signal.SIGALRM, self._on_alarm)
        self._thread = threading.Thread(target=self._look, daemon=True, name="hang watch")
        if limit_s:
            self._thread.start()

    def close(self) -> None:
        self._is_closed.set()
        if self._limit_s:
            self._thread.join(LOOK_S + 1)
            faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, self._old)

    def end(self, error: PhaseTimedOut, *, writes_stacks: bool = False) -> None:
        """Ends the run, from any thread: the error is raised in the main thread. Only the first call counts."""
        with self._lock:
            if self._is_ending.is_set() or self._is_closed.is_set():
                return
            self._is_ending.set()
        threading.Thread(target=self._end, args=(error, writes_stacks), daemon=True).start()

    def _look(self) -> None:
        while not self._is_closed.wait(min(LOOK_S, self._limit_s / 4)):
            faulthandler.dump_traceback_later(self._limit_s + END_S, exit=True, file=STDERR)
            phase, since = self._timers.running
            taken = time.monotonic() - since
            if taken > self._limit_s:
                self._overdue(phase, taken)
                return

    def _overdue(self, phase: str, taken: float) -> None:
        faulthandler.dump_traceback_later(REPORT_S + SOON_S + END_S, exit=True, file=STDERR)
        since = time.strftime("%H:%M:%S", time.localtime(time.time() - taken))
        what = f"has taken {taken:.0f} s, since {since} ({self._key}={self._limit_s:g})"
        if self.ask is not None:
            self.ask(what)
            if self._is_ending.wait(ASK_S):
                return
        self.end(PhaseTimedOut(phase, f"{what}; it is {place_of(self._main)}"), writes_stacks=True)

    def _end(self, error: PhaseTimedOut, writes_stacks: bool) -> None:
        self._error = error
        if writes_stacks:
            error.args = (f"{error}; {self._report(error.phase, str(error))}",)
        signal.pthread_kill(self._main, signal.SIGALRM)
        if isinstance(error, PeerLost):
            if self._is_noticed.wait(NOTICE_S) and self._is_closed.wait(CLOSE_S):
                return
            how = "; the same command goes on"  # nothing was to be saved
        else:
            if self._is_closed.wait(SOON_S):
                return
            phase = error.phase
            say(f"phase {phase} hangs, and the run is being ended; after {END_S:g} s it is ended in any case")
            if self._is_closed.wait(END_S):
                return
            how = "; it cannot be ended in order"
        # The main thread is where no signal reaches it.
        if self.is_heard() and not (isinstance(error, PeerLost) and error.is_told):
            say(f"error: phase {error.phase}: {error}{how}")
        os._exit(error.code)

    def _on_alarm(self, number: int, frame: Any) -> None:
        self._is_noticed.set()
        raise self._error

    def _report(self, phase: str, what: str) -> str:
        """Writes down all stacks. Returns: where they are, in words."""
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-{phase}{self.suffix}.txt"
        path = None if self._folder is None else self._folder / name
        writing = threading.Thread(target=_write, args=(path, f"phase {phase} {what}"), daemon=True)
        writing.start()
        writing.join(REPORT_S)
        where = path or "above"
        if writing.is_alive():
            return (
                f"where all threads and processes of the run were then could not be written in {REPORT_S:g} s"
            )
        return f"where all threads and processes of the run were then: {where}"


def say(line: str) -> None:
    """Writes a line to stderr, past buffers that a thread which hangs may hold."""
    os.write(STDERR, f"{line}\n".encode(errors="replace"))


def is_waiting(thread: int) -> bool:
    """Whether a thread waits for devices or for other processes of the run, as far as its stack tells."""
    frame = sys._current_frames().get(thread)
    for _ in range(6):
        if frame is None:
            return False
        file = frame.f_code.co_filename
        if file.endswith("grpo_jax/run/hosts.py") or "/jax/" in file:
            return True
        frame = frame.f_back
    return False


def place_of(thread: int) -> str:
    """Where a thread is, in words: the function that runs, and the one of this package that waits for it."""
    frame = innermost = sys._current_frames().get(thread)
    if innermost is None:
        return "gone"
    while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
        frame = frame.f_back
    text = f"in {_name(innermost)}"
    return text if frame is None or frame is innermost else f"{text}, for {_name(frame)}"


def _name(frame: Any) -> str:
    return f"{frame.f_code.co_qualname} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _write(path: Path | None, head: str) -> None:
    if path is None:
        write_report(sys.__stderr__ or sys.stderr, head)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            write_report(file, head)
    except OSError as error:
        say(f"{path} cannot be written: {error}")


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
    file.flush()


def _about(pid: int) -> str:
    folder = Path("/proc") / str(pid)
    try:
        command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
        waits = (folder / "wchan").read_text(errors="replace").strip("0\n") or "nothing"
    except OSError:
        return "has ended"
    return f"{command[:300]}\n  state {state}, waits in the kernel for {waits}"
