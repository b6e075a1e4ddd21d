"""Whole runs over two GPUs. `GRPO_JAX_TEST_GPU=1 pytest -m 'gpu and vllm' tests/vllm/test_two_gpus.py`

Every push is checked by checksums, and the run would stop at a probe that differs: what is looked at here is that
the layout is the one that was asked for, and that trainer and engines sample from the same distribution.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands

pytestmark = [pytest.mark.vllm, pytest.mark.gpu]

COMMON = {
    "model.dtype": "bfloat16",
    "random_model.hidden_size": 128,
    "rollout.engine": "vllm",
    "rollout.enforce_eager": True,
    "rollout.max_num_seqs": 64,
    "rollout.gpu_memory_utilization": 0.2,
    "rollout.probe_every": 1,
    "optim.learning_rate": 1e-3,
}


def run(tmp_path, changes):
    """Trains in a process of its own, which chooses its GPUs. Returns what it printed, and its steps' metrics."""
    reward = tmp_path / "my_reward.py"
    reward.write_text(commands.REWARD_FILE)
    overrides = COMMON | {"reward.function": f"{reward}:score"} | changes
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-m", "grpo_jax.train", *commands.train_argv(tmp_path / "run", overrides)],
        capture_output=True, text=True, cwd=commands.ROOT, env=environment, timeout=400,
    )  # fmt: skip
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-6000:]
    return output, [line for line in commands.read_lines(tmp_path / "run") if line["step"]]


def check(lines):
    assert lines
    for line in lines:
        assert line["training/rollout_probs_diff_mean"] < 0.003


def test_an_engine_on_the_other_gpu_is_sent_the_weights_by_nccl(tmp_path):
    output, lines = run(tmp_path, {"rollout.placement": "separate"})
    assert re.search(r"devices +1 x", output)
    assert "engine 0 is ready" in output and "engine 1 is ready" not in output
    check(lines)


def test_it_samples_while_the_trainer_works(tmp_path):
    ahead = {"rollout.max_lag": 1, "algorithm.rollout_is": "token"}
    _, lines = run(tmp_path, {"rollout.placement": "separate"} | ahead)
    assert [line["training/policy_lag"] for line in lines] == [0, 1, 1]


def test_a_trainer_split_over_both_gpus_feeds_an_engine_on_each(tmp_path):
    output, lines = run(tmp_path, {"mesh.fsdp": 2})
    assert re.search(r"devices +2 x", output)
    assert "engine 0 is ready" in output and "engine 1 is ready" in output
    check(lines)


@pytest.fixture(autouse=True)
def two_gpus():
    query = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True)
    if len(query.stdout.splitlines()) < 2:
        pytest.skip("needs two GPUs")
