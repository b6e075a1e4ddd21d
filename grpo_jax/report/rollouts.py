"""The saved rollouts of a step, as groups: from its Parquet file, or without tokens from its lines of JSON."""

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from grpo_jax.config import ConfigError
from grpo_jax.run.workdir import Workdir

TOKEN_COLUMNS = (
    *("token_ids", "sampler_logprobs", "trainer_logprobs", "old_logprobs", "logprobs", "ref_logprobs"),
    *("token_advantages", "is_clipped", "weighs", "token_versions"),
)
Completion = dict[str, Any]
"""Column -> value; a list a token where it is one of `TOKEN_COLUMNS`."""


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
        return sum(len(c["token_ids"]) for c in self.completions if c.get("token_ids"))

    @property
    def mismatch(self) -> float:
        """The largest difference between trainer's and sampler's log-probability of a token."""
        return max(map(mismatch, self.completions))


@dataclasses.dataclass(frozen=True)
class SavedStep:
    """The rollouts of a step."""

    step: int
    groups: list[Group]
    texts: dict[int, str]
    """Token id -> what it stands for; {} without the tokenizer."""
    notes: list[str]
    """What is missing, a line each."""


def mismatch(completion: Completion) -> float:
    """The largest |log p_trainer - log p_sampler| of a completion's tokens, 0 where it is not known."""
    ours, theirs = completion.get("trainer_logprobs"), completion.get("sampler_logprobs")
    pairs = zip(ours or [], theirs or [], strict=False)
    gaps = [abs(a - b) for a, b in pairs if a is not None and b is not None]
    return max((gap for gap in gaps if math.isfinite(gap)), default=0.0)


def read_step(workdir: Workdir, step: int) -> SavedStep:
    """Reads the rollouts of a step.

    Raises: ConfigError: there are none, or nothing of them can be read.
    """
    notes: list[str] = []
    rows = _read_parquet(files_of(workdir, step)[0], notes)
    if rows is None:
        rows = _read_jsonl(files_of(workdir, step)[1], notes)
    if not rows:
        why = "; ".join(notes) or f"{workdir.rollouts} has none"
        raise ConfigError("--step", step, f"there are no rollouts of it to be read: {why}")
    keyed = itertools.groupby(rows, key=lambda row: (row.get("is_dropped", False), row["group"]))
    groups = [Group(number, list(each)) for number, (_, each) in enumerate(keyed)]
    used = {i for group in groups for c in group.completions for i in c.get("token_ids") or ()}
    return SavedStep(step, groups, _texts(workdir, used, notes), notes)


def files_of(workdir: Workdir, step: int) -> tuple[Path, Path]:
    """(Parquet, JSON lines) of a step, whether they are there or not."""
    base = workdir.rollouts / f"step-{step:06d}"
    return base.with_suffix(".parquet"), base.with_suffix(".jsonl")


def _read_parquet(path: Path, notes: list[str]) -> list[Completion] | None:
    if not path.exists():
        notes.append(f"{path.name} is missing: there are no tokens to show")
        return None
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({type(error).__name__}): there are no tokens to show")
        return None
    return rows if rows and {"group", "token_ids"} <= rows[0].keys() else None


def _read_jsonl(path: Path, notes: list[str]) -> list[Completion]:
    """The records, those of neighbours with the same prompt as one group."""
    rows, num_damaged, last, number = [], 0, None, -1
    for text in path.read_text(errors="replace").split("\n") if path.is_file() else []:
        try:
            row = json.loads(text) if text else None
            if row is None:
                continue
            key = (row["prompt_id"], row.get("is_dropped", False))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            num_damaged += 1
            continue
        number, last = (number, last) if key == last else (number + 1, key)
        rows.append({"group": number, **row})
    if num_damaged:
        notes.append(f"{path.name}: {num_damaged} damaged lines left out")
    return rows


def _texts(workdir: Workdir, ids: set[int], notes: list[str]) -> dict[int, str]:
    """What each token id stands for, by the tokenizer of the run's model."""
    if not ids:
        return {}
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(workdir.model_files / "tokenizer.json"))
    except Exception as error:  # its own, and none but the base class
        notes.append(f"the tokenizer in model_files cannot be read ({type(error).__name__}): ids are shown")
        return {}
    return {i: tokenizer.decode([i], skip_special_tokens=False) for i in sorted(ids)}


def repeats(completion: Completion) -> bool:
    return bool(completion.get("repeats"))


def is_all_wrong(group: Sequence[Completion]) -> bool:
    """Whether no completion of a group is correct, as far as the file tells; else, whether all rewards are 0."""
    return not any(c.get("is_correct", c.get("reward", 0) > 0) for c in group)
