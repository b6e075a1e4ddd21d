"""Dynamic sampling: prompts are sampled until the batch is full of groups that can teach something.

DAPO, arXiv:2503.14476 (11): a group whose rewards are all equal has no advantage and no gradient, so it is left
out and another prompt takes its place. Rounds of scored groups enter, a batch of the configured size leaves.
Groups with spread that did not fit into the batch are kept for the next step.

The length penalty does not count as spread: completions that are all wrong and of different length say nothing
about the answer.
"""

import base64
import dataclasses
import itertools
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from grpo_jax.config import KEYS, Config
from grpo_jax.config.sections import FIXED
from grpo_jax.rollout.base import one_line
from grpo_jax.rollout.batches import Position
from grpo_jax.types import Completion, Metrics, Prompt, RewardResult, RolloutGroup, ScoredBatch

logger = logging.getLogger(__name__)


class NoSpreadError(RuntimeError):
    """No group had any spread; the message shows two of them."""


@dataclasses.dataclass(frozen=True)
class _ScoredGroup:
    group: RolloutGroup
    rewards: RewardResult
    """Of this one group."""


class Rounds(Protocol):
    """What rounds are taken from: `batches.Ahead`."""

    def take_round(self) -> ScoredBatch:
        """Samples and scores the next batch of prompts."""

    def release_engine(self) -> None:
        """Nothing more is sampled before the engine has new weights."""

    def state(self) -> Position:
        """The position after the round that was taken last."""

    def restore(self, position: Position) -> None:
        """Goes to such a position."""


class Dynamic:
    """Fills batches from rounds; keeps the groups that are left over for the next step."""

    def __init__(
        self,
        rounds: Rounds,
        prompts: Sequence[Prompt],
        *,
        num_groups: int,
        group_size: int,
        max_rounds: int,
        rewarded_by: str,
    ):
        """
        Args:
            prompts: all of the training data, among which `restore` finds those of the groups that were kept.
            num_groups: P, groups of a batch.
            group_size: G, completions of a group.
            max_rounds: of one step, at least 1.
            rewarded_by: `reward_settings` of the run: rewards by others mean something else.
        """
        self._rewarded_by = rewarded_by
        self._rounds, self._prompts = rounds, prompts
        self._num_groups, self._group_size, self._max_rounds = num_groups, group_size, max_rounds
        self._surplus: list[_ScoredGroup] = []

    def take(self) -> ScoredBatch:
        """Returns P groups: those left over first, then those of as many rounds as it takes.

        Where the rounds are used up before the batch is full, groups without spread fill it, which add nothing to
        the policy gradient.

        Raises:
            NoSpreadError: no group has any spread.
        """
        kept, num_carried = self._surplus, len(self._surplus)
        dropped: list[_ScoredGroup] = []
        rounds: list[ScoredBatch] = []
        while len(kept) < self._num_groups and len(rounds) < self._max_rounds:
            sampled = self._rounds.take_round()
            scored = [_ScoredGroup(g, sampled.rewards.take([i])) for i, g in enumerate(sampled.groups)]
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
        return ScoredBatch(joined.groups, rewards, _joined(rest) if rest else None, metrics)

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
        common = {"rewarded_by": self._rewarded_by}
        surplus = [_to_json(scored) | common for scored in self._surplus]
        return dataclasses.replace(self._rounds.state(), surplus=surplus)

    def restore(self, position: Position) -> None:
        """See `batches.RolloutBatches.restore`. Groups that do not fit this run are dropped.

        Such are left where checkpoint.resume=force goes on with another group size, other prompts or another
        reward; without them the run has lost a few completions, and nothing else.
        """
        self._rounds.restore(position)
        if not position.surplus:
            return
        by_id = {(prompt.prompt_id, prompt.token_ids): prompt for prompt in self._prompts}
        self._surplus, lost = [], []
        for entry in position.surplus:
            scored = _from_json(entry, by_id)
            is_same = entry.get("rewarded_by", self._rewarded_by) == self._rewarded_by
            if scored is not None and is_same and len(scored.group.completions) == self._group_size:
                self._surplus.append(scored)
            else:
                lost.append(entry["prompt_id"])
        if lost:
            logger.warning(
                "WARNING: %d of the %d groups that dynamic sampling had left over are dropped: the prompts, "
                "algorithm.group_size=%d or the reward are others than theirs (%s).",
                len(lost), len(position.surplus), self._group_size, ", ".join(lost),
            )  # fmt: skip


def reward_settings(config: Config) -> str:
    """What the rewards of a run depend on, as JSON."""
    names = [name for name, key in KEYS.items() if name.startswith("reward.") and key.resume == FIXED]
    return json.dumps({name: config.get(name) for name in (*names, "data.max_response_length")})


def _joined(scored: Sequence[_ScoredGroup]) -> ScoredBatch:
    return ScoredBatch([s.group for s in scored], RewardResult.join([s.rewards for s in scored]))


def _explain(dropped: Sequence[_ScoredGroup], rounds: int) -> str:
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


def _to_json(scored: _ScoredGroup) -> dict[str, Any]:
    group, rewards = scored.group, scored.rewards
    return {
        "prompt_id": group.prompt.prompt_id,
        "prompt_token_ids": list(group.prompt.token_ids),
        "completions": [
            dataclasses.asdict(c)
            | {
                "token_ids": list(map(int, c.token_ids)),
                "sampler_logprobs": list(map(float, c.sampler_logprobs)),
                "drawable": None if c.drawable is None else base64.b64encode(c.drawable.tobytes()).decode(),
            }
            for c in group.completions
        ],
        "rewards": rewards.rewards.tolist(),
        "unshaped": rewards.unshaped.tolist(),
        "correctness": rewards.correctness.tolist(),
        "parts": {name: values.tolist() for name, values in rewards.parts.items()},
    }


def _completion_from_json(c: dict[str, Any]) -> Completion:
    drawable = c.get("drawable")
    if drawable is not None:
        words = np.frombuffer(base64.b64decode(drawable), np.uint32)
        drawable = words.reshape(len(c["token_ids"]), -1)
    lists = {name: tuple(c[name]) for name in ("token_ids", "sampler_logprobs")}
    return Completion(**c | lists | {"drawable": drawable})


def _from_json(
    entry: dict[str, Any], prompts: dict[tuple[str, tuple[int, ...]], Prompt]
) -> _ScoredGroup | None:
    """A group that `_to_json` wrote; None where its prompt is not among `prompts`, (id, token ids) -> prompt."""
    prompt = prompts.get((entry["prompt_id"], tuple(entry["prompt_token_ids"])))
    if prompt is None:
        return None
    completions = tuple(_completion_from_json(c) for c in entry["completions"])
    # float32 -> float64 -> text -> float32 gives the same bits back.
    values = {name: np.array(entry[name], np.float32) for name in ("rewards", "unshaped", "correctness")}
    parts = {name: np.array(value, np.float32) for name, value in entry["parts"].items()}
    return _ScoredGroup(RolloutGroup(prompt, completions), RewardResult(**values, parts=parts, errors=()))
