"""One run on two hosts that are namespaces of this machine: trainers on both, vLLM on the second. Needs root."""

import os
import shlex
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands
from two_hosts import A, two_hosts

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

PORT = 6392
RAY = [sys.executable, "-m", "ray.scripts.scripts", "start", "--disable-usage-stats"]
OVERRIDES = {
    "random_model.hidden_size": 64,
    "rollout.engine": "vllm",
    "rollout.ray_address": f"{A}:{PORT}",
    "rollout.placement": "separate",
    "rollout.enforce_eager": True,
    "rollout.gpu_memory_utilization": 0.1,
    "rollout.max_num_seqs": 32,
    "rollout.bucket_mb": 1,
    "rollout.probe_every": 1,
    "rollout.probe_threshold": 1e-4,
    "mesh.fsdp": 8,
    "optim.learning_rate": 1e-2,
    "trainer.num_steps": 2,
    "logging.save_rollouts": True,
}


def test_trainers_on_two_hosts_and_an_engine_on_the_second(tmp_path):
    reward = tmp_path / "my_reward.py"
    reward.write_text(commands.REWARD_FILE)
    (tmp_path / "token").write_text("2" * 64)
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(commands.ROOT),
        "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
    }
    argv = commands.train_argv(tmp_path / "run", OVERRIDES | {"reward.function": f"{reward}:score"})
    # No engine on the first host, which also has no GPU that Ray could go by.
    head = [
        *RAY,
        "--head",
        f"--port={PORT}",
        f"--node-ip-address={A}",
        "--num-cpus=0",
        "--include-dashboard=false",
    ]
    train = [sys.executable, "launch/ray_trainers.py", "run", f"{A}:{PORT}", "2", "grpo_jax.train", *argv]
    script = f"{shlex.join(head)} && exec {shlex.join(train)}"
    with two_hosts(tmp_path) as start:
        first = start("a", ["bash", "-c", script], **environment)
        start("b", [*RAY, f"--address={A}:{PORT}", "--block", "--num-cpus=2"], **environment)
        code = first.wait(timeout=900)
    out = first.log.read_text()
    assert code == 0 and "Done: 2 steps." in out, out
    assert "engine 0 is ready" in out and out.count("nats a token") == 3, out
    lines = [line for line in commands.read_lines(tmp_path / "run") if line["step"]]
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:
        assert line["training/policy_version"] == line["step"] - 1
        assert line["training/rollout_probs_diff_max"] < 1e-4
    for step in (1, 2):
        records = commands.read_jsonl(tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl")
        assert all(record["reward"] == commands.score(record["completion"]) for record in records)
