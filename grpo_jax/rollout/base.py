"""What the trainer asks of a rollout engine."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

from grpo_jax.config import Config
from grpo_jax.types import Params, Prompt, RolloutGroup


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
    """Holds one version of the policy's weights and samples from it."""

    def load_weights(self, params: Params, version: int) -> None:
        """Takes the policy's parameters; later completions are stamped with `version`."""

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """Completes each prompt `sampling.num_samples` times, in the order of `prompts`.

        Args:
            seed: the same weights, prompts and seed give the same completions.
            progress: label of a progress bar; "" shows none.
        """
