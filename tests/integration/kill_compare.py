"""What two runs of the same configuration differ in, of all that does not depend on the clock."""

import dataclasses
from pathlib import Path
from typing import Any

import integration_helpers as helpers
import numpy as np

from grpo_jax.run.retention import saved_steps


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run leaves that does not depend on the clock."""

    names: set[str]
    digests: dict[str, dict[str, str]]
    """Of completions and Hugging Face folders."""
    lines: list[dict[str, Any]]
    checkpoints: dict[int, tuple[Any, Any]]
    """Step -> arrays and progress."""
    points: dict[Any, Any]
    texts: dict[Any, Any]


def read_results(workdir: Path) -> Results:
    """Raises: AssertionError: TensorBoard has a point twice."""
    names = {path.name for path in workdir.iterdir()}
    folders = [
        name
        for name in names
        if name in ("rollouts", "validation", "ledger") or name.startswith("checkpoint-")
    ]
    steps = saved_steps(workdir / "checkpoints")
    return Results(
        names,
        {name: helpers.tree_digest(workdir / name) for name in folders},
        helpers.read_lines(workdir),
        {step: helpers.read_checkpoint(workdir, step) for step in steps},
        *helpers.read_events(workdir),
    )


def compare(workdir: Path, expected: Results) -> str:
    """What differs between a run that was killed and one that was not, in a few words; "" for nothing."""
    try:
        results = read_results(workdir)
    except AssertionError:
        return "TensorBoard has a point twice"
    if results.names != expected.names:
        return f"files {sorted(results.names ^ expected.names)} are only in one"
    if names := [name for name in expected.digests if results.digests[name] != expected.digests[name]]:
        return f"{names} hold other bytes"
    checks = (same_metrics, same_points, same_arrays)
    return next(filter(None, (check(results, expected) for check in checks)), "")


def same_metrics(results: Results, expected: Results) -> str:
    ours, theirs = results.lines, expected.lines
    if (steps := [line["step"] for line in ours]) != [line["step"] for line in theirs]:
        return f"metrics.jsonl has the steps {steps}"
    for our, their in zip(ours, theirs, strict=True):
        if our.keys() != their.keys():
            return f"step {our['step']}: metrics {sorted(our.keys() ^ their.keys())} are only in one"
        values = helpers.without_clock(their)
        if names := [name for name in values if our[name] != values[name]]:
            return f"step {our['step']}: metrics {names} differ"
    return ""


def same_points(results: Results, expected: Results) -> str:
    """TensorBoard has each point of metrics.jsonl, and no other."""
    points = {
        (name, line["step"]): np.float32(value)
        for line in results.lines
        for name, value in line.items()
        if name not in ("step", "epoch", "time") and value is not None
    }
    if results.points != points:
        return (
            f"TensorBoard differs from metrics.jsonl in {sorted(results.points.keys() ^ points.keys())[:5]}"
        )
    return "" if results.texts == expected.texts else "TensorBoard has other texts"


def same_arrays(results: Results, expected: Results) -> str:
    if results.checkpoints.keys() != expected.checkpoints.keys():
        return f"there are checkpoints of {sorted(results.checkpoints)}"
    for step, (arrays, progress) in expected.checkpoints.items():
        our_arrays, our_progress = results.checkpoints[step]
        if names := [name for name in arrays | our_arrays if arrays.get(name) != our_arrays.get(name)]:
            return f"the checkpoint of step {step} has other bits in {names[:5]}"
        if our_progress != progress:
            return f"the checkpoint of step {step} has another progress"
    return ""
