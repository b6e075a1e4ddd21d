"""Rollouts and weights with the real vLLM in a Ray actor, against transformers."""

import contextlib

import pytest
import vllm_helpers as helpers

from grpo_jax.rollout import SamplingParams

pytestmark = pytest.mark.vllm

SAMPLED = SamplingParams(num_samples=3, temperature=0.7, max_tokens=24)
GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)
LONG = 200  # tokens; longer than a block of vLLM's cache on a CPU (128) and on a GPU (16)


@pytest.fixture(scope="module", params=list(helpers.FAMILIES))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def served(family, models, tmp_path_factory):
    """(engine, folder, inspected, parameters of version 1, folder of version 1); version 0 was pushed first."""
    mesh = helpers.mesh_of(data=1, fsdp=1)
    inspected, params = helpers.load(models[family], mesh)
    with contextlib.closing(helpers.engine_for(models[family], mesh)) as engine:
        engine.load_weights(params, version=0)
        yield engine, inspected, params


def test_log_probabilities_are_transformers(served, models, family):
    engine, _, params = served
    engine.load_weights(params, version=0)
    groups = engine.generate(helpers.prompts([5, LONG, 20, 33]), SAMPLED, seed=1)
    assert [len(group.completions) for group in groups] == [3] * 4
    assert {c.policy_version for group in groups for c in group.completions} == {0}
    worst = helpers.worst_difference(groups, helpers.reference(models[family]), temperature=0.7)
    assert worst < helpers.TOLERANCE  # on a CPU the largest seen is 1e-5


def test_greedy_text_follows_the_weights(served, models, family, tmp_path):
    """With and without a change of weights; a cached prefix of the old ones would show at once."""
    engine, inspected, params = served
    batch = helpers.prompts([7, LONG])
    moved = helpers.perturbed(params, seed=3)
    new = helpers.reference(helpers.save_as_folder(moved, inspected.config, models[family], tmp_path / "new"))
    old = helpers.reference(models[family])
    texts = {}
    for version, weights in ((0, params), (1, moved), (2, params)):
        engine.load_weights(weights, version=version)
        groups = engine.generate(batch, GREEDY, seed=0)
        assert {c.policy_version for g in groups for c in g.completions} == {version}
        texts[version] = [group.completions[0].token_ids for group in groups]
    expected_old = [helpers.reference_greedy(old, p.token_ids, 24) for p in batch]
    expected_new = [helpers.reference_greedy(new, p.token_ids, 24) for p in batch]
    assert expected_old != expected_new  # otherwise this test could not fail
    assert texts == {0: expected_old, 1: expected_new, 2: expected_old}


def test_seeds(served):
    engine, *_ = served
    batch = helpers.prompts([6, 9])
    first, again = (engine.generate(batch, SAMPLED, seed=5) for _ in range(2))
    other = engine.generate(batch, SAMPLED, seed=6)
    ids = lambda groups: [c.token_ids for g in groups for c in g.completions]
    assert ids(first) == ids(again)
    assert ids(first) != ids(other)
    assert len(set(ids(first)[:3])) == 3  # the samples of a prompt are drawn apart
