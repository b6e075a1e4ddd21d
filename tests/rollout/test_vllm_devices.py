"""What GPUs, and how much of their memory, the engines get. No GPU, no vLLM and no Ray take part."""

import os
import re

import jax
import numpy as np
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rollout import memory_savers, push_bytes, share_devices, trainer_share
from grpo_jax.rollout.vllm.devices import (
    ENGINE_GPUS,
    check_processes,
    engine_gpus,
    num_replicas,
    split_gpus,
)

MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_ALLOCATOR", "XLA_PYTHON_CLIENT_PREALLOCATE")


@pytest.fixture
def environment(monkeypatch):
    """Returns `environment(**variables)`: sets them, and unsets the others that are looked at here."""

    def make(**variables):
        for name in ("CUDA_VISIBLE_DEVICES", ENGINE_GPUS, *MEMORY):
            monkeypatch.setenv(name, "")  # so that it is restored, whatever becomes of it
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return make


def shares():
    """The variables that are set by now."""
    names = ("CUDA_VISIBLE_DEVICES", ENGINE_GPUS, *MEMORY)
    return {name: os.environ[name] for name in names if name in os.environ}


# GPUs


def separate(section, **changes):
    return section(placement="separate", **changes)


@pytest.mark.parametrize(
    ("visible", "changes", "trainer", "engines"),
    [
        ("0,1,2,3", {}, "012", "3"),
        ("0,1,2,3", {"num_replicas": 2}, "01", "23"),
        ("7,5,3,1", {"tensor_parallel_size": 2}, "75", "31"),
        ("0,1,2,3,4", {"num_replicas": 2, "tensor_parallel_size": 2}, "0", "1234"),
    ],
)
def test_the_last_gpus_are_the_engines(rollout_section, environment, visible, changes, trainer, engines):
    section = separate(rollout_section, **changes)
    assert split_gpus(section, visible.split(",")) == (list(trainer), list(engines))
    environment(CUDA_VISIBLE_DEVICES=visible)
    share_devices(section)
    assert shares() == {"CUDA_VISIBLE_DEVICES": ",".join(trainer), ENGINE_GPUS: ",".join(engines)}
    assert engine_gpus(section) == ",".join(engines)


def test_gpus_are_split_once(rollout_section, environment):
    """The trainer then sees its own alone, and would give away one of those."""
    environment(CUDA_VISIBLE_DEVICES="0,1,2")
    for _ in range(2):
        section = separate(rollout_section)
        share_devices(section)
        assert (os.environ["CUDA_VISIBLE_DEVICES"], engine_gpus(section)) == ("0,1", "2")


@pytest.mark.parametrize("changes", [{"num_replicas": 2}, {"tensor_parallel_size": 2}, {"num_replicas": 3}])
def test_the_trainer_needs_a_gpu_too(rollout_section, environment, changes):
    environment(CUDA_VISIBLE_DEVICES="0,1")
    with pytest.raises(ConfigError, match=r"rollout\.placement='separate'.*leave none of 2 for the trainer"):
        share_devices(separate(rollout_section, **changes))
    assert shares() == {"CUDA_VISIBLE_DEVICES": "0,1"}


@pytest.mark.parametrize(
    ("visible", "changes"),
    [("", {}), ("0,1,2", {"ray_address": "auto"})],
    ids=["no GPU", "the cluster's own GPUs"],
)
def test_where_no_gpu_is_the_trainers_to_give_it_keeps_what_it_sees(
    rollout_section, environment, visible, changes
):
    environment(CUDA_VISIBLE_DEVICES=visible)
    section = separate(rollout_section, **changes)
    share_devices(section)
    assert shares() == {"CUDA_VISIBLE_DEVICES": visible} and engine_gpus(section) == ""


# Memory


@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({"gpu_memory_utilization": 0.4}, 0.53),  # 1 - 0.4 - 0.07
        ({"gpu_memory_utilization": 0.9, "sleep": True}, 0.93),  # one after the other
        ({"gpu_memory_utilization": 0.99}, 0.05),
        ({"placement": "separate"}, 0.75),  # JAX's own default
        ({"engine": "local"}, 0.75),
    ],
)
def test_the_trainers_share_of_the_memory(rollout_section, changes, share):
    assert trainer_share(rollout_section(**changes)) == pytest.approx(share)


def test_jax_leaves_a_colocated_engine_its_share(rollout_section, environment):
    environment()
    share_devices(rollout_section(gpu_memory_utilization=0.4))
    assert shares() == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.530"}
    environment()
    share_devices(rollout_section(gpu_memory_utilization=0.9, sleep=True))
    assert shares() == {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.930",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def test_what_the_user_has_set_stays(rollout_section, environment):
    users = dict(zip(MEMORY, ("0.2", "platform", "true"), strict=True))
    environment(**users)
    share_devices(rollout_section(sleep=True))
    assert shares() == users


def test_the_local_engine_takes_nothing(rollout_section, environment):
    environment(CUDA_VISIBLE_DEVICES="0,1,2")
    section = rollout_section(engine="local", placement="separate")
    share_devices(section)
    assert shares() == {"CUDA_VISIBLE_DEVICES": "0,1,2"}
    assert push_bytes(section) == 0 and memory_savers(section) == []


def test_a_push_takes_four_buckets_at_most(rollout_section):
    assert push_bytes(rollout_section(bucket_mb=192)) == 4 * 192 * 2**20


# How many engines


def mesh_of_size(size):
    from grpo_jax.config import MeshSection
    from grpo_jax.model.sharding import make_mesh

    return make_mesh(MeshSection(1, size, 1), jax.devices()[:size])


@pytest.mark.parametrize(
    ("changes", "both_on_gpus", "expected"),
    [
        ({}, True, 8),  # one on each GPU
        ({"tensor_parallel_size": 2}, True, 4),
        ({"num_replicas": 3}, True, 3),
        ({}, False, 1),  # no GPUs to share
        ({"num_replicas": 3}, False, 3),
        ({"placement": "separate"}, True, 1),
        ({"placement": "separate", "num_replicas": 2}, True, 2),
    ],
)
def test_the_number_of_engines(rollout_section, changes, both_on_gpus, expected):
    section = rollout_section(**changes)
    assert num_replicas(section, mesh_of_size(8), both_on_gpus=both_on_gpus) == expected


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"num_replicas": 5, "tensor_parallel_size": 2}, "rollout.num_replicas"),
        ({"tensor_parallel_size": 16}, "rollout.tensor_parallel_size"),
    ],
)
def test_more_engines_than_gpus_are_refused(rollout_section, changes, key):
    with pytest.raises(ConfigError, match="the trainer has 8") as caught:
        num_replicas(rollout_section(**changes), mesh_of_size(8), both_on_gpus=True)
    assert caught.value.key == key


class HalfOfIt:
    """A mesh of eight GPUs of which this process, one of two, has four."""

    devices = np.zeros((1, 8, 1))
    local_devices = (None,) * 4


@pytest.mark.parametrize(
    ("changes", "expected"), [({}, 8), ({"tensor_parallel_size": 3}, 2), ({"num_replicas": 6}, 6)]
)
def test_each_process_has_as_many_engines(rollout_section, changes, expected):
    assert num_replicas(rollout_section(**changes), HalfOfIt, both_on_gpus=True) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensor_parallel_size": 8}, "rollout.tensor_parallel_size=8: each of 2 processes has 4 GPU(s)"),
        ({"num_replicas": 3}, "rollout.num_replicas=3: must be a multiple of the 2 processes"),
    ],
)
def test_engines_that_processes_cannot_share_evenly_are_refused(rollout_section, changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        num_replicas(rollout_section(**changes), HalfOfIt, both_on_gpus=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"placement": "colocated", "ray_address": "auto"},
            "rollout.ray_address='auto': a run of 2 processes has a Ray of its own for engines on its own GPUs",
        ),
        (
            {"placement": "separate"},
            "rollout.ray_address='': a run of 2 processes with rollout.placement=separate has its engines in a",
        ),
    ],
)
def test_where_engines_of_several_processes_can_be(rollout_section, changes, message):
    section = rollout_section(**changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_processes(section, 2, both_on_gpus=True)
    check_processes(section, 1, both_on_gpus=True)
    check_processes(section, 2, both_on_gpus=False)
    check_processes(rollout_section(placement="colocated"), 2, both_on_gpus=True)
    check_processes(rollout_section(placement="separate", ray_address="10.0.0.1:6379"), 2, both_on_gpus=True)
