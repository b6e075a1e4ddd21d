"""Proves from a run's ledger that each completion was trained once, or left out for a reason that is named.

The ledger is compared with itself, with metrics.jsonl, with the checkpoints, and with the rollouts where those
were written. Every check yields one line for each thing that disagrees.
"""

import collections
import dataclasses
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from grpo_jax.config import ConfigError
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.evaluation import read_jsonl
from grpo_jax.run.ledger import FILE, Entry, walk
from grpo_jax.run.retention import damage_of, saved_steps
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import read_lines

Origin = tuple[int, int]
"""(number of a batch of prompts in the whole run, place in it)"""

METRICS_ATOL = 1e-5
"""Rewards are summed in another order than for metrics.jsonl, in float32."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """What the ledger of a run says, and what is wrong with it."""

    num_steps: int
    num_completions: dict[str, int]
    """Of each fate: "trained", and why others were left out or wait."""
    num_tokens: dict[str, int]
    """Of the trained completions: those that "weigh" in the loss, and those that are "masked"."""
    compared: dict[str, int]
    """What the ledger was compared with, and how many of it."""
    problems: list[str]


def audit(workdir: Workdir) -> Audit:
    """Reads the ledger of a run and checks it.

    Raises: ConfigError: there is no ledger.
    """
    if not (workdir.ledger / FILE).exists():
        raise ConfigError("WORKDIR", str(workdir.path), f"holds no ledger/{FILE}: no run has trained there")
    entries, problems = read_ledger(workdir.ledger / FILE)
    by_step = {entry["step"]: entry for entry in entries}
    if not problems:  # what follows from a line that is damaged is not told once more
        problems += [*check_steps(entries), *check_once(entries)]
    problems += [problem for entry in entries for problem in check_entry(entry)]
    held, damaged = read_lines(workdir.metrics)
    lines = {line["step"]: line for line in held if line["step"] > 0}
    problems += [f"line {number} of metrics.jsonl is damaged" for number in damaged]
    problems += _missing(lines, by_step)
    problems += [p for s, line in lines.items() if s in by_step for p in check_metrics(by_step[s], line)]
    steps = saved_steps(workdir.checkpoints)
    problems += [p for s in steps for p in check_saved(workdir.checkpoints / str(s), by_step.get(s))]
    files = {s: workdir.rollouts / f"step-{s:06d}.jsonl" for s in by_step}
    written = {s: file for s, file in files.items() if file.exists()}
    problems += [p for s, file in written.items() for p in check_rollouts(by_step[s], file)]
    of_tokens = {s: file for s in by_step if (file := workdir.rollouts / f"step-{s:06d}.parquet").exists()}
    problems += [p for s, file in of_tokens.items() for p in check_tokens(by_step[s], file)]
    compared = {
        "lines of metrics.jsonl": len(lines),
        "checkpoints": len(steps),
        "files of rollouts": len(written),
        "files of tokens": len(of_tokens),
    }
    completions, tokens = totals(entries)
    return Audit(len(entries), completions, tokens, compared, problems)


def read_ledger(path: Path) -> tuple[list[Entry], list[str]]:
    """The entries of a ledger, and which of its lines are damaged."""
    with path.open("rb") as file:
        found = [entry for _, entry, _ in walk(file)]
    problems = [
        f"line {number} of ledger/{FILE} is damaged: {entry}"
        for number, entry in enumerate(found, 1)
        if isinstance(entry, ValueError)
    ]
    return [entry for entry in found if isinstance(entry, dict)], problems


def check_steps(entries: list[Entry]) -> Iterator[str]:
    """Every step is there once."""
    for expected, entry in enumerate(entries, 1):
        if entry["step"] != expected:
            yield f"the ledger's line {expected} is that of step {entry['step']}"
            return


def check_once(entries: list[Entry]) -> Iterator[str]:
    """Every group of every batch was trained once, left out once, or waits; each prompt came once an epoch."""
    groups = [group for entry in entries for group in _groups(entry)]
    seen = collections.Counter(origin for origin, _ in groups)
    seen.update(tuple(origin) for entry in entries for origin in entry["lost"])
    kept = {tuple(origin) for origin in entries[-1]["kept"]} if entries else set()
    for origin, times in seen.items():
        if times > 1:
            yield f"{_name(origin)} was trained or left out {times} times"
        if origin in kept:
            yield f"{_name(origin)} was trained or left out, and waits for a later step too"
    first = 0
    for entry in entries:
        for number in range(first, entry["num_batches"]):
            missing = {(number, place) for place in range(entry["batch_size"])} - seen.keys() - kept
            yield from (f"{_name(origin)} was neither trained nor left out" for origin in sorted(missing))
        first = max(first, entry["num_batches"])
    of_epoch = collections.Counter(
        (origin[0] // entry["steps_per_epoch"] + 1, prompt)
        for entry in entries
        for origin, prompt in _groups(entry)
    )
    for (epoch, prompt), times in of_epoch.items():
        if times > 1:
            yield f"prompt {prompt} came {times} times in epoch {epoch}"


def check_entry(entry: Entry) -> Iterator[str]:
    """Seeds, sizes and policy versions within one step."""
    step = entry["step"]
    for kind in ("trained", "no_spread"):
        if entry[kind] is not None:
            yield from (f"step {step}, {kind}: {problem}" for problem in _check_columns(entry[kind], entry))
    for row, num in entry["masked_tokens"].items():
        most = entry["trained"]["tokens"][int(row)]
        if not 0 < num <= most:
            yield f"step {step}: {num} masked tokens of {most} in completion {row}"


def _check_columns(columns: Entry, entry: Entry) -> Iterator[str]:
    num_rows = len(columns["prompt"]) * columns["group_size"]
    for name in ("tokens", "crc", "version", "reward"):
        if len(columns[name]) != num_rows:
            yield f"{len(columns[name])} values of {name}, for {num_rows} completions"
            return
    for number, seed in columns["seeds"].items():
        if seed != derive_seed(entry["seed"], int(number), "rollout"):
            yield f"batch {number} was sampled with seed {seed}, which does not follow from the run's"
    for row in range(num_rows):
        changes = columns["changes"].get(str(row), [])
        starts = [0, *(first for first, _ in changes)]
        versions = [columns["version"][row], *(version for _, version in changes)]
        is_ordered = starts == sorted(set(starts)) and versions == sorted(set(versions))
        is_within = starts[-1] < columns["tokens"][row] and versions[0] >= 0 and versions[-1] < entry["step"]
        if not (is_ordered and is_within):
            yield f"completion {row} has policy versions {versions} from tokens {starts} on"


def check_metrics(entry: Entry, line: dict[str, Any]) -> Iterator[str]:
    """The numbers of metrics.jsonl that follow from the ledger."""
    trained = entry["trained"]
    rewards, tokens = np.array(trained["reward"], np.float32), np.array(trained["tokens"])
    ages = entry["step"] - 1 - _token_versions(trained)
    expected = {
        "reward/mean": rewards.mean(dtype=np.float64),
        "reward/max": rewards.max(),
        "reward/min": rewards.min(),
        "response_length/mean": tokens.mean(),
        "response_length/max": tokens.max(),
        "response_length/min": tokens.min(),
        "training/policy_version": min(trained["version"]),
        "training/token_age_mean": ages.mean(),
        "training/token_age_max": ages.max(),
        "actor/skipped_updates": len(entry["skipped_updates"]) - line.get("actor/overflows", 0),
    }
    for name, value in expected.items():
        held = line.get(name)
        if not isinstance(held, int | float) or abs(held - value) > METRICS_ATOL * max(1, abs(value)):
            yield f"step {entry['step']}: metrics.jsonl has {name} {held}, the ledger {value:.6g}"


def check_saved(checkpoint: Path, entry: Entry | None) -> Iterator[str]:
    """A checkpoint is whole, and goes on where the ledger's step has ended. Args: entry: of that step."""
    step = checkpoint.name
    if damage := damage_of(checkpoint):
        yield f"the checkpoint of step {step} is damaged ({damage})"
    elif entry is None:
        yield f"step {step} is in a checkpoint, and not in the ledger"
    else:
        try:
            progress = json.loads((checkpoint / "progress" / "metadata").read_text())
            yield from check_progress(entry, progress)
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"the progress of checkpoint {step} cannot be read ({type(error).__name__}: {error})"


def check_progress(entry: Entry, progress: Mapping[str, Any]) -> Iterator[str]:
    step = entry["step"]
    if progress["num_rollout_batches"] != entry["num_batches"]:
        held, ours = progress["num_rollout_batches"], entry["num_batches"]
        yield f"the checkpoint of step {step} goes on after {held} batches, the ledger after {ours}"
    kept = [tuple(group["origin"] or ()) for group in progress["surplus"]]
    if kept != [tuple(origin) for origin in entry["kept"]]:
        yield f"the checkpoint of step {step} holds other groups for later steps than the ledger"


def check_rollouts(entry: Entry, file: Path) -> Iterator[str]:
    """The completions that were written are those of the ledger."""
    try:
        records = read_jsonl(file)
        held = [
            (r["prompt_id"], r["num_tokens"], r["policy_version"], np.float32(r["reward"])) for r in records
        ]
    except (ValueError, KeyError, TypeError) as error:
        yield f"step {entry['step']}: {file.name} cannot be read ({type(error).__name__})"
        return
    expected = [
        (prompt, columns["tokens"][row], columns["version"][row], np.float32(columns["reward"][row]))
        for columns in (entry["trained"], entry["no_spread"])
        if columns is not None
        for row, prompt in enumerate(np.repeat(columns["prompt"], columns["group_size"]))
    ]
    if len(held) != len(expected):
        yield f"step {entry['step']}: {file.name} has {len(held)} completions, the ledger {len(expected)}"
    for row, (ours, theirs) in enumerate(zip(held, expected, strict=False)):
        if ours != theirs:
            yield f"step {entry['step']}: completion {row} of {file.name} is {ours}, the ledger's {theirs}"
            return


def check_tokens(entry: Entry, file: Path) -> Iterator[str]:
    """The tokens that were written are those of the ledger, each completion's by its checksum."""
    try:
        held = [np.array(ids, np.int32) for ids in pq.read_table(file, columns=["token_ids"])[0].to_pylist()]
    except (OSError, ValueError, TypeError, IndexError) as error:
        yield f"step {entry['step']}: {file.name} cannot be read ({type(error).__name__})"
        return
    kinds = [columns for columns in (entry["trained"], entry["no_spread"]) if columns is not None]
    expected = [pair for columns in kinds for pair in zip(columns["tokens"], columns["crc"], strict=True)]
    if len(held) != len(expected):
        yield f"step {entry['step']}: {file.name} has {len(held)} completions, the ledger {len(expected)}"
    for row, (ids, (num, crc)) in enumerate(zip(held, expected, strict=False)):
        which = f"step {entry['step']}: completion {row} of {file.name}"
        if len(ids) != num:
            yield f"{which} has {len(ids)} tokens, the ledger's {num}"
            return
        if zlib.crc32(ids.tobytes()) != crc:
            yield f"{which} has other tokens than the ledger's"
            return


def totals(entries: list[Entry]) -> tuple[dict[str, int], dict[str, int]]:
    """How many completions had which fate, and how many tokens of the trained ones weigh."""
    fates: collections.Counter[str] = collections.Counter(trained=0)
    tokens: collections.Counter[str] = collections.Counter()
    for entry in entries:
        trained, left_out = entry["trained"], entry["left_out"]
        num_rows = len(trained["tokens"])
        reason = {row: name for name, rows in left_out.items() for row in rows}
        fates.update(reason.values())
        fates["trained"] += num_rows - len(reason)
        for row, num in enumerate(trained["tokens"]):
            masked = entry["masked_tokens"].get(str(row), 0)
            if row not in reason:
                tokens["weigh"] += num - masked
                tokens["masked"] += masked
        if entry["no_spread"] is not None:
            fates["no spread"] += len(entry["no_spread"]["tokens"])
        fates["lost to another configuration"] += len(entry["lost"]) * trained["group_size"]
    if entries:
        fates["kept for the next step"] = len(entries[-1]["kept"]) * entries[-1]["trained"]["group_size"]
    return {name: num for name, num in fates.items() if num or name == "trained"}, dict(tokens)


def _groups(entry: Entry) -> Iterator[tuple[Origin, str]]:
    for columns in (entry["trained"], entry["no_spread"]):
        if columns is not None:
            yield from zip(
                zip(columns["batch"], columns["place"], strict=True), columns["prompt"], strict=True
            )


def _token_versions(columns: Entry) -> np.ndarray:
    """The policy version of each token, those of all completions one after the other."""
    versions = [
        np.full(num, version) for num, version in zip(columns["tokens"], columns["version"], strict=True)
    ]
    for row, changes in columns["changes"].items():
        for first, version in changes:
            versions[int(row)][first:] = version
    return np.concatenate(versions)


def _missing(lines: Mapping[int, Any], by_step: Mapping[int, Entry]) -> Iterator[str]:
    """Steps that one of both has alone. The ledger's last one may have been killed before its line was written."""
    for step in sorted(lines.keys() - by_step.keys()):
        yield f"step {step} is in metrics.jsonl, and not in the ledger"
    for step in sorted(by_step.keys() - lines.keys() - {max(by_step, default=0)}):
        yield f"step {step} is in the ledger, and not in metrics.jsonl"


def _name(origin: Origin) -> str:
    return f"prompt {origin[1]} of batch {origin[0]}"
