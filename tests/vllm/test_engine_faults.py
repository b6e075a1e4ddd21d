"""Engines that die, hang or are slow, with the real vLLM: who is restarted, who is charged, what is lost."""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time

import pytest
import vllm_helpers as helpers

from grpo_jax.rollout import EngineError, SamplingParams
from grpo_jax.rollout.vllm import cargo, server
from grpo_jax.rollout.vllm.check import VllmInstallation
from grpo_jax.rollout.vllm.replicas import Replicas

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=8)


@pytest.fixture(scope="module")
def two_engines(models):
    """(engine of two replicas on this host, its parameters), with one prompt at a time in each."""
    mesh = helpers.mesh_of()
    _, params = helpers.load(models["llama3"], mesh)
    changes = dict(num_replicas=2, max_restarts=20, max_num_seqs=2)
    with contextlib.closing(helpers.engine_for(models["llama3"], mesh, **changes)) as engine:
        engine.load_weights(params, version=1)
        yield engine, params


def restarts(engine):
    return [replica.num_restarts for replica in engine._replicas]


def core_of(engine, number):
    """Process id of vLLM's own process of an engine: what its actor has started and computes."""
    replica = list(engine._replicas)[number]
    others = [pid for pid in replica.processes if pid != replica.pid]
    (core,) = [pid for pid in others if b"EngineCore" in helpers.command_line(pid)]
    return core


def test_one_dead_core_restarts_its_own_engine_alone(two_engines):
    """vLLM's own process dies between two steps; the actors of both engines go on answering."""
    engine, params = two_engines
    before, charged = helpers.pids(engine), restarts(engine)
    os.kill(core_of(engine, 1), signal.SIGKILL)
    begin = time.monotonic()
    engine.load_weights(params, version=2)
    assert time.monotonic() - begin < 300  # the start of one engine, and no `timeout_s`, which is 600 s here
    assert restarts(engine) == [charged[0], charged[1] + 1]
    after = helpers.pids(engine)
    assert after[0] == before[0] and after[1] != before[1]
    groups = engine.generate(helpers.prompts([8, 9, 10, 11]), GREEDY, seed=0)
    assert [group.completions[0].policy_version for group in groups] == [2] * 4


def test_a_batch_that_queues_behind_another_is_no_silence(two_engines, monkeypatch):
    """The engines work on the batch ahead for several times `timeout_s`; nobody takes its answers meanwhile."""
    engine, _ = two_engines
    before, charged = helpers.pids(engine), restarts(engine)
    long = SamplingParams(num_samples=2, temperature=1.0, max_tokens=200)
    begin = time.monotonic()
    engine.generate(helpers.prompts([20] * 2), long, seed=0)  # one prompt in each engine
    one = time.monotonic() - begin
    limit = max(2.0, 3 * one)
    monkeypatch.setattr(engine, "_section", dataclasses.replace(engine._section, timeout_s=limit))
    ahead = engine.submit(helpers.prompts([20] * 2 * int(6 * limit / one)), long, seed=0)
    begin = time.monotonic()
    (group,) = engine.generate(helpers.prompts([9]), GREEDY, seed=0)
    assert time.monotonic() - begin > limit, "the batch ahead was too short for this test"
    assert len(group.completions) == 1
    assert all(len(group.completions) == 2 for group in ahead())
    assert helpers.pids(engine) == before and restarts(engine) == charged


def test_a_push_that_fails_half_way_leaves_nothing_paused_open_or_half_new(
    two_engines, models, monkeypatch, tmp_path
):
    """The trainer's own fault, with rollouts under way that new weights may change.

    What the engines sample from weights of two versions until the next push is sampled again.
    """
    engine, params = two_engines
    before, charged = helpers.pids(engine), restarts(engine)
    new_params, new = helpers.moved(models["llama3"], helpers.mesh_of(), tmp_path)
    changed = dataclasses.replace(engine._section, update_weights="during", max_lag=1)
    monkeypatch.setattr(engine, "_section", changed)
    monkeypatch.setattr(engine, "_stop_token_ids", ())  # so that none ends before the push
    pack = cargo.pack_buckets

    def failing(*args):
        yield next(pack(*args))
        raise RuntimeError("the trainer's device has failed")

    engine.load_weights(params, version=3)
    wait = engine.submit(
        helpers.prompts([20, 30], seed=8),
        SamplingParams(num_samples=1, temperature=1.0, max_tokens=400),
        seed=0,
    )
    helpers.wait_for_tokens(engine, 20)
    with monkeypatch.context() as patch:
        patch.setattr(cargo, "pack_buckets", failing)
        begin = time.monotonic()
        with pytest.raises(RuntimeError, match="the trainer's device has failed"):
            engine.load_weights(new_params, version=4)
    engine.load_weights(new_params, version=4)
    assert time.monotonic() - begin < 100  # nobody has waited for `timeout_s`
    groups = wait()
    assert {c.policy_version for group in groups for c in group.completions} == {4}
    assert all(len(c.token_ids) == 400 for group in groups for c in group.completions)
    assert helpers.worst_difference(groups, new) < helpers.TOLERANCE
    assert helpers.pids(engine) == before and restarts(engine) == charged


# A start that fails


class FlakyActor:
    """Starts, except at the second and the third time. No vLLM takes part."""

    async def start(self, options, api_port):
        import pathlib

        from grpo_jax.rollout import EngineError

        file = pathlib.Path(options["starts"])
        number = len(file.read_text()) + 1 if file.exists() else 1
        file.write_text("x" * number)
        if number in (2, 3):
            raise EngineError("ValueError: its GPU is still taken")
        about = {"vllm": "0", "device": "none", "node_id": "", "processes": {number: 0}}
        return about | {"why_not_our_scheduler": ""}

    async def pid(self):
        return 0

    async def stop(self):
        pass


@pytest.mark.parametrize("max_restarts", [3, 2])
def test_a_restart_that_fails_is_tried_again_while_restarts_are_left(tmp_path, monkeypatch, max_restarts):
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the actor cannot import this file
    monkeypatch.setattr(server, "EngineActor", FlakyActor)
    section = helpers.section(max_restarts=max_restarts)
    options = {"starts": str(tmp_path / "starts")}
    engines = Replicas(section, options, num_replicas=1, installation=VllmInstallation("0", True))
    with contextlib.closing(engines):
        engines.wait_until_ready()
        if max_restarts == 3:
            engines.restart([0], RuntimeError("OSError: it died"))
            assert [replica.num_restarts for replica in engines] == [3]
            assert [replica.pid for replica in engines] == [4]
        else:
            with pytest.raises(EngineError, match=r"failed 3 time\(s\).*its GPU is still taken"):
                engines.restart([0], RuntimeError("OSError: it died"))


# Many deaths in a row

KILLS = 20


@pytest.fixture(scope="module")
def mortal_engine(models):
    """(engine of one replica, its parameters)"""
    mesh = helpers.mesh_of()
    _, params = helpers.load(models["llama3"], mesh)
    with contextlib.closing(helpers.engine_for(models["llama3"], mesh, max_restarts=KILLS)) as engine:
        engine.load_weights(params, version=0)
        yield engine, params


def kill_within_a_batch(engine, params, pid, number):
    """When its first group has come back."""
    killer = threading.Thread(target=helpers.kill_midway, args=(engine, pid), daemon=True)
    killer.start()
    return killer


def kill_within_a_push(engine, params, pid, number):
    """Some milliseconds after its beginning: from before the first bucket to after the last."""
    killer = threading.Timer(0.004 * number, os.kill, (pid, signal.SIGKILL))
    killer.start()
    engine.load_weights(params, version=number)
    return killer


def kill_now(engine, params, pid, number):
    os.kill(pid, signal.SIGKILL)
    return threading.Thread()


@pytest.mark.slow
def test_twenty_deaths_in_a_row_lose_and_double_nothing(mortal_engine):
    """The actor's process and vLLM's own, in turns, at three kinds of moments, with a batch under way."""
    engine, params = mortal_engine
    sampling = SamplingParams(num_samples=3, temperature=1.0, max_tokens=150)
    batch = helpers.prompts([30] * 16, seed=4)
    expected = {
        group.prompt.prompt_id: [c.token_ids for c in group.completions]
        for group in engine.generate(batch, sampling, seed=9)
    }
    assert all(len(set(samples)) == 3 for samples in expected.values())
    moments = (kill_within_a_batch, kill_within_a_push, kill_now)
    for number in range(1, KILLS + 1):
        pid = core_of(engine, 0) if number % 2 else helpers.pids(engine)[0]
        wait = engine.submit(batch, sampling, seed=9)
        killer = moments[number % 3](engine, params, pid, number)
        groups = wait()
        if killer.ident:
            killer.join()
        # A kill that came after the last answer is noticed by the next one.
        engine.generate(batch[:1], sampling, seed=9)
        assert restarts(engine) == [number]
        assert [group.prompt.prompt_id for group in groups] == [prompt.prompt_id for prompt in batch]
        assert {
            group.prompt.prompt_id: [c.token_ids for c in group.completions] for group in groups
        } == expected
