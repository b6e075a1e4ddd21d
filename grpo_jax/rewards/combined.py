"""The reward of a run: several functions with weights, and a penalty for completions that are too long."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from grpo_jax.rewards.base import Reward, RewardResult
from grpo_jax.types import Completion, Prompt, RolloutGroup


@dataclasses.dataclass(frozen=True)
class Part:
    """One function of the sum."""

    name: str
    """As in the metric reward/NAME/mean."""
    weight: float
    reward: Reward


@dataclasses.dataclass(frozen=True)
class LengthPenalty:
    """The soft overlong punishment of DAPO, arXiv:2503.14476 (13): 0 up to the buffer, then falling linearly.

        R = -penalty * clip((length - (limit - buffer)) / buffer, 0, 1)

    The paper has -1 beyond the limit, where completions are cut here: one of exactly that length gets it.
    """

    NAME: ClassVar[str] = "overlong"

    limit: int
    """Tokens at which completions are cut."""
    buffer: int
    """Tokens, from 1 to `limit`."""
    penalty: float
    """>= 0."""

    def of_lengths(self, lengths: np.ndarray) -> np.ndarray:
        """Returns the penalty of completions with so many tokens: float32 <= 0, of the same shape."""
        excess = (lengths - (self.limit - self.buffer)) / self.buffer
        return (-self.penalty * np.clip(excess, 0.0, 1.0)).astype(np.float32)


class CombinedReward(Reward):
    """sum of weight * function, and the length penalty if there is one. Owns its parts.

    The first part decides what counts as correct.
    """

    def __init__(self, parts: Sequence[Part], penalty: LengthPenalty | None):
        self._parts, self._penalty = parts, penalty

    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        results = [part.reward.score(groups) for part in self._parts]
        values = {part.name: result.rewards for part, result in zip(self._parts, results, strict=True)}
        total = sum(np.float32(part.weight) * values[part.name] for part in self._parts)
        rewards = unshaped = np.asarray(total, np.float32)
        if self._penalty is not None:
            lengths = np.array([[len(c.token_ids) for c in group.completions] for group in groups])
            values[LengthPenalty.NAME] = self._penalty.of_lengths(lengths)
            rewards = unshaped + values[LengthPenalty.NAME]
        return RewardResult(
            rewards=rewards,
            unshaped=unshaped,
            correctness=results[0].rewards,
            parts=values,
            errors=tuple(error for result in results for error in result.errors),
        )

    def explain(self, prompt: Prompt, completion: Completion, reward: float) -> str:
        if len(self._parts) == 1 and self._penalty is None and self._parts[0].weight == 1:
            return self._parts[0].reward.explain(prompt, completion, reward)
        parts = self.score([RolloutGroup(prompt, (completion,))]).parts
        said = [
            f"{part.name} {float(parts[part.name][0, 0]):g} times {part.weight:g} "
            f"({part.reward.explain(prompt, completion, float(parts[part.name][0, 0]))})"
            for part in self._parts
        ]
        if self._penalty is not None:
            said.append(f"{LengthPenalty.NAME} {float(parts[LengthPenalty.NAME][0, 0]):g}")
        return ", ".join(said)

    def close(self) -> None:
        for part in self._parts:
            part.reward.close()
