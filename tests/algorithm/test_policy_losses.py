"""Every policy loss: by hand, against verl, and what they must have in common."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from loss_helpers import (
    ALGORITHM,
    GOLDEN,
    array,
    assert_equals_golden,
    grpo_loss,
    loss_and_grad,
    make_batch,
    pack,
    random_batch,
    unpack,
)

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm import loss as losses
from grpo_jax.algorithm.policy_losses import POLICY_LOSSES
from grpo_jax.config import MeshSection
from grpo_jax.model.sharding import make_mesh

LOSSES = tuple(POLICY_LOSSES)
VERL = [case for case in GOLDEN["policy_loss"] if case["loss"] != "ppo_clip"]
SEQ_MEAN = "seq-mean-token-mean"


@pytest.mark.parametrize("case", VERL, ids=lambda case: f"{case['loss']}-{case['config']['clip_ratio_low']}")
def test_equals_verl(case):
    # verl's geo_mean does not read the mode: it takes the mean over completions.
    mode = SEQ_MEAN if case["loss"] == "geo_mean" else None
    assert_equals_golden(case, mode, policy_loss=case["loss"])


# By hand: two completions, of two tokens and of one, ratios 1.5 and 0.5, and 0.5; advantages 1 and -2; bounds 0.2.

MASK = [[0, 1, 1, 0], [0, 0, 1, 0]]
OLD = np.log([[1, 0.4, 0.6, 1], [1, 1, 0.2, 1]])
LOGPROBS = OLD + np.log([[9, 1.5, 0.5, 9], [9, 9, 0.5, 9]])
ADVANTAGES = [[0, 1, 1, 0], [0, 0, -2, 0]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name):
    """Loss, gradient with respect to the log-probability, and both clip flags of each of the three tokens."""
    if name == "gspo":
        # Geometric means sqrt(1.5 * 0.5), within the bounds, and 0.5, of a bad completion that became less likely.
        s = math.sqrt(0.75)
        return [-s, -s, 2 * 0.8], [-s, -s, 0], [0, 0, 1], [0, 0, 0]
    if name == "cispo":
        weights = [1.2, 0.8, 0.8]
        gradient = [-1.2, -0.8, 2 * 0.8]
        values = [w * a * x for w, a, x in zip(weights, [-1, -1, 2], np.log([0.6, 0.3, 0.1]), strict=True)]
        return values, gradient, [1, 1, 1], [0, 0, 0]
    if name == "geo_mean":
        # log 1.5 is cut to 0.2, log 0.5 of a good token is not; that of a bad one is, to -0.2. Every token of the
        # first completion has the mean's loss -m, and m changes by m / 2 with the log-ratio that is free.
        m = math.exp((0.2 + math.log(0.5)) / 2)
        return [-m, -m, 2 * math.exp(-0.2)], [0, -m, 0], [1, 1, 0], [0, 0, 1]
    if name == "sapo":
        gates = [4 * sigmoid(0.5), 4 * sigmoid(-0.5), 4 / 1.05 * sigmoid(-0.5 * 1.05)]
        slope = lambda tau, r: 4 * sigmoid(tau * (r - 1)) * (1 - sigmoid(tau * (r - 1))) * r
        gradient = [-slope(1, 1.5), -slope(1, 0.5), 2 * slope(1.05, 0.5)]
        return [-gates[0], -gates[1], 2 * gates[2]], gradient, [0, 0, 0], [0, 0, 0]
    assert name == "policy_gradient"
    return [-math.log(0.6), -math.log(0.3), 2 * math.log(0.1)], [-1, -1, 2], [0, 0, 0], [0, 0, 0]


@pytest.mark.parametrize("name", LOSSES[1:])
def test_by_hand(name):
    values, gradient, clipped, clipped_lower = by_hand(name)
    batch = make_batch(MASK, advantages=ADVANTAGES, old=OLD)
    weights = losses.loss_weights(array(MASK), SEQ_MEAN, 1)  # 1/4, 1/4, 1/2
    algorithm = dataclasses.replace(ALGORITHM, policy_loss=name)
    value, metrics, grad = loss_and_grad(LOGPROBS, batch, weights, algorithm)
    np.testing.assert_allclose(value, values[0] / 4 + values[1] / 4 + values[2] / 2, rtol=1e-5)
    expected = [[0, gradient[0] / 4, gradient[1] / 4, 0], [0, 0, gradient[2] / 2, 0]]
    np.testing.assert_allclose(grad, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/pg_clipfrac"], sum(clipped) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["actor/pg_clipfrac_lower"], sum(clipped_lower) / 3, rtol=1e-6)


@pytest.mark.parametrize(
    ("advantage", "x", "loss", "gradient"),  # bounds of the log-ratio: -0.1 and 0.3
    [
        (2, 0.5, -2 * math.exp(0.3), 0),
        (2, 0.2, -2 * math.exp(0.2), -2 * math.exp(0.2)),
        (
            2,
            -0.5,
            -2 * math.exp(-0.5),
            -2 * math.exp(-0.5),
        ),  # a good token that became unlikely is pulled back
        (-2, 0.5, 2 * math.exp(0.5), 2 * math.exp(0.5)),  # and a bad one that became likely
        (-2, -0.05, 2 * math.exp(-0.05), 2 * math.exp(-0.05)),
        (-2, -0.5, 2 * math.exp(-0.1), 0),
        (0, 0.5, 0, 0),
    ],
)
def test_the_bounds_of_geo_mean_by_hand(advantage, x, loss, gradient):
    algorithm = dataclasses.replace(ALGORITHM, policy_loss="geo_mean", clip_low=0.1, clip_high=0.3)
    batch = make_batch([[1]], advantages=[[advantage]], old=[[-2.0]])
    value, _, grad = loss_and_grad([[-2.0 + x]], batch, jnp.ones((1, 1)), algorithm)
    np.testing.assert_allclose((value, grad[0, 0]), (loss, gradient), rtol=1e-5)


def test_gspo_is_clamped_from_above_only():
    """A log-ratio of 30 counts as 10, without a gradient; one of -30 as itself."""
    algorithm = dataclasses.replace(ALGORITHM, policy_loss="gspo")
    batch = make_batch([[1], [1]], advantages=[[-1], [1]], old=[[-31], [-1]])
    value, _, grad = loss_and_grad([[-1.0], [-31.0]], batch, jnp.eye(2)[:, :1], algorithm)
    np.testing.assert_allclose(value, math.exp(10), rtol=1e-5)
    assert grad[0] == 0
    value, _, grad = loss_and_grad([[-1.0], [-31.0]], batch, jnp.eye(2)[:, 1:], algorithm)
    np.testing.assert_allclose((value, grad[1, 0]), (-math.exp(-30), -math.exp(-30)), rtol=1e-5)


# What they have in common


def weights_of(batch):
    return losses.loss_weights(batch.completion_mask, SEQ_MEAN, 1)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_update_is_the_plain_policy_gradient(name):
    """Where policy and old policy are one, the gradient with respect to log p is -A w, whatever the loss."""
    logprobs, _, batch = random_batch(11, old=None, ref=None)
    weights = weights_of(batch)
    _, _, plain = loss_and_grad(
        logprobs, batch, weights, dataclasses.replace(ALGORITHM, policy_loss="policy_gradient")
    )
    np.testing.assert_array_equal(plain, -weights * batch.advantages)
    algorithm = dataclasses.replace(ALGORITHM, policy_loss=name, dual_clip=3.0)
    _, metrics, grad = loss_and_grad(logprobs, batch, weights, algorithm)
    np.testing.assert_allclose(grad, plain, rtol=1e-5)
    assert metrics["actor/pg_clipfrac"] == metrics["actor/pg_clipfrac_lower"] == 0


def test_gspo_on_completions_of_one_token_is_the_clipped_surrogate():
    rng = np.random.default_rng(12)
    old = -rng.exponential(size=(40, 3))
    logprobs = old + rng.normal(0, 0.4, size=old.shape)
    mask = np.tile([[0, 1, 0]], (40, 1))
    batch = make_batch(mask, advantages=rng.normal(size=(40, 1)) * mask, old=old)
    results = [
        loss_and_grad(logprobs, batch, weights_of(batch), dataclasses.replace(ALGORITHM, policy_loss=name))
        for name in ("gspo", "clip")
    ]
    (value, metrics, grad), (expected, expected_metrics, expected_grad) = results
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)
    assert metrics["actor/pg_clipfrac"] == expected_metrics["actor/pg_clipfrac"]
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9  # both sides of the bounds occur


@pytest.mark.parametrize("name", LOSSES)
def test_a_group_without_spread_has_no_gradient(name):
    logprobs, _, batch = random_batch(13)
    batch = batch.replace(advantages=batch.advantages.at[2:4].set(0))  # rows 2 and 3 are such a group
    algorithm = dataclasses.replace(ALGORITHM, policy_loss=name)
    _, _, grad = loss_and_grad(logprobs, batch, weights_of(batch), algorithm)
    assert not grad[2:4].any() and grad[:2].any()


@pytest.mark.parametrize("name", LOSSES)
def test_dr_grpos_gradient_does_not_depend_on_the_padding(name):
    """Its divisor is a constant: neither the width of the array nor another completion's length is in it."""
    logprobs, _, batch = random_batch(14, ref=None)
    algorithm = dataclasses.replace(ALGORITHM, policy_loss=name)
    wide = lambda x: jnp.pad(x, ((0, 0), (0, 9)))
    weights = losses.loss_weights(batch.completion_mask, "seq-mean-token-sum-norm", 32.0)
    _, _, grad = loss_and_grad(logprobs, batch, weights, algorithm)
    padded = jax.tree.map(wide, batch)
    wide_weights = losses.loss_weights(padded.completion_mask, "seq-mean-token-sum-norm", 32.0)
    np.testing.assert_array_equal(wide_weights, wide(weights))
    _, _, wide_grad = loss_and_grad(wide(logprobs), padded, wide_weights, algorithm)
    np.testing.assert_allclose(wide_grad, wide(grad), rtol=1e-6, atol=1e-9)
    assert grad.any()
    # A longer completion in the last row: the others' gradients stay as they are.
    longer = padded.completion_mask.at[-1, 7:].set(1)
    longer_weights = losses.loss_weights(longer, "seq-mean-token-sum-norm", 32.0)
    np.testing.assert_array_equal(longer_weights[:-1], wide_weights[:-1])


PACKINGS = [
    *({"policy_loss": name} for name in LOSSES),
    *({"rollout_is": mode} for mode in ("token", "sequence", "token_mask", "sequence_mask")),
    {"rollout_rs": "seq_mean_k1"},
    {"rollout_rs": "seq_sum_k1", "rollout_is": "sequence", "policy_loss": "gspo"},
]


def terms(changes):
    everything = dict(dual_clip=3.0, kl_coef=0.3, kl_estimator="k3+", entropy_coef=0.02, rollout_rs_low=0.1)
    return dataclasses.replace(ALGORITHM, **everything | dict(rollout_rs_high=5.0) | changes)


def packed_inputs(seed, fill):
    """A batch of one completion a row and the same one packed: (logprobs, entropy, batch, weights) twice."""
    logprobs, entropy, batch = random_batch(seed)
    coef = np.full(np.shape(logprobs), 0.3, np.float32)
    batch = batch.replace(kl_coef=coef)
    weights = weights_of(batch)
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    fields = {name: values for name, values in fields.items() if values is not None}
    rows = pack(fields | {"logprobs": logprobs, "entropy": entropy, "weights": weights}, fill=fill)
    rest = [rows.pop(name) for name in ("logprobs", "entropy", "weights")]
    packed = type(batch)(**{name: jnp.asarray(values) for name, values in rows.items()})
    return (logprobs, entropy, batch, weights), (rest[0], rest[1], packed, jnp.asarray(rest[2]))


@pytest.mark.parametrize("changes", PACKINGS, ids=str)
def test_packed_rows_give_the_same_loss_gradient_and_metrics(changes):
    algorithm = terms(changes)
    (logprobs, entropy, batch, weights), packed = packed_inputs(15, fill=7)
    expected, expected_metrics, expected_grad = loss_and_grad(logprobs, batch, weights, algorithm, entropy)
    value, metrics, grad = loss_and_grad(packed[0], packed[2], packed[3], algorithm, packed[1])
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(unpack(grad, batch.segment_ids), expected_grad, rtol=1e-5, atol=1e-8)
    assert np.count_nonzero(grad) == np.count_nonzero(expected_grad)
    for name, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [np.nan, -np.inf, 1e38])
def test_padding_of_packed_rows_may_hold_anything(name, garbage):
    algorithm = terms({"policy_loss": name, "rollout_is": "sequence", "rollout_rs": "seq_mean_k1"})
    _, packed = packed_inputs(16, fill=7)
    _, spoilt = packed_inputs(16, fill=garbage)
    expected = loss_and_grad(packed[0], packed[2], packed[3], algorithm, packed[1])
    got = loss_and_grad(spoilt[0], spoilt[2], spoilt[3], algorithm, spoilt[1])
    assert got[0] == expected[0] and got[1] == expected[1]
    np.testing.assert_array_equal(got[2], expected[2])


@pytest.mark.parametrize("name", ["gspo", "geo_mean"])
def test_rows_on_eight_devices_give_the_loss_of_one(name):
    algorithm = terms({"policy_loss": name, "rollout_is": "sequence", "rollout_rs": "seq_mean_k1"})
    logprobs, entropy, batch = random_batch(17, num_rows=16, length=12)
    weights = weights_of(batch)
    step = jax.jit(jax.value_and_grad(functools.partial(grpo_loss, algorithm=algorithm), has_aux=True))
    (expected, _), expected_grad = step(logprobs, entropy, batch, weights)
    mesh = make_mesh(MeshSection(data=4, fsdp=2, tensor=1))
    split = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    (value, _), grad = step(*jax.device_put((logprobs, entropy, batch, weights), split))
    assert len(grad.sharding.device_set) == 8
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_the_same_inputs_give_the_same_bits(name):
    algorithm = terms({"policy_loss": name, "rollout_is": "sequence"})
    step = jax.jit(jax.value_and_grad(functools.partial(grpo_loss, algorithm=algorithm), has_aux=True))
    _, packed = packed_inputs(18, fill=7)
    first, second = (jax.device_get(step(*packed)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_the_clipped_tokens_are_those_that_the_metrics_count(name):
    logprobs, entropy, batch = random_batch(3, num_rows=20)
    section = dataclasses.replace(ALGORITHM, policy_loss=name, dual_clip=1.5, clip_low=0.1, clip_high=0.1)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
    metrics = grpo_loss(logprobs, entropy, batch, weights, section)[1].summary()
    clipped = np.asarray(losses.tokens_clipped(logprobs, batch, Algorithm.of(section)))
    assert clipped.dtype == bool and not clipped[np.asarray(batch.completion_mask) == 0].any()
    share = clipped.sum() / np.asarray(batch.completion_mask).sum()
    # With "clip" a token can be both, where the first bound has no part in the loss any more.
    low, high = metrics["actor/pg_clipfrac"], metrics["actor/pg_clipfrac_lower"]
    assert max(low, high) - 1e-6 <= share <= low + high + 1e-6
    assert (share > 0) == (name in ("clip", "gspo", "cispo", "geo_mean"))


def test_a_clipped_token_is_one_beyond_its_bound():
    old = np.log([[0.5, 0.5, 0.5, 0.5]])
    batch = make_batch([[0, 1, 1, 1]], advantages=[[0, 1, 1, -1]], old=old)
    ratios = np.log(
        [[9.0, 1.05, 1.3, 1.3]]
    )  # within; beyond, and good; beyond, but bad: its loss is not bounded
    clipped = losses.tokens_clipped(array(old + ratios), batch, Algorithm.of(ALGORITHM))
    assert np.asarray(clipped).tolist() == [[False, False, True, False]]
