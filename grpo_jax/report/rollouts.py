"""The saved rollouts of a step, as groups: from its Parquet file, or without tokens from its lines of JSON."""

import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from grpo_jax.config import ConfigError
from grpo_jax.report.read import damage_note, saved_steps
from grpo_jax.run.workdir import Workdir

TOKEN_COLUMNS = (
    *("token_ids", "sampler_logprobs", "trainer_logprobs", "old_logprobs", "logprobs", "ref_logprobs"),
    *("token_advantages", "is_clipped", "weighs", "token_versions"),
)
MOST_STEPS = 20
"""That are named one by one."""
Completion = dict[str, Any]
"""Column -> value; [n] numpy, an element a token, where it is one of `TOKEN_COLUMNS`."""


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt with its completions."""

    number: int
    """In the step, from 0."""
    completions: list[Completion]

    @property
    def prompt(self) -> str:
        return str(self.completions[0].get("prompt", ""))

    @property
    def num_tokens(self) -> int:
        return sum(map(num_tokens, self.completions))

    @property
    def mismatch(self) -> float | None:
        """The largest difference between trainer's and sampler's log-probability of a token; None: not known."""
        known = [gap for c in self.completions if (gap := mismatch(c)) is not None]
        return max(known, default=None)


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """The rollouts of a step."""

    step: int
    groups: list[Group]
    texts: dict[int, str]
    """Token id -> what it stands for; {} without the tokenizer."""
    notes: list[str]
    """What is missing, a line each."""

    @property
    def has_tokens(self) -> bool:
        """Whether the tokens of any completion are known."""
        return any(group.num_tokens for group in self.groups)


def has(completion: Completion, name: str) -> bool:
    """Whether a completion has values of its tokens in a column."""
    values = completion.get(name)
    return values is not None and len(values) > 0


def num_tokens(completion: Completion) -> int:
    """Tokens of a completion whose tokens are known, else 0."""
    return len(completion["token_ids"]) if has(completion, "token_ids") else 0


def length(completion: Completion) -> int:
    """Tokens of a completion, be they known or only counted."""
    return num_tokens(completion) or int(completion.get("num_tokens", 0))


def num_clipped(completion: Completion) -> int:
    """Its tokens that were clipped."""
    return int(np.sum(completion["is_clipped"])) if has(completion, "is_clipped") else 0


def mismatch(completion: Completion) -> float | None:
    """The largest |log p_trainer - log p_sampler| of a completion's tokens, None where it is not known."""
    if not (has(completion, "trainer_logprobs") and has(completion, "sampler_logprobs")):
        return None
    gaps = np.abs(completion["trainer_logprobs"] - completion["sampler_logprobs"])
    return float(np.max(gaps, initial=0.0, where=np.isfinite(gaps)))


def read_step(workdir: Workdir, step: int) -> SavedStep:
    """Reads the rollouts of a step.

    Raises: ConfigError: there are none, or nothing of them can be read.
    """
    notes: list[str] = []
    rows = _read_parquet(files_of(workdir, step)[0], notes)
    if not rows:
        rows = _read_jsonl(files_of(workdir, step)[1], notes)
    if not rows:
        steps = saved_steps(workdir)
        why = f"saved are those of {in_short(steps)}" if steps else "none are saved (logging.save_rollouts)"
        why = "; ".join(notes) if step in steps else why
        raise ConfigError("--step", step, f"there are no rollouts of it to be read: {why}")
    keyed = itertools.groupby(rows, key=lambda row: (row.get("is_dropped", False), row["group"]))
    groups = [Group(number, list(each)) for number, (_, each) in enumerate(keyed)]
    ids = [c["token_ids"] for c in rows if has(c, "token_ids")]
    used = np.unique(np.concatenate(ids)).tolist() if ids else []
    return SavedStep(step, groups, _texts(workdir, used, notes), notes)


def in_short(steps: Sequence[int]) -> str:
    """Steps in words: all of a few, or the first, the last and how many."""
    if len(steps) <= MOST_STEPS:
        return f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def files_of(workdir: Workdir, step: int) -> tuple[Path, Path]:
    """(Parquet, JSON lines) of a step, whether they are there or not."""
    base = workdir.rollouts / f"step-{step:06d}"
    return base.with_suffix(".parquet"), base.with_suffix(".jsonl")


def _read_parquet(path: Path, notes: list[str]) -> list[Completion] | None:
    if not path.exists():
        notes.append(f"{path.name} is missing: there are no tokens to show")
        return None
    try:
        return _rows(pq.read_table(path))
    except (OSError, ValueError, TypeError, KeyError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}): there are no tokens to show")
        return None


def _rows(table: pa.Table) -> list[Completion]:
    """The rows of a table; what its tokens have as arrays, since Python takes seconds for as many numbers."""
    lists = [name for name in TOKEN_COLUMNS if name in table.column_names]
    rows = table.drop_columns(lists).to_pylist()
    for name in lists:
        column = table.column(name).combine_chunks()
        ends, is_there = column.offsets.to_numpy(), column.is_valid().to_numpy(zero_copy_only=False)
        values = column.values.to_numpy(zero_copy_only=False)
        for i, row in enumerate(rows):
            row[name] = values[ends[i] : ends[i + 1]] if is_there[i] else None
    return rows if rows and {"group", "token_ids"} <= rows[0].keys() else []


def _read_jsonl(path: Path, notes: list[str]) -> list[Completion]:
    """The records, those of neighbours with the same prompt as one group."""
    damaged: list[int] = []
    rows, last, number = [], None, -1
    for place, text in enumerate(path.read_text(errors="replace").split("\n") if path.is_file() else [], 1):
        try:
            row = json.loads(text) if text else None
            if row is None:
                continue
            key = (row["prompt_id"], row.get("is_dropped", False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            damaged.append(place)
            continue
        number, last = (number, last) if key == last else (number + 1, key)
        rows.append({"group": number, **row})
    notes += damage_note(path.name, damaged)
    return rows


def _texts(workdir: Workdir, ids: Sequence[int], notes: list[str]) -> dict[int, str]:
    """What each token id stands for, by the tokenizer of the run's model."""
    if not ids:
        return {}
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(workdir.model_files / "tokenizer.json"))
    except Exception as error:  # its own, and none but the base class
        notes.append(f"the tokenizer in model_files cannot be read ({type(error).__name__}): ids are shown")
        return {}
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in ids}


def is_all_wrong(group: Sequence[Completion]) -> bool:
    """Whether no completion of a group is correct, as far as the file tells; else, whether all rewards are 0."""
    return not any(c.get("is_correct", c.get("reward", 0) > 0) for c in group)
