"""The ledger of a run: what became of every completion that it has sampled.

One line of JSON a step, in WORKDIR/ledger/steps.jsonl, on disk before the step's checkpoint is there. Each line
ends with a checksum over itself and the one before it, so that none can be changed, left out or put in unnoticed.
`run/audit.py` reads them back, and proves from them what they say.

A completion is named by the number of its batch of prompts in the whole run, the place of its prompt in that
batch, and its own number in the group. Lists of a line:

    trained      groups of the step's batch, in the order of its rows
    no_spread    groups that dynamic sampling has left out
    kept         (batch, place) of groups that it has left over for later steps
    lost         (batch, place) of groups that were left over, and that another configuration
                 (checkpoint.resume=force) has no use for
    left_out     numbers of the trained rows that have added nothing after all, by the reason
"""

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.config import Config
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.position import Position
from grpo_jax.types import RolloutGroup, ScoredBatch, StepResult

logger = logging.getLogger(__name__)

FILE = "steps.jsonl"
Entry = dict[str, Any]
"""One line of the ledger, as JSON."""


def ledger_entry(
    config: Config, result: StepResult, position: Position, *, step: int, steps_per_epoch: int
) -> Entry:
    """What a step has done with its completions. Args: step: counted from 1; position: after it."""
    rollouts, names = result.rollouts, ("actor/skipped_updates", "actor/overflows")
    skipped = [any(update.get(name) for name in names) for update in result.updates]
    trained = _columns(rollouts, config.trainer.seed)
    tokens, use = np.array(trained["tokens"]), result.use
    masked = tokens - use.num_tokens
    return {
        "step": step,
        "steps_per_epoch": steps_per_epoch,
        "batch_size": config.data.train_batch_size,
        "seed": config.trainer.seed,
        "num_batches": position.num_rollout_batches,
        "num_updates": len(result.updates),
        "skipped_updates": np.flatnonzero(skipped).tolist(),
        "trained": trained,
        "minibatch": use.minibatch.tolist() if use.minibatch.any() else 0,
        "masked_tokens": {int(i): int(masked[i]) for i in np.flatnonzero(masked)},
        "left_out": _left_out(config, result, skipped),
        "no_spread": None if rollouts.dropped is None else _columns(rollouts.dropped, config.trainer.seed),
        "kept": [group.origin for group in rollouts.kept],
        "lost": list(position.lost),
    }


def _left_out(config: Config, result: StepResult, skipped: Sequence[bool]) -> dict[str, list[int]]:
    """Numbers of the rows that add nothing to the policy loss, by the reason."""
    completions = [c for group in result.rollouts.groups for c in group.completions]
    use = result.use
    is_cut = np.array([c.finish_reason == "length" for c in completions])
    is_truncated = config.algorithm.mask_truncated & is_cut
    num_minibatches = int(use.minibatch.max()) + 1
    is_lost = np.min(np.reshape(skipped, (-1, num_minibatches)), axis=0)  # in every epoch over the batch
    is_skipped = is_lost[use.minibatch]
    is_rejected = (use.num_tokens == 0) & ~is_truncated
    reasons = {"truncated": is_truncated, "skipped update": is_skipped, "rejected": is_rejected}
    return {name: np.flatnonzero(which).tolist() for name, which in reasons.items() if which.any()}


def _columns(batch: ScoredBatch, seed: int) -> Entry:
    """The groups of a batch as lists: P long, and those of completions P * G."""
    completions = [c for group in batch.groups for c in group.completions]
    origins = [_origin(group) for group in batch.groups]
    return {
        "group_size": len(batch.groups[0].completions),
        "prompt": [group.prompt.prompt_id for group in batch.groups],
        "batch": [number for number, _ in origins],
        "place": [place for _, place in origins],
        "seeds": {n: derive_seed(seed, n, "rollout") for n, _ in origins if n >= 0},
        "tokens": [len(c.token_ids) for c in completions],
        "crc": [zlib.crc32(np.array(c.token_ids, np.int32).tobytes()) for c in completions],
        "version": [c.policy_version for c in completions],
        "changes": {i: c.changes for i, c in enumerate(completions) if c.changes},
        # The shortest text that gives the same float32 back.
        "reward": [float(str(reward)) for reward in batch.rewards.rewards.ravel()],
    }


def _origin(group: RolloutGroup) -> tuple[int, int]:
    assert group.origin is not None, "what is trained on comes from a batch of prompts"
    return group.origin


class Ledger:
    """Appends to the ledger in a folder."""

    def __init__(self, folder: Path, *, last_step: int):
        """Opens it, and cuts off what is later than `last_step`: the work of steps that are done again."""
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / FILE
        self._path.touch()
        self._chain = cut_after(self._path, last_step)

    def append(self, entry: Entry) -> None:
        """Adds the entry of a step. It is on disk when this returns."""
        line, self._chain = to_line(entry, self._chain)
        with self._path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def to_line(entry: Entry, chain: str) -> tuple[str, str]:
    """A line of the ledger, and its checksum. Args: chain: checksum of the line before, "" for the first."""
    text = json.dumps(entry, separators=(",", ":"))
    checksum = hashlib.sha256((chain + text).encode()).hexdigest()
    return f"{text}\t{checksum}\n", checksum


def parse_line(line: str, chain: str) -> Entry:
    """The entry of a line. Args: chain: checksum of the line before.

    Raises: ValueError: it is not the line that was written after that one.
    """
    text, _, checksum = line.rstrip("\n").partition("\t")
    if checksum != hashlib.sha256((chain + text).encode()).hexdigest():
        raise ValueError("its checksum is not that of its content and the line before")
    return json.loads(text)


def walk(lines: Iterable[bytes]) -> Iterator[tuple[bytes, Entry | ValueError, str]]:
    """Yields each line of a ledger, its entry or what is wrong with it, and what the next one is bound to.

    That is the one that the line holds, be it damaged or not: damage to one line is none to those after it.
    """
    chain = ""
    for line in lines:
        text = line.decode(errors="replace")
        entry: Entry | ValueError
        try:
            entry = parse_line(text, chain)
        except ValueError as error:
            entry = error
        chain = text.rstrip("\n").rpartition("\t")[2]
        yield line, entry, chain


def cut_after(path: Path, step: int) -> str:
    """Cuts a ledger after `step`, and an end without a line break. Returns the last line's checksum.

    A line that is damaged stays, for the audit to name; a warning tells of it.
    """
    last, end = "", 0
    with path.open("r+b") as file:
        for number, (line, entry, checksum) in enumerate(walk(file), 1):
            if not line.endswith(b"\n") or (isinstance(entry, dict) and entry["step"] > step):
                break
            if isinstance(entry, ValueError):
                logger.warning("WARNING: line %d of %s is damaged; it is left as it is", number, path)
            last, end = checksum, end + len(line)
        file.truncate(end)
        os.fsync(file.fileno())
    return last
