"""What the trainer asks of a rollout engine. Imports nothing heavy: the engine's own processes read it too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from grpo_jax.config import Config
    from grpo_jax.types import Params, Prompt, RolloutGroup


class EngineError(RuntimeError):
    """The rollout engine cannot go on; the message says why and what may help."""


@dataclasses.dataclass(frozen=True)
class SamplingParams:
    """How completions are drawn. Hashable: an engine may compile for it."""

    num_samples: int
    """G, completions a prompt."""
    temperature: float
    """Divides the logits; 0 takes the most likely token."""
    max_tokens: int
    """A completion is cut after so many tokens."""
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""


def rollout_sampling(config: Config) -> SamplingParams:
    """How training completions are drawn."""
    return SamplingParams(
        num_samples=config.algorithm.group_size,
        temperature=config.rollout.temperature,
        max_tokens=config.data.max_response_length,
        top_p=config.rollout.top_p,
        top_k=config.rollout.top_k,
    )


def eval_sampling(config: Config) -> SamplingParams:
    """How validation completions are drawn."""
    return SamplingParams(config.eval.num_samples, config.eval.temperature, config.data.max_response_length)


class RolloutEngine(Protocol):
    """Holds one version of the policy's weights and samples from it. `close` it at the end."""

    def load_weights(self, params: Params, version: int) -> None:
        """Takes the policy's parameters; later completions are stamped with `version`.

        The arrays must stay alive until the next call, except while rollouts that were submitted are not asked
        for: an engine that has to be restarted gets them again.
        """

    def submit(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> Callable[[], list[RolloutGroup]]:
        """Begins to complete each prompt `sampling.num_samples` times, where the engine can do so by itself.

        Args:
            seed: the same weights, prompts and seed give the same completions.
            progress: label of a progress bar; "" shows none.

        Returns:
            A function that waits for the groups and returns them in the order of `prompts`; to be called once.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """`submit`, and waits."""

    def sleep(self) -> None:
        """Gives up what memory the engine can do without until the next `load_weights`.

        Waits for an engine that is still starting, if it would give up anything.
        """

    def close(self) -> None:
        """Ends the engine's processes."""
