"""A run and its steps on a terminal, for a machine without a browser. Texts never act on the terminal."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from rich.console import Group as Stack
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from grpo_jax.config import ConfigError
from grpo_jax.config.text import visible
from grpo_jax.report.page import SHOWN
from grpo_jax.report.read import RunFacts, expected
from grpo_jax.report.rollouts import (
    Completion,
    Group,
    SavedStep,
    has,
    is_all_wrong,
    length,
    mismatch,
    num_clipped,
)

SHADES = 5
Value = Callable[[Completion, int], float | None]


def _at(name: str) -> Value:
    return lambda c, i: None if c.get(name) is None else c[name][i]


def _less(name: str, other: str) -> Value:
    a, b = _at(name), _at(other)
    return lambda c, i: None if (x := a(c, i)) is None or (y := b(c, i)) is None else x - y


def _ratio(c: Completion, i: int) -> float | None:
    x = _less("logprobs", "old_logprobs")(c, i)
    return None if x is None else math.exp(min(x, 80.0))


QUANTITIES: dict[str, tuple[Value, float, float]] = {
    "sampler": (_at("sampler_logprobs"), 0.0, 4.0),
    "trainer": (_at("trainer_logprobs"), 0.0, 4.0),
    "difference": (_less("trainer_logprobs", "sampler_logprobs"), 0.0, 0.1),
    "ratio": (_ratio, 1.0, 0.2),
    "advantage": (_at("token_advantages"), 0.0, 1.5),
    "mask": (_at("weighs"), 0.0, 1.0),
    "version": (_at("token_versions"), 0.0, math.inf),
}
"""Name -> (value of a token, where its colour begins, how far from there it is full)."""

SORTS: dict[str, Callable[[Group], float]] = {
    "sampled": lambda group: group.number,
    "mismatch": lambda group: -(group.mismatch or 0.0),
    "longest": lambda group: -max(map(length, group.completions)),
    "reward": lambda group: sum(c.get("reward", 0.0) for c in group.completions),
}
FILTERS: dict[str, Callable[[Group], bool]] = {
    "all": lambda group: True,
    "wrong": lambda group: is_all_wrong(group.completions),
    "mixed": lambda group: len({c.get("reward") for c in group.completions}) > 1,
    "repeats": lambda group: any(c.get("repeats") for c in group.completions),
    "cut": lambda group: any(c.get("finish_reason") == "length" for c in group.completions),
    "clipped": lambda group: any(map(num_clipped, group.completions)),
}


def run_view(run: RunFacts) -> RenderableType:
    """How far a run has come, its main numbers, alarms, times, and the steps that can be looked at."""
    head = Table("metric", "first", "last", box=None, pad_edge=False)
    for name in SHOWN:
        values = [line[name] for line in run.lines if isinstance(line.get(name), int | float)]
        if values:
            head.add_row(name, f"{values[0]:.4g}", f"{values[-1]:.4g}")
    phases = Table("phase", "expected s", "measured s", box=None, pad_edge=False)
    for phase, foreseen, measured in expected(run.lines):
        phases.add_row(Text(visible(phase)), "" if foreseen is None else f"{foreseen:.3g}", f"{measured:.3g}")
    alarms = [
        Text(
            visible(
                f"step {a['step']}: {a.get('alarm', 'roll-back')} {a.get('event', '')}: {a.get('seen', '')}"
            )
        )
        for a in run.alarms[-10:]
    ]
    steps = ", ".join(map(str, run.saved_steps)) or "none (logging.save_rollouts)"
    lines = [Text(run.state, style="bold"), *(Text(visible(note), style="red") for note in run.notes)]
    return Stack(*lines, head, phases, *alarms, Text(f"steps with rollouts: {steps}"))


def step_view(
    saved: SavedStep, *, quantity: str, sort: str, show: str, most: int, group: int | None
) -> RenderableType:
    """The groups of a step, their tokens coloured.

    Args:   quantity, sort, show: keys of `QUANTITIES`, `SORTS`, `FILTERS`; most: groups; group: that one alone.
    Raises: ConfigError: there is no such group.
    """
    groups = [g for g in saved.groups if FILTERS[show](g)]
    if group is not None:
        groups = [g for g in saved.groups if g.number == group]
        if not groups:
            raise ConfigError("--group", group, f"step {saved.step} has groups 0 to {len(saved.groups) - 1}")
    groups.sort(key=SORTS[sort])
    shown = groups[:most]
    title = f"step {saved.step}: {len(shown)} of {len(saved.groups)} groups, coloured by {quantity}"
    notes = [Text(visible(note), style="red") for note in saved.notes]
    return Stack(Text(title, style="bold"), *notes, *(_group(g, saved, quantity) for g in shown))


def _group(group: Group, saved: SavedStep, quantity: str) -> Panel:
    first = group.completions[0]
    parts: list[RenderableType] = [Text(visible(group.prompt).strip(), style="dim")]
    for c in group.completions:
        parts += [
            Text(facts(c), style="bold green" if c.get("reward", 0) > 0 else "bold"),
            tokens(c, saved, quantity),
        ]
    title = (
        f"group {group.number} · {first.get('prompt_id', '')} · ground truth {first.get('ground_truth', '')}"
    )
    return Panel(Stack(*parts), title=Text(visible(title)), title_align="left")


def facts(c: Completion) -> str:
    """What is known of a completion, in a line."""
    parts = [f"reward {c.get('reward', math.nan):.4g}"]
    parts += [f"{visible(n)} {v:.4g}" for n, v in c.items() if n.startswith("reward/") and v is not None]
    parts += [f"advantage {np.mean(c['token_advantages']):.4g}"] if has(c, "token_advantages") else []
    parts += [f"{length(c)} tokens", visible(str(c.get("finish_reason", "")))]
    parts += [f"seed {c['seed']}"] if c.get("seed") is not None else []
    parts += [f"version {c.get('policy_version')}"]
    parts += [f"mismatch {gap:.3g}"] if (gap := mismatch(c)) is not None else []
    parts += [
        name for name, key in {"repeats itself": "repeats", "dropped": "is_dropped"}.items() if c.get(key)
    ]
    parts += [f"{num_clipped(c)} clipped"] if num_clipped(c) else []
    return " · ".join(parts)


def tokens(c: Completion, saved: SavedStep, quantity: str) -> Text:
    """The tokens of a completion: blue above where the colour begins, red below; clipped ones underlined."""
    if not has(c, "token_ids"):
        return Text(visible(str(c.get("completion", ""))))
    value, start, full = QUANTITIES[quantity]
    text = Text()
    versions = np.unique(c["token_versions"]).tolist() if has(c, "token_versions") else []
    for i, token in enumerate(c["token_ids"].tolist()):
        at = value(c, i)
        style = _by_number(versions, at) if quantity == "version" else _shade(at, start, full)
        if has(c, "is_clipped") and c["is_clipped"][i]:
            style += " underline"
        text.append(
            visible(saved.texts[token]) if token in saved.texts else f"[{token}]", style=style.strip()
        )
    return text


def _shade(value: float | None, start: float, full: float) -> str:
    if value is None or not math.isfinite(value):
        return ""
    level = min(SHADES, round(SHADES * abs(value - start) / full))
    if not level:
        return ""
    strength = 40 + 32 * level
    return f"white on rgb(20,50,{strength})" if value > start else f"white on rgb({strength},30,30)"


def _by_number(values: Sequence[Any], value: Any) -> str:
    colours = ("rgb(20,50,140)", "rgb(120,60,10)", "rgb(20,100,50)", "rgb(100,20,110)")
    number = values.index(value) if value in values else 0
    return f"white on {colours[number % len(colours)]}"
