"""How a run stops: signals, failures, updates that are not finite."""

import contextlib
import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from grpo_jax.config import Config, ConfigError, split_file_name
from grpo_jax.config.command_line import hush, was_interrupted
from grpo_jax.config.text import printable
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError
from grpo_jax.run.hangs import PhaseTimedOut, hang_behind
from grpo_jax.run.hosts import ALONE, Hosts
from grpo_jax.run.metrics import Timers
from grpo_jax.types import Metrics

logger = logging.getLogger(__name__)


ZERO_KL, ZERO_PPO_KL = 1e-6, 1e-5
"""Above these, numbers that are 0 by construction are not: one program on the same weights gives the same bits."""


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why."""


class RunWatch:
    """Looks at every update: those that are skipped, and the first one, where nothing has moved yet."""

    def __init__(self, config: Config, *, is_new: bool):
        """Args: is_new: whether the run begins with its first step, and does not go on after a checkpoint."""
        self._config = config
        self._is_first_step = is_new
        self._skipped = 0
        self._most_skipped = 0

    @property
    def is_healthy(self) -> bool:
        """False while updates are being skipped."""
        return self._skipped == 0

    @property
    def is_lost(self) -> bool:
        """True once too many updates in a row were not finite."""
        return self._most_skipped >= self._config.trainer.max_nonfinite_updates

    def note(self, updates: Sequence[Metrics]) -> None:
        """Takes note of the updates of a step, and warns of a first one that should have found zeros."""
        if self._is_first_step and (warning := not_zero_warning(updates[0], self._config)):
            logger.warning(warning)
        self._is_first_step = False
        for update in updates:
            self._skipped = self._skipped + 1 if update["actor/skipped_updates"] else 0
            self._most_skipped = max(self._most_skipped, self._skipped)

    def stop_if_lost(self) -> None:
        """Raises: TrainingStopped: too many updates in a row were not finite."""
        if self.is_lost:
            is_float16 = self._config.model.dtype == "float16"
            cure = "optim.loss_scale or optim.learning_rate" if is_float16 else "optim.learning_rate"
            raise TrainingStopped(
                f"loss or gradient was not finite in {self._most_skipped} updates in a row "
                f"(trainer.max_nonfinite_updates); a lower {cure} may help"
            )


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
    """Ctrl-C or SIGTERM asks to stop after the step; a second one, after a second, stops at once.

    Raises: KeyboardInterrupt: at once, where one came before that Python has dropped.
    """
    if was_interrupted():
        raise KeyboardInterrupt
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
    except (Exception, PhaseTimedOut) as error:
        logger.error("%s: %s: %s", what, type(error).__name__, error)


@contextlib.contextmanager
def reported_failure(
    timers: Timers,
    checkpointer: Checkpointer,
    explain: Callable[[BaseException, str], str | None],
    rescue: Callable[[], None],
    hosts: Hosts = ALONE,
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
    except (KeyboardInterrupt, Exception, PhaseTimedOut) as raised:
        error: BaseException = hang_behind(raised) or raised
        if hosts.fail_together(error):
            if not isinstance(error, KeyboardInterrupt | CheckpointError):
                quietly("the last whole step could not be saved", rescue)
            quietly("the last checkpoint", checkpointer.wait)
        else:
            error = hosts.reason_behind(error)
        step = checkpointer.latest_step
        left = f"the last good checkpoint is that of step {step}" if step else "there is no checkpoint yet"
        if isinstance(error, KeyboardInterrupt):
            how = "goes on from it" if step else "starts again"
            logger.info("Interrupted in phase %s; %s. The same command %s.", timers.phase, left, how)
            hush()
            raise SystemExit(130) from None
        if isinstance(error, TrainingStopped):
            phase = "update_actor"  # noticed later, when the step has been reported
        elif isinstance(error, CheckpointError):
            phase = "save_checkpoint"
        elif isinstance(error, PhaseTimedOut):
            phase = error.phase
        else:
            phase = timers.phase
            logger.exception("phase %s failed", phase)
        line = f"phase {phase}: {explain(error, phase) or error}; {left}"
        if hosts.speaks:
            print(f"error: {printable(line)}", file=sys.stderr)
        if isinstance(error, PhaseTimedOut):
            error.is_told = True
            raise SystemExit(error.code) from None
        raise SystemExit(1) from error
