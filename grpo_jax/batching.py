"""Completions to arrays: packing, mini-batches, padding, and the sizes of micro-batches. Host side.

Rollouts enter, `TrainBatch`es of numpy arrays leave; moving them to devices is the caller's. In order:

    make_train_batch -> add_advantages -> split_minibatches -> pad_rows -> the update

A row holds one completion: prompt, completion, padding on the right. The mask comes from lengths and never
from token ids, so that an EOS which doubles as the padding token is trained.

No batch size is refused for the number of devices: what does not divide is filled with rows of padding,
which weigh nothing in any loss or metric. `batch_table` says how many.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.config import ActorSection, Config
from grpo_jax.types import RolloutGroup, TrainBatch


def bucket_length(n: int, multiple: int = 16) -> int:
    """Rounds a row length up to one of few, since each length is compiled anew.

    Multiples of 16 up to 128, then four lengths for each doubling (160, 192, 224, 256, 320, ...): 24 shapes
    up to 2,048 tokens, at most 15 tokens of padding in rows up to 128 and 25 % in longer ones.
    """
    step = multiple
    while n > 8 * step:
        step *= 2
    return -(-n // step) * step


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
        batch: rows in group order; rows beyond P * G must be padding.
        advantages: [P, G] float32, or [B, T] float32 where the estimator is per token.
    """
    advantages = np.asarray(advantages, np.float32)
    mask = np.asarray(batch.completion_mask)
    if advantages.shape == mask.shape:
        of_tokens: Any = np.where(mask > 0, advantages, np.float32(0))
        return dataclasses.replace(batch, advantages=of_tokens)
    num_rows = advantages.size
    if advantages.ndim != 2 or len(mask) < num_rows or mask[num_rows:].any():
        raise ValueError(f"advantages of shape {advantages.shape} do not fit a batch of shape {mask.shape}")
    of_row = np.zeros((len(mask), 1), np.float32)
    of_row[:num_rows, 0] = advantages.ravel()
    on_tokens: Any = np.where(mask > 0, of_row, np.float32(0))
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
        batch: B rows, B divisible by `num_minibatches` (a rule of the configuration), not yet padded.
        num_minibatches: 1 keeps the order of the rows; with more they are permuted.
        seed: of the permutation; several integers, such as (seed, step, epoch), make one.
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


def pad_rows(batch: TrainBatch, multiple: int) -> TrainBatch:
    """Appends rows of padding (every field 0) until `multiple` divides the number of rows."""
    missing = -len(batch.tokens) % multiple
    if not missing:
        return batch
    return jax.tree.map(lambda field: np.pad(np.asarray(field), ((0, missing), (0, 0))), batch)


def micro_batch_rows(actor: ActorSection, length: int) -> int:
    """Returns how many rows of `length` tokens one data shard holds at once, at least 1."""
    if actor.micro_batch_tokens_per_device:
        return max(1, actor.micro_batch_tokens_per_device // length)
    return actor.micro_batch_size_per_device


def plan_micro_batches(
    num_rows: int, length: int, actor: ActorSection, num_data_shards: int
) -> tuple[int, int]:
    """Spreads the rows of a mini-batch evenly over as few micro-batches as memory allows.

    Args:
        num_rows: rows of the mini-batch.
        length: T, tokens of a row.
        actor: says how many rows fit.
        num_data_shards: devices that split the batch: mesh.data * mesh.fsdp.

    Returns:
        The number of micro-batches M and the rows R of each on each data shard. The mini-batch has to be
        padded to M * R * num_data_shards rows; R is often below the limit, so that fewer are needed.
    """
    most = micro_batch_rows(actor, length) * num_data_shards
    num_micro_batches = -(-num_rows // most)
    return num_micro_batches, -(-num_rows // (num_micro_batches * num_data_shards))


def batch_table(config: Config, *, num_data_shards: int, steps_per_epoch: int) -> list[tuple[str, str]]:
    """The batch sizes that follow from the configuration, to be printed at the start: (name, value) rows."""
    data, actor = config.data, config.actor
    num_rows = config.completions_per_step // actor.num_minibatches
    most_tokens = data.max_prompt_length + data.max_response_length
    num_micro, rows = plan_micro_batches(num_rows, bucket_length(most_tokens), actor, num_data_shards)
    padding = num_micro * rows * num_data_shards - num_rows
    num_steps = config.trainer.total_epochs * steps_per_epoch
    if config.trainer.num_steps:
        num_steps = min(num_steps, config.trainer.num_steps)
    micro = f"{num_micro}, {rows} completions on each of {num_data_shards} data shards"
    return [
        ("prompts per step", f"{data.train_batch_size:,}"),
        ("completions per step", f"{config.completions_per_step:,} ({config.algorithm.group_size} a prompt)"),
        (
            "updates per step",
            f"{config.updates_per_step} (mini-batches: {actor.num_minibatches}, passes: {actor.num_epochs})",
        ),
        ("completions per update", f"{num_rows:,}"),
        ("micro-batches per update", micro + (f" (rows of padding: {padding})" if padding else "")),
        ("tokens per step, at most", f"{config.completions_per_step * most_tokens:,}"),
        ("steps per epoch", f"{steps_per_epoch:,}"),
        ("steps in all", f"{num_steps:,}"),
    ]
