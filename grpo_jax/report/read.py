"""What the folder of a run says of it, for its page: read leniently, whatever has become of the run.

A workdir enters, a `RunFacts` leaves. A file that is not there is an empty one; what is damaged is left out and
told in a line of `RunFacts.notes`. Writes nothing.
"""

import contextlib
import dataclasses
import json
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import ConfigError
from grpo_jax.run import lock
from grpo_jax.run.ledger import FILE
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import read_lines

MOST_SPREADS = 400
"""Steps whose completions are looked at one by one: as many as a chart has columns."""
MOST_NAMED = 10
"""Damaged lines of a file."""
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
"""Percent."""
SAVED = re.compile(r"step-(\d+)\.(jsonl|parquet)")
Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """A run, as its folder has it."""

    path: Path
    name: str
    config: dict[str, dict[str, Any]]
    """Section -> key -> value; {} where it cannot be read."""
    lines: list[Line]
    """Of metrics.jsonl."""
    alarms: list[Line]
    spreads: list[Line]
    """{"step", "reward": quantiles, "length": quantiles} of some steps, in order."""
    starts: list[Line]
    """Of starts.jsonl: each time that a process took the run up."""
    saved_steps: list[int]
    """Whose rollouts were saved."""
    state: str
    """How far it has come, in words."""
    notes: list[str]
    """What is damaged or missing, a line each."""

    @property
    def is_empty(self) -> bool:
        return not self.lines

    def value(self, key: str) -> Any:
        """Of a key "SECTION.KEY"; None where config.json does not tell."""
        section, _, name = key.partition(".")
        return self.config.get(section, {}).get(name)


def read_run(path: Path) -> RunFacts:
    """Reads the folder of a run.

    Raises: ConfigError: it is no folder, or holds nothing of a run.
    """
    workdir = Workdir(path)
    check_is_run(workdir)
    notes: list[str] = []
    lines, damaged = read_lines(workdir.metrics)
    notes += damage_note(workdir.metrics.name, damaged)
    config = _read_config(workdir, notes)
    starts = list(_json_lines(workdir.starts, notes))
    return RunFacts(
        path=path,
        name=path.resolve().name,
        config=config,
        lines=sorted((line for line in lines if _is_line(line)), key=lambda line: line["step"]),
        alarms=[a for a in _json_lines(workdir.alarms, notes) if isinstance(a.get("step"), int)],
        spreads=_read_spreads(workdir.ledger / FILE, notes),
        starts=starts,
        saved_steps=saved_steps(workdir),
        state=_state(workdir, lines, starts),
        notes=notes,
    )


def check_is_run(workdir: Workdir) -> None:
    """Raises: ConfigError: the folder is not there, or holds nothing of a run."""
    path = workdir.path
    if not path.is_dir():
        raise ConfigError("WORKDIR", str(path), "there is no such folder")
    if not any(file.exists() for file in (workdir.config, workdir.metrics, workdir.lock)):
        raise ConfigError("WORKDIR", str(path), "holds no run: neither config.json nor metrics.jsonl")


def saved_steps(workdir: Workdir) -> list[int]:
    """The steps whose rollouts were saved, in order."""
    names = [file.name for file in workdir.rollouts.iterdir()] if workdir.rollouts.is_dir() else []
    return sorted({int(match[1]) for name in names if (match := SAVED.fullmatch(name))})


def expected(lines: list[Line]) -> list[tuple[str, float | None, float]]:
    """(phase, expected seconds or None, measured seconds), medians over the steps, the longest first."""
    phases: dict[str, list[float]] = {}
    for line in lines[1:] if len(lines) > 3 else lines:  # the first step compiles
        for name, value in line.items():
            if name.startswith("timing_s/") and isinstance(value, int | float):
                phases.setdefault(name.removeprefix("timing_s/"), []).append(value)
    rows = []
    for phase, values in phases.items():
        known = [v for line in lines if isinstance(v := line.get(f"expected_s/{phase}"), int | float)]
        rows.append((phase, statistics.median(known) if known else None, statistics.median(values)))
    return sorted(rows, key=lambda row: -row[2])


def damage_note(name: str, damaged: list[int]) -> list[str]:
    """One line that names damaged lines of a file, or none. Args: damaged: their numbers, from 1."""
    if not damaged:
        return []
    shown = ", ".join(map(str, damaged[:MOST_NAMED]))
    more = f" and {len(damaged) - MOST_NAMED} more" if len(damaged) > MOST_NAMED else ""
    return [f"{name}: damaged, and left out: line{'s' if len(damaged) > 1 else ''} {shown}{more}"]


def _is_line(line: Line) -> bool:
    return isinstance(line, dict) and isinstance(line["step"], int)


def _read_config(workdir: Workdir, notes: list[str]) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads(workdir.config.read_text(errors="replace"))
        return {name: keys for name, keys in held.items() if isinstance(keys, dict)}
    except FileNotFoundError:
        notes.append("config.json is missing")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        notes.append(f"config.json cannot be read ({type(error).__name__})")
    return {}


def _json_lines(path: Path, notes: list[str]) -> Iterator[Line]:
    """The objects of a file of JSON lines; damaged ones are named in a note."""
    damaged = []
    texts = path.read_text(errors="replace").split("\n") if path.is_file() else []
    for number, text in enumerate(texts, 1):
        line = None
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text) if text else {}
        if isinstance(line, dict):
            if line:
                yield line
        else:
            damaged.append(number)
    notes += damage_note(path.name, damaged)


def _read_spreads(path: Path, notes: list[str]) -> list[Line]:
    """Quantiles of the rewards and lengths of evenly spread steps of the ledger."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
        file.seek(0)
        stride = -(-num_lines // MOST_SPREADS) if num_lines else 1
        chosen = [line for number, line in enumerate(file) if number % stride == 0 or number == num_lines - 1]
    spreads, num_damaged = [], 0
    for line in chosen:
        try:
            entry = json.loads(line.partition(b"\t")[0])
            trained = entry["trained"]
            of = lambda values: np.percentile(np.array(values, float), QUANTILES).tolist()
            spreads.append(
                {"step": int(entry["step"]), "reward": of(trained["reward"]), "length": of(trained["tokens"])}
            )
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            num_damaged += 1
    if num_damaged:
        notes.append(f"ledger: {num_damaged} of the {len(chosen)} lines looked at are damaged")
    return sorted(spreads, key=lambda spread: spread["step"])


def _state(workdir: Workdir, lines: list[Line], starts: list[Line]) -> str:
    last = max((line["step"] for line in lines if isinstance(line["step"], int)), default=0)
    planned = next((s["num_steps"] for s in reversed(starts) if isinstance(s.get("num_steps"), int)), None)
    steps = f"step {last:,}" + (f" of {planned:,}" if planned is not None else "")
    if _is_under_way(workdir.lock):
        written = workdir.metrics.stat().st_mtime if workdir.metrics.exists() else None
        ago = f", whose line was written {_ago(time.time() - written)} ago" if written and last else ""
        return f"under way, after {steps}{ago}" if last else "under way, in its first step"
    if planned is not None and last >= planned:
        return f"finished, {steps}"
    return f"ended after {steps}" if last else "ended before its first step was done"


def _is_under_way(file: Path) -> bool:
    try:
        lock.check_free(file)
    except ConfigError:
        return True
    return False


def _ago(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
