"""Dynamic sampling: prompts are sampled until the batch is full of groups that can teach something.

DAPO, arXiv:2503.14476 (11): a group whose rewards are all equal has no advantage and no gradient, so it is left
out and another prompt takes its place. What enters are rounds, each a batch of scored groups; what leaves is a
batch of the configured size. Groups with spread that did not fit any more wait for the next step.

Whether rewards differ is asked of them without the length penalty: completions that are all wrong and of different
length have nothing to say about the answer.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from grpo_jax.algorithm.advantages import has_spread
from grpo_jax.rewards.base import RewardResult
from grpo_jax.types import Completion, Metrics, Prompt, RolloutGroup

logger = logging.getLogger(__name__)

Scored = tuple[list[RolloutGroup], RewardResult]
"""Groups and their rewards."""


class NoSpreadError(RuntimeError):
    """No group had any spread; the message shows two of them."""


@dataclasses.dataclass(frozen=True)
class _ScoredGroup:
    group: RolloutGroup
    rewards: RewardResult
    """Of this one group."""


@dataclasses.dataclass(frozen=True)
class DynamicBatch:
    """What a step trains on, and what became of the rest."""

    groups: list[RolloutGroup]
    rewards: RewardResult
    dropped: Scored
    """Groups without spread, which nothing is trained on."""
    metrics: Metrics
    """The numbers of groups, as dynamic/NAME."""


class DynamicSampling:
    """Fills batches; holds the groups that are left over from one step to the next."""

    def __init__(self, next_round: Callable[[], Scored], *, num_groups: int, max_rounds: int):
        """
        Args:
            next_round: samples and scores a round of groups of other prompts.
            num_groups: P, groups of a batch.
            max_rounds: of one step, at least 1.
        """
        self._next_round, self._num_groups, self._max_rounds = next_round, num_groups, max_rounds
        self._surplus: list[_ScoredGroup] = []

    def take(self) -> DynamicBatch:
        """Returns P groups: those left over first, then those of as many rounds as it takes.

        Where the rounds are used up before the batch is full, groups without spread fill it, which add nothing to
        the policy gradient.

        Raises:
            NoSpreadError: no group has any spread.
        """
        kept, num_carried = self._surplus, len(self._surplus)
        dropped: list[_ScoredGroup] = []
        errors: tuple[str, ...] = ()
        rounds, num_sampled, reward_sum = 0, 0, 0.0
        while len(kept) < self._num_groups and rounds < self._max_rounds:
            groups, rewards = self._next_round()
            spread = has_spread(rewards.unshaped)
            scored = [_ScoredGroup(group, rewards.take([i])) for i, group in enumerate(groups)]
            kept = [*kept, *itertools.compress(scored, spread)]
            dropped += itertools.compress(scored, ~spread)
            rounds, num_sampled, errors = rounds + 1, num_sampled + len(groups), errors + rewards.errors
            reward_sum += float(rewards.rewards.mean()) * len(groups)
        if not kept:
            raise NoSpreadError(_explain(dropped, rounds))
        num_missing = max(0, self._num_groups - len(kept))
        if num_missing:
            logger.warning(
                "WARNING: %d rounds gave %d of %d groups with any spread of rewards; %d without fill the batch.",
                rounds, len(kept), self._num_groups, num_missing,
            )  # fmt: skip
        filling, dropped = dropped[:num_missing], dropped[num_missing:]
        batch, self._surplus = kept[: self._num_groups], kept[self._num_groups :]
        groups, rewards = _joined([*batch, *filling])
        metrics: Metrics = {
            "dynamic/num_rounds": rounds,
            "dynamic/num_carried": num_carried,
            "dynamic/num_sampled": num_sampled,
            "dynamic/num_no_spread": len(dropped) + num_missing,
            "dynamic/num_filled": num_missing,
            "dynamic/num_kept": len(self._surplus),
        }
        if num_sampled:
            metrics["dynamic/reward_mean"] = reward_sum / num_sampled
        rewards = dataclasses.replace(rewards, errors=errors)
        return DynamicBatch(groups, rewards, _joined(dropped), metrics)

    def state(self) -> list[dict[str, Any]]:
        """The groups left over, as JSON can hold them: later weights would not sample them again."""
        return [_to_json(scored) for scored in self._surplus]

    def restore(self, state: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> None:
        """Takes back what `state` returned.

        Args: prompts: of the training data, among them those of the groups.
        """
        if state:
            by_id = {(prompt.prompt_id, prompt.token_ids): prompt for prompt in prompts}
            self._surplus = [_from_json(entry, by_id) for entry in state]


def _joined(scored: Sequence[_ScoredGroup]) -> Scored:
    if not scored:
        empty = np.zeros((0, 0), np.float32)
        return [], RewardResult(empty, empty, empty, {}, ())
    return [s.group for s in scored], RewardResult.join([s.rewards for s in scored])


def _explain(dropped: Sequence[_ScoredGroup], rounds: int) -> str:
    """Shows two of the groups: one look often tells what the reward function does not like."""
    lines = [
        f"dynamic sampling found no group with any spread of rewards: {len(dropped)} groups in {rounds} rounds "
        "(algorithm.dynamic_sampling_rounds) all have equal rewards. Two of them:"
    ]
    for scored in dropped[:2]:
        prompt, completions = scored.group.prompt, scored.group.completions
        lines.append(f"  prompt:       {_one_line(prompt.text)}")
        lines.append(f"  ground truth: {_one_line(prompt.ground_truth)}")
        lines += [
            f"  reward {reward:g}: {_one_line(completion.text)}"
            for completion, reward in zip(completions[:2], scored.rewards.unshaped[0], strict=False)
        ]
    return "\n".join(lines)


def _one_line(text: str, limit: int = 200) -> str:
    text = " ".join(text.split()) or "(empty)"
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
            }
            for c in group.completions
        ],
        "rewards": rewards.rewards.tolist(),
        "unshaped": rewards.unshaped.tolist(),
        "correctness": rewards.correctness.tolist(),
        "parts": {name: values.tolist() for name, values in rewards.parts.items()},
    }


def _from_json(entry: dict[str, Any], prompts: dict[tuple[str, tuple[int, ...]], Prompt]) -> _ScoredGroup:
    completions = tuple(
        Completion(
            **c | {"token_ids": tuple(c["token_ids"]), "sampler_logprobs": tuple(c["sampler_logprobs"])}
        )
        for c in entry["completions"]
    )
    prompt = prompts[entry["prompt_id"], tuple(entry["prompt_token_ids"])]
    # float32 -> float64 -> text -> float32 gives the same bits back.
    values = {name: np.array(entry[name], np.float32) for name in ("rewards", "unshaped", "correctness")}
    parts = {name: np.array(value, np.float32) for name, value in entry["parts"].items()}
    return _ScoredGroup(RolloutGroup(prompt, completions), RewardResult(**values, parts=parts, errors=()))
