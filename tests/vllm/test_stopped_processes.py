"""Processes of a run with the real vLLM that are stopped, and neither die nor answer; and two runs at once."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands
import vllm_helpers as helpers
from test_train import VLLM

from grpo_jax import audit

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# Phases have their time until the file is there, and then little: a slow start is no hang.
TRAIN = """
import gc, pathlib, sys, threading, time
from grpo_jax.run import hangs
from grpo_jax.train import main

def shorten():
    while not pathlib.Path(FILE).exists():
        time.sleep(0.2)
    for watch in gc.get_objects():
        if isinstance(watch, hangs.HangWatch):
            watch._limit_s = 15.0

FILE, hangs.END_S = sys.argv.pop(1), 45.0
threading.Thread(target=shorten, daemon=True).start()
main()
"""


@contextlib.contextmanager
def training(folder, **changes):
    """A run amid its steps in FOLDER/run: (process, its descendants). FOLDER/short shortens its limit."""
    folder.mkdir(exist_ok=True)
    (folder / "my_reward.py").write_text(commands.REWARD_FILE)
    overrides = VLLM | {
        "reward.function": f"{folder}/my_reward.py:score",
        "trainer.num_steps": 100_000,
        "trainer.total_epochs": 100_000,
        "checkpoint.every_steps": 1,
        **changes,
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    environment |= {"PYTHONPATH": str(commands.ROOT), "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    argv = [str(folder / "short"), *commands.train_argv(folder / "run", overrides)]
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", TRAIN, *argv],
            cwd=commands.ROOT, env=environment, start_new_session=True, stdout=out, stderr=out,
        )  # fmt: skip
    try:
        wait_for_steps(folder, process, 2)
        yield process, psutil.Process(process.pid).children(recursive=True)
    finally:
        process.kill()  # Ray and the reward workers end with it
        process.wait()


def wait_for_steps(tmp_path, process, count):
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < count:
        assert process.poll() is None and time.monotonic() < end, (tmp_path / "out").read_text()[-2000:]
        time.sleep(0.1)


@pytest.mark.parametrize("victim", ["raylet", "gcs_server"])
def test_a_process_of_rays_that_stands_still_ends_the_run(tmp_path, victim):
    """Calls of Ray's that have a timeout wait for it all the same."""
    with training(tmp_path) as (process, others):
        next(other for other in others if other.name() == victim).send_signal(signal.SIGSTOP)
        next(other for other in others if b"EngineCore" in helpers.command_line(other.pid)).kill()
        (tmp_path / "short").touch()
        code, out = process.wait(timeout=240), (tmp_path / "out").read_text()
        assert code == 1
        (line,) = [line for line in out.splitlines() if line.startswith("error: ")]
        assert re.match(r"error: phase (gen|update_weights): has taken \d+ s, since ", line), line
        assert str(tmp_path / "run" / "hangs") in line
        assert not psutil.wait_procs(others, timeout=60)[1]


def test_a_core_that_stands_still_is_replaced_and_nothing_is_lost(tmp_path):
    with training(tmp_path, **{"rollout.timeout_s": 12.0}) as (process, others):
        (core,) = [other for other in others if b"EngineCore" in helpers.command_line(other.pid)]
        core.send_signal(signal.SIGSTOP)
        done = len(commands.read_lines(tmp_path / "run"))
        wait_for_steps(tmp_path, process, done + 3)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 130
        assert not core.is_running()
    out = (tmp_path / "out").read_text()
    assert out.count("engine 0 failed and is started again: ") == 1
    assert re.search(r"engine 0 finished nothing for 12 s|did not take the weights within 12 s", out)
    assert commands.call(audit.main, [tmp_path / "run"]).code == 0


def test_two_runs_at_once_and_the_end_of_one(tmp_path):
    with training(tmp_path / "one") as (one, ones), training(tmp_path / "two") as (two, twos):
        assert not {other.pid for other in ones} & {other.pid for other in twos}
        wait_for_steps(tmp_path / "one", one, len(commands.read_lines(tmp_path / "one" / "run")) + 2)
        one.send_signal(signal.SIGTERM)
        assert one.wait(timeout=120) == 130 and not psutil.wait_procs(ones, timeout=60)[1]
        wait_for_steps(tmp_path / "two", two, len(commands.read_lines(tmp_path / "two" / "run")) + 3)
        assert all(other.is_running() for other in twos)
        two.send_signal(signal.SIGTERM)
        assert two.wait(timeout=120) == 130
    for name, other in (("one", "two"), ("two", "one")):
        workdir, out = tmp_path / name / "run", (tmp_path / name / "out").read_text()
        assert "failed" not in out and str(tmp_path / other) not in out
        steps = [line["step"] for line in commands.read_lines(workdir) if line["step"]]
        assert steps == list(range(1, len(steps) + 1))
        assert commands.call(audit.main, [workdir]).code == 0
