"""What the scores of `mismatch.py` say: differences, a budget from engine to trainer, and what would lower it."""

import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from grpo_jax.config import Config
from grpo_jax.run.mismatch import (
    GIVEN,
    GIVEN_HEAD,
    GRADIENTS,
    HEAD,
    OTHER_DTYPES,
    PLAIN,
    PLAIN_HEAD,
    SAMPLED,
    TRAINER,
    TRUNCATED,
    TRUTH,
    UNTRUNCATED,
    Comparison,
)

ALIKE = 3.0
"""Times the square of the whole way, from which on the squares of its steps do not make it up."""
NUM_SETTINGS = 2
"""Settings that are named, the best first."""
HEAD_ARGUMENT = "rollout.engine_args=(\"hf_overrides={'head_dtype': 'float32'}\",)"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How far two programs are from one another, over the tokens of all completions."""

    nats: float
    """Mean |d log p|."""
    prob: float
    """Mean |d p|."""
    factor: float
    """Mean exp |d log p|, NeMo-RL's token_mult_prob_error."""
    max_prob: float
    """Largest |d p|."""
    square: float
    """Mean (d log p)^2."""

    def to_dict(self) -> dict[str, float | None]:
        return {k: v if math.isfinite(v) else None for k, v in dataclasses.asdict(self).items()}


def difference(a: np.ndarray, b: np.ndarray) -> Difference:
    """Args: a, b: [tokens] log-probabilities of the same tokens."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    nats, prob = np.abs(a - b), np.abs(np.exp(a) - np.exp(b))
    with np.errstate(over="ignore"):
        factor = np.exp(nats).mean()
    return Difference(
        float(nats.mean()), float(prob.mean()), float(factor), float(prob.max()), float((nats**2).mean())
    )


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of the way from the engine as it samples to the trainer."""

    what: str
    size: Difference
    share: float
    """Of the sum of all steps' mean squares: what is rounded independently adds up in squares."""


def row_names(found: Comparison) -> dict[str, str]:
    """Key of a program -> its name in the table, in the order of the table."""
    own = f"trainer ({found.dtype}, {found.attention} attention)"
    return {
        SAMPLED: "engine, as sampled",
        GIVEN: "engine, tokens given",
        GIVEN_HEAD: "engine, head in float32",
        TRAINER: own,
        GRADIENTS: "trainer for gradients, run again",
        TRUNCATED: "trainer, with top_p and top_k",
        PLAIN: "trainer, plain attention",
        HEAD: "trainer, head in float32",
        PLAIN_HEAD: "trainer, both of these",
        **{dtype: f"trainer in {dtype}" for dtype in OTHER_DTYPES if dtype != found.dtype},
        TRUTH: "trainer in float32, in full",
    }


# ---- the budget ----


def budget(found: Comparison) -> list[Step]:
    """The steps from the engine as sampled to the trainer, by way of float32.

    Programs that could not be run are left out, and their steps fall together with the next.
    """
    scores = found.logprobs
    path = [
        (SAMPLED, ""),
        (UNTRUNCATED, "top_p and top_k"),
        (GIVEN, "the engine's way of decoding: token by token, or all at once"),
        (GIVEN_HEAD, f"the engine's head in {found.dtype}"),
        (TRUTH, f"the engine's {found.dtype} and kernels"),
        (PLAIN_HEAD if PLAIN_HEAD in scores else HEAD, f"the trainer's {found.dtype}"),
        (PLAIN if PLAIN_HEAD in scores else TRAINER, f"the trainer's head in {found.dtype}"),
        (TRAINER, f"the trainer's {found.attention} attention"),
    ]
    names: list[str] = []
    rungs: list[tuple[str, str]] = []
    for key, name in path:
        names += [name] if name else []
        if key in scores and (not rungs or rungs[-1][0] != key):
            rungs.append((key, " + ".join(n for n in names if _is_passed(n, found))))
            names = []
    pairs = list(itertools.pairwise(rungs))
    sizes = [difference(scores[a], scores[b]) for (a, _), (b, _) in pairs]
    total = sum(size.square for size in sizes)
    return [
        Step(name, size, size.square / total if total else 0.0)
        for (_, (_, name)), size in zip(pairs, sizes, strict=True)
    ]


def _is_passed(name: str, found: Comparison) -> bool:
    """Whether a step that falls together with the next is there at all: what nobody has set changes nothing."""
    return UNTRUNCATED in found.logprobs or not name.startswith("top_p")


# ---- what would lower it ----


@dataclasses.dataclass(frozen=True)
class Setting:
    """A change that was measured, or estimated from what was."""

    setting: str
    prob: float
    """Mean |d p| between engine and trainer with it."""
    cost: str
    is_estimate: bool = False


def settings(found: Comparison) -> list[Setting]:
    """The changes that would bring engine and trainer nearer to one another, the best first."""
    now = _prob(found, SAMPLED, TRAINER)
    tried = [*_of_trainer(found), *_of_engine(found, now), *_of_dtypes(found)]
    better = [setting for setting in tried if setting.prob < now]  # NaN is not
    return sorted(better, key=lambda setting: setting.prob)


def _prob(found: Comparison, a: str, b: str) -> float:
    return difference(found.logprobs[a], found.logprobs[b]).prob


def _of_trainer(found: Comparison) -> list[Setting]:
    tried = []
    if PLAIN in found.logprobs:
        cost = "time and memory of attention, which grow with the square of the row's length"
        tried.append(Setting("model.attention=plain", _prob(found, PLAIN, SAMPLED), cost))
    if HEAD in found.logprobs:
        cost = "time and memory of the output head; no key sets it yet"
        tried.append(Setting("the trainer's head in float32", _prob(found, HEAD, SAMPLED), cost))
    return tried


def _of_engine(found: Comparison, now: float) -> list[Setting]:
    """Args: now: mean |d p| of engine and trainer."""
    tried = []
    if UNTRUNCATED in found.logprobs:
        prob = _prob(found, UNTRUNCATED, TRAINER)
        tried.append(Setting("rollout.top_p=1 and rollout.top_k=0", prob, "rare tokens are sampled too"))
    if GIVEN_HEAD in found.logprobs and GIVEN in found.logprobs:
        given = _prob(found, GIVEN, TRAINER)
        prob = now * _prob(found, GIVEN_HEAD, TRAINER) / given if given else now
        cost = "time and memory of the engine's output head"
        tried.append(Setting(HEAD_ARGUMENT, prob, cost, is_estimate=True))
    return tried


def _of_dtypes(found: Comparison) -> list[Setting]:
    """Other dtypes of both sides.

    The engine was not run in them. It is taken to be as much farther from float32 than the trainer as it is now,
    and both to round independently; what top-p and top-k cut off stays.
    """
    scores = found.logprobs
    if TRUTH not in scores:
        return []
    engine = next(key for key in (GIVEN, UNTRUNCATED, SAMPLED) if key in scores)
    of_engine, of_trainer = _prob(found, engine, TRUTH), _prob(found, TRAINER, TRUTH)
    ratio = of_engine / of_trainer if of_trainer else 1.0
    cut = _prob(found, SAMPLED, UNTRUNCATED) if UNTRUNCATED in scores else 0.0
    costs = {
        "bfloat16": "none, and the range of float32",
        "float16": "its range ends at 65,504: losses are scaled; see docs/trust.md",
        "float32": "several times slower, and twice the memory of activations and of the engine's weights",
    }
    tried = []
    for dtype, cost in costs.items():
        if dtype != found.dtype and dtype in scores:
            own = _prob(found, dtype, TRUTH) * math.hypot(1, ratio)
            tried.append(Setting(f"model.dtype={dtype}", math.hypot(own, cut), cost, is_estimate=True))
    return tried


# ---- text and JSON ----


def report_lines(found: Comparison, config: Config) -> list[str]:
    """All of it, for the console."""
    return [*_table(found), "", *_budget_lines(found, config), "", *_setting_lines(found, config)]


def _table(found: Comparison) -> list[str]:
    names, scores = row_names(found), found.logprobs
    width = max(map(len, names.values()))
    columns = f"{'|dlogp|':>10}{'|dp|':>10}{'e^|dlogp|':>11}{'max|dp|':>10}"
    lines = [
        f"{len(scores[SAMPLED]):,} tokens; mean |d log p| in nats, mean |d p|, mean exp|d log p|, max |d p|",
        f"{'':{width}}  {'against float32':^41}  {'against the engine, as sampled':^41}",
        f"{'':{width}}  {columns}  {columns}",
    ]
    for key, name in names.items():
        if key in found.missing:
            lines.append(f"{name:{width}}  not available: {found.missing[key]}")
        elif key in scores:
            parts = [_numbers(scores, key, other) for other in (TRUTH, SAMPLED)]
            lines.append(f"{name:{width}}  {'  '.join(parts)}")
    return lines


def _numbers(scores: dict[str, np.ndarray], key: str, other: str) -> str:
    if other not in scores:
        return f"{'-':>41}"
    d = difference(scores[key], scores[other])
    return f"{d.nats:>10.2e}{d.prob:>10.2e}{d.factor:>11.5f}{d.max_prob:>10.2e}"


def _budget_lines(found: Comparison, config: Config) -> list[str]:
    steps = budget(found)
    lines = [
        "Where it comes from: from the engine as sampled to the trainer",
        f"{'nats':>10}{'prob.':>10}  share",
    ]
    for step in steps:
        lines.append(f"{step.size.nats:>10.2e}{step.size.prob:>10.2e}{step.share:>7.0%}  {step.what}")
    lag = config.rollout.max_lag
    old = (
        f"rollout.max_lag={lag} adds what up to {lag} steps change" if lag else "rollout.max_lag=0 adds none"
    )
    lines.append(f"{0:>10.2e}{0:>10.2e}{0:>7.0%}  staleness: the engine has just got these weights; {old}")
    whole = difference(found.logprobs[SAMPLED], found.logprobs[TRAINER])
    lines.append(f"{whole.nats:>10.2e}{whole.prob:>10.2e}         the whole way, measured")
    squares = sum(step.size.square for step in steps)
    if squares <= ALIKE * whole.square:
        lines.append("Steps do not add up; their squares about do, and the shares are of those.")
    else:
        lines.append(
            "The way is shorter than its steps: engine and trainer round alike, and most of it cancels out. The "
            "shares say little."
        )
    return lines


def _setting_lines(found: Comparison, config: Config) -> list[str]:
    chosen = settings(found)[:NUM_SETTINGS]
    lines = ["What would lower it most, to which mean |d p|, and what that costs"]
    for setting in chosen:
        about = "about " if setting.is_estimate else ""
        prob = f"{setting.prob:.2e}" if setting.prob else "float32's own rounding"
        lines.append(f"  {about}{prob} with {setting.setting}: {setting.cost}")
    if not chosen:
        lines.append("  nothing that was tried does")
    if config.corrects_sampler:
        lines.append("The loss corrects what is left (algorithm.rollout_is, algorithm.old_logprobs).")
    else:
        lines.append("algorithm.rollout_is=token does not lower it, but corrects the loss for it.")
    return lines


def report_json(found: Comparison, config: Config) -> dict[str, Any]:
    """All of it, for a file; numbers that are not finite are null."""
    names, scores = row_names(found), found.logprobs
    of = lambda key, other: difference(scores[key], scores[other]).to_dict() if other in scores else None
    return {
        "num_tokens": len(scores[SAMPLED]),
        "rows": [
            {"key": key, "name": name, "float32": of(key, TRUTH), "engine": of(key, SAMPLED)}
            for key, name in names.items()
            if key in scores
        ],
        "not_available": found.missing,
        "budget": [{"what": step.what, "share": step.share, **step.size.to_dict()} for step in budget(found)],
        "whole": of(SAMPLED, TRAINER),
        "settings": [dataclasses.asdict(setting) for setting in settings(found)],
    }
