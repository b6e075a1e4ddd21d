"""The live line of a run on a terminal: step, phase, and the expected end. Logs and files get none."""

import collections
import contextlib
import datetime
import statistics
import sys
import threading
import time
from collections.abc import Iterator

from tqdm import tqdm

from grpo_jax.run.metrics import Timers

EVERY_S = 1.0
NUM_STEPS = 20
"""The last steps whose duration counts for the expected end."""
USUAL = {
    "read_inputs": "seconds",
    "start_engine": "seconds; with vLLM one to three minutes",
    "make_model": "seconds; with a warm start minutes",
    "load_model": "seconds a billion parameters",
    "restore": "seconds a billion parameters",
    "compile": "10 s to 2 min, less the second time",
}
"""Phase of the start -> how long it usually takes."""


class Progress:
    """Follows a run: which step, since when, and how long steps take."""

    def __init__(self, timers: Timers):
        self._timers = timers
        self._done, self._total = 0, 0
        self._last: float | None = None
        self._durations: collections.deque[float] = collections.deque(maxlen=NUM_STEPS)

    def step_done(self, done: int, total: int, now: float) -> None:
        """Args: done: steps of the run; total: of the whole run; now: on the monotonic clock."""
        if self._last is not None and done == self._done + 1:
            self._durations.append(now - self._last)
        self._done, self._total, self._last = done, total, now

    def text(self, now: float, clock: datetime.datetime) -> str:
        """The line. Args: now: on the monotonic clock; clock: the time of day."""
        phase, since = self._timers.running
        running = f"{phase} {now - since:.0f} s"
        if self._last is None:
            usual = USUAL.get(phase)
            return f"Starting: {running}" + (f" (usually {usual})" if usual else "")
        parts = [f"Step {min(self._done + 1, self._total)}/{self._total}", running]
        if self._durations:
            each = statistics.mean(self._durations)
            left = max(0.0, (self._total - self._done) * each - (now - self._last))
            end = clock + datetime.timedelta(seconds=left)
            parts += [f"{each:.3g} s a step", f"ends about {end:%a %H:%M} (in {_in_words(left)})"]
        return " · ".join(parts)


def _in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def live_line(timers: Timers, *, is_shown: bool) -> Iterator[Progress]:
    """Shows the line while it is entered, if `is_shown` and stdout is a terminal."""
    progress = Progress(timers)
    if not (is_shown and sys.stdout.isatty()):
        yield progress
        return
    over = threading.Event()
    with tqdm(bar_format="{desc}", position=0, leave=False, file=sys.stdout, dynamic_ncols=True) as bar:
        thread = threading.Thread(target=_show, args=(progress, bar, over), daemon=True)
        thread.start()
        try:
            yield progress
        finally:
            over.set()
            thread.join()


def _show(progress: Progress, bar: tqdm, over: threading.Event) -> None:
    while not over.wait(EVERY_S):
        bar.set_description_str(progress.text(time.monotonic(), datetime.datetime.now()))
