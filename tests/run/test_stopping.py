"""Signals while steps are under way."""

import os
import signal
import time

import pytest

from grpo_jax.run import stopping


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
