"""Completions to arrays: rows, mini-batches, packing, and the sizes of micro-batches. Host side.

Rollouts enter, `TrainBatch`es of numpy arrays leave; moving them to devices is the caller's. In order:

    make_train_batch -> add_advantages -> split_minibatches -> add_loss_weights -> pack -> the update

Up to `pack`, a row holds one completion: prompt, completion, padding on the right. Packed rows all have the
same length, hold as many of those as fit, one after the other, and are dealt out to micro-batches of one shape:
a run compiles its steps once, whatever lengths the policy comes to. The mask comes from lengths and never from
token ids, so that an EOS which doubles as the padding token is trained.

No batch size is refused for the number of devices: what does not divide is filled with rows of padding,
which weigh nothing in any loss or metric.
"""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm.loss import loss_weights
from grpo_jax.config import ActorSection, Config
from grpo_jax.model.fused_attention import max_sequences
from grpo_jax.model.transformer import bucket_length
from grpo_jax.types import RolloutGroup, TrainBatch


def make_train_batch(groups: Sequence[RolloutGroup], *, pad_id: int, max_length: int | None) -> TrainBatch:
    """Packs every completion with its prompt into a row, in group order.

    Args:
        groups: P groups of G completions each.
        pad_id: token id of the padding, which is never trained or attended to.
        max_length: most tokens that prompt and completion may have together; None: any number.

    Returns:
        A batch of B = P * G rows and T = `bucket_length` of the longest; `advantages` 0, no old or
        reference log-probabilities.
    """
    sizes = sorted({len(group.completions) for group in groups})
    if len(sizes) != 1:
        raise ValueError(f"every group needs the same number of completions; they have {sizes}")
    rows = []
    for group in groups:
        for g, completion in enumerate(group.completions):
            name = f"completion {g} of prompt {group.prompt.prompt_id}"
            if len(completion.sampler_logprobs) != len(completion.token_ids):
                raise ValueError(
                    f"{name}: {len(completion.token_ids)} token_ids, "
                    f"but {len(completion.sampler_logprobs)} sampler_logprobs"
                )
            _check_row(name, group.prompt.token_ids, completion.token_ids, max_length)
            rows.append((group.prompt.token_ids, completion.token_ids))
    batch = _pack(rows, pad_id)
    sampler_logprobs: Any = np.zeros(batch.tokens.shape, np.float32)
    sampler_logprobs[batch.completion_mask > 0] = np.fromiter(
        (logprob for group in groups for c in group.completions for logprob in c.sampler_logprobs), np.float32
    )
    return dataclasses.replace(batch, sampler_logprobs=sampler_logprobs)


def make_sft_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int) -> TrainBatch:
    """Packs (prompt, response) pairs of token ids for supervised fine-tuning, one a row.

    Returns:
        A batch as from `make_train_batch`, the responses as completions, `sampler_logprobs` 0.
    """
    for i, (prompt, response) in enumerate(examples):
        _check_row(f"example {i}", prompt, response, None)
    return _pack(examples, pad_id)


def _check_row(name: str, prompt: Sequence[int], completion: Sequence[int], max_length: int | None) -> None:
    # A completion in column 0 could not be trained: no token comes before it to predict it from.
    if not prompt or not completion:
        raise ValueError(
            f"{name}: {len(prompt)} prompt and {len(completion)} completion tokens; 1 is the least"
        )
    if max_length is not None and len(prompt) + len(completion) > max_length:
        raise ValueError(
            f"{name}: {len(prompt)} prompt and {len(completion)} completion tokens are more than {max_length}"
        )


def _pack(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> TrainBatch:
    """Lays (prompt, completion) out as prompt, completion, padding; advantages and log-probabilities 0."""
    if not rows:
        raise ValueError("a batch needs at least one row")
    starts = np.array([len(prompt) for prompt, _ in rows])[:, None]
    ends = starts + np.array([len(completion) for _, completion in rows])[:, None]
    columns = np.arange(bucket_length(int(ends.max())))
    is_token = columns < ends
    tokens = np.full(is_token.shape, pad_id, np.int32)
    # A boolean index runs row by row, left to right: the order in which the ids are chained.
    tokens[is_token] = np.fromiter(itertools.chain.from_iterable(itertools.chain(*rows)), np.int32)
    fields: dict[str, Any] = {
        "tokens": tokens,
        "positions": np.where(is_token, columns, 0).astype(np.int32),
        "segment_ids": is_token.astype(np.int32),
        "completion_mask": (is_token & (columns >= starts)).astype(np.float32),
        "sampler_logprobs": np.zeros(tokens.shape, np.float32),
        "advantages": np.zeros(tokens.shape, np.float32),
    }
    return TrainBatch(**fields)


def add_advantages(batch: TrainBatch, advantages: Any) -> TrainBatch:
    """Puts the advantage of each completion on all of its tokens.

    Args:
        batch: B = P * G rows in group order.
        advantages: [P, G] float32, or [B, T] float32 where the estimator is per token.
    """
    advantages = np.asarray(advantages, np.float32)
    mask = np.asarray(batch.completion_mask)
    if advantages.shape == mask.shape:
        of_tokens: Any = np.where(mask > 0, advantages, np.float32(0))
        return dataclasses.replace(batch, advantages=of_tokens)
    if advantages.ndim != 2 or len(mask) != advantages.size:
        raise ValueError(f"advantages of shape {advantages.shape} do not fit a batch of shape {mask.shape}")
    on_tokens: Any = np.where(mask > 0, advantages.reshape(-1, 1), np.float32(0))
    return dataclasses.replace(batch, advantages=on_tokens)


def keep_completions(batch: TrainBatch, is_kept: np.ndarray) -> TrainBatch:
    """Takes completions out of the loss: to it, and to its denominators, they are rows of prompt and padding.

    Args:
        batch: one completion a row.
        is_kept: [B] bool.
    """
    keep = lambda field: None if field is None else np.where(is_kept[:, None], field, np.float32(0))
    names = ("completion_mask", "sampler_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    kept: dict[str, Any] = {name: keep(getattr(batch, name)) for name in names}
    return dataclasses.replace(batch, **kept)


def split_minibatches(
    batch: TrainBatch, num_minibatches: int, *, seed: int | Sequence[int]
) -> list[TrainBatch]:
    """Deals the rows of a batch out to mini-batches of equal size, one update each.

    Args:
        batch: B rows, B divisible by `num_minibatches` (a rule of the configuration).
        num_minibatches: 1 keeps the order of the rows; with more they are permuted.
        seed: of the permutation; several integers, such as (seed, step), make one.
    """
    num_rows = len(batch.tokens)
    if num_rows % num_minibatches:
        raise ValueError(f"{num_rows} rows do not divide into {num_minibatches} mini-batches")
    if num_minibatches == 1:
        return [batch]
    order = np.random.default_rng(seed).permutation(num_rows)
    return [
        jax.tree.map(lambda field, rows=rows: np.asarray(field)[rows], batch)
        for rows in np.split(order, num_minibatches)
    ]


def add_loss_weights(batch: TrainBatch, mode: str, norm: float) -> TrainBatch:
    """Puts the weight of each token in the loss of this mini-batch beside it; see `losses.loss_weights`."""
    weights: Any = np.asarray(loss_weights(batch.completion_mask, mode, norm))
    return dataclasses.replace(batch, loss_weights=weights)


@dataclasses.dataclass(frozen=True)
class Places:
    """Where the rows of an unpacked batch [B, T] went. All fields are [B] int."""

    rows: np.ndarray
    starts: np.ndarray
    """First column there."""
    lengths: np.ndarray
    """Tokens, without padding."""
    numbers: np.ndarray
    """Which sequence of its packed row it is, counted from 1."""

    def pack(self, field: np.ndarray, num_rows: int, length: int) -> np.ndarray:
        """[B, T] to [num_rows, length], 0 where nothing was put."""
        mask, where = self._index(field.shape[1])
        packed = np.zeros((num_rows, length), field.dtype)
        packed[where] = field[mask]
        return packed

    def unpack(self, packed: np.ndarray, columns: int) -> np.ndarray:
        """[num_rows, length] to [B, columns], 0 in the padding: undoes `pack`."""
        mask, where = self._index(columns)
        field = np.zeros(mask.shape, packed.dtype)
        field[mask] = packed[where]
        return field

    def _index(self, columns: int) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
        """Which elements of [B, columns] are tokens, and (row, column) of each of them where they are packed."""
        mask = np.arange(columns) < self.lengths[:, None]
        sequence, column = np.nonzero(mask)
        return mask, (self.rows[sequence], self.starts[sequence] + column)


def find_places(lengths: np.ndarray, row_length: int) -> Places:
    """Packs sequences into rows: longest first, each where it leaves the least room (best fit decreasing).

    Args:
        lengths: [B] tokens of each sequence.
        row_length: tokens of a row, and the most that a sequence may have.
    """
    if lengths.max() > row_length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a row of {row_length}")
    rows, starts, numbers = (np.zeros(len(lengths), np.int64) for _ in range(3))
    most = max_sequences(row_length)
    num_rows = 0
    open_rows: list[tuple[int, int, int]] = []  # (room, row, sequences in it), sorted
    for i in np.argsort(-lengths, kind="stable"):
        at = bisect.bisect_left(open_rows, (int(lengths[i]), -1, -1))
        if at < len(open_rows):
            room, row, count = open_rows.pop(at)
        else:
            room, row, count = row_length, num_rows, 0
            num_rows += 1
        rows[i], starts[i], numbers[i] = row, row_length - room, count + 1
        room -= int(lengths[i])
        if room and count + 1 < most:
            bisect.insort(open_rows, (room, row, count + 1))
    return Places(rows, starts, lengths, numbers)


def pack(batch: TrainBatch, rows: int, length: int) -> tuple[list[TrainBatch], Places]:
    """Packs a batch [B, T], one sequence a row, into micro-batches [rows, length].

    Returns: the micro-batches, the last one filled up with rows of padding, and where each sequence went.
    """
    is_token = np.asarray(batch.segment_ids) > 0
    places = find_places(is_token.sum(axis=1), length)
    num_micro = -(-(int(places.rows.max()) + 1) // rows)
    numbers: Any = np.where(is_token, places.numbers[:, None], 0).astype(np.int32)
    batch = dataclasses.replace(batch, segment_ids=numbers)
    packed = jax.tree.map(lambda field: places.pack(np.asarray(field), num_micro * rows, length), batch)
    split = lambda i: jax.tree.map(lambda field: field[i * rows : (i + 1) * rows], packed)
    return [split(i) for i in range(num_micro)], places


def micro_batch_rows(actor: ActorSection, length: int) -> int:
    """Returns how many rows of `length` tokens one data shard holds at once, at least 1."""
    if actor.micro_batch_tokens_per_device:
        return max(1, actor.micro_batch_tokens_per_device // length)
    return actor.micro_batch_size_per_device


def micro_batch_shape(config: Config, num_sequences: int, num_data_shards: int) -> tuple[int, int]:
    """The one shape [R, T] of all micro-batches of a run.

    T holds the longest prompt with the longest completion, and little more: where completions are all that long,
    the rest of their rows is computed for nothing. R is as large as memory allows, or a little less: so that a
    mini-batch of such completions needs few rows of padding.

    Args:
        num_sequences: of a mini-batch.
        num_data_shards: devices that split the batch: mesh.data * mesh.fsdp.
    """
    longest = config.data.max_prompt_length + config.data.max_response_length
    length = min(bucket_length(longest), -(-longest // 128) * 128)
    return plan_rows(num_sequences, length, config.actor, num_data_shards), length


def plan_rows(num_rows: int, length: int, actor: ActorSection, num_data_shards: int) -> int:
    """Spreads rows of `length` tokens evenly over as few micro-batches as memory allows: rows of each of them."""
    most = micro_batch_rows(actor, length) * num_data_shards
    num_micro_batches = -(-num_rows // most)
    return -(-num_rows // (num_micro_batches * num_data_shards)) * num_data_shards


def batch_table(config: Config, *, num_data_shards: int, steps_per_epoch: int) -> list[tuple[str, str]]:
    """The batch sizes that follow from the configuration, to be printed at the start: (name, value) rows."""
    data, actor = config.data, config.actor
    num_completions = config.completions_per_update
    rows, length = micro_batch_shape(config, num_completions, num_data_shards)
    most = -(-num_completions // rows)
    num_steps = config.trainer.total_epochs * steps_per_epoch
    if config.trainer.num_steps:
        num_steps = min(num_steps, config.trainer.num_steps)
    most_tokens = config.completions_per_step * (data.max_prompt_length + data.max_response_length)
    return [
        ("prompts per step", f"{data.train_batch_size:,}"),
        ("completions per step", f"{config.completions_per_step:,} ({config.algorithm.group_size} a prompt)"),
        (
            "updates per step",
            f"{config.updates_per_step} (mini-batches: {actor.num_minibatches}, passes: {actor.num_epochs})",
        ),
        ("completions per update", f"{num_completions:,}"),
        (
            "micro-batches per update",
            f"at most {most}, of {rows // num_data_shards} packed rows of {length:,} tokens on each of "
            f"{num_data_shards} data shards",
        ),
        ("tokens per step, at most", f"{most_tokens:,}"),
        ("steps per epoch", f"{steps_per_epoch:,}"),
        ("steps in all", f"{num_steps:,}"),
    ]
