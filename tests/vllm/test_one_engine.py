"""One engine at a time with the real vLLM: agreement with transformers and the trainer, limits, faults."""

import dataclasses
import functools
import os
import signal
import sys
import threading
import time

import jax
import numpy as np
import pytest
import vllm_helpers as helpers

from grpo_jax.learner.batching import make_train_batch
from grpo_jax.learner.forward import make_forward_step, score_rows
from grpo_jax.rollout import EngineError, SamplingParams
from grpo_jax.weight_sync import WeightSyncError

pytestmark = pytest.mark.vllm

SAMPLED = SamplingParams(num_samples=3, temperature=0.7, max_tokens=24)
GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)
LONG = 200  # tokens; longer than a block of vLLM's cache on a CPU (128) and on a GPU (16)
FAULTY = "qwen2-untied"
"""The family of the engine that changes and faults are tried on."""


class Engines:
    """One engine for each family, with version 0 of its weights. On a CPU they all start side by side."""

    def __init__(self, models):
        self._models, self._made = models, {}

    def __getitem__(self, family):
        if family not in self._made:
            if helpers.IS_GPU:
                self.close()  # Ray has one GPU to give
            for name in [family] if helpers.IS_GPU else helpers.FAMILIES:
                self._made[name] = self._make(name)
        made = self._made[family]
        if not made.is_ready:
            made.engine.load_weights(made.params, version=0)
            made.is_ready = True
        return made

    def _make(self, family):
        # Of one family the trainer is sharded over two devices.
        mesh = helpers.mesh_of(fsdp=2 if family == FAULTY and len(jax.devices()) > 1 else 1)
        engine = helpers.engine_for(self._models[family], mesh, max_model_len=1024, max_restarts=20)
        return Made(engine, mesh, *helpers.load(self._models[family], mesh), self._models[family])

    def close(self):
        for made in self._made.values():
            made.engine.close()
        self._made = {}


@dataclasses.dataclass
class Made:
    """An engine and what it was made of."""

    engine: object
    mesh: jax.sharding.Mesh
    inspected: object
    params: dict
    folder: object
    is_ready: bool = False


@pytest.fixture(scope="module")
def engines(models):
    engines = Engines(models)
    yield engines
    engines.close()


# Every family against transformers


@pytest.fixture(scope="module", params=sorted(helpers.FAMILIES, key=lambda family: family == FAULTY))
def family(request):
    return request.param


@pytest.fixture(scope="module")
def served(family, engines):
    made = engines[family]
    yield made
    if family != FAULTY:
        made.engine.close()


def test_log_probabilities_are_transformers(served):
    engine = served.engine
    engine.load_weights(served.params, version=0)
    groups = engine.generate(helpers.prompts([5, LONG, 20, 33]), SAMPLED, seed=1)
    assert [len(group.completions) for group in groups] == [3] * 4
    assert {c.policy_version for group in groups for c in group.completions} == {0}
    worst = helpers.worst_difference(groups, helpers.reference(served.folder), temperature=0.7)
    assert worst < helpers.TOLERANCE  # on a CPU the largest seen is 1e-5


def test_greedy_text_follows_the_weights(served, tmp_path):
    """With and without a change of weights; a cached prefix of the old ones would show at once."""
    engine, params = served.engine, served.params
    batch = helpers.prompts([7, LONG])
    moved = helpers.perturbed(params, seed=3)
    new = helpers.save_as_folder(moved, served.inspected.config, served.folder, tmp_path / "new")
    old, new = helpers.reference(served.folder), helpers.reference(new)
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
    batch = helpers.prompts([6, 9])
    first, again = (served.engine.generate(batch, SAMPLED, seed=5) for _ in range(2))
    other = served.engine.generate(batch, SAMPLED, seed=6)
    ids = lambda groups: [c.token_ids for g in groups for c in g.completions]
    assert ids(first) == ids(again)
    assert ids(first) != ids(other)
    assert len(set(ids(first)[:3])) == 3  # the samples of a prompt are drawn apart


# Agreement and limits


@pytest.fixture
def made(engines):
    """The engine of one family, with the weights of its folder, whatever the test before has done to it."""
    made = engines[FAULTY]
    made.engine.load_weights(made.params, version=0)
    return made


@pytest.fixture
def engine(made):
    return made.engine


def test_trainer_and_sampler_agree(made, engine):
    """The number that training logs as rollout_probs_diff, from a trainer that is sharded over two devices."""
    sampling = SamplingParams(num_samples=2, temperature=0.8, max_tokens=20)
    groups = engine.generate(helpers.prompts([5, 40, 12]), sampling, seed=2)
    batch = make_train_batch(groups, pad_id=0)
    score = make_forward_step(made.inspected.config, made.mesh, temperature=0.8, chunk_tokens=1024)
    ours = score_rows(score, made.params, batch, (4, 128), made.mesh)
    mask = np.asarray(batch.completion_mask) > 0
    assert np.abs(ours - np.asarray(batch.sampler_logprobs))[mask].max() < helpers.TOLERANCE


def test_given_completions_are_scored_by_the_whole_distribution(made, engine):
    """Also where they were sampled from a part of it, which makes their own log-probabilities larger."""
    cut = SamplingParams(num_samples=2, temperature=1.0, max_tokens=20, top_k=5)
    groups = engine.generate(helpers.prompts([5, LONG, 12]), cut, seed=2)
    scores = engine.score(groups, temperature=1.0)
    pairs = [(group, completion) for group in groups for completion in group.completions]
    model = helpers.reference(made.folder)
    for (group, completion), ours in zip(pairs, scores, strict=True):
        expected = helpers.reference_logprobs(model, group.prompt.token_ids, completion.token_ids)
        assert ours.dtype == np.float32 and np.abs(ours - expected).max() < helpers.TOLERANCE
        assert (np.array(completion.sampler_logprobs) > ours).all()
    with pytest.raises(EngineError, match=r"temperature 1, not at 0\.7"):
        engine.score(groups, temperature=0.7)


def test_truncation_is_in_the_log_probabilities(made, engine):
    """top_k=1 leaves one token, whose probability is then 1."""
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=6, top_k=1)
    groups = engine.generate(helpers.prompts([9]), sampling, seed=0)
    assert all(abs(lp) < 1e-6 for c in groups[0].completions for lp in c.sampler_logprobs)
    cut = SamplingParams(num_samples=4, temperature=1.0, max_tokens=1, top_k=5)
    model = helpers.reference(made.folder)
    (group,) = engine.generate(helpers.prompts([9]), cut, seed=0)
    first = [c.token_ids[0] for c in group.completions]
    whole = [float(helpers.reference_logprobs(model, group.prompt.token_ids, [t])[0]) for t in range(520)]
    kept = np.sort(whole)[-5:]
    for c, token in zip(group.completions, first, strict=True):
        expected = whole[token] - np.log(np.exp(kept).sum())
        assert c.sampler_logprobs[0] == pytest.approx(expected, abs=helpers.TOLERANCE)


def test_length_and_stop(engine):
    """A limit below and above the run of tokens that the engine hands over at once (64)."""
    for limit in (1, 63, 64, 65, 130):
        sampling = SamplingParams(num_samples=4, temperature=1.0, max_tokens=limit)
        for group in engine.generate(helpers.prompts([4]), sampling, seed=limit):
            for c in group.completions:
                assert len(c.token_ids) == len(c.sampler_logprobs) <= limit
                stopped = c.token_ids[-1] == helpers.STOP
                assert c.finish_reason == ("stop" if stopped else "length")
                assert helpers.STOP not in c.token_ids[:-1]
                assert stopped or len(c.token_ids) == limit


# Weights that change while rollouts are under way: rollout.max_lag


def change_midway(made, monkeypatch, tmp_path, update_weights):
    """Pushes version 2 after the first tokens of a batch. Returns (groups, old reference, new reference)."""
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=800)
    engine = made.engine
    changed = dataclasses.replace(engine._section, update_weights=update_weights, max_lag=1)
    monkeypatch.setattr(engine, "_section", changed)
    # Token 2 would end a completion before the weights change: it is made impossible in both.
    monkeypatch.setattr(engine, "_stop_token_ids", ())
    new_params, new = helpers.moved(made.folder, made.mesh, tmp_path)
    engine.load_weights(made.params, version=1)
    wait = engine.submit(helpers.prompts([150, 20], seed=8), sampling, seed=0)
    helpers.wait_for_tokens(engine, 20)
    engine.load_weights(new_params, version=2)
    groups = wait()
    (after,) = engine.generate(helpers.prompts([20], seed=8), GREEDY, seed=0)
    assert after.completions[0].policy_version == 2
    assert after.completions[0].token_ids == helpers.reference_greedy(
        new, after.prompt.token_ids, 24, stop=None
    )
    return groups, helpers.reference(made.folder), new


def test_weights_change_between_batches(made, monkeypatch, tmp_path):
    groups, old, _ = change_midway(made, monkeypatch, tmp_path, "between")
    assert {c.policy_version for g in groups for c in g.completions} == {1}
    assert helpers.worst_difference(groups, old) < helpers.TOLERANCE


def test_weights_change_during_a_batch(made, monkeypatch, tmp_path):
    """Each completion begins with the old weights and ends with the new ones, its cache computed anew."""
    groups, old, new = change_midway(made, monkeypatch, tmp_path, "during")
    for group in groups:
        for completion in group.completions:
            assert completion.policy_version == 1  # the oldest that sampled it
            ids, ours = completion.token_ids, np.array(completion.sampler_logprobs)
            by_old = np.abs(ours - helpers.reference_logprobs(old, group.prompt.token_ids, ids))
            by_new = np.abs(ours - helpers.reference_logprobs(new, group.prompt.token_ids, ids))
            switch = int(np.argmax(by_old > helpers.TOLERANCE))
            assert 0 < switch < len(ids)
            assert by_old[:switch].max() < helpers.TOLERANCE
            assert by_new[switch:].max() < helpers.TOLERANCE
            # Each token knows the weights that sampled it. On a GPU both models may agree on the first new one.
            ((first, version),) = completion.changes
            assert version == 2 and (first == switch or helpers.IS_GPU)
            assert by_old[:first].max() < helpers.TOLERANCE
            assert by_new[first:].max() < helpers.TOLERANCE


# Faults


def test_a_changed_weight_on_the_way_is_named(made, engine, monkeypatch):
    """One bit of one tensor, changed between the trainer's checksum and the engine."""
    from grpo_jax.rollout.vllm import cargo

    pack = cargo.pack_buckets
    pieces = engine._pusher._cargo.plan.layout.buckets[-2]
    piece = next(p for p in pieces if p.name.endswith("k_proj.weight"))

    def spoiled(*args):
        for bucket, flat, sums in pack(*args):
            if bucket.pieces == pieces:
                flat = flat.at[piece.offset // 4 + 5].add(1e-3)
            yield bucket, flat, sums

    monkeypatch.setattr(cargo, "pack_buckets", spoiled)
    with pytest.raises(WeightSyncError, match=piece.name.replace(".", r"\.")):
        engine.load_weights(made.params, version=9)
    monkeypatch.undo()
    engine.load_weights(made.params, version=10)


def test_an_engine_killed_within_a_batch_is_replaced(engine):
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=300)
    batch = helpers.prompts([30] * 24, seed=4)
    expected = engine.generate(batch, sampling, seed=9)
    pid = helpers.pids(engine)[0]
    wait = engine.submit(batch, sampling, seed=9)
    killer = threading.Thread(target=helpers.kill_midway, args=(engine, pid), daemon=True)
    killer.start()
    groups = wait()
    killer.join()
    assert helpers.pids(engine)[0] != pid
    # Asked again with the same weights and seeds, nothing was lost, doubled or mixed up.
    assert [g.prompt.prompt_id for g in groups] == [p.prompt_id for p in batch]
    assert [c.token_ids for g in groups for c in g.completions] == [
        c.token_ids for g in expected for c in g.completions
    ]


def test_an_engine_lost_while_old_weights_are_gone(made, engine, tmp_path):
    """It dies with rollouts under way that new weights wait for: what it owed is sampled by the new ones."""
    _, params = helpers.load(made.folder, made.mesh)
    new_params, new = helpers.moved(made.folder, made.mesh, tmp_path)
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=300)
    engine.load_weights(params, version=1)
    wait = engine.submit(helpers.prompts([30] * 24, seed=4), sampling, seed=9)
    helpers.wait_for_tokens(engine, 20)
    os.kill(helpers.pids(engine)[0], signal.SIGKILL)
    for leaf in jax.tree.leaves(params):
        leaf.delete()  # as the trainer's update would have donated them
    engine.load_weights(new_params, version=2)
    groups = wait()
    assert len(groups) == 24 and all(len(g.completions) == 2 for g in groups)
    assert groups[-1].completions[0].policy_version == 2
    late = [g for g in groups if g.completions[0].policy_version == 2]
    assert helpers.worst_difference(late, new) < helpers.TOLERANCE


def test_an_engine_that_falls_silent_is_replaced(engine, monkeypatch):
    begin = time.monotonic()
    engine.generate(helpers.prompts([3]), GREEDY, seed=0)
    limit = max(5.0, 20 * (time.monotonic() - begin))  # so that its successor is not too slow for it
    pid = helpers.pids(engine)[0]
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(engine, "_section", dataclasses.replace(engine._section, timeout_s=limit))
    (group,) = engine.generate(helpers.prompts([3]), GREEDY, seed=0)
    assert len(group.completions[0].token_ids) >= 1
    assert helpers.pids(engine)[0] != pid


@pytest.fixture
def probe(made):
    """A probe with prompts that are longer than a block of the cache."""
    from grpo_jax.run.probe import Probe

    score = make_forward_step(made.inspected.config, made.mesh, temperature=1.0, chunk_tokens=1024)
    score = functools.partial(score_rows, score, shape=(4, 320), mesh=made.mesh)
    long = helpers.prompts([LONG, 260], seed=6)
    return Probe(long, SamplingParams(1, 1.0, 8), score, threshold=helpers.TOLERANCE, pad_id=0)


def test_the_probe_passes_after_each_push(made, engine, probe):
    moved = helpers.perturbed(made.params, seed=7)
    engine.load_weights(made.params, version=20)
    probe(engine, made.params)
    engine.load_weights(moved, version=21)
    probe(engine, moved)


# From here on the engine is a forgetful one.


@pytest.fixture(scope="module")
def forgetful(engines):
    """The engine, killed between two batches and replaced by one that does not reset its prefix cache."""
    import ray

    from grpo_jax.rollout.vllm import server

    class ForgetfulActor(server.EngineActor):
        async def _reset_prefix_cache(self):
            pass

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor cannot import this file
    made = engines[FAULTY]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "EngineActor", ForgetfulActor)
        os.kill(helpers.pids(made.engine)[0], signal.SIGKILL)
        time.sleep(1.0)
        made.engine.load_weights(made.params, version=4)
    return made


def test_an_engine_killed_between_batches_is_replaced(forgetful):
    (group,) = forgetful.engine.generate(helpers.prompts([3]), GREEDY, seed=0)
    assert group.completions[0].policy_version == 4


def test_a_stale_prefix_cache_would_be_caught(forgetful, probe):
    """The probe stops the run and says why."""
    engine, params = forgetful.engine, forgetful.params
    moved = helpers.perturbed(params, seed=7)
    engine.load_weights(params, version=22)
    probe(engine, params)
    engine.load_weights(moved, version=23)
    with pytest.raises(WeightSyncError, match="prefix cache holds values of older weights"):
        probe(engine, moved)


def test_a_prompt_that_is_too_long_ends_with_a_message(engine, monkeypatch):
    changed = dataclasses.replace(engine._replicas._section, max_restarts=0)
    monkeypatch.setattr(engine._replicas, "_section", changed)
    with pytest.raises(EngineError, match=r"rollout\.max_restarts"):
        engine.generate(helpers.prompts([1100]), GREEDY, seed=0)
