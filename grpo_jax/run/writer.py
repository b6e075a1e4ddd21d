"""The writer of metrics: console, metrics.jsonl, TensorBoard, trackers; and reading metrics.jsonl back."""

import contextlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, Config
from grpo_jax.config.text import printable, verbatim
from grpo_jax.run.tensorboard import TensorBoard
from grpo_jax.run.trackers import Trackers
from grpo_jax.run.workdir import Workdir
from grpo_jax.storage.files import write_whole
from grpo_jax.types import Metrics

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one line of metrics.jsonl a step, and the same numbers to TensorBoard and trackers."""

    def __init__(self, workdir: Workdir, config: Config, *, resume_step: int | None):
        """Args: resume_step: the last step of the checkpoint; what was written of later ones is dropped."""
        self._console = "console" in config.logging.loggers
        self._total_epochs = config.trainer.total_epochs
        self._epoch_shown = 0
        self._path = workdir.metrics
        self._tensorboard = None
        last_step = -1 if resume_step is None else resume_step  # None: of a run that left no checkpoint
        drop_after(self._path, last_step)
        if "tensorboard" in config.logging.loggers:
            settings = changed_keys(config)
            self._tensorboard = TensorBoard(workdir.tensorboard, last_step=last_step, settings=settings)
        self._trackers = Trackers(workdir.path, config)

    def write(self, metrics: Metrics, *, step: int, epoch: int) -> None:
        """Writes the metrics of one step. What is not finite becomes null in metrics.jsonl.

        The line is on disk when this returns: the checkpoint of the step comes after it.
        """
        values = {name: plain(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": epoch, "time": time.time(), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.write(values, step)
        self._trackers.write(values, step)

    def write_text(self, name: str, texts: Sequence[str], *, step: int) -> None:
        """Shows texts in TensorBoard and trackers, with signs for hidden characters."""
        texts = [printable(text) for text in texts]
        if self._tensorboard is not None and texts:
            self._tensorboard.write_text(name, verbatim(texts), step)
        if texts:
            self._trackers.write_samples(name, texts, step)

    def write_histograms(self, values: Mapping[str, Any], *, step: int) -> None:
        """Shows in TensorBoard how values of a step are distributed."""
        if self._tensorboard is not None:
            self._tensorboard.write_histograms(values, step)

    def console(self, metrics: Metrics, *, epoch: int, step: int, steps_per_epoch: int) -> None:
        """Prints the line of a step, and the epoch's where a new one begins. All counted from 1."""
        if not self._console:
            return
        if epoch != self._epoch_shown:
            logger.info("Epoch %d/%d:", epoch, self._total_epochs)
            self._epoch_shown = epoch
        shown = {"reward_mean": "reward/mean", "kl_mean": "kl/mean", "actor_loss": "actor/loss"}
        shown |= {"val_accuracy": "val/accuracy"}
        parts = [f"{label}={metrics[name]:.4g}" for label, name in shown.items() if name in metrics]
        seconds = metrics["timing_s/step"]
        logger.info("  Step %d/%d: %s [%.1fs]", step, steps_per_epoch, ", ".join(parts), seconds)

    def close(self) -> None:
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._trackers.close()


def changed_keys(config: Config) -> dict[str, bool | float | str]:
    """The keys that differ from their default, and the learning rate, by name; tuples as text."""
    values = {name: config.get(name) for name in KEYS}
    shown = {n: v for n, v in values.items() if v != KEYS[n].default or n == "optim.learning_rate"}
    return {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in shown.items()}


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; those that are damaged or were cut short by a crash are left out."""
    return read_lines(workdir.metrics)[0]


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of a metrics.jsonl, and the numbers, from 1, of those that are damaged.

    An end that was cut short is left out, and no damage. No file is an empty one.
    """
    lines, damaged = [], []
    text = path.read_text(errors="replace") if path.exists() else ""
    for number, one in enumerate(text.splitlines(keepends=True), 1):
        try:
            line = json.loads(one)
            int(line["step"])  # without a step it is none
            lines.append(line)
        except (ValueError, TypeError, KeyError):
            if one.endswith("\n"):
                damaged.append(number)
    return lines, damaged


def drop_after(path: Path, step: int) -> None:
    """Removes the lines of steps after `step`: they belong to work that the last checkpoint does not hold.

    The file is there after that, be it empty.
    """
    kept: list[str] = []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    write_whole(path, "".join(kept))


def plain(value: Any) -> int | float | None:
    """A number as JSON can hold it; None for what is not finite."""
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
