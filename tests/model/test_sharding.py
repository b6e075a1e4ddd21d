import dataclasses
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from tiny_models import tiny_config

from grpo_jax.config import ConfigError, MeshSection
from grpo_jax.model import sharding
from grpo_jax.model.sharding import (
    AXIS_RULES,
    batch_sharding,
    constrain,
    make_mesh,
    num_batch_shards,
    partition_spec,
    replicated,
    tree_shardings,
)
from grpo_jax.model.transformer import abstract_params, param_shardings

CONFIG = tiny_config()


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


@pytest.fixture
def warnings(caplog):
    """The log of this test alone: a dropped rule is logged once in the life of a process."""
    sharding._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, "grpo_jax.model.sharding")
    return caplog


# The mesh


@pytest.mark.parametrize(
    ("section", "sizes"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((-1, 1, 1), (8, 1, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((2, 2, -1), (2, 2, 2)),
        ((8, -1, 1), (8, 1, 1)),  # nothing is left: 1
        ((1, 2, 4), (1, 2, 4)),
    ],
)
def test_mesh_sizes(section, sizes, warnings):
    mesh = make_mesh(MeshSection(*section))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.devices.shape == sizes
    assert mesh.devices.ravel().tolist() == jax.devices()
    assert not warnings.records


def test_minus_one_counts_the_given_devices():
    assert make_mesh(MeshSection(1, -1, 2), jax.devices()[:6]).devices.shape == (1, 3, 2)


def test_unused_devices_are_logged(warnings):
    mesh = make_mesh(MeshSection(3, 1, 1))
    assert mesh.devices.ravel().tolist() == jax.devices()[:3]
    assert "[3, 1, 1] uses 3 of 8 devices" in warnings.text


@pytest.mark.parametrize("section", [(16, 1, 1), (4, 4, 1), (3, -1, 1), (2, 8, -1), (5, 1, -1)])
def test_sizes_that_do_not_fit_are_refused(section):
    with pytest.raises(ConfigError) as caught:
        make_mesh(MeshSection(*section))
    assert caught.value.key == "mesh"
    assert caught.value.value == dict(zip(("data", "fsdp", "tensor"), section, strict=True))
    assert "8 device(s)" in caught.value.rule


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What JAX says of a GPU of several hosts: each host is a slice of its own."""

    id: int
    process_index: int
    platform: str = "gpu"

    @property
    def slice_index(self):
        return self.process_index


def test_gpus_of_two_hosts_stand_side_by_side_with_those_of_their_host():
    """`jax.make_mesh` refuses them. With fsdp=4 x tensor=2, each half of `data` is a host, in any order given."""
    gpus = [Gpu(id=number, process_index=number // 8) for number in range(16)]
    devices = sharding._arranged((2, 4, 2), gpus[::-1], 16)
    assert devices.shape == (2, 4, 2)
    assert [{gpu.process_index for gpu in half.flat} for half in devices] == [{0}, {1}]
    assert [gpu.id for gpu in devices.flat] == list(range(16))


# The table of rules


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", None), (8, 5), PartitionSpec(("data", "fsdp"), None)),
        (("vocab", "embed"), (64, 16), PartitionSpec("tensor", "fsdp")),
        (
            ("layers", "embed", "heads", "head_dim"),
            (3, 16, 4, 4),
            PartitionSpec(None, "fsdp", "tensor", None),
        ),
        (("layers", "mlp", "embed"), (3, 24, 16), PartitionSpec(None, "tensor", "fsdp")),
        (
            ("batch", None),
            (6, 5),
            PartitionSpec(None, None),
        ),  # 6 rows over 2 x 2: not by half of the rule either
        (("vocab", "embed"), (63, 16), PartitionSpec(None, "fsdp")),
    ],
)
def test_partition_spec_by_hand(axes, shape, expected):
    assert partition_spec(axes, shape, mesh_of(2, 2, 2)) == expected


def test_axes_of_size_one_do_not_appear():
    assert partition_spec(("vocab", "embed"), (63, 16), mesh_of(1, 8, 1)) == PartitionSpec(None, "fsdp")
    assert partition_spec(("batch", None), (8, 4), mesh_of(1, 8, 1)) == PartitionSpec("fsdp", None)


def test_editing_the_table_changes_the_layout(monkeypatch):
    monkeypatch.setitem(AXIS_RULES, "mlp", ("fsdp", "tensor"))
    assert partition_spec(("mlp",), (24,), mesh_of(2, 2, 2)) == PartitionSpec(("fsdp", "tensor"))


def test_a_rule_for_every_axis_of_the_model():
    _, axes = abstract_params(CONFIG)
    is_spec = lambda x: isinstance(x, PartitionSpec)
    names = {name for spec in jax.tree.leaves(axes, is_leaf=is_spec) for name in spec}
    assert names == {"vocab", "embed", "layers", "heads", "kv_heads", "head_dim", "mlp"}
    assert names <= set(AXIS_RULES)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("vocab", "embed"), (64, 16), (32, 8)),
        (("batch", None), (8, 5), (2, 5)),
        (("layers", "embed", "kv_heads", "head_dim"), (3, 16, 2, 4), (3, 8, 1, 4)),
    ],
)
def test_shards_on_devices(axes, shape, expected):
    mesh = mesh_of(2, 2, 2)
    spec = tree_shardings({"a": PartitionSpec(*axes)}, {"a": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)[
        "a"
    ]
    array = jax.device_put(np.zeros(shape), spec)
    assert {shard.data.shape for shard in array.addressable_shards} == {expected}


# Rules that cannot apply


def test_a_dropped_rule_names_the_parameter(warnings):
    shardings = param_shardings(CONFIG, mesh_of(1, 2, 4))
    assert shardings["layers"]["attention"]["q"].spec == PartitionSpec(None, "fsdp", "tensor", None)
    assert shardings["layers"]["attention"]["k"].spec == PartitionSpec(None, "fsdp", None, None)
    # Two key/value heads over four devices: kernels and biases of k and v, and nothing else.
    named = sorted(record.args[0] for record in warnings.records)
    assert named == [f"['layers']['attention']['{name}']" for name in ("k", "k_bias", "v", "v_bias")]
    assert (
        "['layers']['attention']['k'] is copied, not split: its dimension kv_heads of 2 does not divide by "
        "mesh axis tensor of 4" in warnings.text
    )


def test_a_dropped_rule_is_logged_once(warnings):
    for _ in range(2):
        partition_spec(("vocab", "embed"), (63, 16), mesh_of(2, 2, 2), "some table")
    assert len(warnings.records) == 1
    assert "some table" in warnings.text
    partition_spec(("vocab", "embed"), (63, 16), mesh_of(2, 2, 2))  # an activation: its parameter was named
    assert len(warnings.records) == 1


def test_nothing_is_logged_where_all_rules_apply(warnings):
    param_shardings(CONFIG, mesh_of(2, 2, 2))
    assert not warnings.records


# Batches and activations


@pytest.mark.parametrize(
    ("sizes", "shards"), [((8, 1, 1), 8), ((1, 8, 1), 8), ((2, 2, 2), 4), ((1, 1, 4), 1), ((1, 1, 1), 1)]
)
def test_batch_rows_are_split_over_data_and_fsdp(sizes, shards):
    mesh = mesh_of(*sizes)
    assert num_batch_shards(mesh) == shards
    batch = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh))
    assert {shard.data.shape for shard in batch.addressable_shards} == {(8 // shards, 2)}
    assert {shard.data.shape for shard in jax.device_put(batch, replicated(mesh)).addressable_shards} == {
        (8, 2)
    }


def test_constrain_states_the_axes_inside_a_mesh_and_nothing_outside():
    x = jnp.zeros((8, 3, 64))
    assert constrain(x, "batch", None, "vocab") is x
    with jax.set_mesh(mesh_of(2, 2, 2)):
        y = jax.jit(lambda x: constrain(x + 1, "batch", None, "vocab"))(x)
    assert {shard.data.shape for shard in y.addressable_shards} == {(2, 3, 32)}
