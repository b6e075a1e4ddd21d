"""How a run stops, or warns: signals, failures, updates that are not finite, rewards without any spread."""

import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.algorithm.advantages import frac_zero_std
from grpo_jax.algorithm.loss import MISMATCH_MEANS
from grpo_jax.config import Config, ConfigError, split_file_name
from grpo_jax.rewards.base import Reward
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.metrics import Timers
from grpo_jax.types import Metrics, ScoredBatch, StepResult

logger = logging.getLogger(__name__)


HEALTHY_PROB, HEALTHY_FACTOR = 0.005, 1.01
"""Largest means of |p_trainer - p_sampler| and of exp|log p_trainer - log p_sampler| that docs/trust.md calls
healthy."""
ZERO_KL, ZERO_PPO_KL = 1e-6, 1e-5
"""Above these, numbers that are 0 by construction are not: one program on the same weights gives the same bits."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why."""


class RunWatch:
    """Looks for runs that go nowhere: updates that are skipped, rewards that teach nothing."""

    def __init__(self, config: Config, reward: Reward, *, is_new: bool):
        """Args: is_new: whether the run begins with its first step, and does not go on after a checkpoint."""
        self._config, self._section, self._reward = config, config.trainer, reward
        self._is_first_step = is_new
        self._has_warned_of_mismatch = False
        self._skipped = 0
        self._most_skipped = 0
        self._flat_steps = 0

    @property
    def is_healthy(self) -> bool:
        """False while updates are being skipped."""
        return self._skipped == 0

    @property
    def is_lost(self) -> bool:
        """True once too many updates in a row were not finite."""
        return self._most_skipped >= self._section.max_nonfinite_updates

    def note(self, result: StepResult) -> None:
        """Takes note of one step, and warns: see the other methods."""
        self._warn_of_numbers(result)
        for update in result.updates:
            self._skipped = self._skipped + 1 if update["actor/skipped_updates"] else 0
            self._most_skipped = max(self._most_skipped, self._skipped)
        is_flat = frac_zero_std(result.rollouts.rewards.rewards) == 1
        self._flat_steps = self._flat_steps + 1 if is_flat else 0
        if self._flat_steps and self._flat_steps % self._section.flat_reward_steps == 0:
            self._warn_of_flat_rewards(result.rollouts)

    def stop_if_lost(self) -> None:
        """Raises: TrainingStopped: too many updates in a row were not finite."""
        if self.is_lost:
            is_float16 = self._config.model.dtype == "float16"
            cure = "optim.loss_scale or optim.learning_rate" if is_float16 else "optim.learning_rate"
            raise TrainingStopped(
                f"loss or gradient was not finite in {self._most_skipped} updates in a row "
                f"(trainer.max_nonfinite_updates); a lower {cure} may help"
            )

    def _warn_of_numbers(self, result: StepResult) -> None:
        if self._is_first_step and (warning := not_zero_warning(result.updates[0], self._config)):
            logger.warning(warning)
        self._is_first_step = False
        if not self._has_warned_of_mismatch and (warning := mismatch_warning(result.metrics, self._config)):
            self._has_warned_of_mismatch = True
            logger.warning(warning)

    def _warn_of_flat_rewards(self, rollouts: ScoredBatch) -> None:
        group, rewards = rollouts.groups[0], rollouts.rewards.rewards
        reward = float(rewards[0, 0])
        completion = group.completions[0]
        logger.warning(
            "WARNING: for %d steps the completions of each prompt all got the same reward (now %g on average), "
            "so there is nothing to learn from.\n  prompt:       %s\n  ground truth: %s\n  completion:   %s\n"
            "  reward:       %g, since %s",
            self._flat_steps,
            float(rewards.mean()),
            group.prompt.text.strip(),
            group.prompt.ground_truth,
            completion.text.strip() or "(empty)",
            reward,
            self._reward.explain(group.prompt, completion, reward),
        )


def mismatch_warning(metrics: Metrics, config: Config) -> str:
    """One line where engine and trainer differ by more than is healthy; "" otherwise. Args: metrics: of a step."""
    prob, factor = (metrics.get(name) or 0.0 for name in MISMATCH_MEANS)
    if not (prob > HEALTHY_PROB or factor > HEALTHY_FACTOR):  # NaN is another trouble
        return ""
    reasons = []
    if config.rollout.max_lag:
        reasons.append(f"with rollout.max_lag={config.rollout.max_lag}, older weights are part of it")
    if config.corrects_sampler:
        reasons.append("this run corrects for it (algorithm.rollout_is, algorithm.old_logprobs)")
    (prob_name, factor_name), how = MISMATCH_MEANS, "`python -m grpo_jax.mismatch` with the flags of this run"
    numbers = f"{prob_name}={prob:.2g} (healthy: at most {HEALTHY_PROB:g})"
    numbers += f", {factor_name}={factor:.4g} (at most {HEALTHY_FACTOR:g})"
    text = [f"WARNING: engine and trainer differ: {numbers}", *reasons]
    return "; ".join([*text, f"{how} says where it comes from (docs/trust.md)"])


def not_zero_warning(update: Metrics, config: Config) -> str:
    """One line where the first update of a new run finds that the policy has moved already; "" otherwise.

    Args: update: metrics of the update. Until then policy, old policy and reference are the same bits.
    """
    found = []
    is_own = split_file_name(config.algorithm.kl_estimator) is not None  # which need not be 0 of equals
    if config.algorithm.kl_in == "loss" and not is_own and abs(update.get("kl/mean", 0.0)) > ZERO_KL:
        found.append(f"kl/mean={update['kl/mean']:.2g}")
    if config.algorithm.old_logprobs != "sampler" and abs(update["actor/ppo_kl"]) > ZERO_PPO_KL:
        found.append(f"actor/ppo_kl={update['actor/ppo_kl']:.2g}")
    if not found:
        return ""
    why = "scores and gradients do not come from one program (docs/trust.md)"
    return f"WARNING: {' and '.join(found)} in the first update, where nothing has moved yet: {why}"


SAME_S = 1.0
"""A signal that follows another within this time is the same one: sent to the group, and passed on by a parent."""


class StopRequest:
    requested = False


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Ctrl-C or SIGTERM asks to stop after the step; a second one, after a second, stops at once."""
    stop, last = StopRequest(), -math.inf

    def on_signal(number: int, frame: Any) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before < SAME_S:
            return
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True
        logger.info("Stopping after this step; once more to stop at once.")

    old = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def quietly(what: str, close: Callable[[], None]) -> None:
    """Closes something while a run ends. An error there is logged: it must not hide why the run ends."""
    try:
        close()
    except Exception as error:
        logger.error("%s: %s: %s", what, type(error).__name__, error)


@contextlib.contextmanager
def reported_failure(
    timers: Timers,
    checkpointer: Checkpointer,
    explain: Callable[[Exception, str], str | None],
    rescue: Callable[[], None],
) -> Iterator[None]:
    """Says which phase failed and which checkpoint is left, and exits with 1.

    Args:
        explain: (error, phase) -> what a person reads in place of the error's own text; None: that text.
        rescue: saves what a failure leaves to be saved.
    """
    try:
        yield
    except ConfigError:
        raise
    except (KeyboardInterrupt, Exception) as error:
        if not isinstance(error, KeyboardInterrupt | CheckpointError):
            quietly("the last whole step could not be saved", rescue)
        quietly("the last checkpoint", checkpointer.wait)
        step = checkpointer.latest_step
        left = f"the last good checkpoint is that of step {step}" if step else "there is no checkpoint yet"
        if isinstance(error, KeyboardInterrupt):
            how = "goes on from it" if step else "starts again"
            logger.info("Interrupted in phase %s; %s. The same command %s.", timers.phase, left, how)
            raise SystemExit(130) from None
        if isinstance(error, TrainingStopped):
            phase = "update_actor"  # noticed later, when the step has been reported
        elif isinstance(error, CheckpointError):
            phase = "save_checkpoint"
        else:
            phase = timers.phase
            logger.exception("phase %s failed", phase)
        print(f"error: phase {phase}: {explain(error, phase) or error}; {left}", file=sys.stderr)
        raise SystemExit(1) from None
