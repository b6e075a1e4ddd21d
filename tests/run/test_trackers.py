"""Weights & Biases, MLflow and trackio: the real clients, offline. Where a package is missing: one line."""

import json
import logging
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_jax.config import Config, ConfigError, LoggingSection
from grpo_jax.run import trackers
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import MetricsWriter

ROOT = Path(__file__).resolve().parents[2]
LOGGERS = ("wandb", "mlflow", "trackio")

# Steps 1 and 2, then a start that goes on from step 1: 2 again, and 3.
RUN = """
import pathlib, sys
from grpo_jax.config import Config, LoggingSection
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import MetricsWriter
section = LoggingSection(loggers=(sys.argv[2],), project_name="mine", experiment_name="first")
workdir = Workdir(pathlib.Path(sys.argv[1]))
for resume_step, steps in ((None, (1, 2)), (1, (2, 3))):
    writer = MetricsWriter(workdir, Config(logging=section), resume_step=resume_step)
    for step in steps:
        writer.write({"reward/mean": step / 4, "val/pass@4": float("nan")}, step=step, epoch=1)
        writer.write_text("rollouts", [f"<b>sample</b> of {step}\\nline"], step=step)
    writer.close()
"""


def run(folder, name):
    pytest.importorskip(name)
    environment = {"WANDB_MODE": "offline", "PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(folder)}
    command = [sys.executable, "-c", RUN, folder, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return json.loads((folder / "trackers.json").read_text())[name]


def test_wandb_offline(tmp_path):
    run_id = run(tmp_path, "wandb")
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2  # one a start; `wandb sync` makes one run of what has one id
    assert {file.name for file in files} == {f"run-{run_id}.wandb"}
    for file, values in zip(files, ((b"0.25", b"0.5"), (b"0.5", b"0.75")), strict=True):
        content = file.read_bytes()
        assert b"reward/mean" in content and b"pass@4" not in content
        assert all(value in content for value in values)
    tables = sorted((tmp_path / "wandb").glob("offline-run-*/files/media/table/rollouts*.json"))
    shown = [json.loads(table.read_text()) for table in tables]
    assert sorted(row["data"][0][0] for row in shown) == [1, 2, 2, 3]
    assert shown[0]["columns"] == ["step", "sample"] and "<b>sample</b> of" in shown[0]["data"][0][1]


def test_mlflow_in_the_workdir(tmp_path):
    run_id = run(tmp_path, "mlflow")
    (tag,) = (tmp_path / "mlruns").glob("*/*/tags/grpo_jax.id")  # one run
    assert tag.read_text() == run_id
    folder = tag.parents[1]
    lines = [line.split() for line in (folder / "metrics" / "reward" / "mean").read_text().splitlines()]
    assert [(float(value), int(step)) for _, value, step, *_ in lines] == [
        (0.25, 1),
        (0.5, 2),
        (0.5, 2),
        (0.75, 3),
    ]
    samples = sorted((folder / "artifacts" / "rollouts").iterdir())
    assert [path.name for path in samples] == [f"step-00000{step}.json" for step in (1, 2, 3)]
    table = json.loads(samples[2].read_text())
    assert table == {"columns": ["step", "sample"], "data": [[3, "<b>sample</b> of 3\nline"]]}
    config = json.loads((folder / "artifacts" / "config.json").read_text())
    assert config["logging"]["experiment_name"] == "first"


def test_trackio_in_the_workdir(tmp_path):
    run_id = run(tmp_path, "trackio")
    (file,) = (tmp_path / "trackio").glob("*.db")
    rows = sqlite3.connect(file).execute("select run_name, step, metrics from metrics order by id").fetchall()
    assert {name for name, _, _ in rows} == {f"first-{run_id[:6]}"}
    logged = [(step, json.loads(values)) for _, step, values in rows]
    points = [(step, values["reward/mean"]) for step, values in logged if "reward/mean" in values]
    assert points == [(1, 0.25), (2, 0.5), (2, 0.5), (3, 0.75)]
    assert [step for step, values in logged if "rollouts_samples" in values] == [1, 2, 2, 3]


@pytest.mark.parametrize("name", LOGGERS)
def test_a_package_that_is_missing_is_named_before_training(name, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=rf"logging.loggers='{name}': .*pip install 'grpo_jax\[{name}\]'"):
        trackers.check_trackers(["console", name])
    trackers.check_trackers(["console", "tensorboard"])


def test_wandb_needs_a_key_or_offline_mode(monkeypatch, tmp_path):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _: "there")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"logging.loggers='wandb': has no key: run `wandb login`, or set"):
        trackers.check_trackers(["wandb"])
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_API_KEY", "k")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            trackers.check_trackers(["wandb"])
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password k\n")
    trackers.check_trackers(["wandb"])
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.mine.org")
    with pytest.raises(ConfigError, match="has no key"):
        trackers.check_trackers(["wandb"])


def test_a_service_that_fails_is_told_of_once_and_training_goes_on(monkeypatch, tmp_path, caplog):
    calls = []

    class Broken:
        def write(self, values, step):
            calls.append(step)
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(trackers.MAKERS, "wandb", lambda *_: Broken())
    monkeypatch.setitem(trackers.MAKERS, "mlflow", lambda *_: 1 / 0)
    section = LoggingSection(loggers=("wandb", "mlflow"))
    with caplog.at_level(logging.WARNING):
        writer = MetricsWriter(Workdir(tmp_path), Config(logging=section), resume_step=None)
        for step in (1, 2):
            writer.write({"reward/mean": 0.5}, step=step, epoch=1)
        writer.close()
    assert calls == [1]
    assert [record.getMessage() for record in caplog.records] == [
        "WARNING: mlflow gets no more points, training goes on: division by zero",
        "WARNING: wandb gets no more points, training goes on: no route to host",
    ]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_damaged_ids_are_made_anew_and_good_ones_are_kept(tmp_path):
    file = tmp_path / "trackers.json"
    first = trackers._read_ids(file, ["wandb"])
    assert trackers._read_ids(file, ["wandb", "mlflow"])["wandb"] == first["wandb"]
    for damage in ("", "[1]", "{"):
        file.write_text(damage)
        again = trackers._read_ids(file, ["wandb"])
        assert again["wandb"] != first["wandb"] and json.loads(file.read_text()) == again
