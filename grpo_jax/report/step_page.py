"""The page of a step: its groups side by side, each token coloured by what was computed of it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from grpo_jax.report.document import render
from grpo_jax.report.rollouts import (
    TOKEN_COLUMNS,
    Completion,
    Group,
    SavedStep,
    has,
    is_all_wrong,
    length,
    mismatch,
)

MOST_TOKENS = 180_000
"""Of a page, which keeps it below 5 MB."""


def step_page(saved: SavedStep, neighbours: dict[str, str]) -> str:
    """Returns the HTML. Args: neighbours: label -> address of other pages."""
    groups = _within(saved.groups)
    notes = list(saved.notes)
    if len(groups) < len(saved.groups):
        text = (
            f"{len(groups)} of {len(saved.groups)} groups are shown, those with the largest mismatch: a page "
        )
        notes.append(text + f"holds {MOST_TOKENS:,} tokens. The Parquet file has all of them.")
    data = {"texts": saved.texts, "groups": [_group(group) for group in groups]}
    num = sum(len(group.completions) for group in groups)
    return render(
        "step.html",
        ("step.js",),
        data,
        title=f"Step {saved.step}",
        about=f"{len(groups)} groups, {num} completions",
        notes=notes,
        neighbours=[{"label": label, "href": href} for label, href in neighbours.items()],
    )


def _within(groups: Sequence[Group]) -> list[Group]:
    """All groups, or those with the largest mismatch that a page can hold, in their order."""
    kept: list[Group] = []
    num_tokens = 0
    for group in sorted(groups, key=lambda group: -(group.mismatch or 0.0)):
        num_tokens += group.num_tokens
        if kept and num_tokens > MOST_TOKENS:
            break
        kept.append(group)
    return sorted(kept, key=lambda group: group.number)


def _group(group: Group) -> dict[str, Any]:
    first = group.completions[0]
    return {
        "number": group.number,
        "id": first.get("prompt_id", ""),
        "prompt": group.prompt,
        "truth": first.get("ground_truth", ""),
        "wrong": is_all_wrong(group.completions),
        "mismatch": _short(group.mismatch),
        "completions": [_completion(c) for c in group.completions],
    }


def _completion(c: Completion) -> dict[str, Any]:
    advantage = float(np.mean(c["token_advantages"])) if has(c, "token_advantages") else None
    parts = {n.removeprefix("reward/"): _short(v) for n, v in c.items() if n.startswith("reward/")}
    facts = {
        "reward": _short(c.get("reward")),
        "parts": parts,
        "advantage": _short(advantage),
        "finish": c.get("finish_reason", ""),
        "seed": None if c.get("seed") is None else str(c["seed"]),
        "version": c.get("policy_version"),
        "dropped": bool(c.get("is_dropped")),
        "repeats": bool(c.get("repeats")),
        "text": c.get("completion", ""),
        "mismatch": _short(mismatch(c)),
        "length": length(c),
    }
    return facts | {"tokens": {name: _tokens(c[name]) for name in TOKEN_COLUMNS if has(c, name)}}


def _tokens(values: np.ndarray) -> Any:
    """The values of a completion's tokens as JSON, to 4 digits; one alone where all are the same."""
    if values.dtype.kind == "f":
        values = _rounded(values)
    elif values.dtype.kind == "b":
        values = values.astype(int)
    if len(values) > 1 and (values == values[0]).all():
        return values[0].item()
    return [value if math.isfinite(value) else None for value in values.tolist()]


def _rounded(values: np.ndarray) -> np.ndarray:
    """[n] float64, to 4 digits."""
    exact = values.astype(np.float64)
    size = np.abs(exact, where=np.isfinite(exact) & (exact != 0), out=np.ones_like(exact))
    digits = 10.0 ** (3 - np.floor(np.log10(size)))
    return np.round(exact * digits) / digits


def _short(value: Any) -> Any:
    """A number to 4 digits; None where it is not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
