"""What a reward is: the function that a user writes, and the object that scores a step's completions."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from grpo_jax.types import Completion, Prompt, RolloutGroup


class RewardFunction(Protocol):
    """verl's `compute_score`: called with keyword arguments, for one completion at a time."""

    def __call__(
        self, *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
    ) -> float | Mapping[str, Any]:
        """Returns the reward, or a mapping that has it under "score" (the rest is not read)."""
        ...


class RewardError(RuntimeError):
    """A reward function failed; the message names the prompt, the completion and what happened."""


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """The rewards of some groups; arrays are [P, G] float32, finite."""

    rewards: np.ndarray
    """What is trained on."""
    unshaped: np.ndarray
    """The same without the length penalty."""
    correctness: np.ndarray
    """Of the first function alone: a completion is correct from 1 on."""
    parts: Mapping[str, np.ndarray]
    """What each function gave, and the length penalty, by name; not yet weighted."""
    errors: tuple[str, ...]
    """One line for each completion whose function failed, and gave 0 therefore."""

    @classmethod
    def of_one(cls, rewards: np.ndarray, errors: tuple[str, ...]) -> "RewardResult":
        """The result of a single function."""
        return cls(rewards, rewards, rewards, {}, errors)

    def take(self, groups: Sequence[int]) -> "RewardResult":
        """Returns the rewards of some of the groups; the errors stay behind."""
        index = list(groups)
        return RewardResult(
            self.rewards[index],
            self.unshaped[index],
            self.correctness[index],
            {name: values[index] for name, values in self.parts.items()},
            (),
        )

    @classmethod
    def join(cls, results: Sequence["RewardResult"]) -> "RewardResult":
        """Puts the groups of several results one after the other."""
        return cls(
            np.concatenate([r.rewards for r in results]),
            np.concatenate([r.unshaped for r in results]),
            np.concatenate([r.correctness for r in results]),
            {name: np.concatenate([r.parts[name] for r in results]) for name in results[0].parts},
            tuple(error for r in results for error in r.errors),
        )


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
