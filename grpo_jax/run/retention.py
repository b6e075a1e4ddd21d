"""Which checkpoints are whole, and which stay: the newest, one every so many epochs, and the best."""

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grpo_jax.config import CheckpointSection, ConfigError
from grpo_jax.storage.files import temporary_beside
from grpo_jax.storage.manifest import damage, has_manifest, read_facts

logger = logging.getLogger(__name__)

MARK = "has_manifest"
"""Key in a checkpoint's progress: it was not written before there were manifests, so the lack of one is damage."""
STEP = re.compile("0|[1-9][0-9]*")
"""The name of a checkpoint's folder."""
Facts = Mapping[str, Any]
"""Of a checkpoint: the `epoch` that ended with its step, or None; `metrics` of its step; facts of its run."""


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that a folder holds checkpoints of, in their order; none if there is no such folder."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(path.name) for path in checkpoints.iterdir() if STEP.fullmatch(path.name))


def damage_of(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in a few words; "" for one that is whole, or that cannot be verified.

    Of the latter, which versions without manifests wrote, one line is logged.
    """
    if has_manifest(checkpoint):
        return damage(checkpoint)
    try:
        progress = json.loads((checkpoint / "progress" / "metadata").read_text())
        is_older = MARK not in progress
    except (OSError, ValueError, TypeError) as error:
        return f"neither manifest nor progress can be read ({type(error).__name__})"
    if not is_older:
        return damage(checkpoint)
    logger.warning(
        "The checkpoint of step %s is from a version that wrote no checksums: it cannot be verified.",
        checkpoint.name,
    )
    return ""


def find_whole(checkpoints: Path, key: str = "checkpoint") -> tuple[int | None, dict[int, str]]:
    """The latest step whose checkpoint is whole, and what is wrong with each later one.

    Args:   key: by which the user named the folder.
    Returns: None where there are no checkpoints at all.
    Raises: ConfigError: there are some, and none is whole.
    """
    damaged: dict[int, str] = {}
    for step in reversed(saved_steps(checkpoints)):
        if not (reason := damage_of(checkpoints / str(step))):
            return step, damaged
        damaged[step] = reason
    if damaged:
        found = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
        rule = f"no checkpoint is whole ({found}); restore one from a copy, or choose another --workdir"
        raise ConfigError(key, str(checkpoints), rule)
    return None, {}


def read_all_facts(checkpoints: Path) -> dict[int, Facts | None]:
    """The facts of each step's checkpoint; None where no manifest tells them."""
    facts: dict[int, Facts | None] = {}
    for step in saved_steps(checkpoints):
        try:
            facts[step] = read_facts(checkpoints / str(step))
        except ValueError:
            facts[step] = None
    return facts


def value_of(facts: Facts | None, metric: str) -> float | None:
    """A metric of a checkpoint's step; None: not measured then."""
    return None if facts is None else facts.get("metrics", {}).get(metric)


def best_step(facts: Mapping[int, Facts | None], metric: str) -> int | None:
    """The first of the steps whose metric is the largest; None where it was measured at none of them."""
    values = {step: value for step in sorted(facts) if (value := value_of(facts[step], metric)) is not None}
    return max(values, key=values.__getitem__) if values else None


def steps_to_keep(facts: Mapping[int, Facts | None], section: CheckpointSection) -> set[int]:
    """Of the steps that have checkpoints, those whose checkpoints stay.

    The newest are counted among those with a manifest: none of these makes way for one that nobody has verified.
    """
    verified = sorted(step for step, known in facts.items() if known is not None)
    newest = verified[-section.max_to_keep :]
    kept = set(newest)
    if len(newest) < section.max_to_keep:
        kept = set(sorted(facts)[-section.max_to_keep :]) | kept
    if section.keep_every_epochs:
        epochs = {step: known["epoch"] for step, known in facts.items() if known is not None}
        kept |= {step for step, epoch in epochs.items() if epoch and epoch % section.keep_every_epochs == 0}
    best = best_step(facts, section.keep_best)
    return kept if best is None else kept | {best}


def rotate(checkpoints: Path, section: CheckpointSection) -> None:
    """Removes the checkpoints that need not stay."""
    facts = read_all_facts(checkpoints)
    for step in facts.keys() - steps_to_keep(facts, section):
        remove_checkpoint(checkpoints / str(step))


def remove_checkpoint(checkpoint: Path) -> None:
    """Removes a checkpoint. Renamed first: what is half removed must not look like one."""
    shutil.rmtree(checkpoint.rename(temporary_beside(checkpoint)), ignore_errors=True)


def set_aside(checkpoint: Path, reason: str) -> None:
    """Moves a damaged checkpoint to WORKDIR/checkpoints-damaged, and says so."""
    folder = checkpoint.parent.with_name(checkpoint.parent.name + "-damaged")
    folder.mkdir(exist_ok=True)
    target = folder / checkpoint.name
    if target.exists():
        target = temporary_beside(target).with_suffix("")
    checkpoint.rename(target)
    logger.warning(
        "WARNING: the checkpoint of step %s is damaged (%s); it is now %s", checkpoint.name, reason, target
    )
