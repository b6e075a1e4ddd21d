"""Packing: sequences into rows of one length, rows into micro-batches of one shape; and their sizes. Host side.

Packed rows hold as many sequences as fit, one after the other. All micro-batches of a run have one shape, so its
steps are compiled once, whatever lengths the policy comes to.
"""

import bisect
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import ActorSection, Config
from grpo_jax.model.fused_attention import max_sequences
from grpo_jax.model.transformer import bucket_length
from grpo_jax.types import TrainBatch


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
        """[B, T, ...] to [num_rows, length, ...], 0 where no sequence lies."""
        mask, target = self._index(field.shape[1])
        packed = np.zeros((num_rows, length, *field.shape[2:]), field.dtype)
        packed[target] = field[mask]
        return packed

    def unpack(self, packed: np.ndarray, columns: int) -> np.ndarray:
        """[num_rows, length] to [B, columns], 0 in the padding: undoes `pack`."""
        mask, source = self._index(columns)
        field = np.zeros(mask.shape, packed.dtype)
        field[mask] = packed[source]
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


def rows_of_tokens(
    micro_batches: Sequence[Sequence[np.ndarray]],
    *,
    rows: Sequence[np.ndarray],
    places: Sequence[Places],
    shape: tuple[int, ...],
) -> np.ndarray:
    """Puts values of tokens back into the rows of the whole batch.

    Args:
        micro_batches: of each mini-batch, those of its micro-batches, each [R, T'].
        rows: the rows of each mini-batch; places: where they went.
        shape: [B, T], of what is returned, which is 0 where there is no token.
    """
    values = [np.concatenate(each) for each in micro_batches]
    whole = np.zeros(shape, values[0].dtype)
    for of_minibatch, at, packed in zip(rows, places, values, strict=True):
        whole[of_minibatch] = at.unpack(packed, shape[1])
    return whole


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
