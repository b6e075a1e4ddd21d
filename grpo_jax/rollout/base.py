"""The rollout engine as the trainer sees it, and how completions are drawn.

Imports nothing heavy: the engine's own processes, perhaps without JAX, import this file too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from grpo_jax.config.text import printable

if TYPE_CHECKING:
    from grpo_jax.config import Config
    from grpo_jax.types import Params, Prompt, RolloutGroup


class Finding(NamedTuple):
    """One thing that was looked at, to see whether an engine can run here."""

    name: str
    is_ok: bool
    found: str
    mend: str = ""
    """The command or the change that mends it; "" where it is ok."""


class EngineError(RuntimeError):
    """The rollout engine cannot go on; the message says why and what may help."""


LONGEST_ERROR = 2000
"""Characters that are printed of an error of a reward."""


def derive_seed(seed: int, number: int, purpose: str) -> int:
    """A seed below 2**31 for each number (of a step, or of a batch) and purpose."""
    words = [seed, number, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF


def one_line(text: str, limit: int = 200) -> str:
    """A text for a message: on one line, cut to `limit` characters, with signs for hidden characters."""
    text = printable(" ".join(text.split())) or shown_empty(text)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown_empty(text: str) -> str:
    """What stands for a text in which nothing can be seen."""
    return f"(only {len(text)} characters of white space)" if text else "(empty)"


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

    @property
    def is_cut(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.top_p < 1 or self.top_k > 0


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


class PendingGroups(Protocol):
    """Completions that an engine was asked for."""

    def __call__(self) -> list[RolloutGroup]:
        """Waits for the groups and returns them in the order of the prompts. Call it once."""

    def finished(self) -> dict[int, RolloutGroup]:
        """The groups that have come back so far, by the number of their prompt. Waits for nothing."""


class RolloutEngine(Protocol):
    """Holds one version of the policy's weights and samples from it. `close` it at the end."""

    def load_weights(self, params: Params, version: int) -> None:
        """Takes the policy's parameters; later completions are stamped with `version`.

        The arrays must be alive whenever rollouts are awaited: a restarted engine is sent them again.
        """

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        finished: Mapping[int, RolloutGroup] = {},
        progress: str = "",
    ) -> PendingGroups:
        """Starts to complete each prompt `sampling.num_samples` times, at once or when the result is called.

        Args:
            seed: the same weights, prompts and seed give the same completions.
            finished: groups that are there already, by the number of their prompt; only the others are sampled.
            progress: label of a progress bar; "" shows none.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """Submits the prompts and waits for their groups."""

    def score(self, groups: Sequence[RolloutGroup], *, temperature: float) -> list[np.ndarray]:
        """Log-probabilities of given completions, each read at once, without top-p and top-k.

        Returns: for each completion, in order, one float32 a token.
        Raises: EngineError: the engine cannot score, or not at this temperature.
        """

    def sleep(self) -> None:
        """Frees the memory that the engine does not need until the next `load_weights`, where it can.

        Waits for an engine that is still starting, if it has memory to free.
        """

    def close(self) -> None:
        """Ends the engine's processes."""
