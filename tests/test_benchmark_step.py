"""benchmarks/step.py: the command at a tiny workload, and what it makes of NVML's samples."""

import importlib
import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.mark.slow
def test_a_tiny_workload(tmp_path):
    command = [
        sys.executable, BENCHMARKS / "step.py", "--shape=tiny", "--engine=local", "--prompts=2", "--samples=2",
        "--prompt_tokens=48", "--new=4", "--warmup=1", "--steps=2", f"--folder={tmp_path}",
        f"--json={tmp_path / 'result.json'}", "--config.model.dtype=float32", "--config.model.remat=none",
        "--config.algorithm.kl_coef=0",
    ]  # fmt: skip
    # Compiling takes most of the time.
    env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    run = json.loads((tmp_path / "result.json").read_text())["runs"][0]
    assert [step["number"] for step in run["steps"]] == [2, 3]  # the first one warms up
    assert run["tokens"] == 2 * 2 * (48 + 4)
    assert "ref" not in run["phases"]  # the override of the configuration arrived
    first, second = (step["end"] for step in run["steps"])
    assert run["seconds"][1] == pytest.approx(second - first)
    # A step contains its phases.
    for seconds, step in zip(run["seconds"], run["steps"], strict=True):
        assert step["phases"]["gen"] + step["phases"]["update_actor"] < step["phases"]["step"] < seconds
    for label in ("step  ", "phases, s, medians", "tokens/s", "update MFU", "trainer's peak", "first step"):
        assert f"\n  {label}" in done.stdout
    # It was stopped before its end, between steps or within one, and the run's folder is gone.
    log = (tmp_path / "grpo_jax.log").read_text()
    assert "Interrupted" in log or "Stopped after step" in log
    assert {path.name for path in tmp_path.iterdir()} == {
        "model-tiny", "prompts.parquet", "grpo_jax.log", "result.json"
    }  # fmt: skip


@pytest.mark.slow
def test_ended_from_outside_it_ends_its_trainer(tmp_path):
    """`timeout` sends it SIGTERM. A trainer that stayed would hold the GPU of what is measured next."""
    command = [
        sys.executable, BENCHMARKS / "step.py", "--shape=tiny", "--engine=local", "--prompts=2", "--samples=2",
        "--prompt_tokens=48", "--new=4", "--steps=100", f"--folder={tmp_path}",
    ]  # fmt: skip
    log = tmp_path / "grpo_jax.log"
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"JAX_PLATFORMS": "cpu"}) as process:
        deadline = time.time() + 120
        while not (log.exists() and "prompts" in log.read_text()) and time.time() < deadline:
            time.sleep(0.1)
        trainers = of_session_leaders(process.pid)
        assert len(trainers) == 1
        for _ in range(2):
            process.terminate()
            time.sleep(0.3)
        assert process.wait(120) == 128 + 15
    assert not Path(f"/proc/{trainers[0]}").exists()


def of_session_leaders(parent):
    """Children of a process that lead a session of their own."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if os.getsid(int(child)) == int(child)]


def test_idle_share_and_peak_over_two_gpus(monkeypatch):
    nvml = types.SimpleNamespace(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetHandleByUUID=lambda name: int(name.removeprefix("GPU-")),
        nvmlDeviceGetUtilizationRates=lambda gpu: types.SimpleNamespace(gpu=(90, 50)[gpu - 1]),
        nvmlDeviceGetMemoryInfo=lambda gpu: types.SimpleNamespace(used=gpu * 10**9),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,GPU-2")
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_watch = importlib.import_module("gpu_watch")
    with gpu_watch.GpuWatch(period_s=0.001) as watch:
        start = time.time()
        time.sleep(0.1)
    assert watch.idle_share(start, time.time()) == pytest.approx(1 - (0.9 + 0.5) / 2)
    assert watch.idle_share(start - 2, start - 1) is None
    assert watch.peak_bytes() == 2 * 10**9


def test_no_gpu_no_samples(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)  # importing it fails
    monkeypatch.syspath_prepend(BENCHMARKS)
    gpu_watch = importlib.import_module("gpu_watch")
    with gpu_watch.GpuWatch() as watch:
        watch.wait_until_free(0, timeout_s=5)
    assert watch.idle_share(0, time.time()) is None
    assert watch.peak_bytes() is None


def test_the_console_line_of_verl(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS / "peers")
    verl_run = importlib.import_module("verl_run")
    line = (
        "(TaskRunner pid=7) step:2 - actor/entropy:np.float64(11.62) - critic/score/mean:0.43 - "
        "timing_s/gen:16.1 - timing_s/ref:3.8 - response_length/mean:511.5 - perf/mfu/actor:3.3e-01\n"
    )
    step = verl_run.parse_step(line, 5.0)
    assert (step["step"], step["time"], step["generation_s"], step["mfu"]) == (2, 5.0, 16.1, 0.33)
    assert step["phases"] == {"gen": 16.1, "ref": 3.8}
    assert (step["mean_length"], step["reward"]) == (511.5, 0.43)
    assert verl_run.parse_step("Training Progress: step:", 5.0) is None
