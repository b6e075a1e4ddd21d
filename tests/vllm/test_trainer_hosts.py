"""Several trainer processes and a real engine, which the first of them has."""

import os
import signal
import sys
import time
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import hosts_helpers as hosts
import integration_helpers as commands
from test_accounting import actors
from test_train import VLLM

from grpo_jax import audit

pytestmark = pytest.mark.vllm


def test_two_processes_push_together_and_survive_the_end_of_their_engine(tmp_path):
    """The engine dies while rollouts are awaited: the new one wants the weights, which both bring together."""
    reward, workdir, mark = tmp_path / "my_reward.py", tmp_path / "run", uuid.uuid4().hex
    reward.write_text(commands.REWARD_FILE)
    overrides = VLLM | {
        "reward.function": f"{reward}:score",
        "mesh.fsdp": -1,
        "rollout.max_lag": 1,
        "algorithm.rollout_is": "token",
        "trainer.num_steps": 4,
        "trainer.total_epochs": 2,
        "checkpoint.every_steps": 2,
        "logging.save_rollouts": True,
    }
    argv = commands.train_argv(workdir, overrides)
    with hosts.started(argv, 2, GRPO_JAX_TEST_MARK=mark) as processes:
        for line in processes[0].stdout:
            if line.startswith("  Step 1/3"):
                break
        (actor,) = actors(mark)
        time.sleep(0.2)
        os.kill(actor, signal.SIGKILL)
        first, second = hosts.finish(processes, timeout=500)
    assert (first.code, second.code) == (0, 0), first.err[-2000:] + second.err[-2000:]
    assert "engine 0 failed and is started again" in first.out
    assert second.err == second.out == ""
    lines = [line for line in commands.read_lines(workdir) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # Engine and trainer agree on every token: the pushed weights are those that both processes hold parts of.
    assert all(
        line["training/rollout_probs_diff_max"] < 1e-4 or line["training/policy_lag"] for line in lines
    )
    assert "nats a token" in first.out
    result = commands.call(audit.main, [workdir])
    assert result.code == 0, result.out
