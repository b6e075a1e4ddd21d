"""Each alarm on numbers worked out here, and on healthy ones; the table and its page."""

import json
import pathlib
import re

import numpy as np
import pytest
from config_helpers import CONFIGS, gsm8k

from grpo_jax.config import KEYS, load_config, parse_config
from grpo_jax.run.alarms import ALARMS, MIN_STEPS, WINDOW, first_of_each, num_before, raised
from grpo_jax.run.metrics import ends_in_loop

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROB, FACTOR = "training/rollout_probs_diff_mean", "training/token_mult_prob_error"
HEALTHY = {
    "actor/loss": 0.01,
    "actor/grad_norm": 0.3,
    "actor/entropy": 0.4,
    "actor/skipped_updates": 0,
    "kl/mean": 0.02,
    "reward/mean": 0.5,
    "reward/max": 1.0,
    "reward/min": 0.0,
    "frac_reward_zero_std": 0.2,
    "response_length/clip_ratio": 0.1,
    "response_length/repeat_ratio": 0.05,
    "training/policy_lag": 0,
    PROB: 0.001,
    FACTOR: 1.001,
}


def load(recipe):
    return parse_config(load_config(CONFIGS / f"{recipe}.py"))


def names_of(before, now, config=None):
    """Names of the alarms of a step. Args: both are what differs from a healthy line."""
    before = [HEALTHY | line for line in before]
    return [found.alarm.name for found in raised(before, HEALTHY | now, config or gsm8k())]


def steps(count=MIN_STEPS, **changes):
    return [changes] * count


def test_a_healthy_step_raises_none():
    assert names_of(steps(WINDOW), {}) == []


# ---- against a moving window ----


@pytest.mark.parametrize(
    ("name", "alarm", "usual", "good", "bad"),
    [
        # Nothing varies, so the spread is a fifth of the median, and the limit three times the median.
        ("kl/mean", "kl-spike", 0.02, 0.0599, 0.0601),
        ("actor/entropy", "entropy-spike", 0.4, 1.19, 1.21),
        # Here the floors decide: 10 * 0.001; 10 * 0.05; max_grad_norm=1; 10 * 0.01 on both sides.
        ("kl/mean", "kl-spike", 0.0, 0.0099, 0.0101),
        ("actor/entropy", "entropy-spike", 0.1, 0.599, 0.601),
        ("actor/grad_norm", "grad-norm-spike", 0.3, 1.29, 1.31),
        ("actor/grad_norm", "grad-norm-spike", 0.0, 0.99, 1.01),
        ("actor/loss", "loss-spike", 0.01, 0.109, 0.111),
        ("actor/loss", "loss-spike", 0.01, -0.089, -0.091),
        ("actor/loss", "loss-spike", 1e-9, 0.09, 0.11),
        ("actor/entropy", "entropy-collapse", 0.4, 0.041, 0.039),
    ],
)
def test_the_limits_where_nothing_varies(name, alarm, usual, good, bad):
    before = steps(**{name: usual})
    assert names_of(before, {name: good}) == []
    assert names_of(before, {name: bad}) == [alarm]
    assert names_of(before[1:], {name: bad}) == []  # too few steps to say what is usual
    assert names_of(before, {name: float("nan")}) == names_of(before, {name: None}) == []


def test_the_spread_is_that_of_the_window():
    """1, 2, ..., 21 around 11: half of the distances are at most 5, so the spread is 5 * 1.4826 = 7.413."""
    before = [{"actor/grad_norm": float(value)} for value in range(1, 22)]
    limit = 11 + 10 * 7.413
    assert names_of(before, {"actor/grad_norm": limit - 0.01}) == []
    assert names_of(before, {"actor/grad_norm": limit + 0.01}) == ["grad-norm-spike"]


def test_a_few_spikes_do_not_hide_the_next_one():
    """Mean and standard deviation of the window would be about 40 and 194."""
    before = [*steps(25), *steps(2, **{"actor/grad_norm": 1000.0}), *steps(23)]
    assert names_of(before, {"actor/grad_norm": 5.0}) == ["grad-norm-spike"]


def test_only_the_last_steps_count():
    before = [*steps(100, **{"kl/mean": 9.0}), *steps(WINDOW)]
    assert names_of(before, {"kl/mean": 0.5}) == ["kl-spike"]


def test_the_clipping_bound_is_the_least_spike_of_the_gradient():
    before = steps(**{"actor/grad_norm": 0.3})
    loose = gsm8k(**{"optim.max_grad_norm": 10.0})
    assert names_of(before, {"actor/grad_norm": 10.2}, loose) == []
    assert names_of(before, {"actor/grad_norm": 10.4}, loose) == ["grad-norm-spike"]


def test_the_kl_of_the_reward_counts_where_the_loss_has_none():
    before = [{"kl/reward_penalty": 0.02}] * MIN_STEPS
    lines = [{k: v for k, v in (HEALTHY | line).items() if k != "kl/mean"} for line in [*before, {}]]
    lines[-1]["kl/reward_penalty"] = 0.5
    assert [found.alarm.name for found in raised(lines[:-1], lines[-1], gsm8k())] == ["kl-spike"]


def test_numbers_that_a_run_does_not_have_are_not_missed():
    lines = [{"actor/loss": 0.0, "actor/grad_norm": 0.1}] * MIN_STEPS
    assert raised(lines, lines[0], gsm8k()) == []


def test_the_quickstart_raises_none():
    text = (ROOT / "tests" / "data" / "quickstart_metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert len(lines) == 40 and list(first_of_each(lines, load("quickstart"))) == []
    # One of its numbers a hundred times as large is found; the others still are none.
    for step, name, alarm in ((25, "actor/grad_norm", "grad-norm-spike"), (40, "kl/mean", "kl-spike")):
        changed = [line | ({name: 100 * line[name]} if line["step"] == step else {}) for line in lines]
        [(at, found)] = first_of_each(changed, load("quickstart"))
        assert (at, found.alarm.name) == (step, alarm)


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_learns_raises_none(seed):
    """As the quickstart: loss towards 0, KL from 0 on, entropy from 0.2 to 0.03, gradients that vary by half."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(1, 201):
        noise = rng.lognormal(0, 0.3, 4)
        change = {
            "step": step,
            "actor/loss": -0.4 * np.exp(-step / 20) * noise[0] + 0.01 * rng.normal(),
            "kl/mean": 0.04 * (1 - np.exp(-step / 15)) * noise[1],
            "actor/entropy": (0.03 + 0.17 * np.exp(-step / 10)) * noise[2],
            "actor/grad_norm": 0.3 * noise[3],
        }
        lines.append(HEALTHY | {name: float(value) for name, value in change.items()} | {"step": step})
    assert list(first_of_each(lines, gsm8k())) == []


def test_growth_without_end_is_found():
    """1.2 times as much each step: 25 steps ago, the median, it was a hundredth."""
    lines = [HEALTHY | {"step": step, "kl/mean": 1e-4 * 1.2**step} for step in range(1, 101)]
    [(step, found)] = first_of_each(lines, gsm8k())
    assert found.alarm.name == "kl-spike" and MIN_STEPS < step < 60


# ---- against a limit ----


def test_an_update_that_was_not_finite():
    assert names_of([], {"actor/skipped_updates": 2, "actor/loss": None}) == ["not-finite"]


@pytest.mark.parametrize(
    ("changes", "line", "is_raised"),
    [
        ({}, {"training/policy_lag": 0}, False),
        ({}, {"training/policy_lag": 1}, True),
        ({}, {"training/token_age_max": 1}, True),
        ({"rollout.max_lag": 2}, {"training/policy_lag": 2, "training/token_age_max": 2}, False),
        ({"rollout.max_lag": 2}, {"training/policy_lag": 3}, True),
        # What one step leaves over is trained on in the next.
        ({"algorithm.dynamic_sampling_rounds": 4}, {"training/policy_lag": 1}, False),
        ({"algorithm.dynamic_sampling_rounds": 4}, {"training/policy_lag": 2}, True),
    ],
)
def test_weights_older_than_allowed(changes, line, is_raised):
    corrected = changes | {"algorithm.rollout_is": "token"}  # which old weights need
    assert names_of([], line, gsm8k(**corrected)) == ["stale-weights"] * is_raised


@pytest.mark.parametrize(
    ("prob", "factor", "is_raised"),
    [
        (0.005, 1.01, False),  # the bounds themselves are healthy
        (0.0051, 1.0, True),
        (0.0, 1.011, True),
        (float("nan"), float("nan"), False),  # another trouble, which has an alarm of its own
        (None, None, False),  # as metrics.jsonl has what is not finite
    ],
)
def test_the_bounds_of_the_mismatch(prob, factor, is_raised):
    assert names_of([], {PROB: prob, FACTOR: factor}) == ["mismatch"] * is_raised


def test_the_mismatch_names_both_numbers_the_command_and_what_is_done_already():
    line = HEALTHY | {PROB: 0.0089, FACTOR: 1.0401}
    [plain] = raised([], line, gsm8k())
    assert f"{PROB}=0.0089" in plain.seen and f"{FACTOR}=1.04 " in plain.seen
    assert "python -m grpo_jax.mismatch" in plain.alarm.remedy
    assert "corrects" not in plain.seen and "max_lag" not in plain.seen
    [corrected] = raised([], line, gsm8k(**{"algorithm.rollout_is": "token", "rollout.max_lag": 2}))
    assert "this run corrects for it" in corrected.seen and "rollout.max_lag=2" in corrected.seen


# ---- in several steps in a row ----

ZERO = {"reward/max": 0.0, "reward/min": 0.0, "reward/mean": 0.0, "frac_reward_zero_std": 1.0}


@pytest.mark.parametrize(
    ("alarm", "line"),
    [
        ("zero-reward", ZERO),  # and not "no-spread" too
        ("no-spread", {"frac_reward_zero_std": 1.0}),
        ("no-spread", ZERO | {"reward/max": 1.0, "reward/min": 1.0, "reward/mean": 1.0}),
        ("all-truncated", {"response_length/clip_ratio": 1.0}),
        ("repeated-text", {"response_length/repeat_ratio": 0.5}),
    ],
)
def test_what_must_last(alarm, line):
    config = gsm8k(**{"trainer.flat_reward_steps": 3})
    assert names_of([line, line], line, config) == [alarm]
    assert names_of([line], line, config) == []  # a run that has just begun
    assert names_of([line, {}, line], line, config) == []
    assert names_of([line, line], {}, config) == []


def test_a_row_may_be_longer_than_the_window():
    config = gsm8k(**{"trainer.flat_reward_steps": 80})
    assert num_before(config) == 80 and num_before(gsm8k()) == WINDOW
    assert names_of([ZERO] * 79, ZERO, config) == ["zero-reward"]
    assert names_of([ZERO] * 78, ZERO, config) == []


@pytest.mark.parametrize(
    ("tokens", "is_loop"),
    [
        ([7] * 64, True),
        ([7] * 63, False),
        ([1, 2, 3] * 22, True),  # 66 tokens
        ([*range(100), *[1, 2, 3] * 22], True),
        ([*[1, 2, 3] * 22, 9], False),  # it came out of it
        (list(range(64)) * 4, True),
        (list(range(64)) * 3, False),
        (list(range(65)) * 4, False),
        ([*range(50), 7, 7, 7, 7, 7], False),
        ([3], False),
    ],
)
def test_loops(tokens, is_loop):
    assert ends_in_loop(tuple(tokens)) is is_loop


# ---- the table ----


def test_the_page_has_every_alarm_with_cause_and_remedy():
    page = (ROOT / "docs" / "alarms.md").read_text()
    for alarm in ALARMS:
        row = next(line for line in page.splitlines() if line.startswith(f"| `{alarm.name}` |"))
        assert alarm.cause in row and alarm.remedy in row
        assert all(f"`{name}`" in row for name in alarm.metrics)
    assert len({alarm.name for alarm in ALARMS}) == len(ALARMS)


def test_what_alarms_name_exists():
    sections = "|".join({key.partition(".")[0] for key in KEYS})
    for alarm in ALARMS:
        for key in re.findall(rf"\b(?:{sections})\.[a-z_]+", alarm.cause + " " + alarm.remedy):
            assert key in KEYS, (alarm.name, key)
