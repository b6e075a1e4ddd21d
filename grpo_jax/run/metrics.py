"""The metrics of a step, as numbers by name, and the timers of its phases.

The names are those of verl, so that existing dashboards keep working; docs/metrics.md explains each.
"""

import contextlib
import resource
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from grpo_jax.algorithm.advantages import frac_zero_std
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import active_weights, head_weights
from grpo_jax.rewards.base import CORRECT_REWARD
from grpo_jax.types import Metrics, RolloutGroup, ScoredBatch

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


LOOP_TOKENS, LOOP_TIMES, LONGEST_LOOP = 64, 4, 64
"""A completion that ends in a loop has a piece of at most 64 tokens 4 times or more, over 64 tokens or more."""


def ends_in_loop(token_ids: Sequence[int]) -> bool:
    """Whether a completion ends in the same piece over and over."""
    for period in range(1, LONGEST_LOOP + 1):
        length = max(LOOP_TOKENS, LOOP_TIMES * period)
        if len(token_ids) < length:
            return False  # longer ones would need as many tokens, or more
        if token_ids[-1] == token_ids[-1 - period]:  # which is quick, and seldom so
            tail = token_ids[-length:]
            if tail[period:] == tail[:-period]:
                return True
    return False


def rollout_metrics(batch: ScoredBatch, step: int) -> Metrics:
    """Metrics of the completions of step number `step`, counted from 0, before any KL penalty."""
    rewards = batch.rewards.rewards
    completions = [c for group in batch.groups for c in group.completions]
    responses = np.array([len(c.token_ids) for c in completions])
    prompts = np.array([len(group.prompt.token_ids) for group in batch.groups])
    version = min(c.policy_version for c in completions)
    ages = step - np.concatenate([c.token_versions for c in completions])
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/max": float(rewards.max()),
        "reward/min": float(rewards.min()),
        "reward/num_errors": len(batch.rewards.errors),
        **{f"reward/{name}/mean": float(values.mean()) for name, values in batch.rewards.parts.items()},
        "accuracy": float((batch.rewards.correctness >= CORRECT_REWARD).mean()),
        "frac_reward_zero_std": float(frac_zero_std(rewards)),
        **_mean_max_min("response_length", responses),
        "response_length/clip_ratio": float(np.mean([c.finish_reason == "length" for c in completions])),
        "response_length/repeat_ratio": float(np.mean([ends_in_loop(c.token_ids) for c in completions])),
        **_mean_max_min("prompt_length", prompts),
        "training/policy_version": version,
        "training/policy_lag": step - version,
        "training/token_age_mean": float(ages.mean()),
        "training/token_age_max": int(ages.max()),
        **batch.metrics,
    }


def update_flops(config: ModelConfig, lengths: np.ndarray) -> float:
    """Matrix FLOPs of forward and backward over sequences of the given lengths.

    Not counted is what no result depends on or what is done twice: products of experts that the router did not
    choose, keys before a window, recomputation.
    """
    attention_width = config.num_heads * config.head_dim
    weights = active_weights(config) + head_weights(config)
    n = lengths.astype(np.float64)
    unseen = lambda window: np.sum(np.maximum(n - window, 0) ** 2) if window else 0.0
    seen = config.num_layers * float(np.sum(n**2)) - float(sum(map(unseen, config.windows)))
    causal_attention = 2 * attention_width * seen
    # Of frozen weights there is no gradient; the adapters' products are too few to count.
    return (4.0 if config.lora else 6.0) * weights * float(lengths.sum()) + 3 * causal_attention


def sequence_lengths(groups: Sequence[RolloutGroup]) -> np.ndarray:
    """[B] tokens of each sequence, prompt and completion."""
    return np.array([len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions])


def performance_metrics(
    model: ModelConfig, lengths: np.ndarray, timings: Metrics, *, num_devices: int, num_passes: int
) -> Metrics:
    """Throughput, MFU where the device's peak is known, and the memory high-water mark.

    Args:
        lengths: as from `sequence_lengths`.
        timings: "timing_s/step" and "timing_s/update_actor", seconds.
        num_passes: how often the updates of the step went over the sequences.
    """
    metrics = {"perf/throughput": float(lengths.sum()) / timings["timing_s/step"] / num_devices}
    device = jax.local_devices()[0]
    peak = next((flops for name, flops in PEAK_FLOPS.items() if name in device.device_kind), None)
    if peak:
        flops = num_passes * update_flops(model, lengths)
        achieved = flops / timings["timing_s/update_actor"] / num_devices
        metrics["perf/mfu/actor"] = achieved / peak
    stats = device.memory_stats() or {}
    # On a CPU the arrays are part of the process.
    used = stats.get("peak_bytes_in_use", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    metrics["perf/max_memory_allocated_gb"] = used / 1e9
    return metrics


class Timers:
    """Seconds spent in each phase of a step, and which phase is running (for messages, and for `hangs.py`)."""

    def __init__(self) -> None:
        self.running = ("start", time.monotonic())
        """(the phase that is running, since when on the monotonic clock: its begin or the end of one within it)"""
        self.entered = 0
        """How many phases have begun: tells which process of a run has come least far."""
        self._seconds: Metrics = {}

    @property
    def phase(self) -> str:
        """The one that is running; after an error, the one that it has ended."""
        return self.running[0]

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Names the phase that is running, and counts its seconds."""
        start = time.perf_counter()
        try:
            with self.within(phase):
                yield
        finally:
            name = f"timing_s/{phase}"
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Names the phase that is running, and counts nothing."""
        outer = self.phase
        self.running = (phase, time.monotonic())
        self.entered += 1
        try:
            yield
        except BaseException:
            self.running = (self.phase, time.monotonic())  # the name stays, for who reports the error
            raise
        self.running = (outer, time.monotonic())

    def collect(self) -> Metrics:
        """Returns the seconds by metric name and starts again at zero."""
        collected, self._seconds = self._seconds, {}
        return collected


def _mean_max_min(name: str, values: np.ndarray) -> Metrics:
    return {
        f"{name}/mean": float(values.mean()),
        f"{name}/max": int(values.max()),
        f"{name}/min": int(values.min()),
    }
