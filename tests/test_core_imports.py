"""The functional core can be imported where no engine, checkpointer, logger or tokenizer is installed."""

import pathlib
import subprocess
import sys

import pytest

SHELL_PACKAGES = ("ray", "vllm", "grain", "orbax", "tensorboardX", "transformers", "torch")
CORE_FOLDERS = ("config", "algorithm", "learner", "model", "rewards")
SHELL_FILES = ("grpo_jax.model.hf", "grpo_jax.model.random_model")
"""Files of these folders that read and write, and may need more."""


def modules_of(*folders):
    root = pathlib.Path(__file__).resolve().parents[1] / "grpo_jax"
    files = [file for folder in folders for file in sorted((root / folder).rglob("*.py"))]
    names = [".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files]
    return [name.removesuffix(".__init__") for name in names]


CORE_MODULES = ["grpo_jax.types", "grpo_jax.rollout.dynamic", "grpo_jax.rollout.batches"]
CORE_MODULES += ["grpo_jax.weight_sync.buckets"]
CORE_MODULES += [name for name in modules_of(*CORE_FOLDERS) if name not in SHELL_FILES]
ENGINE_MODULES = (
    "grpo_jax.rollout",
    "grpo_jax.rollout.base",
    "grpo_jax.rollout.vllm",
    "grpo_jax.rollout.vllm.api",
    "grpo_jax.rollout.vllm.server",
    "grpo_jax.weight_sync",
    "grpo_jax.weight_sync.wire",
    "grpo_jax.weight_sync.ipc",
    "grpo_jax.weight_sync.host",
    "grpo_jax.weight_sync.nccl",
    "grpo_jax.weight_sync.cuda",
)
"""Of both ends of a push: an engine's environment need not have JAX, nor the trainer's PyTorch."""
TRAINER_MODULES = (
    "grpo_jax.rollout.local",
    "grpo_jax.rollout.vllm.check",
    "grpo_jax.rollout.vllm.devices",
    "grpo_jax.rollout.vllm.options",
    "grpo_jax.rollout.vllm.cluster",
    "grpo_jax.rollout.vllm.replicas",
    "grpo_jax.rollout.vllm.requests",
    "grpo_jax.rollout.vllm.push",
    "grpo_jax.rollout.vllm.engine",
)
"""The trainer's side of the engines: vLLM and PyTorch may be absent, and Ray is imported when it is used."""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def run_without(packages, modules):
    # Importing is made to fail, as where the packages are absent: sys.modules alone would let pass a module
    # that imports one of them if it can.
    code = f"""
import importlib, sys
for package in {packages!r}:
    sys.modules[package] = None
for module in {modules!r}:
    importlib.import_module(module)
"""
    return run(code)


def test_the_core_imports_no_shell_package():
    result = run_without(SHELL_PACKAGES, CORE_MODULES)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "packages",
    [("jax", "jaxlib", "flax", "ml_dtypes", "optax", "transformers", "ml_collections"), SHELL_PACKAGES],
    ids=["an engine's environment", "a trainer's environment"],
)
def test_the_ends_of_a_push_need_nothing_of_each_other(packages):
    result = run_without(packages, ENGINE_MODULES)
    assert result.returncode == 0, result.stderr


def test_the_trainers_side_of_the_engines_needs_neither_vllm_nor_ray_to_be_imported():
    result = run_without(("vllm", "torch", "ray", "transformers"), TRAINER_MODULES)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", SHELL_PACKAGES)
def test_the_core_leaves_shell_packages_out_of_sys_modules(package, loaded_by_the_core):
    assert package not in loaded_by_the_core


@pytest.fixture(scope="module")
def loaded_by_the_core():
    result = run(f"import sys, {', '.join(CORE_MODULES)}; print('LOADED', *sys.modules)")
    assert result.returncode == 0, result.stderr
    return result.stdout.split("LOADED", 1)[1].split()
