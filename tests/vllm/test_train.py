"""Whole runs through the commands, with the real vLLM behind Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands
import vllm_helpers as helpers

from grpo_jax import evaluate

pytestmark = pytest.mark.vllm

VLLM = {
    "random_model.hidden_size": 64,  # heads of 32, the narrowest that vLLM's CPU attention has
    "rollout.engine": "vllm",
    "rollout.enforce_eager": True,
    "rollout.gpu_memory_utilization": 0.2,
    "rollout.max_num_seqs": 64,
    "rollout.probe_every": 2,
    "rollout.probe_threshold": 0.02 if helpers.IS_GPU else 1e-4,
}
CLOSE = 1e-2 if helpers.IS_GPU else 1e-4


@pytest.fixture(scope="module")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "my_reward.py"
    path.write_text(commands.REWARD_FILE)
    return path


def test_float16_in_trainer_and_engine(tmp_path, reward_file):
    """The checked push of float16 weights, and eleven bits on both sides: 2^-11 of logits of a few units."""
    overrides = VLLM | {
        "model.dtype": "float16",
        "reward.function": f"{reward_file}:score",
        "rollout.probe_threshold": 5e-3,
        "algorithm.kl_coef": 0.1,
        "trainer.num_steps": 2,
    }
    commands.train_ok(tmp_path / "run", overrides)
    first, second = (line for line in commands.read_lines(tmp_path / "run") if line["step"])
    assert first["kl/mean"] == 0 and second["kl/mean"] > 0
    for line in (first, second):
        assert line["actor/loss_scale"] == 65536 and line["actor/overflows"] == 0
        assert 0 < line["training/rollout_probs_diff_max"] < 5e-3


def test_adapters_alone_are_pushed_and_rollouts_keep_theirs(tmp_path, reward_file):
    """With a batch ahead, the engine has adapters of several versions at once; each probe is of the last one."""
    overrides = VLLM | {
        "lora.rank": 4,
        "lora.push": "adapter",
        "reward.function": f"{reward_file}:score",
        "rollout.probe_every": 1,
        "rollout.max_lag": 1,
        "algorithm.rollout_is": "token",
        "optim.offload": False,
        "optim.learning_rate": 1e-2,
        "trainer.num_steps": 4,
        "trainer.total_epochs": 2,
        "logging.save_rollouts": True,
    }
    workdir = tmp_path / "run"
    out = commands.train_ok(workdir, overrides)
    assert out.count("nats a token") == 5
    for step in range(1, 5):
        records = commands.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
        assert {r["policy_version"] for r in records} == {max(0, step - 2)}
    lines = [line for line in commands.read_lines(workdir) if line["step"]]
    assert lines[0]["training/rollout_probs_diff_max"] < CLOSE
    # Of the step before: the weights have moved since, by much more than rounding.
    assert all(line["training/rollout_probs_diff_max"] > 2 * CLOSE for line in lines[1:])


def test_adapters_arrive_merged(tmp_path, reward_file):
    """The engine computes with W + A B what the trainer computes with W and A B apart: the probe compares them."""
    overrides = VLLM | {
        "lora.rank": 4,
        "reward.function": f"{reward_file}:score",
        "rollout.probe_every": 1,
        "optim.offload": False,
        "optim.learning_rate": 1e-2,
        "trainer.num_steps": 2,
    }
    workdir = tmp_path / "run"
    out = commands.train_ok(workdir, overrides)
    assert out.count("nats a token") == 3
    lines = [line for line in commands.read_lines(workdir) if line["step"]]
    assert all(line["training/rollout_probs_diff_max"] < CLOSE for line in lines)
    adapter = f"--adapter={workdir / 'checkpoint-final'}"
    argv = [f"--model={workdir / 'random-model'}", adapter, f"--data={workdir / 'data' / 'val.parquet'}"]
    texts = []
    for engine in ("vllm", "local"):
        file = tmp_path / f"{engine}.jsonl"
        flags = [f"--engine={engine}", f"--generations={file}", "--max_response_length=8"]
        result = commands.call(evaluate.main, [*argv, *flags, "--gpu_memory_utilization=0.2"])
        assert result.code == 0, result.err
        texts.append([record["completion"] for record in commands.read_jsonl(file)])
    assert texts[0] == texts[1]


def test_a_run_its_interruption_and_its_evaluation(tmp_path, reward_file):
    workdir = tmp_path / "run"
    overrides = VLLM | {
        "reward.function": f"{reward_file}:score",
        "logging.save_rollouts": True,
        "trainer.num_steps": 2,
        "optim.learning_rate": 1e-2,
    }
    out = commands.train_ok(workdir, overrides)
    assert "engine 0 is ready" in out
    assert out.count("nats a token") == 2  # after the first push, and after that of version 2
    # The same command with more steps goes on, with another engine that gets the saved weights.
    commands.train_ok(workdir, overrides | {"trainer.num_steps": 3})
    lines = [line for line in commands.read_lines(workdir) if line["step"]]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["training/policy_version"] == line["step"] - 1
        assert line["training/policy_lag"] == 0
        assert line["training/rollout_probs_diff_max"] < CLOSE
        assert line["timing_s/update_weights"] > 0
    for step in (1, 2, 3):
        records = commands.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
        assert [r["policy_version"] for r in records] == [step - 1] * 16
        assert all(record["reward"] == commands.score(record["completion"]) for record in records)
    argv = [
        f"--model={workdir}/checkpoint-epoch-1", f"--data={workdir}/data/val.parquet", "--max_response_length=8",
        f"--reward={reward_file}:score",
    ]  # fmt: skip
    answers = {}
    for engine in ("vllm", "local"):
        flags = [
            f"--engine={engine}",
            f"--generations={tmp_path}/{engine}.jsonl",
            f"--json={tmp_path}/{engine}.json",
        ]
        result = commands.call(evaluate.main, argv + flags)
        assert result.code == 0, result.err
        answers[engine] = [r["completion"] for r in commands.read_jsonl(tmp_path / f"{engine}.jsonl")]
    assert answers["vllm"] == answers["local"]
    assert json.loads((tmp_path / "vllm.json").read_text())["num"] == 5


def test_rollouts_ahead_of_the_trainer(tmp_path, reward_file):
    """max_lag=1: the first batch is on-policy, every later one was sampled with weights one step old."""
    overrides = VLLM | {
        "reward.function": f"{reward_file}:score",
        "rollout.max_lag": 1,
        "algorithm.rollout_is": "token",
        "optim.learning_rate": 1e-3,
    }
    commands.train_ok(tmp_path / "run", overrides)
    lines = [line for line in commands.read_lines(tmp_path / "run") if line["step"]]
    assert [line["training/policy_lag"] for line in lines] == [0, 1, 1]
    assert [line["training/policy_version"] for line in lines] == [0, 0, 1]
    assert abs(lines[0]["rollout_corr/is_weight_mean"] - 1) < CLOSE
    assert lines[1]["rollout_corr/is_weight_max"] > 1 + 10 * CLOSE  # the policy has moved since


@pytest.mark.skipif(
    not os.environ.get("GRPO_JAX_TRAINER_PYTHON"), reason="GRPO_JAX_TRAINER_PYTHON: one without vLLM"
)
def test_an_engine_in_an_environment_of_its_own(tmp_path, reward_file):
    """The trainer's environment has no vLLM; `rollout.python` names this one, which has."""
    trainer = os.environ["GRPO_JAX_TRAINER_PYTHON"]
    overrides = VLLM | {"reward.function": f"{reward_file}:score", "trainer.num_steps": 1}
    arguments = [trainer, "-m", "grpo_jax.train", *commands.train_argv(tmp_path / "run", overrides)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    run = lambda *more: subprocess.run(
        [*arguments, *more], capture_output=True, text=True, cwd=commands.ROOT, env=environment, timeout=1200
    )
    without = run()
    assert without.returncode == 2
    assert "vLLM is not installed" in without.stderr and "--config.rollout.engine=local" in without.stderr
    result = run(f"--config.rollout.python={sys.executable}")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "engine 0 is ready" in result.stdout


@pytest.mark.parametrize("how", ["SIGTERM to the group", "Ray's death"])
def test_a_run_outlives_what_ends_its_engines(tmp_path, reward_file, how):
    """Both end the run in order, with a checkpoint of the last whole step, and nothing is left running."""
    import psutil

    overrides = VLLM | {"reward.function": f"{reward_file}:score", "trainer.num_steps": 100_000}
    overrides |= {
        "trainer.total_epochs": 100_000,
        "checkpoint.every_steps": 1,
        "eval.before_training": False,
    }
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PYTHONPATH"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "grpo_jax.train", *commands.train_argv(tmp_path / "run", overrides)],
        cwd=commands.ROOT, env=environment, start_new_session=True, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 300
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0][-2000:]
        time.sleep(0.1)
    others = psutil.Process(process.pid).children(recursive=True)
    sockets = [
        (member.name(), connection.laddr)
        for member in [psutil.Process(process.pid), *others]
        for connection in member.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(sockets) > 5
    assert {address.ip.removeprefix("::ffff:") for _, address in sockets} == {"127.0.0.1"}, sockets
    if how == "Ray's death":
        next(other for other in others if other.name() == "raylet").kill()
    else:
        for other in [process, *others]:
            if os.getpgid(other.pid) == process.pid:
                other.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    done = commands.read_lines(tmp_path / "run")[-1]["step"]
    if how == "Ray's death":
        assert process.returncode == 1
        assert "Ray's processes have ended: Ray has lost raylet" in out
        assert f"; the last good checkpoint is that of step {done}\n" in out
    else:
        assert process.returncode == 130, out[-2000:]
        assert f"Stopped after step {done}; everything is saved." in out
    assert (tmp_path / "run" / "checkpoints" / str(done)).is_dir()
    assert not psutil.wait_procs(others, timeout=60)[1]
