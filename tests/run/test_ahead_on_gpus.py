"""The programs of test_ahead.py compiled for H100s, where JAX has its CUDA plugin; the GPUs need not be there."""

import dataclasses

import jax.numpy as jnp
import pytest
from test_ahead import CHANGES, MODEL, gradient_bytes, gsm8k

from grpo_jax.config import ConfigError
from grpo_jax.learner.memory import abstract_mesh
from grpo_jax.model.counts import dense_weights, head_weights, layer_weights
from grpo_jax.model.sharding import make_mesh
from grpo_jax.run.ahead import compile_run
from grpo_jax.run.memory import plan_run
from grpo_jax.run.targets import describe

pytestmark = pytest.mark.gpu

CUDNN = dataclasses.replace(MODEL, attention="cudnn", dtype=jnp.dtype("bfloat16"))


def test_two_hosts_of_eight():
    """Memory as counted, products as by hand; an eighth of the gradients goes to the other host once an update."""
    config = gsm8k(**CHANGES | {"mesh.data": 2})
    found = compile_run(config, CUDNN, describe("h100", 16).devices)
    plan = plan_run(config, CUDNN, abstract_mesh(2, 8, 1))
    assert found.phases["optimizer"] == pytest.approx(plan.phases["optimizer"], rel=0.01)
    programs = {program.name: program.facts for program in found.programs}
    products = 2 * 2 * 1024 * (layer_weights(MODEL) + head_weights(MODEL))
    assert programs["score"].flops == pytest.approx(products, rel=0.01)
    assert set(programs["score"].kernels) == {"__cudnn$fmhaSoftmax"}
    assert "reduce-scatter" in programs["gradients"].traffic
    sums = gradient_bytes(MODEL, make_mesh(config.mesh, describe("h100", 16).devices))
    assert sums <= programs["sum of gradients"].traffic["all-reduce"].num_bytes < sums + 4096
    assert programs["gradients"].traffic["all-reduce"].num_bytes < 0.1 * sums


@pytest.mark.parametrize("num", [1, 8])
def test_grouped_experts(num):
    """The kernel in the programs of a run. XLA's count of FLOPs does not look into it.

    On eight devices each gathers the experts of a layer, 200 MB, which are many beside the rest of this model.
    """
    model = dataclasses.replace(
        CUDNN, hidden_size=1024, intermediate_size=512, num_experts=64, experts_per_token=4, experts="grouped"
    )
    config = gsm8k(**CHANGES | {"mesh.fsdp": num, "actor.micro_batch_size_per_device": 8})
    found = compile_run(config, model, describe("h100", num).devices)
    plan = plan_run(config, model, abstract_mesh(1, num, 1))
    for phase in ("score", "update", "sampling"):
        assert found.phases[phase] == pytest.approx(plan.need(phase), rel=0.1)
    (score,) = (program.facts for program in found.programs if program.name == "score")
    plain = 2 * 8 * 1024 * (dense_weights(model) + head_weights(model))
    assert score.flops == pytest.approx(plain, rel=0.01)


def test_what_a_described_gpu_lacks():
    with pytest.raises(ConfigError, match="needs optim"):
        compile_run(gsm8k(**CHANGES | {"optim.offload": True}), CUDNN, describe("h200", 8).devices)
    with pytest.raises(ConfigError, match="a multiple of 8"):
        describe("h100", 12)
