"""Accuracy and pass@k of completions, with the engine and the rewards of training; and completions as records."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.rewards.base import CORRECT_REWARD, Reward
from grpo_jax.rollout.base import RolloutEngine, SamplingParams
from grpo_jax.types import Metrics, Prompt, RolloutGroup


@dataclasses.dataclass(frozen=True)
class Evaluation:
    groups: list[RolloutGroup]
    rewards: np.ndarray
    """[P, G] float32."""
    correctness: np.ndarray
    """[P, G] float32; what `rewards.base.CORRECT_REWARD` is compared with."""
    errors: tuple[str, ...]
    """Of the reward function, where it may go on after one."""

    @property
    def accuracy(self) -> float:
        """Share of the completions that are correct."""
        return float((self.correctness >= CORRECT_REWARD).mean())

    def pass_at(self, k: int) -> float:
        """Mean over prompts of the estimated chance that one of k completions is correct."""
        samples = self.rewards.shape[1]
        counts = (self.correctness >= CORRECT_REWARD).sum(axis=1)
        return float(np.mean([pass_at_k(samples, int(c), k) for c in counts]))

    def summary(self) -> Metrics:
        """accuracy, num, and pass@k for k = 1, 2, 4, ... up to the number of samples, where there are several."""
        samples = self.rewards.shape[1]
        ks = [2**i for i in range(int(math.log2(samples)) + 1)] if samples > 1 else []
        passes = {f"pass@{k}": self.pass_at(k) for k in ks}
        return {"accuracy": self.accuracy, "num": len(self.rewards), **passes}

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a completion, in order."""
        return rollout_records(self.groups, self.rewards)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k out of n samples, c of them correct, is correct.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv:2107.03374 (1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: SamplingParams,
    *,
    seed: int,
    progress: str,
) -> Evaluation:
    """Completes the prompts with the engine's current weights and scores the completions."""
    groups = engine.generate(prompts, sampling, seed=seed, progress=progress)
    result = reward.score(groups)
    return Evaluation(groups, result.rewards, result.correctness, result.errors)


def rollout_records(groups: Sequence[RolloutGroup], rewards: np.ndarray) -> list[dict[str, Any]]:
    """One dictionary a completion, in order, for files."""
    return [
        {
            "prompt_id": group.prompt.prompt_id,
            "prompt": group.prompt.text,
            "ground_truth": group.prompt.ground_truth,
            "completion": completion.text,
            "reward": float(rewards[p, g]),
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "policy_version": completion.policy_version,
        }
        for p, group in enumerate(groups)
        for g, completion in enumerate(group.completions)
    ]


LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}
"""What JSON allows within a text as it is, and many readers take for the end of a line."""


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Writes one line of JSON a record, which is one line to every reader."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record, ensure_ascii=False).translate(LINE_ENDS) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records that `write_jsonl` wrote.

    Raises: ValueError: a line is not JSON.
    """
    # No `splitlines`: older versions wrote the characters of `LINE_ENDS` as they are.
    return [json.loads(line) for line in path.read_text().split("\n") if line]
