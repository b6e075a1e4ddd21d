"""When a run says that engine and trainer differ, or that a number is not 0 which should be."""

import logging

import numpy as np
import pytest
from config_helpers import gsm8k
from group_helpers import make_group

from grpo_jax.run.stopping import RunWatch, mismatch_warning, not_zero_warning
from grpo_jax.types import RewardResult, ScoredBatch, StepResult, TokenUse

PROB, FACTOR = "training/rollout_probs_diff_mean", "training/token_mult_prob_error"
ZERO = {"kl/mean": 0.0, "actor/ppo_kl": 0.0, "actor/skipped_updates": 0}


@pytest.mark.parametrize(
    ("prob", "factor", "is_warned"),
    [
        (0.005, 1.01, False),  # the bounds themselves are healthy
        (0.0051, 1.0, True),
        (0.0, 1.011, True),
        (float("nan"), float("nan"), False),  # another trouble, which has a warning of its own
        (None, None, False),  # as metrics.jsonl has what is not finite
    ],
)
def test_the_bounds_of_the_mismatch(prob, factor, is_warned):
    assert bool(mismatch_warning({PROB: prob, FACTOR: factor}, gsm8k())) is is_warned


def test_a_step_without_these_numbers_is_not_warned_of():
    assert mismatch_warning({"val/accuracy": 0.5}, gsm8k()) == ""


def test_the_warning_names_both_numbers_the_command_and_what_is_done_already():
    metrics = {PROB: 0.0089, FACTOR: 1.0401}
    plain = mismatch_warning(metrics, gsm8k())
    assert f"{PROB}=0.0089" in plain and f"{FACTOR}=1.04 " in plain and "python -m grpo_jax.mismatch" in plain
    assert "corrects" not in plain and "max_lag" not in plain and "\n" not in plain
    changes = {"algorithm.rollout_is": "token", "rollout.max_lag": 2}
    corrected = mismatch_warning(metrics, gsm8k(**changes))
    assert "this run corrects for it" in corrected and "rollout.max_lag=2" in corrected


@pytest.mark.parametrize(
    ("changes", "update", "named"),
    [
        ({}, {}, ()),
        ({}, {"kl/mean": 1e-6, "actor/ppo_kl": -1e-5}, ()),
        ({}, {"kl/mean": 6.4e-4}, ("kl/mean=0.00064",)),
        ({}, {"kl/mean": -2e-6}, ("kl/mean=-2e-06",)),  # k1 has either sign
        ({}, {"actor/ppo_kl": -2e-5}, ("actor/ppo_kl=-2e-05",)),
        ({}, {"kl/mean": 0.1, "actor/ppo_kl": 0.1}, ("kl/mean=0.1", "actor/ppo_kl=0.1")),
        ({"algorithm.kl_in": "reward"}, {"kl/mean": 0.1}, ()),
        ({"algorithm.kl_estimator": "mine.py:kl"}, {"kl/mean": 0.1}, ()),
        # There pi_old is the sampler's, which is another program.
        ({"algorithm.old_logprobs": "sampler"}, {"actor/ppo_kl": 0.1}, ()),
    ],
)
def test_zero_means_zero(changes, update, named):
    warning = not_zero_warning(ZERO | update, gsm8k(**changes))
    assert bool(warning) is bool(named) and all(name in warning for name in named)


def result_of(update=(), metrics=()):
    group = make_group([1], ([2], [-1.0]), ([3], [-1.0]))
    rewards = np.array([[0.0, 1.0]], np.float32)
    scored = ScoredBatch([group], RewardResult.of_one(rewards, ()))
    use = TokenUse(np.zeros(2, int), np.ones(2, int))
    return StepResult(scored, use, [ZERO | dict(update), ZERO | {"kl/mean": 1.0}], dict(metrics))


@pytest.fixture
def warnings_of(monkeypatch):
    """Returns `warnings_of(results, is_new)`: what a watch logs of the steps, one list a step."""

    def run(results, is_new):
        logged = []
        logger = logging.getLogger("grpo_jax.run.stopping")
        monkeypatch.setattr(logger, "warning", lambda text, *args: logged[-1].append(text % args))
        watch = RunWatch(gsm8k(), None, is_new=is_new)
        for result in results:
            logged.append([])
            watch.note(result)
        return logged

    return run


def test_the_mismatch_is_warned_of_once_a_run(warnings_of):
    bad = result_of(metrics={PROB: 0.02, FACTOR: 1.0})
    assert [len(step) for step in warnings_of([result_of(), bad, bad], is_new=True)] == [0, 1, 0]


def test_only_the_first_update_of_a_new_run_must_find_zero(warnings_of):
    moved = result_of(update={"kl/mean": 0.01})
    assert [len(step) for step in warnings_of([moved, moved], is_new=True)] == [1, 0]
    assert [len(step) for step in warnings_of([moved, moved], is_new=False)] == [0, 0]
    assert [len(step) for step in warnings_of([result_of(), moved], is_new=True)] == [0, 0]
