"""Several engines, several workers, several hosts."""

import contextlib
import os
import signal

import pytest
import vllm_helpers as helpers

from grpo_jax.rollout import SamplingParams

pytestmark = pytest.mark.vllm

GREEDY = SamplingParams(num_samples=1, temperature=0.0, max_tokens=24)
SAMPLED = SamplingParams(num_samples=2, temperature=0.9, max_tokens=32)


# Two engines, one of them on another host


@pytest.fixture(scope="class")
def two_hosts(ray_nodes):
    """Ray has room for one engine on the trainer's node, and for one on another."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    cluster, trainers_node = ray_nodes
    node = cluster.add_node(num_cpus=1)

    @ray.remote(num_cpus=3, scheduling_strategy=NodeAffinitySchedulingStrategy(trainers_node, soft=False))
    class Occupant:
        def ping(self):
            return True

    occupant = Occupant.remote()
    ray.get(occupant.ping.remote())
    yield
    ray.kill(occupant)
    cluster.remove_node(node)


@pytest.fixture(scope="class")
def two_engines(two_hosts, models, tmp_path_factory):
    """(engine, parameters of version 1, transformers' model of them)"""
    mesh = helpers.mesh_of(fsdp=2, tensor=2)
    params, model = helpers.moved(models["llama3"], mesh, tmp_path_factory.mktemp("two"))
    with contextlib.closing(helpers.engine_for(models["llama3"], mesh, num_replicas=2)) as engine:
        engine.load_weights(params, version=1)
        yield engine, params, model


class TestTwoHosts:
    def test_weights_reach_another_host(self, two_engines):
        """Another node of Ray: buckets go through its object store, and the engine's actor hands them on."""
        engine, params, model = two_engines
        assert sorted(replica.is_local for replica in engine._replicas) == [False, True]
        batch = helpers.prompts([8, 21])  # one for each
        for version in (1, 2):
            engine.load_weights(params, version=version)
            groups = engine.generate(batch, GREEDY, seed=0)
            assert [g.completions[0].token_ids for g in groups] == [
                helpers.reference_greedy(model, p.token_ids, 24) for p in batch
            ]

    def test_two_replicas_share_the_prompts(self, two_engines):
        engine, _, model = two_engines
        batch = helpers.prompts([9, 30, 150, 12, 60, 7, 33], seed=3)
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


# One engine of several processes


@pytest.fixture(scope="module")
def port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="class")
def parallel_engine(models, port, tokenizer_folder, tmp_path_factory):
    """(engine of two workers, each a process, that answers on the port; transformers' model of its weights)

    One key/value head for two workers, a vocabulary of 520 padded to 576: nothing divides evenly. Buckets are of
    as many parts as there are devices, as NCCL's, so that workers take columns of some of the rows. With a single
    GPU it has one worker.
    """
    import shutil

    workers = 1 if helpers.IS_GPU else 2
    mesh = helpers.mesh_of(fsdp=workers, tensor=workers)
    folder = tmp_path_factory.mktemp("parallel") / "model"
    shutil.copytree(models["qwen2-tied"], folder)
    for file in tokenizer_folder.iterdir():
        shutil.copy(file, folder)
    params, model = helpers.moved(models["qwen2-tied"], mesh, folder.parent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as it is by default
        patch.setattr("grpo_jax.rollout.vllm.engine.num_parts", lambda transport, mesh: mesh.size)
        engine = helpers.engine_for(folder, mesh, tensor_parallel_size=workers, api_port=port)
    with contextlib.closing(engine):
        engine.load_weights(params, version=1)
        yield engine, model


class TestOneEngineOfSeveralProcesses:
    def test_tensor_parallel_workers_take_their_parts(self, parallel_engine):
        if helpers.IS_GPU:
            pytest.skip("needs two GPUs")
        engine, model = parallel_engine
        batch = helpers.prompts([11, 140])
        groups = engine.generate(batch, GREEDY, seed=0)
        assert [g.completions[0].token_ids for g in groups] == [
            helpers.reference_greedy(model, p.token_ids, 24) for p in batch
        ]
        groups = engine.generate(batch, SAMPLED, seed=0)
        assert helpers.worst_difference(groups, model, temperature=0.9) < helpers.TOLERANCE

    def test_the_policy_answers_on_a_port(self, parallel_engine, port):
        """OpenAI's protocol on loopback, with the weights of the last push, beside rollouts."""
        import json
        import urllib.request

        engine, model = parallel_engine
        prompt = helpers.prompts([12])[0]
        expected = helpers.reference_greedy(model, prompt.token_ids, 8)
        body = {
            "model": "policy",
            "prompt": [list(prompt.token_ids)],
            "max_tokens": 8,
            "temperature": 0,
            "return_token_ids": True,
        }
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answer = json.load(urllib.request.urlopen(request, timeout=600))
        assert tuple(answer["choices"][0]["token_ids"]) == expected
        (group,) = engine.generate([prompt], GREEDY, seed=0)
        assert group.completions[0].token_ids[:8] == expected
