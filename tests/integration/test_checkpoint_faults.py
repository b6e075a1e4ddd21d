"""A run whose checkpoints are damaged, cannot be written, or are ahead of its metrics."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import integration_helpers as helpers
import pytest

from grpo_jax import export
from grpo_jax.run.retention import saved_steps


def flip_a_byte(checkpoint):
    file = max((p for p in (checkpoint / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 64
    file.write_bytes(data)


@pytest.fixture
def workdir(tmp_path, whole_run):
    """A finished run with the checkpoints of steps 4 and 6."""
    return shutil.copytree(whole_run[0], tmp_path / "run")


def test_a_flipped_byte_costs_two_steps_and_no_bit(workdir, whole_run, whole_run_overrides):
    flip_a_byte(workdir / "checkpoints" / "6")
    out = helpers.train_ok(workdir, whole_run_overrides)
    assert re.search(r"WARNING: the checkpoint of step 6 is damaged \(params/.* holds other bytes", out)
    assert "Going on after step 4 of 6." in out
    assert helpers.read_checkpoint(workdir, 6) == helpers.read_checkpoint(whole_run[0], 6)
    assert [line["step"] for line in helpers.read_lines(workdir)] == [0, 1, 2, 3, 4, 5, 6]
    assert {step for _, step in helpers.read_events(workdir)[0]} == {0, 1, 2, 3, 4, 5, 6}
    assert (workdir / "checkpoints-damaged" / "6").is_dir()


def test_without_a_whole_checkpoint_it_does_not_begin_anew(workdir, whole_run_overrides, tmp_path):
    for step in (4, 6):
        flip_a_byte(workdir / "checkpoints" / str(step))
    before = helpers.tree_digest(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_text()
    result = helpers.run_train(workdir, whole_run_overrides)
    assert result.code == 2 and result.err.count("\n") == 1
    assert "no checkpoint is whole (step 6: params/" in result.err and "; step 4: params/" in result.err
    assert (helpers.tree_digest(workdir / "checkpoints"), (workdir / "metrics.jsonl").read_text()) == before
    result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
    assert result.code == 2 and result.err.count("\n") == 1 and "no checkpoint is whole" in result.err
    assert not (tmp_path / "out").exists()


def test_export_takes_the_one_before_unless_told_which(workdir, tmp_path):
    flip_a_byte(workdir / "checkpoints" / "6")
    result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0 and result.out.splitlines()[-1].startswith("step 4 of "), result.err
    six = workdir / "checkpoints" / "6"
    result = helpers.call(export.main, [f"--checkpoint={six}", f"--output={tmp_path / 'six'}"])
    assert result.code == 2 and "is damaged (params/" in result.err and result.err.count("\n") == 1


@pytest.mark.slow
def test_a_background_save_that_failed_ends_the_run_at_the_next_step(tmp_path, reward_file):
    overrides = {"reward.function": f"{reward_file}:score", "trainer.total_epochs": 9}
    overrides |= {"checkpoint.every_steps": 2, "logging.loggers": ("console",)}
    slow = reward_file.with_name("slow")
    slow.touch()
    try:
        with helpers.start("grpo_jax.train", helpers.train_argv(tmp_path / "run", overrides)) as process:
            while not (tmp_path / "run" / "checkpoints" / "2").exists():
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            # Smaller than the arrays, larger than the logs: for the next save the disk is full.
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (30_000, 30_000))
            out, err = process.communicate(timeout=120)
    finally:
        slow.unlink()
    assert process.returncode == 1, err
    last = err.splitlines()[-1]
    assert last.startswith("error: phase save_checkpoint: the checkpoint of step 4 could not be written: ")
    assert last.endswith("; the last good checkpoint is that of step 2")
    assert "Step 1/3" in out and "  Step 3/3" in out
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["2"]


KILLED_BEFORE_ITS_LINE = """
import os, signal, time
from grpo_jax import train
from grpo_jax.run.writer import MetricsWriter
write = MetricsWriter.write
def killed(self, metrics, *, step, epoch):
    if step == 2:
        time.sleep(1.5)  # the files of the checkpoint are written by now
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, metrics, step=step, epoch=epoch)
MetricsWriter.write = killed
train.main()
"""


@pytest.mark.slow
def test_a_kill_between_checkpoint_and_line_loses_no_line(tmp_path, reward_file):
    overrides = {"reward.function": f"{reward_file}:score", "checkpoint.every_steps": 1}
    argv = helpers.train_argv(tmp_path / "run", overrides)
    done = subprocess.run(
        [sys.executable, "-c", KILLED_BEFORE_ITS_LINE, *argv], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert saved_steps(tmp_path / "run" / "checkpoints") == [1]
    out = helpers.train_ok(tmp_path / "run", overrides)
    assert "Going on after step 1 of 3." in out
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2, 3]
    assert not list((tmp_path / "run").rglob("*.tmp*"))


def test_checkpoints_by_time_and_by_the_best_validation(tmp_path, reward_file):
    overrides = {"reward.function": f"{reward_file}:score", "trainer.total_epochs": 2}
    by_time = overrides | {
        "checkpoint.every_minutes": 1e-9,
        "checkpoint.max_to_keep": 9,
        "trainer.num_steps": 3,
    }
    helpers.train_ok(tmp_path / "time", by_time)
    assert saved_steps(tmp_path / "time" / "checkpoints") == [1, 2, 3]

    best = overrides | {"checkpoint.keep_best": "val/accuracy", "eval.every_steps": 1}
    best |= {"checkpoint.max_to_keep": 1, "checkpoint.keep_every_epochs": 1}
    helpers.train_ok(tmp_path / "best", best)
    accuracy = {line["step"]: line["val/accuracy"] for line in helpers.read_lines(tmp_path / "best")}
    first_best = max(accuracy, key=accuracy.__getitem__)
    assert saved_steps(tmp_path / "best" / "checkpoints") == sorted({3, 6, first_best})
