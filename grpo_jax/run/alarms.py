"""Numbers that go wrong: which there are, what tells them, what is behind them most of the time, and what helps.

A pure core: lines of metrics enter, as metrics.jsonl has them, and the alarms of the last of them leave. So a run
that goes on knows from metrics.jsonl alone which alarms it had. `alarm_log.py` tells them.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from grpo_jax.algorithm.loss import MISMATCH_MEANS
from grpo_jax.config import Config

Line = Mapping[str, Any]
"""Metrics of a step; None where a number was not finite."""

WINDOW = 50
"""Steps that a number is compared with: enough for a steady median, few enough to follow a run that learns."""
MIN_STEPS = 20
"""Of them, at least. The first steps of a run, warm-up and a KL from 0 on, are like no others."""
SPIKE = 10.0
"""How many spreads from the median a number must be. Of Gaussian noise that is one step in 10^23. The numbers here
have heavier tails: in a dozen runs (the quickstart, real models in float16 and bfloat16) none was beyond 4.5."""
RELATIVE_SPREAD = 0.2
"""The least spread, of the median: whatever is positive has to become three times as large."""
COLLAPSE = 0.1
"""An entropy below this part of its median has collapsed. The quickstart's, which learns fast, falls to a half."""
HEALTHY_PROB, HEALTHY_FACTOR = 0.005, 1.01
"""Largest means of |p_trainer - p_sampler| and of exp|log p_trainer - log p_sampler| that docs/trust.md calls
healthy."""
MOSTLY = 0.5
"""The share of completions that end in a loop from which on it is no longer the odd one."""

Rule = Callable[[Sequence[Line], Line, Config], str]
"""(steps before, oldest first; the step; configuration) -> what is wrong in a few words, or ""."""


@dataclasses.dataclass(frozen=True)
class Alarm:
    """One way in which a run goes wrong."""

    name: str
    metrics: tuple[str, ...]
    """What is looked at."""
    find: Rule
    cause: str
    """The likely one."""
    remedy: str
    is_divergence: bool = False
    """Whether the weights may be ruined, so that going back to earlier ones can help."""
    shows_completion: bool = False
    """Whether a look at a completion helps."""


# ---- against a moving window ----


def _numbers(lines: Sequence[Line], name: str) -> list[float]:
    """The finite values among the last steps."""
    values = (line.get(name) for line in lines[-WINDOW:])
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _typical(before: Sequence[Line], now: Line, name: str) -> tuple[float, float, float] | None:
    """(value, median, spread) of a number; None where it is not there, not finite, or there are too few before it.

    The spread is the median absolute deviation, scaled to a Gaussian's standard deviation. Neither moves much for
    a few values that are far off, as mean and standard deviation do, which would hide the next one.
    """
    value, seen = now.get(name), _numbers(before, name)
    if value is None or not math.isfinite(value) or len(seen) < MIN_STEPS:
        return None
    median = statistics.median(seen)
    deviation = 1.4826 * statistics.median(abs(other - median) for other in seen)
    return float(value), median, max(deviation, RELATIVE_SPREAD * abs(median))


def _beyond(name: str, value: float, median: float, limit: float) -> str:
    return f"{name} is {value:.3g}, beyond {limit:.3g} (median of the steps before: {median:.3g})"


def _rises(before: Sequence[Line], now: Line, config: Config, *, names: Sequence[str], floor: float) -> str:
    """Args: names: of which the first that is there is looked at; floor: least spread, for numbers near 0."""
    name = next((name for name in names if name in now), names[0])
    if (found := _typical(before, now, name)) is None:
        return ""
    value, median, spread = found
    limit = median + SPIKE * max(spread, floor)
    return _beyond(name, value, median, limit) if value > limit else ""


def _loss(before: Sequence[Line], now: Line, config: Config) -> str:
    """On either side: without a bound a surrogate can become large and negative. 0 is normal, hence the floor."""
    if (found := _typical(before, now, "actor/loss")) is None:
        return ""
    value, median, spread = found
    reach = SPIKE * max(spread, 0.01)
    limit = median + math.copysign(reach, value - median)
    return _beyond("actor/loss", value, median, limit) if abs(value - median) > reach else ""


def _grad_norm(before: Sequence[Line], now: Line, config: Config) -> str:
    """A norm within `max_grad_norm` of the usual one is an update like any other."""
    floor = config.optim.max_grad_norm / SPIKE
    return _rises(before, now, config, names=("actor/grad_norm",), floor=floor)


def _entropy_falls(before: Sequence[Line], now: Line, config: Config) -> str:
    if (found := _typical(before, now, "actor/entropy")) is None:
        return ""
    value, median, _ = found
    if value >= COLLAPSE * median:
        return ""
    return f"actor/entropy is {value:.3g}, below a tenth of the median of the steps before, {median:.3g}"


def _not_finite(before: Sequence[Line], now: Line, config: Config) -> str:
    count = now.get("actor/skipped_updates") or 0
    return f"loss or gradient was not finite in {count:.0f} update(s), which are left out" if count else ""


# ---- against a limit ----


def _stale(before: Sequence[Line], now: Line, config: Config) -> str:
    """A batch that dynamic sampling fills with what the step before left over is one step older."""
    limit = config.rollout.max_lag + bool(config.algorithm.dynamic_sampling_rounds)
    names = ("training/policy_lag", "training/token_age_max")
    ages = {name: now[name] for name in names if now.get(name) is not None and now[name] > limit}
    return ", ".join(f"{name} is {age:g}, of at most {limit} step(s)" for name, age in ages.items())


def _mismatch(before: Sequence[Line], now: Line, config: Config) -> str:
    prob, factor = (now.get(name) or 0.0 for name in MISMATCH_MEANS)
    if not (prob > HEALTHY_PROB or factor > HEALTHY_FACTOR):  # NaN is another trouble
        return ""
    (prob_name, factor_name), reasons = MISMATCH_MEANS, []
    if config.rollout.max_lag:
        reasons.append(f"with rollout.max_lag={config.rollout.max_lag}, older weights are part of it")
    if config.corrects_sampler:
        reasons.append("this run corrects for it (algorithm.rollout_is, algorithm.old_logprobs)")
    numbers = f"engine and trainer differ: {prob_name}={prob:.2g} (healthy: at most {HEALTHY_PROB:g})"
    numbers += f", {factor_name}={factor:.4g} (at most {HEALTHY_FACTOR:g})"
    return "; ".join([numbers, *reasons])


# ---- in several steps in a row ----


def _in_a_row(before: Sequence[Line], now: Line, config: Config, is_so: Callable[[Line], bool]) -> int:
    """`trainer.flat_reward_steps` where so many steps, this one included, are so; else 0."""
    count = config.trainer.flat_reward_steps
    lines = [*before, now][-count:]
    return count if len(lines) == count and all(map(is_so, lines)) else 0


def _is_zero(line: Line) -> bool:
    return line.get("reward/max") == line.get("reward/min") == 0


def _zero_reward(before: Sequence[Line], now: Line, config: Config) -> str:
    count = _in_a_row(before, now, config, _is_zero)
    return (
        f"every reward of the last {count} step(s) is 0, so there is nothing to learn from" if count else ""
    )


def _no_spread(before: Sequence[Line], now: Line, config: Config) -> str:
    if _zero_reward(before, now, config):
        return ""  # which says more
    count = _in_a_row(before, now, config, lambda line: line.get("frac_reward_zero_std") == 1)
    text = f"in the last {count} step(s) the completions of each prompt all got the same reward (now "
    return f"{text}{now['reward/mean']:g} on average), so there is nothing to learn from" if count else ""


def _truncated(before: Sequence[Line], now: Line, config: Config) -> str:
    count = _in_a_row(before, now, config, lambda line: line.get("response_length/clip_ratio") == 1)
    limit = config.data.max_response_length
    return f"every completion of the last {count} step(s) was cut at {limit} tokens" if count else ""


def _repeated(before: Sequence[Line], now: Line, config: Config) -> str:
    name = "response_length/repeat_ratio"
    count = _in_a_row(before, now, config, lambda line: (line.get(name) or 0) >= MOSTLY)
    return f"{now[name]:.0%} of the completions end in a loop, for {count} step(s) now" if count else ""


# ---- the table ----

LOWER = "lower optim.learning_rate, add optim.warmup_steps, lower optim.max_grad_norm"
BACK = "trainer.max_rollbacks goes back by itself"

ALARMS = (
    Alarm(
        "not-finite", ("actor/skipped_updates",), _not_finite,
        "the learning rate is too high, or a number is beyond the range of model.dtype",
        "lower optim.learning_rate (float16: optim.loss_scale), or try model.dtype=float32; " + BACK,
        is_divergence=True,
    ),
    Alarm(
        "loss-spike", ("actor/loss",), _loss,
        "an update was too large, or rewards or log-probabilities of the batch are of another size",
        f"look at the batch (logging.save_rollouts); {LOWER}; {BACK}",
        is_divergence=True,
    ),
    Alarm(
        "kl-spike", ("kl/mean", "kl/reward_penalty"),
        functools.partial(_rises, names=("kl/mean", "kl/reward_penalty"), floor=0.001),
        "the policy leaves the reference fast: updates are too large, or a reward is exploited",
        f"{LOWER}, raise algorithm.kl_coef; read the completions that are rewarded most; {BACK}",
        is_divergence=True,
    ),
    Alarm(
        "entropy-spike", ("actor/entropy",), functools.partial(_rises, names=("actor/entropy",), floor=0.05),
        "the policy falls apart into noise: updates are too large, or the engine samples from another policy",
        f"{LOWER}, lower algorithm.entropy_coef; look at training/rollout_probs_diff_mean; {BACK}",
        is_divergence=True,
    ),
    Alarm(
        "entropy-collapse", ("actor/entropy",), _entropy_falls,
        "the policy has settled on one answer, right or not, and samples nothing else any more",
        f"lower optim.learning_rate, raise algorithm.clip_high, kl_coef or entropy_coef; {BACK}",
        is_divergence=True,
    ),
    Alarm(
        "grad-norm-spike", ("actor/grad_norm",), _grad_norm,
        "a batch with very unlikely tokens or very uneven rewards; or the weights are being ruined",
        f"one step alone is clipped and harmless; if it stays: {LOWER}; {BACK}",
        is_divergence=True,
    ),
    Alarm(
        "stale-weights", ("training/policy_lag", "training/token_age_max"), _stale,
        "an engine has missed a push of new weights, or its rollouts wait longer than rollout.max_lag allows",
        "look for restarts of engines in train.log; algorithm.rollout_is=token corrects the loss",
    ),
    Alarm(
        "mismatch", MISMATCH_MEANS, _mismatch,
        "engine and trainer compute another distribution: dtypes, kernels, top_p or top_k, older weights",
        "`python -m grpo_jax.mismatch` with the flags of this run says where it comes from (docs/trust.md)",
    ),
    Alarm(
        "zero-reward", ("reward/max", "reward/min"), _zero_reward,
        "the rule of the reward wants another form of answer, or the completions are cut before it",
        "read the completion and the reason; another reward.function, longer completions, easier prompts",
        shows_completion=True,
    ),
    Alarm(
        "no-spread", ("frac_reward_zero_std",), _no_spread,
        "the prompts are all too hard or all too easy, or all completions of a prompt are the same",
        "other prompts, a higher rollout.temperature or algorithm.group_size, algorithm.dynamic_sampling_rounds",
        shows_completion=True,
    ),
    Alarm(
        "all-truncated", ("response_length/clip_ratio",), _truncated,
        "data.max_response_length is too short, or the model never ends: a base model, a wrong chat template",
        "raise data.max_response_length; see which tokens end a completion (rollout.stop_token_ids)",
        shows_completion=True,
    ),
    Alarm(
        "repeated-text", ("response_length/repeat_ratio",), _repeated,
        "the model has fallen into loops: too high a learning rate, or a reward for length",
        "lower optim.learning_rate, and go back to an earlier checkpoint; reward.overlong_buffer",
        shows_completion=True,
    ),
)  # fmt: skip
"""Every alarm. docs/alarms.md lists them."""


@dataclasses.dataclass(frozen=True)
class Found:
    """An alarm that a step raises."""

    alarm: Alarm
    seen: str
    """In a few words, with the numbers."""


def raised(before: Sequence[Line], now: Line, config: Config) -> list[Found]:
    """The alarms of one step, in the order of the table. Args: before: steps, oldest first; see `num_before`."""
    found = (Found(alarm, alarm.find(before, now, config)) for alarm in ALARMS)
    return [each for each in found if each.seen]


def num_before(config: Config) -> int:
    """How many steps back the rules look."""
    return max(WINDOW, config.trainer.flat_reward_steps)


def first_of_each(lines: Sequence[Line], config: Config) -> Iterator[tuple[int, Found]]:
    """Each alarm that a whole metrics.jsonl raises, with the step where it first does."""
    steps = [line for line in lines if is_step(line)]
    told: set[str] = set()
    for at, line in enumerate(steps):
        for found in raised(steps[max(0, at - num_before(config)) : at], line, config):
            if found.alarm.name not in told:
                told.add(found.alarm.name)
                yield line["step"], found


def is_step(line: Line) -> bool:
    """Whether a line is that of a step, and not of the validation before the first one."""
    return "actor/loss" in line
