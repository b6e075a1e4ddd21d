"""What the learner does to a batch around the updates: penalties, advantages, masks, the KL's coefficient."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from loss_helpers import ALGORITHM, make_batch

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm import loss as losses
from grpo_jax.config import Config, ConfigError, MeshSection
from grpo_jax.learner.batching import keep_completions
from grpo_jax.learner.learner import Learner
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import abstract_params, num_params
from grpo_jax.types import Completion, Prompt, RewardResult, RolloutGroup, ScoredBatch

# One prompt with two completions, of two tokens and of one. log p_old - log p_ref: 1 and 2; -3.
MASK = np.array([[0, 1, 1, 0], [0, 0, 1, 0]], np.float32)
OLD = np.array([[0, -1, -1, 0], [0, 0, -4, 0]], np.float32)
REF = np.array([[0, -2, -3, 0], [0, 0, -1, 0]], np.float32)
REWARDS = np.array([[1.0, 0.0]], np.float32)


MODEL = ModelConfig(
    vocab_size=8, hidden_size=4, intermediate_size=4, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=2,
    rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=False, qk_norm=False,
)  # fmt: skip


def learner_for(optim=None, **changes):
    """A learner of steps of two completions. Args: optim: keys of that section; changes: of `algorithm`."""
    section = dataclasses.replace(ALGORITHM, **{"kl_coef": 0.5, "group_size": 2} | changes)
    config = Config()
    data = dataclasses.replace(config.data, train_batch_size=1, max_prompt_length=8, max_response_length=8)
    optim = dataclasses.replace(config.optim, **{"offload": False} | (optim or {}))
    config = dataclasses.replace(config, algorithm=section, data=data, optim=optim)
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    timer = lambda phase: contextlib.nullcontext()
    return Learner(config, Algorithm.of(section), MODEL, mesh, num_steps=10, timer=timer)


def host_batch():
    batch = make_batch(MASK, old=OLD, ref=REF, sampler=OLD - 1)
    return batch.replace(**{f.name: np.asarray(getattr(batch, f.name)) for f in dataclasses.fields(batch)
                            if getattr(batch, f.name) is not None})  # fmt: skip


def rollouts(*reasons):
    completions = tuple(Completion((1,), (0.0,), "", reason, 0) for reason in reasons)
    group = RolloutGroup(Prompt("p", (1,), "", "", "", {}), completions)
    return ScoredBatch([group], RewardResult.of_one(REWARDS, ()))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Rewards less half the KL: 1 - 3 / 2 = -0.5 and 0 + 3 / 2 = 1.5; their mean 0.5.
        ("grpo_no_std", [[0, -1, -1, 0], [0, 0, 1, 0]]),
        ("rloo", [[0, -2, -2, 0], [0, 0, 2, 0]]),
        # Lengths 2 and 1: mean (2 * -0.5 + 1.5) / 3 = 1 / 6.
        ("opo", [[0, -2 / 3, -2 / 3, 0], [0, 0, 4 / 3, 0]]),
    ],
)
def test_a_penalty_in_the_reward_of_completions(name, expected):
    learner = learner_for(adv_estimator=name, kl_in="reward", kl_estimator="k1")
    batch, metrics = learner.with_advantages(host_batch(), REWARDS)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5)
    assert metrics == {"kl/reward_penalty": pytest.approx((1.5 - 3) / 2)}  # means of the completions' tokens


def test_a_penalty_in_the_reward_of_tokens():
    """Returns: 1 - 0.5 - 1 = -0.5 and 1 - 1 = 0; 0 + 1.5. Mean 1/3, variance (25/36 + 1/9 + 49/36) / 2 = 13/12."""
    learner = learner_for(adv_estimator="reinforce_plus_plus", kl_in="reward", kl_estimator="k1")
    batch, _ = learner.with_advantages(host_batch(), REWARDS)
    expected = np.array([[0, -5 / 6, -1 / 3, 0], [0, 0, 7 / 6, 0]]) / np.sqrt(13 / 12)
    np.testing.assert_allclose(batch.advantages, expected, rtol=1e-5)


def test_the_penalty_takes_the_coefficient_as_it_is_now():
    learner = learner_for(adv_estimator="grpo_no_std", kl_in="reward", kl_estimator="k1", kl_target=1.0)
    learner.reference.kl_coef = 0.0
    batch, _ = learner.with_advantages(host_batch(), REWARDS)
    np.testing.assert_allclose(batch.advantages, [[0, 0.5, 0.5, 0], [0, 0, -0.5, 0]])
    unpenalized, metrics = learner_for(adv_estimator="grpo_no_std").with_advantages(host_batch(), REWARDS)
    np.testing.assert_array_equal(unpenalized.advantages, batch.advantages)
    assert metrics == {}


def test_an_estimator_of_the_users_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def halved(rewards, lengths):\n    return rewards / 2 + lengths\n")
    name = f"{path}:halved"
    learner = learner_for(adv_estimator=name)
    batch, _ = learner.with_advantages(host_batch(), REWARDS)
    np.testing.assert_allclose(batch.advantages, [[0, 2.5, 2.5, 0], [0, 0, 1, 0]])


def test_an_estimator_that_cannot_be_loaded(tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    for name, complaint in (("absent.py:f", "no file"), (f"{tmp_path}/bad.py:f", "ZeroDivisionError")):
        with pytest.raises(ConfigError, match=complaint) as caught:
            learner_for(adv_estimator=name)
        assert caught.value.key == "algorithm.adv_estimator"


# Truncated completions


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_truncated_completions_are_left_out_of_the_loss_and_its_denominators(mode):
    learner = learner_for(mask_truncated=True)
    batch, _ = learner.with_advantages(host_batch(), REWARDS)
    masked = learner.with_loss_terms(batch, rollouts("stop", "length"))
    np.testing.assert_array_equal(masked.completion_mask, [MASK[0], np.zeros(4)])
    for name in ("advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs"):
        np.testing.assert_array_equal(getattr(masked, name), [getattr(batch, name)[0], np.zeros(4)], name)
    np.testing.assert_array_equal(masked.tokens, batch.tokens)
    # Two tokens of one completion are left: each weighs 1/2, in either mode.
    weights = losses.loss_weights(masked.completion_mask, mode, 1)
    np.testing.assert_array_equal(weights, MASK * [[0.5], [0]])
    # The truncated one has taken part in the comparison: the first one's advantage is not 0.
    assert masked.advantages[0, 1] > 0


def test_truncated_completions_stay_unless_configured():
    learner = learner_for()
    assert learner.with_loss_terms(batch := host_batch(), rollouts("length", "length")) is batch


def test_fields_that_are_not_there_are_not_masked():
    batch = make_batch(MASK)
    assert keep_completions(batch, np.array([True, False])).old_logprobs is None


# The coefficient and the reference


def test_an_adaptive_coefficient_stands_on_every_token_of_the_loss():
    learner = learner_for(kl_target=0.1)
    learner.reference.kl_coef = 0.125
    batch = learner.with_loss_terms(host_batch(), rollouts("stop", "stop"))
    np.testing.assert_array_equal(batch.kl_coef, np.full((2, 4), 0.125, np.float32))
    other = learner_for(kl_target=0.1, kl_in="reward")
    in_reward = other.with_loss_terms(host_batch(), rollouts("stop", "stop"))
    assert in_reward.kl_coef is None and learner_for().reference.is_adaptive is False


def test_the_coefficient_follows_the_kl_of_the_step():
    learner = learner_for(kl_target=0.1, kl_horizon=10.0)
    metrics = learner.move_reference(None, {"kl/mean": 7.0}, 1)
    assert metrics == {"kl/coef": 0.5}  # the one of this step
    assert learner.reference.kl_coef == pytest.approx(0.5 * (1 + 0.2 * 2 / 10))
    # verl's, in the reward
    learner.move_reference(None, {"kl/mean": 7.0, "kl/reward_penalty": 0.095}, 2)
    assert learner.reference.kl_coef == pytest.approx(0.5 * 1.04 * (1 - 0.05 * 2 / 10))
    fixed = learner_for()
    assert fixed.move_reference(None, {"kl/mean": 7.0}, 1) == {} and fixed.reference.kl_coef == 0.5


@pytest.mark.parametrize("ref_offload", [False, True])
def test_the_reference_is_refreshed_every_n_steps(ref_offload):
    learner = learner_for(ref_refresh_every=3, ref_offload=ref_offload)
    policy_at = lambda n: jax.tree.map(lambda x: jnp.full(x.shape, n, jnp.float32), abstract_params(MODEL)[0])
    learner.reference.copy_from(policy_at(0))
    refreshed = []
    for done in range(1, 8):
        policy = policy_at(done)
        refreshed.append(learner.move_reference(policy, {}, done)["kl/is_refreshed"])
        jax.tree.map(lambda x: x.delete(), policy)  # as the next update donates it
        for leaf in jax.tree.leaves(learner.reference.on_device()):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, done // 3 * 3))
    assert refreshed == [0, 0, 1, 0, 0, 1, 0]


# Programs before the first step


@pytest.mark.parametrize("offload", [False, True])
def test_what_compiling_says_of_memory(offload):
    """At least what is held and summed: float32 parameters and, on the device, twice as many moments."""
    learner = learner_for(optim={"offload": offload})
    with jax.set_mesh(learner.mesh):
        sizes = learner.compile()
    parameters = 4 * num_params(MODEL)
    moments = 0 if offload else 2 * parameters
    assert sizes["update"] >= 2 * parameters + moments  # parameters, sums of gradients
    assert sizes["update"] < 2 * parameters + moments + 2**20
    assert set(sizes) == ({"score", "update"} if offload else {"score", "update", "optimizer"})
    assert 2 * parameters + moments - 4 * num_params(MODEL) <= sizes["score"] < sizes["update"]  # no sums
    if not offload:
        assert 4 * parameters <= sizes["optimizer"] < 4 * parameters + 2**20
