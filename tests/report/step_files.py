"""A saved step with known numbers: two groups of two completions and one that was dropped."""

import dataclasses

import numpy as np

from grpo_jax.run.token_file import write_tokens
from grpo_jax.types import (
    Completion,
    Prompt,
    RewardResult,
    RolloutGroup,
    ScoredBatch,
    StepResult,
    TokenUse,
    TokenValues,
)

SAMPLER = -1.0


def group(number, texts, truth="7"):
    """Completions of three tokens each, all sampled with log-probability -1; the last one by newer weights."""
    prompt = Prompt(f"train/{number}", (10, 11), f"What is {number}?", truth, "s", {})
    make = lambda text: Completion((4, 5, 6), (SAMPLER,) * 3, text, "stop", 2, ((2, 3),))
    return RolloutGroup(prompt, tuple(map(make, texts)), (number, 0))


def rewards(*rows):
    return dataclasses.replace(
        RewardResult.of_one(np.array(rows, np.float32), ()), parts={"format": np.full((len(rows), 2), 0.5)}
    )


def step_result(*, text="#### 7"):
    """The result of a step; the trainer's numbers are multiples of the row's number, so that each is another."""
    groups = [group(0, [text, "#### 8"]), group(1, ["a", "b"])]
    dropped = ScoredBatch([group(2, ["c", "d"])], rewards([0, 0]))
    row = np.arange(4, dtype=np.float32)[:, None]
    at = lambda value: np.where(np.arange(6) < 5, value, np.float32(99)).astype(
        np.float32
    )  # 99 in the padding
    tokens = TokenValues(
        trainer_logprobs=at(-1 - row / 8),
        old_logprobs=at(-1 - row / 8),
        logprobs=at(-1 - row / 8 + np.log(1.5)),
        ref_logprobs=None,
        advantages=at(row - 1.5),
        is_clipped=(at(row) == 3) & (np.arange(6) == 4),
        weighs=at(row) != 0,
    )
    use = TokenUse(np.zeros(4, int), np.full(4, 3))
    batch = ScoredBatch(groups, rewards([1, 0], [0, 0]), dropped)
    return StepResult(batch, use, [], {}, tokens)


def write_step(workdir, step, **options):
    path = workdir / "rollouts" / f"step-{step:06d}.parquet"
    write_tokens(path, step_result(**options), seed=3)
    return path
