"""How a run ends: signals, and the first error as the one that is reported."""

import contextlib
import os
import signal
import time

import pytest

from grpo_jax.config import CheckpointSection
from grpo_jax.run import stopping
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.metrics import Timers
from grpo_jax.run.stopping import quietly, reported_failure


def fails():
    raise OSError("no space left")


@pytest.mark.parametrize("code", [1, 130])
def test_a_second_error_in_close_hides_no_exit_code(code):
    with pytest.raises(SystemExit) as stop, contextlib.ExitStack() as resources:
        resources.callback(quietly, "the engine", fails)
        resources.callback(quietly, "the metrics", fails)
        raise SystemExit(code)
    assert stop.value.code == code
    quietly("the engine", fails)  # and at the end of a run that went well it is only logged


def test_a_checkpoint_that_fails_is_one_line_of_its_phase(tmp_path, capsys):
    timers, checkpointer = Timers(), Checkpointer(tmp_path / "c", CheckpointSection(), is_offloaded=False)
    reported = reported_failure(timers, checkpointer, lambda error, phase: None, lambda: None)
    with contextlib.closing(checkpointer), pytest.raises(SystemExit) as stop, reported, timers("testing"):
        raise CheckpointError("the checkpoint of step 4 could not be written: no space left")
    assert stop.value.code == 1
    line = "error: phase save_checkpoint: the checkpoint of step 4 could not be written: no space left"
    assert capsys.readouterr().err == f"{line}; there is no checkpoint yet\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_same_signal_twice_is_one_and_a_later_one_stops_at_once(monkeypatch, number):
    """A batch system signals the whole group, and a parent in it passes its own on."""
    monkeypatch.setattr(stopping, "SAME_S", 0.2)
    before = signal.getsignal(number)
    with stopping.stop_on_signal() as stop:
        assert not stop.requested
        for _ in range(3):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        assert stop.requested
        time.sleep(0.25)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert signal.getsignal(number) is before
