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
