"""Several trainer processes and a real engine, which the first of them has."""

import os
import signal
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import hosts_helpers as hosts
import integration_helpers as commands
from test_accounting import actors
from test_train import VLLM

from grpo_jax import audit

pytestmark = pytest.mark.vllm


@pytest.mark.slow
def test_each_process_pushes_to_its_own_engine_and_both_engines_may_die(tmp_path):
    """Each engine is on a node of Ray that its process has started, and gets the weights from that process."""
    check_run(tmp_path, 2, {"rollout.num_replicas": 2})


@pytest.mark.slow
def test_each_process_pushes_adapters_to_its_own_engine(tmp_path):
    """An engine that is started again gets the model that they belong to as well."""
    changes = {"rollout.num_replicas": 2, "lora.rank": 4, "lora.push": "adapter", "optim.offload": False}
    check_run(tmp_path, 2, changes)


def test_two_processes_push_together_and_survive_the_end_of_their_engine(tmp_path):
    """The engine dies while rollouts are awaited: the new one wants the weights, which both bring together."""
    check_run(tmp_path, 1, {})


@pytest.mark.slow
def test_the_end_of_ray_beside_one_process_ends_the_run_in_one_line(tmp_path):
    """Its engine cannot be started again: there is no place for it any more."""
    reward, mark = tmp_path / "my_reward.py", uuid.uuid4().hex
    reward.write_text(commands.REWARD_FILE)
    overrides = VLLM | {"reward.function": f"{reward}:score", "mesh.fsdp": -1, "rollout.num_replicas": 2}
    overrides |= {"trainer.num_steps": 6, "trainer.total_epochs": 2, "checkpoint.every_steps": 1}
    with hosts.started(
        commands.train_argv(tmp_path / "run", overrides), 2, GRPO_JAX_TEST_MARK=mark
    ) as processes:
        wait_for_step(2, processes)
        [node] = [
            process
            for process in psutil.Process(processes[1].pid).children()
            if "node" in process.cmdline() and process.cmdline()[2].endswith("ray_head.py")
        ]
        os.killpg(node.pid, signal.SIGKILL)
        first, second = hosts.finish(processes, timeout=300)
    assert (first.code, second.code) == (1, 1)
    [line] = [text for text in first.err.splitlines() if text.startswith("error:")]
    assert "process 1" in line and "Ray's processes have ended" in line
    assert second.err == ""


def wait_for_step(number, processes):
    """Returns what the first process prints until the step is done."""
    said = ""
    for line in processes[0].stdout:
        said += line
        if line.startswith(f"  Step {number}/3"):
            break
    time.sleep(0.2)
    return said


def check_run(tmp_path, num_engines, changes):
    """Trains in two processes, kills each engine once, and looks at what came of it."""
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
        **changes,
    }
    argv = commands.train_argv(workdir, overrides)
    with hosts.started(argv, 2, GRPO_JAX_TEST_MARK=mark) as processes:
        said = wait_for_step(1, processes)
        victims = actors(mark)
        assert len(victims) == num_engines
        os.kill(victims.pop(), signal.SIGKILL)
        for victim in victims:
            said += wait_for_step(2, processes)
            if victim in actors(mark):  # it was not started anew together with the other one
                os.kill(victim, signal.SIGKILL)
        first, second = hosts.finish(processes, timeout=500)
    assert (first.code, second.code) == (0, 0), first.err[-2000:] + second.err[-2000:]
    for number in range(num_engines):
        assert f"engine {number} failed and is started again" in said + first.out
    assert second.err == second.out == ""
    lines = [line for line in commands.read_lines(workdir) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    # Engine and trainer agree on every token: the pushed weights are those that both processes hold parts of.
    assert all(
        line["training/rollout_probs_diff_max"] < 1e-4 or line["training/policy_lag"] for line in lines
    )
    assert "nats a token" in said + first.out
    result = commands.call(audit.main, [workdir])
    assert result.code == 0, result.out
