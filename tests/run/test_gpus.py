"""Two runs of a user on the same GPUs: the second is told. No GPU takes part, only their names."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from grpo_jax.config import MeshSection
from grpo_jax.model.sharding import make_mesh
from grpo_jax.run import gpus

HOLD = """
import pathlib, sys, time
from grpo_jax.run import gpus
with gpus.hold(sys.argv[2:], pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(100)
"""


@pytest.fixture
def other_run(tmp_path):
    """A process that uses the GPUs b and c."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "gpus"), "GPU-b", "GPU-c"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


@pytest.fixture
def warnings():
    """What is said while the test runs."""
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    gpus.logger.addHandler(handler)
    yield lines
    gpus.logger.removeHandler(handler)


def test_a_run_is_told_of_another_on_its_gpus_while_that_lives(tmp_path, other_run, warnings):
    folder = tmp_path / "gpus"
    assert folder.stat().st_mode & 0o777 == 0o700
    with gpus.hold(["GPU-a"], folder):
        assert not warnings
    with gpus.hold(["GPU-a", "GPU-b", "GPU-c"], folder):
        (line,) = warnings
        assert line.startswith(f"WARNING: GPU 1, 2 of this run is used by process {other_run.pid} on host ")
        assert "CUDA_VISIBLE_DEVICES" in line and "\n" not in line
    other_run.send_signal(signal.SIGKILL)
    other_run.wait()
    with gpus.hold(["GPU-b", "GPU-c"], folder):
        assert len(warnings) == 1
        assert [path.name for path in sorted(folder.iterdir())] == [f"GPU-{x}.{os.getpid()}" for x in "bc"]
    assert not list(folder.iterdir())


def test_a_folder_that_cannot_be_used_ends_no_run(tmp_path, warnings):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "gpus").symlink_to(tmp_path / "elsewhere")
    with gpus.hold(["GPU-a"], tmp_path / "gpus"):
        (line,) = warnings
        assert line.startswith("WARNING: nobody can tell whether other runs use these GPUs")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_runs_on_cpus_write_nothing(tmp_path, warnings):
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices("cpu")[:1])
    assert gpus.gpus_of(mesh) == []
    with gpus.hold([], tmp_path / "gpus"):
        assert not warnings and not (tmp_path / "gpus").exists()
