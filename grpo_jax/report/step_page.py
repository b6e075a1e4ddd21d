"""The page of a step: its groups side by side, each token coloured by what was computed of it."""

import math
from collections.abc import Sequence
from typing import Any

from grpo_jax.report.document import render
from grpo_jax.report.rollouts import TOKEN_COLUMNS, Completion, Group, SavedStep, is_all_wrong, mismatch

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
    for group in sorted(groups, key=lambda group: -group.mismatch):
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
    advantages = c.get("token_advantages") or []
    parts = {n.removeprefix("reward/"): _short(v) for n, v in c.items() if n.startswith("reward/")}
    facts = {
        "reward": _short(c.get("reward")),
        "parts": parts,
        "advantage": _short(sum(advantages) / len(advantages)) if advantages else None,
        "finish": c.get("finish_reason", ""),
        "seed": None if c.get("seed") is None else str(c["seed"]),
        "version": c.get("policy_version"),
        "dropped": bool(c.get("is_dropped")),
        "repeats": bool(c.get("repeats")),
        "text": c.get("completion", ""),
        "mismatch": _short(mismatch(c)),
        "length": len(c["token_ids"]) if c.get("token_ids") else c.get("num_tokens", 0),
    }
    return facts | {"tokens": {name: _tokens(c[name]) for name in TOKEN_COLUMNS if c.get(name)}}


def _tokens(values: Sequence[Any]) -> Any:
    """The values of a completion's tokens; one alone where all are the same."""
    numbers = [_short(v) if isinstance(v, float) else int(v) if isinstance(v, bool) else v for v in values]
    return numbers[0] if len(set(numbers)) == 1 and len(numbers) > 1 else numbers


def _short(value: Any) -> Any:
    """A number to 4 digits; None where it is not finite."""
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.4g}")
