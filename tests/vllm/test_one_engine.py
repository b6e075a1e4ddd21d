"""One engine, whatever the family: agreement with the trainer, limits, faults."""

import contextlib
import dataclasses
import functools
import os
import signal
import threading
import time

import jax
import numpy as np
import pytest
import vllm_helpers as helpers

from grpo_jax.learner.batching import make_train_batch
from grpo_jax.learner.update import make_score_step, score_rows
from grpo_jax.rollout import EngineError, SamplingParams
from grpo_jax.weight_sync import WeightSyncError

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def engine(models):
    mesh = helpers.mesh_of(fsdp=2, tensor=1) if len(jax.devices()) > 1 else helpers.mesh_of()
    inspected, params = helpers.load(models["qwen2-untied"], mesh)
    with contextlib.closing(helpers.engine_for(models["qwen2-untied"], mesh, max_restarts=20)) as engine:
        engine.load_weights(params, version=0)
        engine.test_params, engine.test_model, engine.test_mesh = params, inspected.config, mesh
        yield engine


def test_trainer_and_sampler_agree(engine):
    """The number that training logs as rollout_probs_diff, from a trainer that is sharded over two devices."""
    sampling = SamplingParams(num_samples=2, temperature=0.8, max_tokens=20)
    groups = engine.generate(helpers.prompts([5, 40, 12]), sampling, seed=2)
    batch = make_train_batch(groups, pad_id=0)
    score = make_score_step(engine.test_model, engine.test_mesh, temperature=0.8, chunk_tokens=1024)
    ours = score_rows(score, engine.test_params, batch, (4, 128), engine.test_mesh)
    mask = np.asarray(batch.completion_mask) > 0
    assert np.abs(ours - np.asarray(batch.sampler_logprobs))[mask].max() < helpers.TOLERANCE


def test_truncation_is_in_the_log_probabilities(engine, models):
    """top_k=1 leaves one token, whose probability is then 1."""
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=6, top_k=1)
    groups = engine.generate(helpers.prompts([9]), sampling, seed=0)
    assert all(abs(lp) < 1e-6 for c in groups[0].completions for lp in c.sampler_logprobs)
    cut = SamplingParams(num_samples=4, temperature=1.0, max_tokens=1, top_k=5)
    model = helpers.reference(models["qwen2-untied"])
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


def test_an_engine_killed_within_a_batch_is_replaced(engine):
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=300)
    batch = helpers.prompts([30] * 24, seed=4)
    start = time.monotonic()
    expected = engine.generate(batch, sampling, seed=9)
    middle = (time.monotonic() - start) / 2
    pid = helpers.pids(engine)[0]
    killer = threading.Timer(middle, os.kill, (pid, signal.SIGKILL))
    killer.start()
    groups = engine.generate(batch, sampling, seed=9)
    killer.join()
    assert helpers.pids(engine)[0] != pid
    # Asked again with the same weights and seeds, nothing was lost, doubled or mixed up.
    assert [g.prompt.prompt_id for g in groups] == [p.prompt_id for p in batch]
    assert [c.token_ids for g in groups for c in g.completions] == [
        c.token_ids for g in expected for c in g.completions
    ]


def test_an_engine_killed_between_batches_is_replaced(engine):
    os.kill(helpers.pids(engine)[0], signal.SIGKILL)
    time.sleep(1.0)
    engine.load_weights(engine.test_params, version=4)
    (group,) = engine.generate(helpers.prompts([3]), GREEDY, seed=0)
    assert group.completions[0].policy_version == 4


def test_an_engine_that_falls_silent_is_replaced(engine, monkeypatch):
    pid = helpers.pids(engine)[0]
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(engine, "_section", dataclasses.replace(engine._section, timeout_s=5.0))
    (group,) = engine.generate(helpers.prompts([3]), GREEDY, seed=0)
    assert len(group.completions[0].token_ids) >= 1
    assert helpers.pids(engine)[0] != pid


def test_a_changed_weight_on_the_way_is_named(engine, monkeypatch):
    """One bit of one tensor, changed between the trainer's checksum and the engine."""
    from grpo_jax.rollout.vllm import push

    pack = push.pack_buckets
    pieces = engine._pusher._plan.layout.buckets[-2]
    piece = next(p for p in pieces if p.name.endswith("k_proj.weight"))

    def spoiled(*args):
        for bucket, flat, sums in pack(*args):
            if bucket.pieces == pieces:
                flat = flat.at[piece.offset // 4 + 5].add(1e-3)
            yield bucket, flat, sums

    monkeypatch.setattr(push, "pack_buckets", spoiled)
    with pytest.raises(WeightSyncError, match=piece.name.replace(".", r"\.")):
        engine.load_weights(engine.test_params, version=9)
    monkeypatch.undo()
    engine.load_weights(engine.test_params, version=10)


def test_a_stale_prefix_cache_would_be_caught(engine, monkeypatch):
    """An engine that does not reset its prefix cache after a push: the probe stops the run and says why."""
    import sys

    import ray

    from grpo_jax.rollout.vllm import server as vllm_server
    from grpo_jax.run.probe import Probe

    class ForgetfulActor(vllm_server.EngineActor):
        async def _reset_prefix_cache(self):
            pass

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor cannot import this file
    score = functools.partial(
        score_rows,
        make_score_step(engine.test_model, engine.test_mesh, temperature=1.0, chunk_tokens=1024),
        shape=(4, 320),
        mesh=engine.test_mesh,
    )
    long = helpers.prompts([200, 260], seed=6)  # longer than a block of the cache
    probe = Probe(long, SamplingParams(1, 1.0, 8), score, threshold=helpers.TOLERANCE, pad_id=0)
    moved = helpers.perturbed(engine.test_params, seed=7)
    engine.load_weights(engine.test_params, version=20)
    probe(engine, engine.test_params)
    engine.load_weights(moved, version=21)
    probe(engine, moved)  # as it is, the engine forgets

    monkeypatch.setattr(vllm_server, "EngineActor", ForgetfulActor)
    os.kill(helpers.pids(engine)[0], signal.SIGKILL)
    engine.load_weights(engine.test_params, version=22)
    probe(engine, engine.test_params)
    engine.load_weights(moved, version=23)
    with pytest.raises(WeightSyncError, match="prefix cache holds values of older weights"):
        probe(engine, moved)
    monkeypatch.undo()
    os.kill(helpers.pids(engine)[0], signal.SIGKILL)
    engine.load_weights(engine.test_params, version=24)


def test_a_prompt_that_is_too_long_ends_with_a_message(engine, monkeypatch):
    monkeypatch.setattr(engine._replicas, "_section", helpers.section(max_restarts=0))
    with pytest.raises(EngineError, match=r"rollout\.max_restarts"):
        engine.generate(helpers.prompts([600]), GREEDY, seed=0)
