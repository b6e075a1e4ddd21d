"""The reward of a run: several functions with weights, and a penalty for completions that are too long."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from grpo_jax.rewards.base import Reward, RewardError, RewardResult
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

    The first part decides what counts as correct. A sum that float32 cannot hold is an error like those of a
    function: finite rewards times finite weights need not be finite.

    Args: on_error: "stop" or "zero", as `reward.on_error`.
    """

    def __init__(self, parts: Sequence[Part], penalty: LengthPenalty | None, *, on_error: str):
        self._parts, self._penalty, self._on_error = parts, penalty, on_error

    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        results = [part.reward.score(groups) for part in self._parts]
        values = {part.name: result.rewards for part, result in zip(self._parts, results, strict=True)}
        with np.errstate(over="ignore", invalid="ignore"):
            total = sum(np.float32(part.weight) * values[part.name] for part in self._parts)
            rewards = unshaped = np.asarray(total, np.float32)
            if self._penalty is not None:
                lengths = np.array([[len(c.token_ids) for c in group.completions] for group in groups])
                values[LengthPenalty.NAME] = self._penalty.of_lengths(lengths)
                rewards = unshaped + values[LengthPenalty.NAME]
        too_large = ~(np.isfinite(rewards) & np.isfinite(unshaped))
        errors = [error for result in results for error in result.errors]
        errors += self._name(groups, too_large)
        return RewardResult(
            rewards=np.where(too_large, np.float32(0), rewards),
            unshaped=np.where(too_large, np.float32(0), unshaped),
            correctness=results[0].rewards,
            parts=values,
            errors=tuple(errors),
        )

    def _name(self, groups: Sequence[RolloutGroup], too_large: np.ndarray) -> list[str]:
        """Returns a line for each completion whose sum is too large. Raises: RewardError: it stops the run."""
        lines = [
            f"prompt {groups[row].prompt.prompt_id}, completion {column}: the sum of its rewards, times their "
            "weights, is no finite float32"
            for row, column in np.argwhere(too_large)
        ]
        if lines and self._on_error == "stop":
            raise RewardError(lines[0])
        return lines

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
