"""The functional core can be imported where no engine, checkpointer, logger or tokenizer is installed."""

import importlib.util
import subprocess
import sys

import pytest

SHELL_PACKAGES = ("ray", "vllm", "grain", "orbax", "tensorboardX", "transformers", "torch")
CORE_MODULES = (
    "grpo_jax.config",
    "grpo_jax.types",
    "grpo_jax.rewards",
    "grpo_jax.rewards.base",
    "grpo_jax.rewards.gsm8k",
    "grpo_jax.rewards.math",
    "grpo_jax.advantages",
    "grpo_jax.batching",
    "grpo_jax.losses",
    "grpo_jax.update",
    "grpo_jax.model",
    "grpo_jax.model.transformer",
    "grpo_jax.model.attention",
    "grpo_jax.model.logprobs",
    "grpo_jax.model.sharding",
)


def exists(module):
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_core_imports_no_shell_package():
    modules = [module for module in CORE_MODULES if exists(module)]
    # Importing is made to fail, as where the packages are absent: sys.modules alone would let pass a module
    # that imports one of them if it can.
    code = f"""
import importlib, sys
for package in {SHELL_PACKAGES!r}:
    sys.modules[package] = None
for module in {modules!r}:
    importlib.import_module(module)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", SHELL_PACKAGES)
def test_the_core_leaves_shell_packages_out_of_sys_modules(package, loaded_by_the_core):
    assert package not in loaded_by_the_core


@pytest.fixture(scope="module")
def loaded_by_the_core():
    modules = [module for module in CORE_MODULES if exists(module)]
    result = run(f"import sys, {', '.join(modules)}; print('LOADED', *sys.modules)")
    assert result.returncode == 0, result.stderr
    return result.stdout.split("LOADED", 1)[1].split()
