"""Dynamic sampling: prompts are sampled until the batch is full of groups that can teach something.

DAPO, arXiv:2503.14476 (11): a group whose rewards are all equal has no advantage and no gradient, so it is left
out and another prompt takes its place. Rounds of scored groups enter, a batch of the configured size leaves.
Groups with spread that did not fit into the batch are kept for the next step.

The length penalty does not count as spread: completions that are all wrong and of different length say nothing
about the answer.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Protocol

from grpo_jax.rollout.base import one_line
from grpo_jax.rollout.position import Position, ScoredGroup
from grpo_jax.types import Metrics, RewardResult, ScoredBatch

logger = logging.getLogger(__name__)


class NoSpreadError(RuntimeError):
    """No group had any spread; the message shows two of them."""


class Rounds(Protocol):
    """What rounds are taken from: `batches.Ahead`."""

    def take_round(self) -> ScoredBatch:
        """Samples and scores the next batch of prompts."""

    def release_engine(self) -> None:
        """Nothing more is sampled before the engine has new weights."""

    def state(self) -> Position:
        """The position after the round that was taken last."""

    def abandon(self) -> None:
        """Throws away what is under way."""

    def restore(self, position: Position) -> None:
        """Goes to such a position."""


class Dynamic:
    """Fills batches from rounds; keeps the groups that are left over for the next step."""

    def __init__(self, rounds: Rounds, *, num_groups: int, max_rounds: int):
        """Args: num_groups: P, groups of a batch; max_rounds: of one step, at least 1."""
        self._rounds = rounds
        self._num_groups, self._max_rounds = num_groups, max_rounds
        self._surplus: list[ScoredGroup] = []

    def take(self) -> ScoredBatch:
        """Returns P groups: those left over first, then those of as many rounds as it takes.

        Where the rounds are used up before the batch is full, groups without spread fill it, which add nothing to
        the policy gradient.

        Raises:
            NoSpreadError: no group has any spread.
        """
        kept, num_carried = self._surplus, len(self._surplus)
        dropped: list[ScoredGroup] = []
        rounds: list[ScoredBatch] = []
        while len(kept) < self._num_groups and len(rounds) < self._max_rounds:
            sampled = self._rounds.take_round()
            scored = [ScoredGroup(g, sampled.rewards.take([i])) for i, g in enumerate(sampled.groups)]
            spread = sampled.rewards.has_spread
            kept = [*kept, *itertools.compress(scored, spread)]
            dropped += itertools.compress(scored, ~spread)
            rounds.append(sampled)
        self._rounds.release_engine()
        if not kept:
            raise NoSpreadError(_explain(dropped, len(rounds)))
        num_missing = max(0, self._num_groups - len(kept))
        if num_missing:
            logger.warning(
                "WARNING: %d rounds gave %d of %d groups with any spread of rewards; %d without fill the batch.",
                len(rounds), len(kept), self._num_groups, num_missing,
            )  # fmt: skip
        batch, self._surplus = kept[: self._num_groups], kept[self._num_groups :]
        metrics = self._metrics(rounds, num_carried, len(dropped), num_missing)
        joined = _joined([*batch, *dropped[:num_missing]])
        errors = tuple(error for sampled in rounds for error in sampled.rewards.errors)
        rewards = dataclasses.replace(joined.rewards, errors=errors)
        rest = dropped[num_missing:]
        left_over = tuple(s.group for s in self._surplus)
        return ScoredBatch(joined.groups, rewards, _joined(rest) if rest else None, left_over, metrics)

    def _metrics(
        self, rounds: Sequence[ScoredBatch], num_carried: int, num_flat: int, num_missing: int
    ) -> Metrics:
        """The numbers of groups.

        Args: num_flat: without spread; num_missing: of them, those that fill the batch.
        """
        metrics: Metrics = {
            "dynamic/num_rounds": len(rounds),
            "dynamic/num_carried": num_carried,
            "dynamic/num_sampled": sum(len(sampled.groups) for sampled in rounds),
            "dynamic/num_no_spread": num_flat,
            "dynamic/num_filled": num_missing,
            "dynamic/num_kept": len(self._surplus),
        }
        if rounds:
            total = sum(float(sampled.rewards.rewards.mean()) * len(sampled.groups) for sampled in rounds)
            metrics["dynamic/reward_mean"] = total / metrics["dynamic/num_sampled"]
        return metrics

    def state(self) -> Position:
        """See `batches.RolloutBatches.state`. Holds the groups left over: later weights would sample others."""
        return dataclasses.replace(self._rounds.state(), surplus=tuple(self._surplus))

    def abandon(self) -> None:
        """See `batches.RolloutBatches.abandon`."""
        self._rounds.abandon()

    def restore(self, position: Position) -> None:
        """See `batches.RolloutBatches.restore`."""
        self._rounds.restore(position)
        self._surplus = list(position.surplus)


def _joined(scored: Sequence[ScoredGroup]) -> ScoredBatch:
    return ScoredBatch([s.group for s in scored], RewardResult.join([s.rewards for s in scored]))


def _explain(dropped: Sequence[ScoredGroup], rounds: int) -> str:
    """Shows two of the groups: one look often tells what the reward function does not like."""
    lines = [
        f"dynamic sampling found no group with any spread of rewards: {len(dropped)} groups in {rounds} rounds "
        "(algorithm.dynamic_sampling_rounds) all have equal rewards. Two of them:"
    ]
    for scored in dropped[:2]:
        prompt, completions = scored.group.prompt, scored.group.completions
        lines.append(f"  prompt:       {one_line(prompt.text)}")
        lines.append(f"  ground truth: {one_line(prompt.ground_truth)}")
        lines += [
            f"  reward {reward:g}: {one_line(completion.text)}"
            for completion, reward in zip(completions[:2], scored.rewards.unshaped[0], strict=False)
        ]
    return "\n".join(lines)
