"""Every token of a step's completions, in Parquet: how likely it was, by which weights, how hard it was pushed.

A row is a completion, in the order of the lines of rollouts/step-NNNNNN.jsonl. Lists have an element a token;
those of the trainer are null where nothing was trained (`is_dropped`). docs/run_page.md says what each column is.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grpo_jax.rollout.base import derive_seed
from grpo_jax.run.metrics import ends_in_loop
from grpo_jax.storage.files import temporary_beside
from grpo_jax.types import Completion, ScoredBatch, StepResult, TokenValues

TRAINER_COLUMNS = {
    "trainer_logprobs": "trainer_logprobs",
    "old_logprobs": "old_logprobs",
    "logprobs": "logprobs",
    "ref_logprobs": "ref_logprobs",
    "token_advantages": "advantages",
    "is_clipped": "is_clipped",
    "weighs": "weighs",
}
"""Column -> field of `TokenValues`."""


def write_tokens(path: Path, result: StepResult, seed: int) -> None:
    """Writes the file of a step. Args: seed: `trainer.seed`.

    It is there whole or not at all; it is not waited for until it is on the disk.
    """
    tables = [_table(result.rollouts, result.tokens, seed, is_dropped=False)]
    if result.rollouts.dropped is not None:
        tables.append(_table(result.rollouts.dropped, None, seed, is_dropped=True))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        pq.write_table(pa.concat_tables(tables, promote_options="default"), temporary, compression="zstd")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _table(batch: ScoredBatch, values: TokenValues | None, seed: int, *, is_dropped: bool) -> pa.Table:
    group_size = len(batch.groups[0].completions)
    completions = [c for group in batch.groups for c in group.completions]
    of_prompts = lambda get: [get(group) for group in batch.groups for _ in range(group_size)]
    batches = [group.origin[0] if group.origin else -1 for group in batch.groups]
    seeds = {n: derive_seed(seed, n, "rollout") for n in set(batches) if n >= 0}
    rewards = batch.rewards
    parts = {f"reward/{name}": part.ravel().astype(np.float32) for name, part in rewards.parts.items()}
    columns: dict[str, Any] = {
        "group": np.repeat(np.arange(len(batch.groups), dtype=np.int32), group_size),
        "sample": np.tile(np.arange(group_size, dtype=np.int32), len(batch.groups)),
        "prompt_id": of_prompts(lambda group: _clean(group.prompt.prompt_id)),
        "prompt": of_prompts(lambda group: _clean(group.prompt.text)),
        "ground_truth": of_prompts(lambda group: _clean(group.prompt.ground_truth)),
        "completion": [_clean(c.text) for c in completions],
        "reward": rewards.rewards.ravel().astype(np.float32),
        **parts,
        "is_correct": rewards.correctness.ravel() >= 1,
        "finish_reason": [c.finish_reason for c in completions],
        "repeats": [ends_in_loop(c.token_ids) for c in completions],
        "seed": pa.array([seeds.get(n) for n in batches for _ in range(group_size)], pa.int64()),
        "policy_version": np.array([c.policy_version for c in completions], np.int32),
        "is_dropped": np.full(len(completions), is_dropped),
        "token_ids": _lists(completions, [c.token_ids for c in completions], np.int32),
        "sampler_logprobs": _lists(completions, [c.sampler_logprobs for c in completions], np.float32),
        "token_versions": _lists(completions, [c.token_versions for c in completions], np.int32),
    }
    if values is not None:
        columns |= _of_trainer(batch, completions, values)
    return pa.table(columns)


def _of_trainer(
    batch: ScoredBatch, completions: Sequence[Completion], values: TokenValues
) -> dict[str, pa.Array]:
    """The columns of what the trainer computed: the elements of its rows that are tokens of the completions."""
    first = np.array([len(group.prompt.token_ids) for group in batch.groups for _ in group.completions])
    lengths = np.array([len(c.token_ids) for c in completions])
    column = np.arange(values.logprobs.shape[1])
    is_token = (column >= first[:, None]) & (column < (first + lengths)[:, None])
    fields = {name: getattr(values, field) for name, field in TRAINER_COLUMNS.items()}
    return {name: _as_lists(lengths, field[is_token]) for name, field in fields.items() if field is not None}


def _lists(completions: Sequence[Completion], values: Sequence[Any], dtype: Any) -> pa.Array:
    lengths = np.array([len(c.token_ids) for c in completions])
    return _as_lists(lengths, np.concatenate([np.asarray(each, dtype) for each in values]))


def _as_lists(lengths: np.ndarray, flat: np.ndarray) -> pa.Array:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat))


def _clean(text: str) -> str:
    """Text that Parquet can hold: half characters become question marks."""
    return text.encode("utf-8", "replace").decode()
