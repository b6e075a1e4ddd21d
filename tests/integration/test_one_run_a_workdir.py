"""One run at a time in a workdir: a second one is refused, and a killed one is in nobody's way."""

import json
import os
import shutil
import signal
import socket

import integration_helpers as helpers
import pytest

from grpo_jax import sft
from grpo_jax.config import ConfigError
from grpo_jax.run import lock


@pytest.fixture
def running(tmp_path, reward_file):
    """A run that is in the middle of its steps: (process, workdir, overrides)."""
    overrides = {"reward.function": f"{reward_file}:score", "trainer.total_epochs": 50}
    slow = reward_file.with_name("slow")
    slow.touch()
    try:
        with helpers.start("grpo_jax.train", helpers.train_argv(tmp_path / "run", overrides)) as process:
            for line in process.stdout:
                if line.startswith("  Step 1/3:"):
                    break
            yield process, tmp_path / "run", overrides
            process.kill()
    finally:
        slow.unlink()


@pytest.mark.slow
def test_a_second_run_is_refused_until_the_first_is_dead(running):
    process, workdir, overrides = running
    others = ("optim.learning_rate", 0.005)
    for main, changes in ((None, {}), (None, dict([others])), (sft.main, {"sft.num_steps": 2})):
        argv = helpers.train_argv(workdir, overrides | changes)
        result = helpers.call(main, argv) if main else helpers.run_train(workdir, overrides | changes)
        assert result.code == 2 and result.err.count("\n") == 1
        assert f"is in use by process {process.pid} on host {socket.gethostname()} since " in result.err
        assert "-m grpo_jax.train" in result.err
    assert process.poll() is None

    process.send_signal(signal.SIGKILL)
    process.wait()
    (workdir / "checkpoint-epoch-9.0123456789ab.tmp").mkdir()  # half written
    (workdir / "checkpoints" / "9.0123456789ab.tmp.orbax-checkpoint-tmp").mkdir(parents=True)
    helpers.train_ok(workdir, overrides | {"trainer.total_epochs": 1, "trainer.num_steps": 1})
    assert json.loads((workdir / "lock").read_text())["pid"] == os.getpid()
    assert not list(workdir.rglob("*.tmp*"))


def test_the_lock_is_free_after_a_run_and_its_file_may_be_empty(tmp_path):
    file = tmp_path / "lock"
    for content in ("", "[1]", '{"pid": 1}'):
        file.write_text(content)
        lock.check_free(file)
        assert file.read_text() == content
        with lock.hold(file):
            assert json.loads(file.read_text())["pid"] == os.getpid()
            with pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on host"):
                lock.check_free(file)
            with pytest.raises(ConfigError, match="in use by process"), lock.hold(file):
                pass
            file.write_text(content)
            with pytest.raises(ConfigError, match="in use by another process"):
                lock.check_free(file)


def test_problems_of_which_a_kill_left_one_file_are_written_again(tmp_path):
    """As versions before this left them: train.parquet alone."""
    overrides = {"reward.function": "gsm8k", "trainer.num_steps": 1}
    helpers.train_ok(tmp_path / "whole", overrides)
    shutil.copytree(tmp_path / "whole" / "data", tmp_path / "run" / "data")
    (tmp_path / "run" / "data" / "val.parquet").unlink()
    helpers.train_ok(tmp_path / "run", overrides)
    assert helpers.tree_digest(tmp_path / "run" / "data") == helpers.tree_digest(tmp_path / "whole" / "data")


@pytest.mark.slow
def test_two_runs_at_once_in_two_workdirs_know_nothing_of_each_other(tmp_path, reward_file):
    """Other seeds, the same names of everything else: each ends as it does alone."""
    overrides = {
        "reward.function": f"{reward_file}:score",
        "trainer.num_steps": 2,
        "logging.save_rollouts": True,
    }
    overrides |= {"checkpoint.every_steps": 1}
    argv = lambda name, seed: helpers.train_argv(tmp_path / name, overrides | {"trainer.seed": seed})
    with helpers.start("grpo_jax.train", argv("one", 1)) as one:
        began = one.stdout.readline()
        second = helpers.run_train(tmp_path / "two", overrides | {"trainer.seed": 2})
        out, err = one.communicate(timeout=120)
    assert (one.returncode, second.code) == (0, 0), err + second.err
    assert began and "WARNING: GPU" not in out + second.out
    logs = {}
    for name, other, seed in (("one", "two", 1), ("two", "one", 2)):
        helpers.train_ok(tmp_path / "alone" / name, overrides | {"trainer.seed": seed})
        pair = [tmp_path / name, tmp_path / "alone" / name]
        lines = [[helpers.without_clock(line) for line in helpers.read_lines(path)] for path in pair]
        assert lines[0] == lines[1] and [line["training/global_step"] for line in lines[0]] == [1, 2]
        digests = [helpers.tree_digest(path / "rollouts") for path in pair]
        assert digests[0] == digests[1] and len(digests[0]) == 4  # two steps, texts and tokens
        assert helpers.read_checkpoint(pair[0], 2) == helpers.read_checkpoint(pair[1], 2)
        logs[name] = (tmp_path / name / "train.log").read_text()
        assert str(tmp_path / other) not in logs[name]
        assert logs[name].count("  Step 2/3:") == 1
    assert helpers.tree_digest(tmp_path / "one" / "rollouts") != helpers.tree_digest(
        tmp_path / "two" / "rollouts"
    )
