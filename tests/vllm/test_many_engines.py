"""Several engines, several workers, several hosts, and weights that change while an engine samples."""

import contextlib
import os
import signal
import time

import jax
import numpy as np
import pytest
import vllm_helpers as helpers

from grpo_jax.rollout import SamplingParams

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)
SAMPLED = SamplingParams(num_samples=2, temperature=0.9, max_tokens=32)


@pytest.fixture
def own_process(monkeypatch):
    """vLLM's engine in a process of its own, as it is by default."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


def moved(models, family, mesh, tmp_path):
    """(parameters, transformers' model of them) that differ from those of the folder."""
    inspected, params = helpers.load(models[family], mesh)
    params = helpers.perturbed(params, seed=5)
    folder = helpers.save_as_folder(params, inspected.config, models[family], tmp_path / "moved")
    return params, helpers.reference(folder)


def test_two_replicas_share_the_prompts(models, tmp_path):
    mesh = helpers.mesh_of(fsdp=2)
    params, model = moved(models, "qwen2-untied", mesh, tmp_path)
    batch = helpers.prompts([9, 30, 150, 12, 60, 7, 33], seed=3)
    engine = helpers.engine_for(models["qwen2-untied"], mesh, num_replicas=2)
    with contextlib.closing(engine):
        engine.load_weights(params, version=1)
        wait = engine.submit(batch, SAMPLED, seed=1)
        assert sorted(len(owed) for owed in engine._pending[0]._owed.values()) == [3, 4]
        groups = wait()
        assert [g.prompt for g in groups] == batch
        assert helpers.worst_difference(groups, model, temperature=0.9) < helpers.TOLERANCE
        # One of two dies: what it owed is asked again, the other's answers are kept.
        os.kill(helpers.pids(engine)[1], signal.SIGKILL)
        again = engine.generate(batch, SAMPLED, seed=1)
        assert [c.token_ids for g in again for c in g.completions] == [
            c.token_ids for g in groups for c in g.completions
        ]


def test_tensor_parallel_workers_take_their_parts(models, tmp_path, own_process):
    """One key/value head for two workers, a vocabulary of 520 padded to 576: nothing divides evenly."""
    mesh = helpers.mesh_of(fsdp=2, tensor=2)
    params, model = moved(models, "qwen2-tied", mesh, tmp_path)
    with contextlib.closing(helpers.engine_for(models["qwen2-tied"], mesh, tensor_parallel_size=2)) as engine:
        engine.load_weights(params, version=1)
        batch = helpers.prompts([11, 140])
        groups = engine.generate(batch, GREEDY, seed=0)
        assert [g.completions[0].token_ids for g in groups] == [
            helpers.reference_greedy(model, p.token_ids, 24) for p in batch
        ]
        groups = engine.generate(batch, SAMPLED, seed=0)
        assert helpers.worst_difference(groups, model, temperature=0.9) < helpers.TOLERANCE


def test_weights_reach_another_host(models, tmp_path, ray_nodes):
    """Another node of Ray: buckets go through its object store, and the engine's actor hands them on."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cluster, here = ray_nodes
    node = cluster.add_node(num_cpus=2)

    @ray.remote(num_cpus=4, scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
    class Occupant:
        def ping(self):
            return True

    occupant = Occupant.remote()
    ray.get(occupant.ping.remote())
    mesh = helpers.mesh_of(tensor=2)
    params, model = moved(models, "llama3", mesh, tmp_path)
    try:
        with contextlib.closing(helpers.engine_for(models["llama3"], mesh)) as engine:
            for version in (1, 2):
                engine.load_weights(params, version=version)
                batch = helpers.prompts([8, 21])
                groups = engine.generate(batch, GREEDY, seed=0)
                assert [g.completions[0].token_ids for g in groups] == [
                    helpers.reference_greedy(model, p.token_ids, 24) for p in batch
                ]
            assert not engine._replicas[0].is_local
    finally:
        ray.kill(occupant)
        cluster.remove_node(node)


def half_of(engine, batch, sampling):
    """Seconds until a batch is half done, on this machine as it is now."""
    engine.generate(batch[:1], GREEDY, seed=0)  # whatever a first batch compiles
    start = time.monotonic()
    engine.generate(batch, sampling, seed=1)
    return (time.monotonic() - start) / 2


class TestWeightsThatChange:
    """rollout.max_lag: rollouts are under way when new weights come."""

    LONG = SamplingParams(num_samples=2, temperature=1.0, max_tokens=400)

    def run(self, models, tmp_path, update_weights):
        """Pushes version 2 a moment after a batch was asked for. Returns (groups, old, new reference)."""
        mesh = helpers.mesh_of()
        _, params = helpers.load(models["qwen2-untied"], mesh)
        new_params, new = moved(models, "qwen2-untied", mesh, tmp_path)
        # Token 2 would end a completion before the weights change: it is made impossible in both.
        engine = helpers.engine_for(
            models["qwen2-untied"], mesh, update_weights=update_weights, max_lag=1, max_model_len=1024
        )
        with contextlib.closing(engine):
            engine._stop_token_ids = ()
            engine.load_weights(params, version=1)
            batch = helpers.prompts([150, 20], seed=8)
            middle = half_of(engine, batch, self.LONG)
            wait = engine.submit(batch, self.LONG, seed=0)
            time.sleep(middle)
            engine.load_weights(new_params, version=2)
            groups = wait()
            (after,) = engine.generate(helpers.prompts([20], seed=8), GREEDY, seed=0)
            assert after.completions[0].policy_version == 2
            assert after.completions[0].token_ids == helpers.reference_greedy(new, after.prompt.token_ids, 24)
        return groups, helpers.reference(models["qwen2-untied"]), new

    def test_between(self, models, tmp_path):
        groups, old, _ = self.run(models, tmp_path, "between")
        assert {c.policy_version for g in groups for c in g.completions} == {1}
        assert helpers.worst_difference(groups, old) < helpers.TOLERANCE

    def test_during(self, models, tmp_path):
        """Each completion begins with the old weights and ends with the new ones, its cache computed anew."""
        groups, old, new = self.run(models, tmp_path, "during")
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


def test_an_engine_lost_while_old_weights_are_gone(models, tmp_path):
    """It dies with rollouts under way that new weights wait for: what it owed is sampled by the new ones."""
    mesh = helpers.mesh_of()
    _, params = helpers.load(models["qwen2-untied"], mesh)
    new_params, new = moved(models, "qwen2-untied", mesh, tmp_path)
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=300)
    engine = helpers.engine_for(models["qwen2-untied"], mesh, max_lag=1)
    with contextlib.closing(engine):
        engine.load_weights(params, version=1)
        batch = helpers.prompts([30] * 24, seed=4)
        middle = half_of(engine, batch, sampling)
        wait = engine.submit(batch, sampling, seed=9)
        time.sleep(middle)
        os.kill(helpers.pids(engine)[0], signal.SIGKILL)
        for leaf in jax.tree.leaves(params):
            leaf.delete()  # as the trainer's update would have donated them
        engine.load_weights(new_params, version=2)
        groups = wait()
        assert len(groups) == 24 and all(len(g.completions) == 2 for g in groups)
        assert groups[-1].completions[0].policy_version == 2
        late = [g for g in groups if g.completions[0].policy_version == 2]
        assert helpers.worst_difference(late, new) < helpers.TOLERANCE


def test_the_policy_answers_on_a_port(models, tmp_path, own_process, tokenizer_folder):
    """OpenAI's protocol on loopback, with the weights of the last push, beside rollouts."""
    import json
    import shutil
    import socket
    import urllib.request

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = tmp_path / "model"
    shutil.copytree(models["qwen2-untied"], folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    mesh = helpers.mesh_of()
    params, model = moved(models, "qwen2-untied", mesh, tmp_path)
    prompt = helpers.prompts([12])[0]
    expected = helpers.reference_greedy(model, prompt.token_ids, 8)
    body = {
        "model": "policy",
        "prompt": [list(prompt.token_ids)],
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
    }
    with contextlib.closing(helpers.engine_for(folder, mesh, api_port=port)) as engine:
        engine.load_weights(params, version=1)
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=60))
        assert tuple(answer["choices"][0]["token_ids"]) == expected
        (group,) = engine.generate([prompt], GREEDY, seed=0)
        assert group.completions[0].token_ids[:8] == expected
