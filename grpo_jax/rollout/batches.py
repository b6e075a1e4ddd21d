"""Scored batches of rollouts in the order of the steps, sampled up to `max_lag` steps ahead."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.position import Position
from grpo_jax.types import RolloutGroup, ScoredBatch, Timer

if TYPE_CHECKING:
    from grpo_jax.data.prompts import PromptIterator
    from grpo_jax.rewards.base import Reward
    from grpo_jax.rollout.base import PendingGroups, RolloutEngine, SamplingParams


class RolloutBatches(Protocol):
    """What the training loop takes its batches from."""

    def take(self) -> ScoredBatch:
        """Waits for the batch of the next step."""

    def state(self) -> Position:
        """The position after the batch that was taken last."""

    def abandon(self) -> None:
        """Waits for what is under way and throws it away; `restore` comes next."""

    def restore(self, position: Position) -> None:
        """Goes to a position that `state` returned, before the first batch is taken or after `abandon`."""


class Ahead:
    """Prompts, completions and rewards of each step; with `max_lag`, sampled while earlier steps are trained.

    With `max_lag` 0 each batch is sampled when it is taken, with the newest weights. With k, batch s + k is
    requested as soon as batch s has come back: it is sampled while the trainer works on batch s, with weights at
    most k steps old.
    """

    def __init__(
        self,
        prompts: PromptIterator,
        engine: RolloutEngine,
        reward: Reward,
        timer: Timer,
        *,
        sampling: SamplingParams,
        seed: int,
        max_lag: int,
        num_batches: int,
    ):
        """Args: seed: of the run; num_batches: beyond so many batches nothing is asked for ahead."""
        self._prompts, self._engine, self._reward, self._timer = prompts, engine, reward, timer
        self._sampling, self._seed = sampling, seed
        self._max_lag, self._num_batches = max_lag, num_batches
        self._num_asked = self._num_taken = 0
        self._pending: collections.deque[tuple[PendingGroups, Mapping[str, Any]]] = collections.deque()
        self._restored: collections.deque[Mapping[int, RolloutGroup]] = collections.deque()
        """Of the batches that are asked for next, the groups that a checkpoint held."""
        self._prompt_state: Mapping[str, Any] = prompts.state()

    def take(self) -> ScoredBatch:
        """See `RolloutBatches.take`. The engine may give up its memory afterwards."""
        with self._timer("gen"):
            groups = self._wait()
            self.release_engine()
        return self._scored(groups)

    def take_round(self) -> ScoredBatch:
        """As `take`, but the engine stays ready for another round."""
        with self._timer("gen"):
            groups = self._wait()
        return self._scored(groups)

    def release_engine(self) -> None:
        """Lets the engine give up its memory until it gets new weights."""
        self._engine.sleep()

    def state(self) -> Position:
        """See `RolloutBatches.state`. What batches ahead still owe is asked for again after a restore."""
        first = self._num_taken
        under_way = [
            {place: dataclasses.replace(group, origin=(first + i, place)) for place, group in groups.items()}
            for i, groups in enumerate([pending.finished() for pending, _ in self._pending])
        ]
        ahead = [*under_way, *self._restored]
        while ahead and not ahead[-1]:
            ahead.pop()
        return Position(dict(self._prompt_state), self._num_taken, ahead=tuple(ahead))

    def abandon(self) -> None:
        """See `RolloutBatches.abandon`."""
        with self._timer("gen"):
            while self._pending:
                pending, _ = self._pending.popleft()
                pending()

    def restore(self, position: Position) -> None:
        """See `RolloutBatches.restore`."""
        self._prompts.restore(position.prompt_iterator)
        self._prompt_state = self._prompts.state()
        self._num_asked = self._num_taken = position.num_rollout_batches
        self._restored = collections.deque(position.ahead)

    def _scored(self, groups: list[RolloutGroup]) -> ScoredBatch:
        with self._timer("reward"):
            return ScoredBatch(groups, self._reward.score(groups))

    def _wait(self) -> list[RolloutGroup]:
        if not self._pending:
            self._ask()
        pending, self._prompt_state = self._pending.popleft()
        number = self._num_taken
        groups = [dataclasses.replace(g, origin=(number, place)) for place, g in enumerate(pending())]
        self._num_taken += 1
        while len(self._pending) < self._max_lag and self._num_asked < self._num_batches:
            self._ask()
        return groups

    def _ask(self) -> None:
        prompts = next(self._prompts)
        seed = derive_seed(self._seed, self._num_asked, "rollout")
        finished = self._restored.popleft() if self._restored else {}
        pending = self._engine.submit(
            prompts, self._sampling, seed=seed, finished=finished, progress="rollouts"
        )
        self._pending.append((pending, self._prompts.state()))
        self._num_asked += 1
