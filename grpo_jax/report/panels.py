"""Which charts the page of a run has, and their curves.

A chart is JSON for `assets/run.js`: {"title", "about", "kind": "lines" | "bands" | "bars", "curves": [...]}. A
curve is {"label", "run": its number, "x", "y"}; charts without any are left out.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.report.read import QUANTILES, Line, RunFacts
from grpo_jax.report.thin import bin_means, thin

MOST_BARS = 200
DEVICE_PHASES = ("gen", "old_log_prob", "ref", "update_actor")
"""In which a device of the run computes; in the others all of them wait for a host."""
BESIDE = ("testing", "save_checkpoint", "ledger", "save_rollouts", "roll_back")
"""Phases that are no part of `timing_s/step`."""


@dataclasses.dataclass(frozen=True)
class Chart:
    """A chart of metrics as they are in metrics.jsonl."""

    title: str
    about: str
    metrics: tuple[str, ...]
    """Names; one that ends in * stands for all that begin so."""


SECTIONS: dict[str, tuple[Chart, ...]] = {
    "Learning": (
        Chart("Reward and accuracy", "of the sampled completions; held-out accuracy is val/accuracy",
              ("reward/mean", "accuracy", "val/accuracy")),
        Chart("Held-out pass@k", "", ("val/pass@*",)),
        Chart("Parts of the reward", "of each function, before its weight", ("reward/*/mean",)),
        Chart("Groups without spread", "share of groups whose rewards are all equal: they teach nothing",
              ("frac_reward_zero_std",)),
    ),
    "Policy": (
        Chart("KL to the reference", "nats a token", ("kl/mean", "kl/reward_penalty")),
        Chart("Entropy", "nats a token", ("actor/entropy",)),
        Chart("Clipped tokens", "share of tokens", ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")),
        Chart("KL of the updates", "mean of log π_old − log π", ("actor/ppo_kl",)),
        Chart("Gradient norm", "before clipping", ("actor/grad_norm",)),
        Chart("Loss", "", ("actor/loss",)),
        Chart("Learning rate", "", ("actor/lr",)),
        Chart("Skipped updates", "", ("actor/skipped_updates", "actor/overflows")),
    ),
    "Sampler and trainer": (
        Chart("Difference of probabilities", "|p_trainer − p_sampler|",
              ("training/rollout_probs_diff_mean", "training/rollout_probs_diff_max")),
        Chart("Error of probabilities", "mean of exp |log p_trainer − log p_sampler|, 1 where both agree",
              ("training/token_mult_prob_error",)),
        Chart("Corrections", "importance weights and shares of tokens", ("rollout_corr/*",)),
        Chart("Age of the tokens", "by how many steps the weights that sampled them are older",
              ("training/token_age_mean", "training/token_age_max", "training/policy_lag")),
    ),
    "Lengths": (
        Chart("Tokens of a completion", "",
              ("response_length/mean", "response_length/max", "response_length/min")),
        Chart("Cut and repeating completions", "share of completions",
              ("response_length/clip_ratio", "response_length/repeat_ratio")),
        Chart("Tokens of a prompt", "", ("prompt_length/mean", "prompt_length/max")),
    ),
    "Time and memory": (
        Chart("Throughput", "tokens a second and device", ("perf/throughput",)),
        Chart("Memory", "10⁹ bytes of the first device, beside what was planned; on a CPU, of the whole process",
              ("perf/max_memory_allocated_gb", "perf/memory_planned_gb")),
        Chart("FLOPs of the updates", "share of the device's peak", ("perf/mfu/actor",)),
    ),
}  # fmt: skip


def sections(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """The page's sections: {"title", "charts"}."""
    found = []
    for title, charts in SECTIONS.items():
        of_metrics = [_lines_chart(chart, runs) for chart in charts]
        special = {"Learning": _reward_bands, "Lengths": _length_bands, "Time and memory": _time_charts}
        more = special[title](runs) if title in special else []
        shown = [chart for chart in (*more, *of_metrics) if chart["curves"]]
        if title != "Time and memory":  # where the bars come first
            shown = [chart for chart in (*of_metrics, *more) if chart["curves"]]
        if shown:
            found.append({"title": title, "charts": shown})
    return found


def _lines_chart(chart: Chart, runs: Sequence[RunFacts]) -> dict[str, Any]:
    curves = [
        curve(name, number, *series(run.lines, name))
        for number, run in enumerate(runs)
        for name in _names(chart.metrics, run.lines)
    ]
    return {
        "title": chart.title,
        "about": chart.about,
        "kind": "lines",
        "curves": [each for each in curves if each["x"]],
    }


def _names(patterns: Sequence[str], lines: Sequence[Line]) -> list[str]:
    """The metrics that are meant, as far as any line has them, in order."""
    there = {name for line in lines for name in line}
    names: list[str] = []
    for pattern in patterns:
        head, star, tail = pattern.partition("*")
        fits = lambda name, head=head, tail=tail: (
            name.startswith(head) and name.endswith(tail) and len(name) > len(head + tail)
        )
        names += sorted(filter(fits, there)) if star else [pattern] if pattern in there else []
    return names


def series(lines: Sequence[Line], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is a finite number."""
    pairs = [(line["step"], line[name]) for line in lines if _is_number(line.get(name))]
    return [step for step, _ in pairs], [float(value) for _, value in pairs]


def curve(label: str, run: int, xs: Sequence[float], ys: Sequence[float]) -> dict[str, Any]:
    """A curve, thinned and rounded to 5 digits. Args: run: its number."""
    x, y = thin(xs, ys)
    return {"label": label, "run": run, "x": x.astype(int).tolist(), "y": _rounded(y)}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _value(line: Line, name: str) -> float:
    """0 where the line has no such number."""
    return float(line[name]) if _is_number(line.get(name)) else 0.0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ---- distributions ----


def _reward_bands(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    return [_bands(run, n, "reward", "Distribution of rewards", runs) for n, run in enumerate(runs)]


def _length_bands(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    return [_bands(run, n, "length", "Distribution of lengths", runs) for n, run in enumerate(runs)]


def _bands(run: RunFacts, number: int, of: str, title: str, runs: Sequence[RunFacts]) -> dict[str, Any]:
    steps = [spread["step"] for spread in run.spreads]
    labels = {0: "lowest", 50: "median", 100: "highest"}
    curves = [
        {
            "label": labels.get(percent, f"{percent} %"),
            "run": number,
            "x": steps,
            "y": _rounded(np.array([spread[of][i] for spread in run.spreads])),
        }
        for i, percent in enumerate(QUANTILES)
    ]
    of_run = f" ({run.name})" if len(runs) > 1 else ""
    about = (
        "of all completions of a step; half of them lie within the darker band, nine of ten within the other"
    )
    return {"title": title + of_run, "about": about, "kind": "bands", "curves": curves if steps else []}


# ---- time ----


def _time_charts(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    bars = [_time_bars(run, number, runs) for number, run in enumerate(runs)]
    return [*bars, _idle_chart(runs)]


def _time_bars(run: RunFacts, number: int, runs: Sequence[RunFacts]) -> dict[str, Any]:
    """Seconds by phase as stacked bars, and the expected seconds of all predicted phases as a line."""
    title = "Seconds by phase" + (f" ({run.name})" if len(runs) > 1 else "")
    about = "a step; where there are many, the mean of neighbours; the dashed line is what is expected"
    chart: dict[str, Any] = {"title": title, "about": about, "kind": "bars", "curves": []}
    lines = [line for line in run.lines if _is_number(line.get("timing_s/step"))]
    if not lines:
        return chart
    names = [n for n in _names(("timing_s/*",), lines) if n != "timing_s/step"]
    seconds = np.array([[_value(line, n) for n in names] for line in lines]).reshape(len(lines), len(names))
    within = [i for i, n in enumerate(names) if n.removeprefix("timing_s/") not in BESIDE]
    rest = np.array([line["timing_s/step"] for line in lines]) - seconds[:, within].sum(axis=1)
    steps = [line["step"] for line in lines]
    x, means = bin_means(steps, np.column_stack([seconds, np.maximum(rest, 0)]), MOST_BARS)
    labels = [*(n.removeprefix("timing_s/") for n in names), "between the phases"]
    bar = lambda label, y: {"label": label, "run": number, "x": x.astype(int).tolist(), "y": _rounded(y)}
    order = np.argsort(-means.sum(axis=0), kind="stable")
    chart["curves"] = [bar(labels[i], means[:, i]) for i in order if means[:, i].any()]
    foreseen = [[sum(_value(line, n) for n in _names(("expected_s/*",), [line]))] for line in lines]
    if np.any(foreseen):
        expected = bin_means(steps, np.array(foreseen), MOST_BARS)[1][:, 0]
        chart["curves"].append(bar("expected", expected) | {"is_line": True})
    return chart


def _idle_chart(runs: Sequence[RunFacts]) -> dict[str, Any]:
    curves = []
    for number, run in enumerate(runs):
        pairs = [(line["step"], _idle(line)) for line in run.lines if _value(line, "timing_s/step") > 0]
        curves.append(curve("idle", number, [s for s, _ in pairs], [share for _, share in pairs]))
    about = (
        "share of the time in which no phase that computes on them was running: rewards, pushes of weights, "
    )
    about += "waits for saving, and what lies between"
    return {
        "title": "Devices idle",
        "about": about,
        "kind": "lines",
        "curves": [each for each in curves if each["x"]],
    }


def _idle(line: Line) -> float:
    of = lambda phase: _value(line, f"timing_s/{phase}")
    whole = of("step") + of("save_checkpoint") + of("ledger") + of("save_rollouts")
    return max(0.0, 1 - sum(map(of, DEVICE_PHASES)) / whole)
