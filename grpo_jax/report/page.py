"""The page of one run, or of several beside one another."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS
from grpo_jax.report.document import LIBRARY, render
from grpo_jax.report.panels import sections
from grpo_jax.report.read import Line, RunFacts, expected
from grpo_jax.run.speed import SHORT_S, SLOW

MOST_ALARMS = 500
SHOWN = ("reward/mean", "val/accuracy", "kl/mean", "actor/entropy", "response_length/mean", "timing_s/step")
"""Metrics whose first and last values stand at the head of the page."""


def run_page(runs: Sequence[RunFacts], links: Sequence[dict[int, str]]) -> str:
    """Returns the HTML.

    Args: runs: at least one; links: of each run, step -> address of its page.
    """
    names = _distinct_names(runs)
    runs = [dataclasses.replace(run, name=name) for run, name in zip(runs, names, strict=True)]
    alarms = [
        {"run": n, "step": a["step"], "name": _alarm_name(a)} for n, r in enumerate(runs) for a in r.alarms
    ]
    begun = [each for each in alarms if each["name"]][:MOST_ALARMS]
    data = {"runs": names, "sections": sections(runs), "alarms": begun}
    return render(
        "run.html",
        (f"{LIBRARY}.js", "run.js"),
        data,
        title=", ".join(names),
        runs=[_view(run, of_run) for run, of_run in zip(runs, links, strict=True)],
        config=_config_rows(runs),
    )


def _distinct_names(runs: Sequence[RunFacts]) -> list[str]:
    """The folders' names; where two are alike, with the folder above."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(Path(run.path.resolve().parent.name) / run.name) for run in runs]


def _view(run: RunFacts, links: dict[int, str]) -> dict[str, Any]:
    """What the template shows of a run beside its curves."""
    start = run.starts[-1] if run.starts else {}
    phases = [
        {"name": phase, "expected": _number(foreseen), "measured": _number(measured),
         "slow": foreseen is not None and measured > SLOW * foreseen > SLOW * SHORT_S}
        for phase, foreseen, measured in expected(run.lines)
    ]  # fmt: skip
    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "notes": run.notes,
        "head": [row for name in SHOWN if (row := _first_and_last(run.lines, name))],
        "alarms": [_alarm(alarm) for alarm in run.alarms[-MOST_ALARMS:]],
        "phases": phases,
        "knows_expected": any(phase["expected"] for phase in phases),
        "links": [{"step": step, "href": href} for step, href in sorted(links.items())],
        "about": _about(start, len(run.starts)),
        "replaced": _replaced(start, run),
        "recipe": str(start.get("recipe") or ""),
    }


def _about(start: Line, num_starts: int) -> list[tuple[str, str]]:
    rows = [(label, str(start[name])) for name, label in _ABOUT.items() if start.get(name)]
    versions = start.get("versions")
    if isinstance(versions, dict):
        rows.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if num_starts > 1:
        rows.append(("taken up", f"{num_starts} times; this is the last"))
    return rows


_ABOUT = {
    "command": "command",
    "recipe": "recipe",
    "since": "since",
    "host": "host",
    "devices": "devices",
    "model": "model",
    "folder": "in the folder",
}


def _replaced(start: Line, run: RunFacts) -> list[dict[str, str]]:
    """The keys in which the run differs from its recipe."""
    replaced = start.get("replaced")
    if not isinstance(replaced, dict):
        return []
    return [
        {"key": str(key), "recipe": _shown(value), "run": _shown(run.value(str(key)))}
        for key, value in replaced.items()
    ]


def _config_rows(runs: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Every key of any run: its values, its default, and what is remarkable about it."""
    keys = {
        f"{section}.{name}": None for run in runs for section, names in run.config.items() for name in names
    }
    rows = []
    for key in keys:
        values = [_shown(run.value(key)) for run in runs]
        default = _shown(KEYS[key].default) if key in KEYS else ""
        rows.append(
            {
                "key": key,
                "values": values,
                "default": default,
                "meaning": KEYS[key].meaning if key in KEYS else "",
                "is_changed": any(value != default for value in values),
                "is_different": len(set(values)) > 1,
            }
        )
    return rows


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return repr(value) if isinstance(value, str) else str(value)


def _first_and_last(lines: Sequence[Line], name: str) -> dict[str, str] | None:
    values = [line[name] for line in lines if isinstance(line.get(name), int | float)]
    return {"name": name, "first": _number(values[0]), "last": _number(values[-1])} if values else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _alarm_name(alarm: Line) -> str:
    """The name of an alarm where it begins, of the roll-back where it is one; else ""."""
    if alarm.get("event") == "roll-back":
        return "roll-back"
    return str(alarm.get("alarm", "")) if alarm.get("event") == "begins" else ""


def _alarm(alarm: Line) -> dict[str, str]:
    names = ("step", "event", "seen", "cause", "remedy")
    name = "" if alarm.get("alarm") is None else alarm["alarm"]
    return {"name": str(name), **{each: str(alarm.get(each, "")) for each in names}}
