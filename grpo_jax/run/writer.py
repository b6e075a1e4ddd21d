"""The writer of metrics: console, metrics.jsonl, TensorBoard; and reading metrics.jsonl back."""

import contextlib
import json
import logging
import math
import time
from collections.abc import Sequence
from typing import Any

from grpo_jax.config import Config
from grpo_jax.run.workdir import Workdir
from grpo_jax.types import Metrics

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one line of metrics.jsonl a step, and the same numbers to TensorBoard."""

    def __init__(self, workdir: Workdir, config: Config, *, resume_step: int | None):
        """Args: resume_step: the last step of the checkpoint; what was written of later ones is dropped."""
        self._console = "console" in config.logging.loggers
        self._total_epochs = config.trainer.total_epochs
        self._epoch_shown = 0
        self._path = workdir.metrics
        self._tensorboard = None
        drop_after(self._path, -1 if resume_step is None else resume_step)
        if "tensorboard" in config.logging.loggers:
            from tensorboardX import SummaryWriter

            purge = 0 if resume_step is None else resume_step + 1  # 0: of a run that left no checkpoint
            self._tensorboard = SummaryWriter(str(workdir.tensorboard), purge_step=purge)

    def write(self, metrics: Metrics, *, step: int, epoch: int) -> None:
        """Writes the metrics of one step. What is not finite becomes null in metrics.jsonl."""
        values = {name: _plain(value) for name, value in metrics.items()}
        line = {"step": step, "epoch": epoch, "time": time.time(), **values}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if self._tensorboard is not None:
            for name, value in values.items():
                if value is not None:
                    self._tensorboard.add_scalar(name, value, step)
            self._tensorboard.flush()

    def write_text(self, name: str, texts: Sequence[str], *, step: int) -> None:
        """Shows texts in TensorBoard, each as it is."""
        if self._tensorboard is not None and texts:
            blocks = ["    " + text.replace("\n", "\n    ") for text in texts]  # Markdown for verbatim
            self._tensorboard.add_text(name, "\n\n---\n\n".join(blocks), step)

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


def read_metrics(workdir: Workdir) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line that was cut short by a crash is left out."""
    if not workdir.metrics.exists():
        return []
    lines = []
    for text in workdir.metrics.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            lines.append(json.loads(text))
    return lines


def drop_after(path: Any, step: int) -> None:
    """Removes the lines of steps after `step`: they belong to work that the last checkpoint does not hold."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(path)


def _plain(value: Any) -> int | float | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
