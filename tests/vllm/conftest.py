"""Engines that several tests share, and one Ray for all of them."""

import os

import pytest

# One process an engine, no compiler: half a minute less for each engine.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="session", autouse=True)
def ray_cluster():
    """Engines join it instead of starting one each."""
    import ray

    gpus = {"num_gpus": 1} if os.environ.get("GRPO_JAX_TEST_GPU") == "1" else {"num_gpus": 0}
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, **gpus)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """family -> folder of a tiny random model."""
    import vllm_helpers as helpers

    root = tmp_path_factory.mktemp("models")
    return {family: helpers.make_model(root / family, family) for family in helpers.FAMILIES}
