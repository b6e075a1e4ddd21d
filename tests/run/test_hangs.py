"""A phase that stands still: it is named, everybody's stack is written down, and the run ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.config import CheckpointSection
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.hangs import HangWatch, watched
from grpo_jax.run.metrics import Timers
from grpo_jax.run.stopping import reported_failure

ROOT = Path(__file__).parents[2]


def stand_still():
    time.sleep(60)


def test_the_report_and_the_end(tmp_path, capsys):
    timers, saved = Timers(), []
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSection(), is_offloaded=False)
    before = signal.getsignal(signal.SIGALRM)
    child = subprocess.Popen(["sleep", "61"])
    watch = HangWatch(timers, tmp_path / "hangs", 0.4)
    begin = time.monotonic()
    failing = reported_failure(timers, checkpointer, lambda error, phase: None, lambda: saved.append(1))
    with pytest.raises(SystemExit) as stop, failing, timers("gen"):
        stand_still()
    taken = time.monotonic() - begin
    watch.close()
    checkpointer.close()
    child.kill()
    child.wait()
    assert stop.value.code == 1 and saved == [1]
    assert 0.4 < taken < 10
    (report,) = (tmp_path / "hangs").iterdir()
    assert report.name.endswith("-gen.txt")
    text = report.read_text()
    where = "stand_still (test_hangs.py:"
    assert " phase gen has taken 0 s, since " in text and f"it is in {where}" in text
    assert "in stand_still" in text.split("\n\n", 1)[1]  # the stacks
    assert f"process {child.pid}: sleep 61\n  state S" in text
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: phase gen: has taken 0 s, since ")
    assert f"(trainer.phase_timeout_s=0.4); it is in {where}" in last and "; where all threads and" in last
    assert str(report) in last and last.endswith("; there is no checkpoint yet")
    assert signal.getsignal(signal.SIGALRM) is before


def test_c_code_that_makes_another_error_of_a_hang_hides_it_not(tmp_path, capsys):
    """As Ray's does: a function that has succeeded finds that a signal has raised something."""
    timers = Timers()
    with (
        pytest.raises(SystemExit) as stop,
        watched(timers, tmp_path / "hangs", 0.3),
        timers.within("compare"),
    ):
        try:
            stand_still()
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: phase compare: has taken 0 s, since ")
    with pytest.raises(SystemError, match="of its own"), watched(timers, None, 60.0):
        raise SystemError("of its own")


def test_a_main_thread_that_no_signal_reaches_is_ended(tmp_path):
    code = """
import signal, sys, time, pathlib
from grpo_jax.run import hangs
from grpo_jax.run.metrics import Timers
hangs.SOON_S = hangs.END_S = 0.3
timers = Timers()
watch = hangs.HangWatch(timers, pathlib.Path(sys.argv[1]), 0.3)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
with timers("update_actor"):
    time.sleep(60)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True, text=True, timeout=50, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert (
        first == "phase update_actor hangs, and the run is being ended; after 0.3 s it is ended in any case"
    )
    assert last.startswith("error: phase update_actor: has taken 0 s, since ")
    assert "; it is in <module> (<string>:" in last and last.endswith("it cannot be ended in order")


def test_phases_within_their_time_are_left_alone(tmp_path):
    """Each one has the whole time, and so has what lies between two."""
    timers = Timers()
    watch = HangWatch(timers, tmp_path / "hangs", 0.8)
    for phase in ("gen", "reward"):
        with timers(phase):
            time.sleep(0.5)
        time.sleep(0.5)
    watch.close()
    never = HangWatch(timers, tmp_path / "hangs", 0)
    assert not any(thread.name == "hang watch" for thread in threading.enumerate())
    never.close()
    assert not (tmp_path / "hangs").exists()
