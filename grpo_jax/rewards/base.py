"""What a reward is: the function that a user writes, and the object that scores a step's completions."""

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from grpo_jax.types import Completion, Prompt, RewardResult, RolloutGroup

CORRECT_REWARD = 1.0
"""A completion counts as correct, in `accuracy`, from this reward of the first function on."""


class RewardFunction(Protocol):
    """verl's `compute_score`: called with keyword arguments, for one completion at a time."""

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
    ) -> float | Mapping[str, Any]:
        """Returns the reward, or a mapping that has it under "score" (the rest is not read)."""
        ...


class RewardError(RuntimeError):
    """A reward function failed; the message names the prompt, the completion and what happened."""


class Reward(abc.ABC):
    """Scores completions. Close it when done, or use it as a context manager."""

    @abc.abstractmethod
    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        """Returns the reward of every completion.

        Args:
            groups: P groups of G completions each.

        Raises:
            RewardError: a function failed, and failures are to stop the run.
        """

    @abc.abstractmethod
    def explain(self, prompt: Prompt, completion: Completion, reward: float) -> str:
        """Says in a few words why `completion` got `reward`."""

    def close(self) -> None:  # noqa: B027  an inline reward holds nothing
        """Gives back what the reward holds; calling it twice does no harm."""

    def __enter__(self) -> "Reward":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class InlineReward(Reward):
    """Calls a function in this process: for our own rules, which are quick and cannot fail."""

    def __init__(self, compute_score: RewardFunction, explain: Callable[[str, str], str]):
        self._compute_score, self._explain = compute_score, explain

    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        rewards = [
            [self._compute_score(**arguments(group.prompt, completion)) for completion in group.completions]
            for group in groups
        ]
        return RewardResult.of_one(np.array(rewards, np.float32), errors=())

    def explain(self, prompt: Prompt, completion: Completion, reward: float) -> str:
        return self._explain(completion.text, prompt.ground_truth)


def arguments(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """Returns the keyword arguments of a `RewardFunction`."""
    return {
        "data_source": prompt.data_source,
        "solution_str": completion.text,
        "ground_truth": prompt.ground_truth,
        "extra_info": prompt.extra_info,
    }
