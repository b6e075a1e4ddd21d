"""float16: gradients that would underflow do not, those that overflow skip an update and nothing else."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_forward import random_batch
from tiny_models import tiny_config

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.loss import grpo_loss
from grpo_jax.config import AlgorithmSection, MeshSection, OptimSection
from grpo_jax.learner import make_optimizer
from grpo_jax.learner.forward import make_forward_step, to_micro_batches
from grpo_jax.learner.loss_scale import LossScaling, make_loss_scaling
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import init_params
from grpo_jax.types import LossScale

OPTIM = OptimSection(learning_rate=1e-3, beta1=0.5, max_grad_norm=1e9, offload=False)
MODEL = tiny_config(dtype=jnp.float16)
R, T = 4, 48


def updates(batches, *, model=MODEL, optim=OPTIM, sizes=(1, 1, 1)):
    """The last state, and the metrics of each update."""
    mesh = make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(optim, model, mesh, num_updates=10)
        forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=16)
        loss = functools.partial(grpo_loss, algorithm=Algorithm.of(AlgorithmSection()))
        update = make_update_step(model, mesh, optimizer, forward, loss, optim=optim)
        state, metrics = optimizer.init_state(init_params(model, jax.random.key(0), mesh)), []
        for batch in batches:
            state, summary = update(state, to_micro_batches(batch, (max(R, math.prod(sizes)), T), mesh)[0])
            metrics.append({name: float(value) for name, value in summary.items()})
        return jax.tree.map(np.array, state), metrics


def scaled(factor):
    """A batch whose gradients are so many times as large."""
    batch = random_batch(MODEL.vocab_size)
    return batch.replace(advantages=batch.advantages * np.float32(factor))


def first_moments(state):
    return np.concatenate([x.ravel() for x in jax.tree.leaves(state.opt_state[0].mu)])


def test_the_scale_by_hand():
    """Doubled after two updates without overflow, halved by one, within 1 and 2^24; 0: it stays."""
    scaling, now, seen = LossScaling(4.0, growth=2), LossScale(jnp.float32(4), jnp.int32(0)), []
    for is_finite in (True, True, True, False, True, True, False, False, False, False, False):
        now = scaling.next(now, jnp.bool_(is_finite))
        seen.append((float(now.scale), int(now.good_updates)))
    assert seen == [(4, 1), (8, 0), (8, 1), (4, 0), (4, 1), (8, 0), (4, 0), (2, 0), (1, 0), (1, 0), (1, 0)]
    top = scaling.next(LossScale(jnp.float32(2**24), jnp.int32(1)), jnp.bool_(True))
    assert (float(top.scale), int(top.good_updates)) == (2**24, 0)
    fixed = LossScaling(4.0, growth=0)
    assert fixed.next(now, jnp.bool_(False)) is now
    assert bool(scaling.explains(LossScale(jnp.float32(2), 0)))
    assert not bool(scaling.explains(LossScale(jnp.float32(1), 0)))  # it cannot be lowered
    assert not fixed.explains(LossScale(jnp.float32(2), 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_only_float16_needs_one(dtype):
    assert make_loss_scaling(OPTIM, dtype) is None
    assert make_loss_scaling(OPTIM, jnp.float16) == LossScaling(65536.0, 100)


@pytest.mark.slow
def test_gradients_below_float16s_smallest_number_arrive():
    """Some 1e-8 each, where 6e-8 is the smallest: without a scale nearly all are 0."""
    tiny = scaled(1e-5)
    expected = first_moments(updates([tiny], model=dataclasses.replace(MODEL, dtype=jnp.float32))[0])
    assert 1e-9 < np.abs(expected).mean() < 5e-8
    state, [metrics] = updates([tiny])
    got = first_moments(state)
    assert np.linalg.norm(got - expected) < 0.02 * np.linalg.norm(expected)
    unscaled = first_moments(updates([tiny], optim=dataclasses.replace(OPTIM, loss_scale=1.0))[0])
    assert np.linalg.norm(unscaled - expected) > 0.5 * np.linalg.norm(expected)
    assert metrics["actor/loss_scale"] == 65536 and metrics["actor/overflows"] == 0
    assert metrics["actor/grad_norm"] == pytest.approx(2 * np.linalg.norm(expected), rel=0.02)


@pytest.mark.parametrize("is_offloaded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_overflow_skips_the_update_and_halves_the_scale(is_offloaded):
    """An advantage of 1e6 times 2^16 is beyond 65,504; the run is not broken by it."""
    optim = dataclasses.replace(OPTIM, offload=is_offloaded)
    good, bad = scaled(1.0), scaled(1e6)
    state, metrics = updates([good, bad, good], optim=optim)
    assert [m["actor/loss_scale"] for m in metrics] == [65536, 65536, 32768]
    assert [m["actor/overflows"] for m in metrics] == [0, 1, 0]
    assert [m["actor/skipped_updates"] for m in metrics] == [0, 0, 0]
    assert int(state.step) == 2 and int(state.loss_scale.good_updates) == 1
    without, _ = updates([good, good], optim=optim)
    for got, expected in zip(jax.tree.leaves(state.params), jax.tree.leaves(without.params), strict=True):
        # Half of the scale rounds gradients near float16's smallest numbers a little differently.
        np.testing.assert_allclose(got, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 4, 1), (2, 2, 2)], ids=str)
def test_every_mesh_gives_the_update_of_one_device(sizes):
    """Rounded to eleven bits some twenty times in a row."""
    batch = scaled(1.0)
    (one, [expected]), (many, [metrics]) = updates([batch]), updates([batch], sizes=sizes)
    assert metrics == pytest.approx(expected, rel=1e-2, abs=1e-4)
    a, b = first_moments(one), first_moments(many)
    assert np.linalg.norm(a - b) < 5e-3 * np.linalg.norm(a)


def test_a_gradient_that_overflows_by_itself_breaks_the_run():
    """With a fixed scale, or one that cannot be lowered: skipped as any update that is not finite."""
    for optim in (dict(loss_scale_growth=0), dict(loss_scale=1.0)):
        _, [metrics] = updates([scaled(1e9)], optim=dataclasses.replace(OPTIM, **optim))
        assert (metrics["actor/skipped_updates"], metrics["actor/overflows"]) == (1, 0)


def test_a_loss_that_is_not_finite_is_no_overflow():
    """Nor does it move the update counter; the scale is halved all the same."""
    state, [metrics] = updates([scaled(np.nan)])
    assert (metrics["actor/skipped_updates"], metrics["actor/overflows"]) == (1, 0)
    assert int(state.step) == 0
