"""The live line of a run."""

import datetime
import io
import logging
import re
import time

import pytest

from grpo_jax.run import progress
from grpo_jax.run.metrics import Timers
from grpo_jax.run.progress import Progress, live_line
from grpo_jax.run.workdir import start_logging

NOON = datetime.datetime(2026, 3, 2, 12, 0)  # a Monday


def at(phase, since):
    timers = Timers()
    timers.running = (phase, since)
    return timers


def test_the_start_says_what_it_does_and_how_long_that_takes():
    text = Progress(at("compile", 100.0)).text(112.0, NOON)
    assert text == "Starting: compile 12 s (usually 10 s to 2 min, less the second time)"


def test_a_step_with_its_phase_and_the_end():
    line = Progress(at("gen", 130.0))
    line.step_done(4, 40, 100.0)
    assert line.text(133.0, NOON) == "Step 5/40 · gen 3 s"  # how long a step takes is not known yet
    line.step_done(5, 40, 160.0)
    line.step_done(6, 40, 200.0)
    # 34 steps of 50 s each, of which 10 s are over: 1,690 s
    assert line.text(210.0, NOON) == "Step 7/40 · gen 80 s · 50 s a step · ends about Mon 12:28 (in 28 min)"


def test_a_roll_back_is_no_step():
    line = Progress(at("gen", 0.0))
    for done, now in ((4, 0.0), (5, 10.0), (2, 500.0), (3, 510.0)):
        line.step_done(done, 40, now)
    assert "10 s a step" in line.text(510.0, NOON)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_it_is_for_terminals_alone(monkeypatch, is_terminal):
    out = io.StringIO()
    out.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    with live_line(at("compile", time.monotonic()), is_shown=True):
        time.sleep(0.3)
    assert ("Starting: compile 0 s" in out.getvalue()) == is_terminal


def test_messages_are_printed_above_it(monkeypatch):
    out = io.StringIO()
    out.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", out)
    monkeypatch.setattr(progress, "EVERY_S", 0.01)
    start_logging()
    with live_line(at("compile", time.monotonic()), is_shown=True):
        time.sleep(0.1)
        logging.getLogger("grpo_jax").info("a message\nof two lines")
        time.sleep(0.1)
    monkeypatch.undo()
    start_logging()
    # The line is cleared, the message stands alone, and the line is there again.
    assert re.search(r"\r +\ra message\nof two lines\n\r?Starting: compile", out.getvalue())
