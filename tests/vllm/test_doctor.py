"""`python -m grpo_jax.doctor` with the real vLLM and the real Ray: what is well, and what is not."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands
import vllm_helpers as helpers

pytestmark = pytest.mark.vllm


@pytest.fixture
def ray_folder():
    """Where Ray keeps its files; its path is short, since those of sockets may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="dr-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from grpo_jax.config import RandomModelSection
    from grpo_jax.model import random_model

    folder = tmp_path_factory.mktemp("doctor") / "model"
    tokenizer = random_model.make_tokenizer(["What is the capital of France? 1 + 2 = 3"] * 9, 300)
    sizes = dict(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2, num_kv_heads=1
    )
    mesh = helpers.mesh_of()
    random_model.make_random_model(folder, RandomModelSection(**sizes), tokenizer, seed=0, mesh=mesh)
    return folder


def environment(**variables):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return kept | {"PYTHONPATH": str(commands.ROOT)} | variables


def run(*argv, **variables):
    """(exit code, what --json prints, stderr)"""
    done = subprocess.run(
        [sys.executable, "-m", "grpo_jax.doctor", "--json", *argv],
        capture_output=True, text=True, cwd=commands.ROOT, timeout=900,
        env=environment(**variables),
    )  # fmt: skip
    assert done.stdout.startswith("{"), done.stdout[-2000:] + done.stderr[-2000:]
    return done.returncode, json.loads(done.stdout), done.stderr


def test_vllm_is_imported_ray_comes_and_goes_and_the_engine_speaks(tmp_path, model_folder, ray_folder):
    overrides = {
        "model.path": model_folder,
        "rollout.engine": "vllm",
        "rollout.enforce_eager": True,
        "rollout.gpu_memory_utilization": 0.2,
        "rollout.max_num_seqs": 8,
        "rollout.probe_threshold": 0.02 if helpers.IS_GPU else 1e-4,
    }
    argv = commands.train_argv(tmp_path / "run", overrides)
    code, report, err = run(*argv, "--sample", RAY_TMPDIR=str(ray_folder))
    checks = {check["name"]: check for check in report["checks"]}
    assert code == 0 and report["ok"], (report, err[-2000:])
    names = {"vLLM", "vLLM's packages", "vLLM's import", "ports", "Ray", "data", "disk", "sample"}
    assert names <= set(checks)
    assert "torch 2." in checks["vLLM's packages"]["found"]
    assert checks["vLLM's import"]["found"].endswith("for cuda" if helpers.IS_GPU else "for cpu")
    assert "1 place(s) reserved, a process run, ended" in checks["Ray"]["found"]
    assert "engine and trainer differ by" in checks["sample"]["found"]
    assert not list(ray_folder.iterdir()) and not (tmp_path / "run").exists()


def test_a_ray_that_cannot_start_is_named_with_its_cure(ray_folder):
    """In a process of its own: this one has joined the Ray of all tests."""
    deep = ray_folder / ("d" * 90)
    deep.mkdir()
    code = (
        "import json, os, sys\n"
        "from grpo_jax.config import RolloutSection\n"
        "from grpo_jax.rollout.vllm.trial import try_ray\n"
        "for folder in sys.argv[1:]:\n"
        "    os.environ['RAY_TMPDIR'] = folder\n"
        "    print(json.dumps(try_ray(RolloutSection(engine='vllm'), uses_gpus=False)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ray_folder / "absent", deep],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip
    absent, long = map(json.loads, done.stdout.splitlines()[-2:])
    assert absent[:2] == ["Ray", False] and "No such file or directory" in absent[2]
    assert long[:2] == ["Ray", False] and "107 bytes" in long[2] and long[3] == "export RAY_TMPDIR=/tmp"
