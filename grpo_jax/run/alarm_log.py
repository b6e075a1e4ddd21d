"""Alarms of a run as they are told: in the log, in WORKDIR/alarms.jsonl and in TensorBoard.

An alarm is told when it begins, then ever more seldom while it lasts, and when it is over.
"""

import collections
import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

from grpo_jax.config import Config
from grpo_jax.config.text import printable
from grpo_jax.rewards.base import Reward
from grpo_jax.rollout.base import shown_empty
from grpo_jax.run.alarms import Found, Line, is_step, num_before, raised
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import MetricsWriter, plain, read_metrics
from grpo_jax.storage.files import write_whole
from grpo_jax.types import Metrics, ScoredBatch

logger = logging.getLogger(__name__)

REMIND = 10
"""Steps until an alarm that lasts is told again; then twice as many, and so on."""
QUIET = 10
"""Steps without it after which an alarm is over: one that comes and goes is not told each time."""
TROUBLE = 3
"""Steps in a row with an alarm of the diverging kind until the run has diverged. One alone is often an odd batch:
its gradient is clipped, or the update skipped."""


@dataclasses.dataclass(frozen=True)
class Sounding:
    """An alarm that has begun and is not over."""

    since: int
    last: int
    """The last step that raised it."""
    remind_at: int
    pause: int
    """Steps between the last time that it was told and the next."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What is to be told of an alarm at a step."""

    event: str
    """"begins", "lasts" or "ends"."""
    name: str
    since: int
    found: Found | None
    """None where it ends."""


class AlarmStates:
    """Which alarms are sounding. Fed with the lines of the same steps, it is always in the same state."""

    def __init__(self, config: Config):
        self._config = config
        self._before: collections.deque[Line] = collections.deque(maxlen=num_before(config))
        self.sounding: dict[str, Sounding] = {}
        self.trouble: list[Found] = []
        """Of the diverging kind, raised by the last step."""
        self.trouble_since: int | None = None
        """The first of the steps in a row, up to the last, that raised some."""
        self._last = 0

    @property
    def has_diverged(self) -> bool:
        return self.trouble_since is not None and self._last - self.trouble_since + 1 >= TROUBLE

    def advance(self, line: Line, step: int) -> list[Told]:
        """Takes the metrics of the next step; returns what there is to tell of it."""
        found = raised(list(self._before), line, self._config)
        self._before.append(line)
        self._last = step
        self.trouble = [each for each in found if each.alarm.is_divergence]
        self.trouble_since = (self.trouble_since or step) if self.trouble else None
        return [*self._raise(found, step), *self._end(step)]

    def _raise(self, found: list[Found], step: int) -> Iterator[Told]:
        for each in found:
            name = each.alarm.name
            held = self.sounding.get(name)
            if held is None:
                self.sounding[name] = Sounding(step, step, step + REMIND, REMIND)
                yield Told("begins", name, step, each)
            elif step >= held.remind_at:
                pause = 2 * held.pause
                self.sounding[name] = Sounding(held.since, step, step + pause, pause)
                yield Told("lasts", name, held.since, each)
            else:
                self.sounding[name] = dataclasses.replace(held, last=step)

    def _end(self, step: int) -> Iterator[Told]:
        for name, held in list(self.sounding.items()):
            if step - held.last >= QUIET:
                del self.sounding[name]
                yield Told("ends", name, held.since, None)


class AlarmLog:
    """Tells the alarms of a run, each once, however often it is interrupted."""

    def __init__(self, workdir: Workdir, config: Config, writer: MetricsWriter, *, num_rollbacks: int):
        """Goes on from the lines that metrics.jsonl has; the alarms of later steps are dropped.

        Args: num_rollbacks: that led here; the lines of later ones are dropped too.
        """
        self._path, self._config, self._writer = workdir.alarms, config, writer
        self._states = AlarmStates(config)
        steps = [line for line in read_metrics(workdir) if is_step(line)]
        for line in steps:
            self._states.advance(line, line["step"])
        self._drop_after(steps[-1]["step"] if steps else 0, num_rollbacks)

    @property
    def has_diverged(self) -> bool:
        """Whether numbers of the diverging kind have been wrong for too long."""
        return self._states.has_diverged

    @property
    def may_roll_back(self) -> bool:
        """Whether the weights are in doubt, and the run may go back: then they are not saved."""
        return self._config.trainer.max_rollbacks > 0 and self._states.trouble_since is not None

    @property
    def trouble_since(self) -> int:
        """The step whose numbers were wrong first, of those in a row up to now; there must be trouble."""
        assert self._states.trouble_since is not None
        return self._states.trouble_since

    def explain_trouble(self) -> str:
        """The alarms of the diverging kind that the last step raised, in one line."""
        seen = "; ".join(f"{each.alarm.name} ({each.seen})" for each in self._states.trouble)
        return f"alarm since step {self.trouble_since}: {seen}"

    def note(self, metrics: Metrics, step: int, show: Callable[[], str]) -> Metrics:
        """Takes the metrics of a step, and tells what there is to tell.

        Args:    show: a completion of the step with its reward and the reason, as lines.
        Returns: the number of alarms that are sounding, and a 1 for each, by metric name.
        """
        for told in self._states.advance(metrics, step):
            self._tell(told, metrics, step, show)
        names = self._states.sounding
        return {"alarms/num_sounding": len(names), **{f"alarms/{name}": 1 for name in names}}

    def tell_rollback(self, why: str, *, back_from: int, to: int, number: int) -> None:
        """Says that the run went back to a step, for the how-manieth time."""
        text = f"WARNING: {why}. Going back from step {back_from} to the checkpoint of step {to}, and on with the "
        text += f"prompts in another order (roll-back {number} of {self._config.trainer.max_rollbacks})."
        logger.warning(text)
        line = {"step": to, "event": "roll-back", "back_from": back_from, "number": number, "seen": why}
        # In TensorBoard it belongs to the next step: a run that goes on from this one will go back again.
        self._write(line, "roll-back", text, to + 1)

    def _tell(self, told: Told, metrics: Metrics, step: int, show: Callable[[], str]) -> None:
        line: dict[str, Any] = {"step": step, "event": told.event, "alarm": told.name, "since": told.since}
        if told.found is None:
            text = f"Alarm {told.name} of step {told.since} is over: {QUIET} steps without it."
            logger.info(text)
            self._write(line, told.name, text, step)
            return
        alarm, seen = told.found.alarm, told.found.seen
        text = f"WARNING: alarm {told.name}"
        text += f" since step {told.since}: {seen}." if told.event == "lasts" else f" at step {step}: {seen}."
        text += f" Likely cause: {alarm.cause}. Remedy: {alarm.remedy}."
        if alarm.shows_completion:
            text += f"\n{show()}"
        logger.warning(text)
        values = {name: plain(metrics[name]) for name in alarm.metrics if name in metrics}
        line |= {"seen": seen, "cause": alarm.cause, "remedy": alarm.remedy, "values": values}
        self._write(line, told.name, text, step)

    def _write(self, line: dict[str, Any], name: str, text: str, step: int) -> None:
        """Args: name, step: under which TensorBoard has the text."""
        with self._path.open("a") as file:
            file.write(json.dumps(line | {"time": time.time()}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._writer.write_text(f"alarms/{name}", [text], step=step)

    def _drop_after(self, step: int, num_rollbacks: int) -> None:
        """Removes what a run that goes on after `step` will tell again."""
        if not self._path.exists():
            return
        kept = []
        for text in self._path.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, TypeError, KeyError):
                line = json.loads(text)
                is_rollback = line["event"] == "roll-back"
                if line["number"] <= num_rollbacks if is_rollback else line["step"] <= step:
                    kept.append(text + "\n")
        write_whole(self._path, "".join(kept))


def example(rollouts: ScoredBatch, reward: Reward) -> str:
    """The first completion of a batch with its prompt, its reward and the reason for it, as lines."""
    group, value = rollouts.groups[0], float(rollouts.rewards.rewards[0, 0])
    completion = group.completions[0]
    lines = (
        f"prompt:       {printable(group.prompt.text.strip())}",
        f"ground truth: {printable(group.prompt.ground_truth)}",
        f"completion:   {printable(completion.text.strip()) or shown_empty(completion.text)}",
        f"reward:       {value:g}, since {printable(reward.explain(group.prompt, completion, value))}",
    )
    return "\n".join(f"  {line}" for line in lines)
