"""benchmarks/real_model.py: what it makes of the lines of several runs, and the command with a tiny model."""

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Imports a module of benchmarks/ by its name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def line(step, time=0.0, **numbers):
    names = {"reward": "reward/mean", "accuracy": "val/accuracy", "kl": "kl/mean"}
    return {"step": step, "time": time} | {names[name]: value for name, value in numbers.items()}


def test_points_leave_out_what_a_line_lacks(load):
    curves = load("curves")
    lines = [line(0, accuracy=0.25), line(1, reward=0.5), line(2, reward=None), line(3, reward=0.0)]
    assert curves.points(lines, "reward/mean") == {1: 0.5, 3: 0.0}
    assert curves.points(lines, "val/accuracy") == {0: 0.25}
    assert curves.points([], "val/accuracy") == {}


def test_seconds_are_those_between_the_ends_of_neighbouring_steps(load):
    # Step 0 is the validation before the first step; between 2 and 4 a line is missing.
    lines = [line(0, 5.0), line(1, 90.0), line(2, 93.0), line(4, 99.0), line(5, 103.5)]
    assert load("curves").step_seconds(lines) == [3.0, 4.5]


def test_a_band_is_of_the_steps_that_all_runs_have(load):
    band = load("curves").band
    runs = [{0: 0.1, 20: 0.4, 40: 0.6}, {20: 0.2, 0: 0.1}, {0: 0.4, 20: 0.3, 60: 0.9}]
    (first, second) = band(runs)
    assert first == (0, pytest.approx(0.2), 0.1, 0.4)
    assert second == (20, pytest.approx(0.3), 0.2, 0.4)
    assert band([{3: 0.5}]) == [(3, 0.5, 0.5, 0.5)]
    assert band([{1: 0.5}, {2: 0.5}]) == []


def test_of_two_files_the_run_that_came_farther_counts(load, tmp_path):
    report = load("curve_report")
    short = report.Run("grpo_jax", "float32", 0, [line(1, reward=0.1)])
    long = report.Run("grpo_jax", "float32", 0, [line(1, reward=0.1), line(2, reward=0.2)])
    peer = report.Run("TRL", "bfloat16", 0, [line(1, reward=0.3)])
    second = report.Run("grpo_jax", "bfloat16", 1, [line(1, reward=0.4)])
    report.write_json([peer, short], tmp_path / "0.json")
    report.write_json([long, second], tmp_path / "1.json")
    read = report.read_runs([tmp_path / "1.json", tmp_path / "0.json"])
    assert report.merge(read) == [second, long, peer]
    assert list(report.by_label([second, long, peer])) == [
        "grpo_jax bfloat16",
        "grpo_jax float32",
        "TRL bfloat16",
    ]


@pytest.mark.parametrize("content", ["[", "{}", '[{"side": "x"}]', "[]", None])
def test_a_file_that_is_none_of_ours_is_one_line(load, tmp_path, content):
    file = tmp_path / "runs.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match=r"^error: --draw: "):
        load("curve_report").read_runs([str(file)])


def test_a_row_of_the_table(load):
    report = load("curve_report")
    lines = [
        line(0, 1.0, accuracy=0.1),
        line(1, 50.0, reward=0.2, kl=1e-9),
        line(2, 54.0, reward=0.3, kl=0.1),
    ]
    lines += [line(3, 60.0, reward=0.4), line(4, 65.0, reward=0.5, accuracy=0.625)]
    for number, values in zip((0.001, 0.003, 0.002, 0.9), lines[1:], strict=True):
        values[report.PROBS_DIFF] = number  # the median is 0.0025
    row = report.table_row(report.Run("grpo_jax", "float16", 0, lines))
    assert row == {
        "steps": "4", "before": "10.0%", "after": "62.5%", "last quarter": "0.5", "no spread": "-",
        "s/step": "5", "probs diff": "0.0025", "mult error": "-", "kl at 1": "1e-09",
    }  # fmt: skip
    assert set(report.table_row(report.Run("TRL", "float16", 0, [])).values()) == {"0", "-"}


def test_trl_gets_our_settings(load):
    config = load("common").shipped("smollm")
    settings = load("curves").trl_settings(config, seed=3, micro_rows=64, dtype="float16")
    # 64 prompts x 16 completions are 16 micro-batches of 64.
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (64, 16)
    assert (settings["beta"], settings["temperature"], settings["learning_rate"]) == (0.001, 0.8, 2e-5)
    assert (settings["max_steps"], settings["seed"]) == (100, 3)
    assert (settings["bf16"], settings["fp16"]) == (False, True)
    with pytest.raises(SystemExit, match=r"1024 completions a step are no multiple of .* 60"):
        load("curves").trl_settings(config, seed=3, micro_rows=60, dtype="float16")


def test_a_command_ends_well_or_badly_or_is_stopped(load, tmp_path):
    curves, log = load("curves"), tmp_path / "logs" / "run.log"
    curves.run([sys.executable, "-c", "print('fine')"], log)
    assert log.read_text() == "fine\n"
    with pytest.raises(SystemExit, match=r"(?s)exit code 3:\n.*trouble"):
        curves.run([sys.executable, "-c", "print('trouble'); raise SystemExit(3)"], log)
    saves = "import signal, time\n"
    saves += "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), exit(130)))\nprint('ready')\n"
    saves += "time.sleep(60)"
    with pytest.raises(curves.OutOfTime, match="run"):
        curves.run([sys.executable, "-c", saves], log, deadline=time.time() + 2)
    assert log.read_text() == "ready\nsaved\n"


@pytest.mark.slow
def test_a_tiny_model_in_two_pieces_and_their_picture(load, tmp_path):
    sizes = dict(vocab=512, hidden=16, mlp=32, layers=2, heads=2, kv_heads=1)
    load("common").write_random_model(tmp_path / "model", SimpleNamespace(**sizes))

    def command(*arguments):
        env = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
        words = [sys.executable, BENCHMARKS / "real_model.py", *arguments]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        (source / f"{split}.jsonl").write_text((ROOT / f"tests/data/gsm8k_sample_{split}.jsonl").read_text())
    flags = [
        f"--model={tmp_path / 'model'}", f"--source={source}", f"--folder={tmp_path / 'runs'}",
        "--config.sft.num_steps=0", "--config.data.train_batch_size=2", "--config.algorithm.group_size=2",
        "--config.data.max_prompt_length=1024", "--config.data.max_response_length=4",
        "--config.eval.num_prompts=2", "--config.model.remat=none", "--steps=2", "--eval_every=1",
        "--config.actor.micro_batch_size_per_device=2",
    ]  # fmt: skip
    for seed in (0, 1):
        command(*flags, f"--seeds={seed}", f"--json={tmp_path / f'{seed}.json'}")
    (run,) = json.loads((tmp_path / "0.json").read_text())
    assert (run["side"], run["dtype"], run["seed"]) == ("grpo_jax", "float32", 0)
    assert [entry["step"] for entry in run["lines"]] == [0, 1, 2]
    out = command("--draw=0.json,1.json", "--picture=both.png")
    assert "step,grpo_jax float32 0,grpo_jax float32 1\n0,0.0000,0.0000\n" in out
    assert "  grpo_jax float32, 2 seeds: 0: 0.0% (0.0% to 0.0%), 1: " in out
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
