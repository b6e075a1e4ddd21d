import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_helpers import (
    ALGORITHM,
    GOLDEN,
    array,
    assert_equals_golden,
    grpo_loss,
    loss_and_grad,
    make_batch,
    random_batch,
)

from grpo_jax import config
from grpo_jax.algorithm import corrections, kl, policy_losses, ratios
from grpo_jax.algorithm import loss as losses

PPO_CLIP = [case for case in GOLDEN["policy_loss"] if case["loss"] == "ppo_clip"]
MODES = config.KEYS["algorithm.loss_agg"].choices


# Agreement with verl


@pytest.mark.parametrize("case", PPO_CLIP, ids=lambda case: f"{case['agg']}-{case['config']['clip_ratio_c']}")
def test_policy_loss_equals_verl(case):
    assert_equals_golden(case, dual_clip=case["config"]["clip_ratio_c"])


@pytest.mark.parametrize("name", list(GOLDEN["kl_per_token"]))
def test_kl_equals_verl(name):
    mask = np.array(GOLDEN["mask"])
    values = kl.KL_ESTIMATORS[name](array(GOLDEN["logprobs"]), array(GOLDEN["ref_logprobs"])) * mask
    np.testing.assert_allclose(values, GOLDEN["kl_per_token"][name], atol=1e-5, rtol=0)
    np.testing.assert_allclose(values.sum() / mask.sum(), GOLDEN["kl_token_mean"][name], atol=1e-5, rtol=0)


def test_kl_gradient_equals_verl():
    """With advantages 0 and coefficient 1 the loss is the token mean of k3."""
    mask = array(GOLDEN["mask"])
    batch = make_batch(mask, old=GOLDEN["old_logprobs"], ref=GOLDEN["ref_logprobs"])
    algorithm = dataclasses.replace(ALGORITHM, kl_coef=1.0)
    weights = losses.loss_weights(mask, "token-mean", 1)
    value, metrics, grad = loss_and_grad(GOLDEN["logprobs"], batch, weights, algorithm)
    np.testing.assert_allclose(value, GOLDEN["kl_token_mean"]["k3"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(metrics["kl/mean"], GOLDEN["kl_token_mean"]["k3"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(grad, GOLDEN["kl_k3_grad"], atol=1e-5, rtol=0)


def test_every_aggregation_of_the_configuration_is_there_and_no_other():
    for mode in MODES:
        losses.loss_weights(jnp.ones((1, 2)), mode, 2.0)
    with pytest.raises(ValueError, match="'mean'"):
        losses.loss_weights(jnp.ones((1, 2)), "mean", 2.0)


# Values by hand: two completions, of two tokens and of one, with ratios 1.5, 0.5 and 0.5.
#   A = 1,  r = 1.5: max(-1.5, -1.2) = -1.2, clipped, gradient 0
#   A = 1,  r = 0.5: max(-0.5, -0.8) = -0.5, gradient of the loss with respect to log p = -A r = -0.5
#   A = -2, r = 0.5: max(1.0, 1.6) = 1.6, clipped, gradient 0

MASK = [[0, 1, 1, 0], [0, 0, 1, 0]]
RATIOS = [[9.0, 1.5, 0.5, 9.0], [9.0, 9.0, 0.5, 9.0]]
OLD = [[0.0, math.log(0.4), math.log(0.6), 0.0], [0.0, 0.0, math.log(0.2), 0.0]]
ADVANTAGES = [[0, 1, 1, 0], [0, 0, -2, 0]]
LOGPROBS = np.array(OLD) + np.log(RATIOS)
HAND = {  # mode, with norm 4 -> (loss, weight of the tokens of the first row, of the second)
    "token-mean": ((-1.2 - 0.5 + 1.6) / 3, 1 / 3, 1 / 3),
    "seq-mean-token-sum": ((-1.7 + 1.6) / 2, 1 / 2, 1 / 2),
    "seq-mean-token-mean": ((-1.7 / 2 + 1.6) / 2, 1 / 4, 1 / 2),
    "seq-mean-token-sum-norm": ((-1.7 + 1.6) / 2 / 4, 1 / 8, 1 / 8),
}


@pytest.mark.parametrize("mode", MODES)
def test_loss_by_hand(mode):
    expected, first, second = HAND[mode]
    weights = losses.loss_weights(array(MASK), mode, 4.0)
    np.testing.assert_allclose(weights, np.array(MASK) * [[first], [second]], rtol=1e-6)
    batch = make_batch(MASK, advantages=ADVANTAGES, old=OLD)
    value, metrics, grad = loss_and_grad(LOGPROBS, batch, weights, ALGORITHM)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grad, [[0, 0, -0.5 * first, 0], [0, 0, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(metrics["actor/pg_clipfrac"], 2 / 3, rtol=1e-6)
    assert metrics["actor/pg_clipfrac_lower"] == 0
    np.testing.assert_allclose(metrics["actor/ppo_kl"], -(math.log(1.5) + 2 * math.log(0.5)) / 3, rtol=1e-5)


def test_kl_and_entropy_terms_by_hand():
    # At the first update (r = 1) the surrogate is -A: (-1 - 1 + 2) / 3 = 0, its gradient -A / 3.
    logprobs = [[0.0, math.log(0.4), math.log(0.6), 0.0], [0.0, 0.0, math.log(0.2), 0.0]]
    ref = [[0.0, math.log(0.2), math.log(0.6), 0.0], [0.0, 0.0, math.log(0.4), 0.0]]  # p / p_ref: 2, 1, 1/2
    entropy = [[7.0, 1.0, 2.0, 7.0], [7.0, 7.0, 3.0, 7.0]]
    batch = make_batch(MASK, advantages=ADVANTAGES, ref=ref)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    algorithm = dataclasses.replace(ALGORITHM, kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, algorithm, entropy)
    np.testing.assert_allclose(value, 0.1 * 0 - 0.01 * 2, rtol=1e-5)  # k1: log 2 + 0 - log 2; entropy: 6 / 3
    np.testing.assert_allclose(metrics["kl/mean"], 0, atol=1e-7)
    np.testing.assert_allclose(metrics["actor/entropy"], 2, rtol=1e-6)
    np.testing.assert_allclose(grad, [[0, -0.3, -0.3, 0], [0, 0, 0.7, 0]], rtol=1e-5)  # (-A + 0.1) / 3

    in_reward = dataclasses.replace(algorithm, kl_in="reward", entropy_coef=0.0, kl_estimator="k2")
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, in_reward, entropy)
    np.testing.assert_allclose(value, 0, atol=1e-7)
    np.testing.assert_allclose(metrics["kl/mean"], math.log(2) ** 2 / 3, rtol=1e-5)  # reported all the same
    np.testing.assert_allclose(grad, -np.array(ADVANTAGES) / 3, rtol=1e-6)


def test_no_reference_no_kl():
    batch = make_batch(MASK, advantages=ADVANTAGES)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    _, metrics, _ = loss_and_grad(LOGPROBS, batch, weights, dataclasses.replace(ALGORITHM, kl_coef=0.1))
    assert "kl/mean" not in metrics


def test_the_entropy_bonus_reaches_the_entropy():
    batch = make_batch(MASK, advantages=ADVANTAGES)
    weights = losses.loss_weights(array(MASK), "seq-mean-token-mean", 1)
    algorithm = dataclasses.replace(ALGORITHM, entropy_coef=0.01)
    grad = jax.grad(lambda h: grpo_loss(array(LOGPROBS), h, batch, weights, algorithm)[0])(array(MASK))
    np.testing.assert_allclose(grad, [[0, -0.0025, -0.0025, 0], [0, 0, -0.005, 0]], rtol=1e-6)


def test_sampler_mismatch_by_hand():
    # Old probabilities 0.5, 0.25, 0.1; the sampler's 0.4, 0.5, 0.1.
    old = np.log([[1, 0.5, 0.25, 1], [1, 1, 0.1, 1]])
    sampler = np.log([[1, 0.4, 0.5, 1], [1, 1, 0.1, 1]])
    sampler[0, 0] = -5.0  # a prompt token: unread
    batch = make_batch(MASK, old=old, sampler=sampler)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    _, metrics, _ = loss_and_grad(LOGPROBS, batch, weights, ALGORITHM)
    np.testing.assert_allclose(metrics["training/rollout_probs_diff_mean"], (0.1 + 0.25 + 0) / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["training/rollout_probs_diff_max"], 0.25, rtol=1e-5)
    # exp |log p - log q| = max(p / q, q / p)
    np.testing.assert_allclose(metrics["training/token_mult_prob_error"], (1.25 + 2 + 1) / 3, rtol=1e-5)


# The correction of sampler against trainer

TIS = dataclasses.replace(ALGORITHM, rollout_is="token", rollout_is_threshold=1.5)


@pytest.mark.parametrize(
    ("old", "sampler", "threshold", "expected"),
    [
        (0.5, 0.4, 2.0, 1.25),
        (0.25, 0.5, 2.0, 0.5),
        (0.3, 0.3, 2.0, 1.0),
        (0.5, 0.2, 2.0, 2.0),  # 2.5, cut
        (0.5, 0.4, 0.75, 0.75),
    ],
)
def test_correction_by_hand(old, sampler, threshold, expected):
    old, sampler = array([[math.log(old)]]), array([[math.log(sampler)]])

    def correct(old, sampler):
        ratio = corrections.importance_ratio(old, sampler, jnp.ones((1, 1), jnp.int32), "token")
        return corrections.truncated(ratio, threshold)

    np.testing.assert_allclose(correct(old, sampler), [[expected]], rtol=1e-6)
    grads = jax.grad(lambda *args: correct(*args).sum(), argnums=(0, 1))(old, sampler)
    assert not np.asarray(grads).any()  # a constant


@pytest.mark.parametrize(("difference", "expected"), [(1000.0, 20.0), (np.inf, 20.0), (-1000.0, -20.0)])
def test_the_log_of_the_correction_is_clamped(difference, expected):
    segments = jnp.ones((1, 1), jnp.int32)
    for level in ("token", "sequence"):
        weight = corrections.importance_ratio(array([[difference]]), array([[0.0]]), segments, level)
        np.testing.assert_allclose(weight, [[math.exp(expected)]], rtol=1e-5)


def test_corrected_loss_by_hand():
    # The three tokens have ratios 1.5, 0.5, 0.5 and losses -1.2 (clipped), -0.5, 1.6 (clipped), see above;
    # old probabilities 0.4, 0.6, 0.2 and the sampler's 0.5, 0.3, 0.4 give weights 0.8, 2 -> 1.5, 0.5.
    sampler = [[-9.0, math.log(0.5), math.log(0.3), -9.0], [-9.0, -9.0, math.log(0.4), -9.0]]
    batch = make_batch(MASK, advantages=ADVANTAGES, old=OLD, sampler=sampler)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    value, metrics, grad = loss_and_grad(LOGPROBS, batch, weights, TIS)
    np.testing.assert_allclose(value, (-0.8 * 1.2 - 1.5 * 0.5 + 0.5 * 1.6) / 3, rtol=1e-5)
    np.testing.assert_allclose(grad, [[0, 0, -1.5 * 0.5 / 3, 0], [0, 0, 0, 0]], rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/is_weight_mean"], (0.8 + 1.5 + 0.5) / 3, rtol=1e-6)
    np.testing.assert_allclose(metrics["rollout_corr/is_weight_max"], 1.5, rtol=1e-6)
    np.testing.assert_allclose(metrics["rollout_corr/is_clipped_frac"], 1 / 3, rtol=1e-6)
    # What is clipped, and how far sampler and trainer are apart, are other questions.
    _, plain, _ = loss_and_grad(LOGPROBS, batch, weights, ALGORITHM)
    assert not any(name.startswith("rollout_corr/") for name in plain)
    assert {name: metrics[name] for name in plain if name != "actor/loss"} == {
        name: number for name, number in plain.items() if name != "actor/loss"
    }


def test_the_largest_correction_is_that_of_a_completion_token():
    # p_old / p_sampler = 1/2 on the only token; prompt and padding, where all is 0, would give 1.
    batch = make_batch([[0, 1, 0]], old=[[0, math.log(0.2), 0]], sampler=[[0, math.log(0.4), 0]])
    _, metrics, _ = loss_and_grad([[0, -1.0, 0]], batch, batch.completion_mask, TIS)
    np.testing.assert_allclose(metrics["rollout_corr/is_weight_max"], 0.5, rtol=1e-6)


def test_the_correction_leaves_kl_and_entropy_alone():
    # With advantages 0 nothing of the surrogate is left: (0.1 * k1 - 0.01 * entropy) / 3, gradient 0.1 / 3.
    ref = np.array(OLD) + math.log(2)
    entropy = [[7.0, 1.0, 2.0, 7.0], [7.0, 7.0, 3.0, 7.0]]
    batch = make_batch(MASK, ref=ref, sampler=np.array(OLD) - 0.3)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    terms = dataclasses.replace(TIS, kl_coef=0.1, kl_estimator="k1", entropy_coef=0.01)
    value, metrics, grad = loss_and_grad(OLD, batch, weights, terms, entropy)
    np.testing.assert_allclose(value, -0.1 * math.log(2) - 0.01 * 2, rtol=1e-5)
    np.testing.assert_allclose(grad, np.array(MASK) * 0.1 / 3, rtol=1e-5)
    np.testing.assert_allclose(metrics["rollout_corr/is_weight_mean"], math.exp(0.3), rtol=1e-5)


def test_the_first_corrected_update_is_the_weighted_policy_gradient():
    """With one update a step the old log-probabilities are the update's own: gradient -w c A, c of those."""
    logprobs, entropy, batch = random_batch(6, old=None, ref=None)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
    _, metrics, grad = loss_and_grad(logprobs, batch, weights, TIS, entropy)
    correction = np.minimum(np.exp(np.asarray(logprobs - batch.sampler_logprobs)), 1.5)
    np.testing.assert_allclose(grad, -weights * correction * batch.advantages, rtol=1e-5)
    assert 0 < metrics["rollout_corr/is_clipped_frac"] < 1
    assert metrics["actor/ppo_kl"] == metrics["actor/pg_clipfrac"] == 0


@pytest.mark.parametrize(
    ("rollout_is", "threshold", "expected"),
    [
        # Policy: a, b with probability 1/2 each; sampler: a with 3/4, b with 1/4; A(a) = 1, A(b) = -2.
        # With logits (x, 0), d log p(a) / dx = 1/2 and d log p(b) / dx = -1/2, so the policy gradient is
        # 1/2 * 1 * 1/2 + 1/2 * (-2) * (-1/2) = 3/4. Of four tokens the sampler draws a, a, a, b.
        ("none", 2.0, -(3 * 1 / 2 + 1) / 4),  # -0.625: that of another policy
        ("token", 4.0, -3 / 4),  # weights 2/3 and 2: 3 * 2/3 * 1/2 + 2 * 1 over 4
        ("token", 2.0, -3 / 4),  # a weight on the cap is whole
        ("token", 1.0, -(3 * 2 / 3 * 1 / 2 + 1) / 4),  # -0.5: the price of the cap
    ],
)
def test_the_correction_makes_the_gradient_that_of_the_policy(rollout_is, threshold, expected):
    is_a = jnp.array([[1], [1], [1], [0]])
    sampler = np.log([[0.75], [0.75], [0.75], [0.25]])
    batch = make_batch(np.ones((4, 1)), advantages=[[1], [1], [1], [-2]], sampler=sampler)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
    algorithm = dataclasses.replace(ALGORITHM, rollout_is=rollout_is, rollout_is_threshold=threshold)

    def loss(x):
        logprobs = jnp.where(is_a == 1, jax.nn.log_sigmoid(x), jax.nn.log_sigmoid(-x))
        return grpo_loss(logprobs, jnp.zeros((4, 1)), batch, weights, algorithm)[0]

    np.testing.assert_allclose(jax.grad(loss)(0.0), expected, rtol=1e-6)


def test_against_the_sampler_the_trainer_is_still_measured():
    # The ratio is against the sampler's 0.4, 0.5, 0.1 (1.25, 0.5, 1); the policy is at 0.5, 0.25, 0.1.
    logprobs = np.log([[1, 0.5, 0.25, 1], [1, 1, 0.1, 1]])
    sampler = np.log([[1, 0.4, 0.5, 1], [1, 1, 0.1, 1]])
    batch = make_batch(MASK, advantages=ADVANTAGES, old=sampler, sampler=sampler)
    weights = losses.loss_weights(array(MASK), "token-mean", 1)
    algorithm = dataclasses.replace(ALGORITHM, old_logprobs="sampler")
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, algorithm)
    np.testing.assert_allclose(value, (-1.2 - 0.5 + 2) / 3, rtol=1e-5)  # 1.25 is clipped to 1.2
    np.testing.assert_allclose(grad, [[0, 0, -0.5 / 3, 0], [0, 0, 2 / 3, 0]], rtol=1e-5)
    merged = losses.merge_updates([metrics], algorithm)
    assert merged["training/rollout_probs_diff_mean"] == pytest.approx((0.1 + 0.25 + 0) / 3, rel=1e-5)
    assert merged["training/rollout_probs_diff_max"] == pytest.approx(0.25, rel=1e-5)
    assert merged["training/token_mult_prob_error"] == pytest.approx((1.25 + 2 + 1) / 3, rel=1e-5)
    # Later updates have moved the policy away from the one that sampled: the first one's numbers count.
    # Others are means over the updates: of log(p_old / p), 1 more in the second, 0.5 more.
    _, later, _ = loss_and_grad(logprobs - 1.0, batch, weights, algorithm)
    both = losses.merge_updates([metrics, later], algorithm)
    for name in (name for name in merged if name.startswith("training/")):
        assert both[name] == merged[name]
    np.testing.assert_allclose(both["actor/ppo_kl"], merged["actor/ppo_kl"] + 0.5, rtol=1e-5)
    # Against the trainer's own, all updates compare the same old ones, each on its mini-batch: their mean.
    names = loss_and_grad(logprobs, batch, weights, ALGORITHM)[1]
    assert set(names) == set(merged) == set(metrics)
    means = losses.merge_updates([metrics, later], ALGORITHM)
    for name in ("training/rollout_probs_diff_mean", "training/token_mult_prob_error"):
        assert means[name] == pytest.approx((metrics[name] + later[name]) / 2)
    assert means["training/rollout_probs_diff_max"] == pytest.approx(
        max(metrics["training/rollout_probs_diff_max"], later["training/rollout_probs_diff_max"])
    )


def test_nll_loss_by_hand():
    logprobs = array([[9, -1, -2, 9], [9, 9, -6, 9]])
    batch = make_batch(MASK)
    weights = losses.loss_weights(array(MASK), "seq-mean-token-mean", 1)
    entropy = array([[9, 1, 2, 9], [9, 9, 6, 9]])
    nll = jax.value_and_grad(losses.nll_loss, has_aux=True)
    (value, metrics), grad = nll(logprobs, entropy, batch.replace(loss_weights=weights))
    assert value == metrics.summary()["actor/loss"] == (3 / 2 + 6) / 2
    assert metrics.summary()["actor/entropy"] == metrics.tokens == 3
    np.testing.assert_array_equal(grad, [[0, -0.25, -0.25, 0], [0, 0, -0.5, 0]])


def test_kl_of_tokens_by_hand():
    old = [[5.0, -1.0, -2.0, np.nan], [5.0, -np.inf, -4.0, 5.0], [np.nan] * 4]  # the last row is padding
    ref = [[1.0, -1.5, -1.0, 3.0], [np.nan, 0.0, -1.0, 0.0], [0.0] * 4]
    mask = [*MASK, [0] * 4]
    of_tokens = lambda name: kl.kl_of_tokens(array(old), array(ref), array(mask), kl.KL_ESTIMATORS[name])
    # log p - log p_ref: 0.5 and -1 in the first completion, -3 in the second
    np.testing.assert_allclose(of_tokens("k1"), [[0, 0.5, -1, 0], [0, 0, -3, 0], [0] * 4])
    np.testing.assert_allclose(of_tokens("abs"), [[0, 0.5, 1, 0], [0, 0, 3, 0], [0] * 4])
    np.testing.assert_allclose(of_tokens("k2"), [[0, 0.125, 0.5, 0], [0, 0, 4.5, 0], [0] * 4])


@pytest.mark.parametrize(
    ("probability", "reference", "expected"),
    [
        (0.5, 0.25, {"k1": math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 0.5 - 1 + math.log(2)}),
        (0.25, 0.5, {"k1": -math.log(2), "k2": math.log(2) ** 2 / 2, "k3": 2 - 1 - math.log(2)}),
        (0.3, 0.3, {"k1": 0, "k2": 0, "k3": 0}),
    ],
)
def test_kl_by_hand(probability, reference, expected):
    logprobs, ref_logprobs = array([[math.log(probability)]]), array([[math.log(reference)]])
    for name, value in (expected | {"abs": abs(expected["k1"])}).items():
        np.testing.assert_allclose(kl.KL_ESTIMATORS[name](logprobs, ref_logprobs), [[value]], rtol=1e-5)
        if name != "k2":  # the straight-through variants: this value, the gradient of k2, log(p / p_ref)
            through = lambda x, name=name: kl.KL_ESTIMATORS[f"{name}+"](x, ref_logprobs).sum()
            np.testing.assert_allclose(through(logprobs), value, rtol=1e-5)
            np.testing.assert_allclose(jax.grad(through)(logprobs), [[expected["k1"]]], rtol=1e-5, atol=1e-7)


# Boundaries


def surrogate_and_grad(logprob, advantage, **clips):
    """One token, old log-probability 0. Returns (loss, clipped, dual_clipped, gradient) as numbers."""

    def loss(logprobs):
        one = jnp.ones((1, 1))
        tokens = policy_losses.PolicyTokens(logprobs, array([[0.0]]), array([[advantage]]), one, one)
        value, *flags = policy_losses.clipped_surrogate(tokens, dataclasses.replace(ALGORITHM, **clips))
        return value.sum(), flags

    (value, flags), grad = jax.value_and_grad(loss, has_aux=True)(array([[logprob]]))
    return (value.item(), *(flag.item() for flag in flags), grad.item())


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("logprob", [0.2, -0.2])
def test_a_ratio_exactly_on_a_bound_is_not_clipped(advantage, logprob):
    ratio = jnp.exp(jnp.float32(logprob)).item()
    clips = {"clip_low": 1 - ratio if logprob < 0 else 0.1, "clip_high": ratio - 1 if logprob > 0 else 0.1}
    loss, clipped, _, grad = surrogate_and_grad(logprob, advantage, dual_clip=0.0, **clips)
    assert (loss, clipped, grad) == (-advantage * ratio, 0, -advantage * ratio)


@pytest.mark.parametrize(
    ("ratio", "advantage", "dual_clip", "expected"),  # expected: loss, clipped, dual_clipped, gradient
    [
        (4.0, -2.0, 3.0, (6.0, 0, 1, 0.0)),  # the bad token's loss is bounded by 2 * 3
        (4.0, -2.0, 0.0, (8.0, 0, 0, 8.0)),  # and is not without dual clip
        (4.0, -2.0, 5.0, (8.0, 0, 0, 8.0)),
        (4.0, 2.0, 3.0, (-2.4, 1, 0, 0.0)),  # a good token is not its concern
        (0.5, -2.0, 3.0, (1.6, 1, 0, 0.0)),
        (1.1, 2.0, 3.0, (-2.2, 0, 0, -2.2)),
        (0.5, 2.0, 3.0, (-1.0, 0, 0, -1.0)),
        (1.1, 0.0, 3.0, (0.0, 0, 0, 0.0)),
    ],
)
def test_clips_by_hand(ratio, advantage, dual_clip, expected):
    clips = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": dual_clip}
    np.testing.assert_allclose(surrogate_and_grad(math.log(ratio), advantage, **clips), expected, rtol=1e-5)


def test_a_ratio_exactly_on_the_dual_clip_is_not_clipped():
    ratio = jnp.exp(jnp.float32(1.0)).item()
    clips = {"clip_low": 0.2, "clip_high": 0.2, "dual_clip": ratio}
    assert surrogate_and_grad(1.0, -2.0, **clips) == (2 * ratio, 0, 0, 2 * ratio)


def test_clip_higher_lets_good_tokens_grow_further():
    clips = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 0.0}
    loss, clipped, _, grad = surrogate_and_grad(math.log(1.25), 1.0, **clips)
    np.testing.assert_allclose((loss, clipped, grad), (-1.25, 0, -1.25), rtol=1e-5)
    loss, clipped, _, grad = surrogate_and_grad(math.log(1.3), 1.0, **clips)
    np.testing.assert_allclose((loss, clipped, grad), (-1.28, 1, 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("difference", "clamped", "slope"),
    [(19.0, 19, 1), (20.0, 20, 1), (21.0, 20, 0), (-20.0, -20, 1), (-21.0, -20, 0), (np.inf, 20, 0)],
)
def test_the_log_ratio_is_clamped(difference, clamped, slope):
    value, grad = jax.value_and_grad(ratios.log_ratio)(jnp.float32(difference), jnp.float32(0))
    assert (value, grad) == (clamped, slope)


def test_a_huge_ratio_stays_finite():
    loss, _, dual_clipped, grad = surrogate_and_grad(1000.0, -1.0, clip_low=0.2, clip_high=0.2, dual_clip=3.0)
    assert (loss, dual_clipped, grad) == (3.0, 1, 0)
    loss, _, _, grad = surrogate_and_grad(1000.0, -1.0, clip_low=0.2, clip_high=0.2, dual_clip=0.0)
    np.testing.assert_allclose(loss, math.exp(20), rtol=1e-5)
    assert grad == 0


@pytest.mark.parametrize("ref_minus_logprob", [2.7, 50.0, 1000.0, -12.0, -1000.0])
def test_k3_is_clamped_at_ten(ref_minus_logprob):
    """exp(2.7) - 2.7 - 1 = 11.2 and exp(-12) + 12 - 1 = 11.0 are the nearest of these to 10."""
    value, grad = jax.value_and_grad(kl.kl_k3)(jnp.float32(0), jnp.float32(ref_minus_logprob))
    assert (value, grad) == (10, 0)


def test_k3_is_accurate_near_the_reference():
    """exp(x) - x - 1 = x^2 / 2 + x^3 / 6 + ...; term by term in float32 it would be noise."""
    x = 2.0**-12
    value = kl.kl_k3(jnp.float32(0), jnp.float32(x)).item()
    np.testing.assert_allclose(value, x**2 / 2 + x**3 / 6, rtol=1e-3)


# Properties


FULL = dataclasses.replace(ALGORITHM, dual_clip=3.0, kl_coef=0.3, entropy_coef=0.02, rollout_is="token")


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_add_up_to_the_whole_batch(mode):
    logprobs, entropy, batch = random_batch(0)
    weights = losses.loss_weights(batch.completion_mask, mode, 5.0)
    whole_loss, whole_metrics, whole_grad = loss_and_grad(logprobs, batch, weights, FULL, entropy)

    _, shape = grpo_loss(logprobs, entropy, batch, weights, FULL)
    metrics, loss, grads = jax.tree.map(jnp.zeros_like, shape), 0.0, []
    for start in (0, 2, 4):
        rows = slice(start, start + 2)
        part = jax.tree.map(lambda x, rows=rows: x[rows], batch)
        args = (logprobs[rows], entropy[rows], part, weights[rows], FULL)
        (value, more), grad = jax.value_and_grad(grpo_loss, has_aux=True)(*args)
        loss, metrics, grads = loss + value, metrics.merge(more), [*grads, grad]
    np.testing.assert_allclose(loss, whole_loss, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(grads), whole_grad, rtol=1e-5)
    summary = metrics.summary()
    assert summary.keys() == whole_metrics.keys()
    for name, value in whole_metrics.items():
        np.testing.assert_allclose(summary[name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_padding_change_nothing(mode):
    logprobs, entropy, batch = random_batch(1)
    weights = losses.loss_weights(batch.completion_mask, mode, 5.0)
    expected, expected_metrics, expected_grad = loss_and_grad(logprobs, batch, weights, FULL, entropy)

    def pad(x):
        return jnp.pad(x, ((0, 3), (0, 0)))

    padded = jax.tree.map(pad, batch)
    padded_weights = losses.loss_weights(padded.completion_mask, mode, 5.0)
    np.testing.assert_array_equal(padded_weights, pad(weights))
    value, metrics, grad = loss_and_grad(pad(logprobs), padded, padded_weights, FULL, pad(entropy))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, pad(expected_grad), rtol=1e-6)
    for name, number in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], number, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("mode", MODES)
def test_an_empty_batch_is_zero_and_not_nan(mode):
    logprobs, entropy, batch = random_batch(2)
    batch = dataclasses.replace(batch, completion_mask=jnp.zeros_like(batch.completion_mask))
    weights = losses.loss_weights(batch.completion_mask, mode, 5.0)
    assert not np.asarray(weights).any()
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, FULL, entropy)
    assert value == 0 and not grad.any()
    assert all(number == 0 for number in metrics.values())


@pytest.mark.parametrize("garbage", [np.nan, -np.inf, np.inf, 1e38])
@pytest.mark.parametrize("kl_estimator", list(kl.KL_ESTIMATORS))
def test_columns_outside_the_completion_may_hold_anything(garbage, kl_estimator):
    algorithm = dataclasses.replace(FULL, kl_estimator=kl_estimator)
    logprobs, entropy, batch = random_batch(3)
    weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
    expected, expected_metrics, expected_grad = loss_and_grad(logprobs, batch, weights, algorithm, entropy)

    def spoil(x):
        return jnp.where(batch.completion_mask > 0, x, garbage)

    names = ("old_logprobs", "ref_logprobs", "sampler_logprobs", "advantages")
    spoilt = dataclasses.replace(batch, **{name: spoil(getattr(batch, name)) for name in names})
    args = (spoil(logprobs), spoil(entropy), spoilt, weights, algorithm)
    (value, metrics), grads = jax.value_and_grad(grpo_loss, argnums=(0, 1), has_aux=True)(*args)
    assert value == expected
    assert metrics.summary() == expected_metrics
    np.testing.assert_array_equal(grads[0], expected_grad)
    for grad in grads:
        assert np.isfinite(grad).all()
        assert not np.asarray(grad)[np.asarray(batch.completion_mask) == 0].any()
    nll = jax.value_and_grad(losses.nll_loss, has_aux=True)
    (value, metrics), nll_grad = nll(spoil(logprobs), spoil(entropy), spoilt.replace(loss_weights=weights))
    assert np.isfinite(value) and np.isfinite(metrics.summary()["actor/entropy"])
    np.testing.assert_array_equal(nll_grad, -weights)


def test_the_first_update_is_the_plain_policy_gradient():
    """Where the ratio is 1 the gradient with respect to log p is -A * w: REINFORCE."""
    logprobs, entropy, batch = random_batch(4, old=None, ref=None)
    weights = losses.loss_weights(batch.completion_mask, "seq-mean-token-mean", 1)
    value, metrics, grad = loss_and_grad(logprobs, batch, weights, ALGORITHM, entropy)
    np.testing.assert_array_equal(grad, -batch.advantages * weights)
    np.testing.assert_allclose(value, -np.sum(batch.advantages * weights), rtol=1e-6)
    assert metrics["actor/pg_clipfrac"] == metrics["actor/ppo_kl"] == 0
    given = dataclasses.replace(batch, old_logprobs=logprobs)
    same_value, _, same_grad = loss_and_grad(logprobs, given, weights, ALGORITHM, entropy)
    assert same_value == value
    np.testing.assert_array_equal(same_grad, grad)


def test_jit_equals_no_jit():
    logprobs, entropy, batch = random_batch(5)

    def loss(logprobs, entropy, batch):
        weights = losses.loss_weights(batch.completion_mask, "token-mean", 1)
        value, metrics = grpo_loss(logprobs, entropy, batch, weights, FULL)
        return value, metrics.summary()

    step = jax.value_and_grad(loss, has_aux=True)
    (value, metrics), grad = step(logprobs, entropy, batch)
    (jit_value, jit_metrics), jit_grad = jax.jit(step)(logprobs, entropy, batch)
    np.testing.assert_allclose(jit_value, value, rtol=1e-6)
    # atol: terms of a token's gradient may cancel, and fused they are rounded in another order.
    np.testing.assert_allclose(jit_grad, grad, rtol=1e-6, atol=1e-8)
    for name, number in metrics.items():
        np.testing.assert_allclose(jit_metrics[name], number, rtol=1e-6, err_msg=name)
