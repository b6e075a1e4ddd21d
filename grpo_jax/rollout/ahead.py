"""Batches of rollouts in the order of the steps, sampled up to `max_lag` steps ahead."""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_jax.data.prompts import PromptIterator
    from grpo_jax.rollout.base import RolloutEngine, SamplingParams
    from grpo_jax.types import RolloutGroup


class RolloutsAhead:
    """Asks the engine for the batches of coming steps once that of the present one is there.

    With `max_lag` 0 nothing is asked for ahead: each batch is sampled when it is wanted, with the newest weights.
    With k, batch s + k is asked for as soon as batch s has come back, so it is sampled while the trainer works on
    batch s, with weights at most k steps old.
    """

    def __init__(
        self,
        prompts: PromptIterator,
        engine: RolloutEngine,
        sampling: SamplingParams,
        seed_of: Callable[[int], int],
        *,
        max_lag: int,
        first_step: int,
        num_steps: int,
    ):
        """
        Args:
            seed_of: number of a batch, counted from 0 -> seed of its rollouts. One batch a step, except with
                dynamic sampling.
            first_step: number of the first batch.
            num_steps: beyond so many batches nothing is asked for ahead.
        """
        self._prompts, self._engine, self._sampling, self._seed_of = prompts, engine, sampling, seed_of
        self._max_lag, self._num_steps = max_lag, num_steps
        self._next_step = self._num_taken = first_step
        self._asked: collections.deque[tuple[Callable[[], list[RolloutGroup]], Mapping[str, Any]]]
        self._asked = collections.deque()
        self._state: Mapping[str, Any] = prompts.state()

    def take(self) -> list[RolloutGroup]:
        """Waits for the batch of the next step."""
        if not self._asked:
            self._ask()
        wait, self._state = self._asked.popleft()
        groups = wait()
        self._num_taken += 1
        while len(self._asked) < self._max_lag and self._next_step < self._num_steps:
            self._ask()
        return groups

    def _ask(self) -> None:
        prompts = next(self._prompts)
        wait = self._engine.submit(
            prompts, self._sampling, seed=self._seed_of(self._next_step), progress="rollouts"
        )
        self._asked.append((wait, self._prompts.state()))
        self._next_step += 1

    @property
    def num_taken(self) -> int:
        """Number of the batch that will be taken next: those taken in this run, interruptions or not."""
        return self._num_taken

    def state(self) -> dict[str, Any]:
        """Where the prompt iterator stood after the batch that was taken last; those ahead are asked for again."""
        return dict(self._state)
