"""One Ray for all tests, of two nodes, and the models that engines share."""

import os

import pytest

# No compiler, and vLLM's engine within the actor: half a minute less for each engine. Tests that want its own
# process, as it is by default, set VLLM_ENABLE_V1_MULTIPROCESSING themselves.
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
IS_GPU = os.environ.get("GRPO_JAX_TEST_GPU") == "1"
# JAX takes three quarters of a GPU otherwise, before an engine asks for its share.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.3")


@pytest.fixture(scope="session", autouse=True)
def ray_nodes():
    """Engines join it instead of starting one each. Returns the ids of the nodes: the trainer's, and another."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "num_gpus": int(IS_GPU)})
    ray.init(cluster.address, log_to_driver=False, namespace="grpo_jax_tests")
    here = ray.get_runtime_context().get_node_id()
    yield cluster, here
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """family -> folder of a tiny random model."""
    import vllm_helpers as helpers

    root = tmp_path_factory.mktemp("models")
    return {family: helpers.make_model(root / family, family) for family in helpers.FAMILIES}
