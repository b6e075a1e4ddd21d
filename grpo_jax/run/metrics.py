"""What is reported: metric names, timers, and the writer (console, train.log, metrics.jsonl, TensorBoard).

The names are those of verl, so that existing dashboards keep working; docs/metrics.md explains each.
"""

import contextlib
import json
import logging
import math
import resource
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm.advantages import frac_zero_std
from grpo_jax.algorithm.loss import FIRST_UPDATE
from grpo_jax.config import Config
from grpo_jax.model.config import ModelConfig
from grpo_jax.rewards.base import RewardResult
from grpo_jax.run.workdir import Workdir
from grpo_jax.types import Metrics, RolloutGroup

logger = logging.getLogger(__name__)

CORRECT_REWARD = 1.0
"""A completion counts as correct, in `accuracy`, from this reward on."""

# Dense bf16 peak, FLOP/s, by a part of `device_kind`, from the makers' data sheets.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}


def rollout_metrics(groups: Sequence[RolloutGroup], scored: RewardResult, config: Config) -> Metrics:
    """Metrics of one step's completions, before any KL penalty."""
    rewards = scored.rewards
    completions = [c for group in groups for c in group.completions]
    responses = np.array([len(c.token_ids) for c in completions])
    prompts = np.array([len(group.prompt.token_ids) for group in groups])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        **{f"reward/{name}/mean": float(values.mean()) for name, values in scored.parts.items()},
        "accuracy": float((scored.correctness >= CORRECT_REWARD).mean()),
        "frac_reward_zero_std": float(frac_zero_std(rewards)),
        **_spread("response_length", responses),
        "response_length/clip_ratio": float(np.mean([c.finish_reason == "length" for c in completions])),
        **_spread("prompt_length", prompts),
        "training/policy_version": min(c.policy_version for c in completions),
    }


def merge_updates(updates: Sequence[Metrics]) -> Metrics:
    """Metrics of several updates as those of one step: means, but sums of counts and maxima of maxima.

    What only the first update can measure (`losses.FIRST_UPDATE`) is taken from there.
    """
    merged: Metrics = {}
    for name in updates[0]:
        if name.startswith(FIRST_UPDATE):
            merged[name.removeprefix(FIRST_UPDATE)] = float(updates[0][name])
            continue
        values = np.array([float(update[name]) for update in updates])
        combine = np.sum if name == "actor/skipped_updates" else np.max if name.endswith("_max") else np.mean
        merged[name] = float(combine(values))
    return merged


def update_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """Matrix FLOPs of forward and backward over sequences of the given lengths; recomputation not counted."""
    attention_width = config.num_heads * config.head_dim
    per_layer = config.hidden_size * (
        2 * attention_width + 2 * config.num_kv_heads * config.head_dim + 3 * config.intermediate_size
    )
    weights = config.num_layers * per_layer + config.vocab_size * config.hidden_size
    causal_attention = (
        2 * config.num_layers * attention_width * float(np.sum(lengths.astype(np.float64) ** 2))
    )
    return 6.0 * weights * float(lengths.sum()) + 3 * causal_attention


def performance_metrics(
    model: ModelConfig, lengths: np.ndarray, num_devices: int, timings: Metrics
) -> Metrics:
    """Throughput, MFU where the device's peak is known, and the memory high-water mark.

    Args:
        lengths: [B] tokens of each sequence of the step, prompt and completion.
        timings: "timing_s/step" and "timing_s/update_actor", seconds.
    """
    metrics = {"perf/throughput": float(lengths.sum()) / timings["timing_s/step"] / num_devices}
    device = jax.devices()[0]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device.device_kind), None)
    if peak:
        achieved = update_flops(model, lengths) / timings["timing_s/update_actor"] / num_devices
        metrics["perf/mfu/actor"] = achieved / peak
    stats = device.memory_stats() or {}
    # On a CPU the arrays are part of the process.
    used = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    metrics["perf/max_memory_allocated_gb"] = used / 1e9
    return metrics


class Timers:
    """Seconds spent in each phase of a step, and which phase is running (for error messages)."""

    def __init__(self) -> None:
        self.phase = "start"
        self._seconds: Metrics = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self.phase, start = phase, time.perf_counter()
        try:
            yield
        finally:
            name = f"timing_s/{phase}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def collect(self) -> Metrics:
        """Returns the seconds by metric name and starts again at zero."""
        collected, self._seconds = self._seconds, {}
        return collected


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


def _spread(name: str, values: np.ndarray) -> Metrics:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": int(values.max()),
        f"{name}/min": int(values.min()),
    }


def _plain(value: Any) -> int | float | None:
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
