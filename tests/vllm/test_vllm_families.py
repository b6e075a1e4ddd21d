"""Every row of `family_models.ROWS` in the real vLLM: pushed weights arrive, the text is that of transformers."""

import contextlib
import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
import vllm_helpers as helpers
from family_models import FAMILY_ROWS, ROWS, kind_and_fields

from grpo_jax.config import LoraSection
from grpo_jax.model.lora import init_adapters, join
from grpo_jax.model.peft import with_adapters
from grpo_jax.rollout import SamplingParams
from grpo_jax.weight_sync import WeightSyncError

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)
SAMPLED = SamplingParams(num_samples=3, temperature=0.7, max_tokens=24)
REFUSED = {"qwen3-windows"}
"""By vLLM, which knows no windows in some of Qwen's layers."""
LENGTHS = [5, 20, 60]  # shorter and longer than the windows of the rows


OLD = {"qwen2", "qwen3", "llama"}
"""Families of test_one_engine.py."""
SHORT = {row for row in FAMILY_ROWS if ROWS[row][0] not in OLD} | {"qwen2-yarn"}
"""The others take a minute each, for a switch that the tests of the trainer know already."""
PARAMS = [
    pytest.param(row, marks=() if row in SHORT else pytest.mark.slow) for row in ROWS if row not in REFUSED
]


@pytest.fixture(params=PARAMS)
def folder(request, tmp_path):
    kind, fields = kind_and_fields(request.param, {"head_dim": 32} | helpers.SIZES)
    return helpers.write_model(tmp_path / "model", kind, fields)


def test_pushed_weights_arrive(folder, tmp_path, monkeypatch):
    """Greedy text before and after a change of all weights, and log-probabilities of sampled text after it.

    Two devices, and on CPUs buckets of two parts as by NCCL: vLLM has to load every tensor by its rows.
    """
    mesh = helpers.mesh_of() if helpers.IS_GPU else helpers.mesh_of(fsdp=2)
    monkeypatch.setattr("grpo_jax.rollout.vllm.engine.num_parts", lambda transport, mesh: mesh.size)
    inspected, params = helpers.load(folder, mesh)
    moved = helpers.perturbed(params, seed=3)
    new = helpers.save_as_folder(moved, inspected.config, folder, tmp_path / "new")
    models = [helpers.reference(path) for path in (folder, new)]
    batch = helpers.prompts(LENGTHS)
    expected = [
        [helpers.reference_greedy(model, prompt.token_ids, 24) for prompt in batch] for model in models
    ]
    assert expected[0] != expected[1]  # otherwise this test could not fail
    engine = helpers.engine_for(folder, mesh, max_model_len=min(512, inspected.max_position))
    try:
        for version, weights in enumerate((params, moved)):
            engine.load_weights(weights, version=version)
            groups = engine.generate(batch, GREEDY, seed=0)
            helpers.check_greedy(groups, models[version], expected[version])
        groups = engine.generate(batch, SAMPLED, seed=1)
    finally:
        engine.close()
    assert helpers.worst_difference(groups, models[1], temperature=0.7) < helpers.TOLERANCE
    assert all(np.isfinite(c.sampler_logprobs).all() for group in groups for c in group.completions)


ADAPTED = [
    pytest.param(row, marks=() if row == "phi3" else pytest.mark.slow)
    for row in FAMILY_ROWS
    if ROWS[row][0] != "qwen3_moe"
]


@pytest.mark.skipif(helpers.IS_GPU, reason="vLLM's kernels for adapters do not compute in float32 on GPUs")
@pytest.mark.parametrize("row", ADAPTED)
def test_adapters_alone_arrive(row, tmp_path, monkeypatch):
    """Phi-3 has one for several kernels. Sampled text has the probabilities of the merged model.

    vLLM has one slot for two versions: rollouts under way get theirs into it again after the push of the next.
    Two devices and two parts, as `test_pushed_weights_arrive`.
    """
    monkeypatch.setattr("grpo_jax.rollout.vllm.engine.num_parts", lambda transport, mesh: mesh.size)
    kind, fields = kind_and_fields(row, {"head_dim": 32} | helpers.SIZES)
    path = helpers.write_model(tmp_path / "model", kind, fields)
    mesh = helpers.mesh_of() if helpers.IS_GPU else helpers.mesh_of(fsdp=2)
    inspected, frozen = helpers.load(path, mesh)
    config = with_adapters(inspected.config, LoraSection(rank=4, alpha=8.0))
    begin = init_adapters(config, jax.random.key(1), mesh)
    policies = [join(frozen, helpers.perturbed(begin, seed)) for seed in (2, 3)]
    folders = [tmp_path / f"merged-{version}" for version in range(2)]
    for policy, target in zip(policies, folders, strict=True):
        helpers.save_as_folder(policy, config, path, target)
    folder = dataclasses.replace(inspected, config=config)
    batch = helpers.prompts(LENGTHS)
    max_len = min(512, inspected.max_position)
    sampling = SamplingParams(num_samples=3, temperature=0.7, max_tokens=max_len - max(LENGTHS))
    made = helpers.engine_for(
        folder, mesh, lora_push="adapter", max_model_len=max_len, engine_args=("max_loras=1",)
    )
    with contextlib.closing(made) as engine:
        engine.load_weights(policies[0], version=0)
        wait = engine.submit(batch, sampling, seed=1)
        helpers.wait_for_tokens(engine, 5)
        engine.load_weights(policies[1], version=1)
        batches = [wait(), engine.generate(batch, SAMPLED, seed=1)]
    for version, (groups, merged) in enumerate(zip(batches, folders, strict=True)):
        assert {c.policy_version for group in groups for c in group.completions} == {version}
        assert helpers.worst_difference(groups, helpers.reference(merged), 0.7) < helpers.TOLERANCE
        # The adapters do something, and each version something else.
        for other in (path, folders[1 - version]):
            assert helpers.worst_difference(groups, helpers.reference(other), 0.7) > 0.1


def test_experts_in_another_layout_are_refused():
    """This back end swaps gate and up once they are loaded, where a push would not find them."""
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend

    from grpo_jax.rollout.vllm.worker import record_load_plan

    model = torch.nn.ModuleDict({"experts": torch.nn.Module()})
    method = SimpleNamespace(unquantized_backend=UnquantizedMoeBackend.FLASHINFER_CUTLASS)
    model["experts"].quant_method = method
    with pytest.raises(
        WeightSyncError, match=r"experts experts in a layout of FlashInfer CUTLASS.*moe_backend"
    ):
        record_load_plan(model, None)
