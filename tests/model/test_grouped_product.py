"""Products by groups of rows, in the kernel's interpreter, and experts that are computed so."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config

from grpo_jax.config import ConfigError, MeshSection
from grpo_jax.model.experts import Kernels, _slots, choose_experts, dense, grouped, num_slots
from grpo_jax.model.fused_attention import DEVICE_KINDS
from grpo_jax.model.grouped_product import TILES, Tiles, grouped_product
from grpo_jax.model.sharding import make_mesh

SMALL = Tiles(rows=16, outputs=32, depth=16)
SIZES = [32, 0, 16, 0]
"""Rows of each group, of 64: two groups have none, and the last 16 rows belong to none."""


def product(x, kernels, sizes, tiles=TILES):
    return grouped_product(x, kernels, sizes, tiles, True)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_products_and_gradients():
    """Beside NumPy's products of each group. 96 columns are three tiles of 32, and a sum of 48 three of 16."""
    x, kernels, dy = random(64, 48), random(4, 48, 96, seed=1), random(64, 96, seed=2)
    y, back = jax.vjp(lambda x, kernels: product(x, kernels, jnp.array(SIZES), SMALL), x, kernels)
    dx, dkernels = back(dy)
    rows = [slice(0, 32), slice(32, 32), slice(32, 48), slice(48, 48)]
    for group, here in enumerate(rows):
        np.testing.assert_allclose(y[here], x[here] @ kernels[group], rtol=0, atol=1e-4)
        np.testing.assert_allclose(dx[here], dy[here] @ kernels[group].T, rtol=0, atol=1e-4)
        np.testing.assert_allclose(dkernels[group], x[here].T @ dy[here], rtol=0, atol=1e-4)
    assert not y[48:].any() and not dx[48:].any()


def test_slots():
    """Rows of expert 1 fill a block and begin another, none chose expert 2."""
    experts = jnp.array([1, 0, 1, 3, 1, 0])
    slots, sizes = _slots(experts, 4, 2)
    assert sizes.tolist() == [2, 4, 0, 2]
    assert slots.tolist() == [2, 0, 3, 6, 4, 1]
    assert num_slots(6, 4) == (1 + 4) * TILES.rows


def inputs(rows=8, length=40, experts=6):
    """x, shares, chosen, kernels of wide enough experts; nobody chooses the last one."""
    keys = jax.random.split(jax.random.key(0), 5)
    scores = jax.random.normal(keys[0], (rows, length, experts)).at[..., -1].set(-100.0)
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores), 2)
    x = jax.random.normal(keys[1], (rows, length, 64))
    gate, up = (0.2 * jax.random.normal(key, (experts, 64, 128)) for key in keys[2:4])
    down = 0.2 * jax.random.normal(keys[4], (experts, 128, 64))
    return x, shares, chosen, Kernels(gate, up, down)


def results(function, x, shares, chosen, kernels):
    """[the sum that experts give, and its gradients by all but what is chosen]."""
    cotangent = jnp.asarray(random(*x.shape, seed=3))

    @jax.jit
    def run(x, shares, kernels):
        y, back = jax.vjp(lambda x, shares, kernels: function(x, shares, chosen, kernels), x, shares, kernels)
        return [y, *jax.tree.leaves(back(cotangent))]

    return run(x, shares, kernels)


def check_equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert np.abs(b).max() > 0.1  # otherwise they would be equal whatever they are
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.abs(b).max())


def test_grouped_equals_dense():
    given = inputs()
    check_equal(results(functools.partial(grouped, product), *given), results(dense, *given))


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (1, 2, 4)])
def test_on_eight_devices(sizes):
    """Each sorts its own rows; split by "tensor", it has a part of each expert's width."""
    given = inputs()
    expected = results(dense, *given)
    with jax.set_mesh(make_mesh(MeshSection(*sizes))):
        found = results(functools.partial(grouped, product), *given)
    check_equal(found, expected)


def test_on_devices_that_do_not_divide_the_rows():
    """As one prompt of an engine on the trainer's own arrays: all devices compute it."""
    given = inputs(rows=3)
    expected = results(dense, *given)
    with jax.set_mesh(make_mesh(MeshSection(2, 2, 2))):
        found = results(functools.partial(grouped, product), *given)
    check_equal(found, expected)


WIDE = dict(num_experts=8, experts_per_token=2, hidden_size=256, intermediate_size=128, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("wanted", "device", "changes", "chosen"),
    [
        ("auto", "h100", {}, "grouped"),
        ("auto", "a100", {}, "grouped"),
        ("auto", "tpu-v5e", {}, "dense"),
        ("auto", "h100", dict(dtype=jnp.float32), "dense"),
        ("auto", "h100", dict(intermediate_size=192), "dense"),
        ("auto", "h100", dict(num_experts=0), "dense"),
        ("dense", "h100", {}, "dense"),
        ("grouped", "h100", dict(dtype=jnp.float16), "grouped"),
    ],
)
def test_choice(wanted, device, changes, chosen):
    assert choose_experts(wanted, tiny_config(**WIDE | changes), DEVICE_KINDS[device]) == chosen


@pytest.mark.parametrize(
    ("device", "changes", "rule"),
    [
        ("tpu-v5e", {}, "needs an NVIDIA GPU, Ampere"),
        ("h100", dict(dtype=jnp.float32), "needs model.dtype=bfloat16 or float16"),
        ("h100", dict(intermediate_size=192), r"needs widths that 128 divides, not \[192, 256\]"),
        ("h100", dict(num_experts=0), "this model has no experts"),
    ],
)
def test_grouped_is_refused(device, changes, rule):
    with pytest.raises(ConfigError, match=f"model.experts='grouped': {rule}"):
        choose_experts("grouped", tiny_config(**WIDE | changes), DEVICE_KINDS[device])
