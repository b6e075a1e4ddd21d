"""Completions to arrays, one completion a row, and rows to mini-batches. Host side.

Rollouts enter, `TrainBatch`es of numpy arrays leave. In order:

    make_train_batch -> add_advantages -> split_minibatches -> add_loss_weights -> packing.pack -> the update

A row is prompt, completion, padding on the right. The mask comes from lengths and never from token ids, so that an
EOS which doubles as the padding token is trained.

No batch size is refused for the number of devices: what does not divide is filled with rows of padding,
which weigh nothing in any loss or metric.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm.loss import loss_weights
from grpo_jax.model.transformer import bucket_length
from grpo_jax.types import Completion, RolloutGroup, TrainBatch


def make_train_batch(
    groups: Sequence[RolloutGroup], *, pad_id: int, version: int | None = None
) -> TrainBatch:
    """Puts every completion with its prompt into a row, in group order.

    Args:
        groups: P groups of G completions each.
        pad_id: token id of the padding, which is never trained or attended to.
        version: of the weights that are to be trained, which gives tokens their age.

    Returns:
        A batch of B = P * G rows and T = `bucket_length` of the longest; `advantages` 0, no old or
        reference log-probabilities; without a `version` no `token_ages`.
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
            _check_row(name, group.prompt.token_ids, completion.token_ids)
            rows.append((group.prompt.token_ids, completion.token_ids))
    batch = _lay_out(rows, pad_id)
    completions = [c for group in groups for c in group.completions]
    sampler_logprobs: Any = np.zeros(batch.tokens.shape, np.float32)
    sampler_logprobs[batch.completion_mask > 0] = np.fromiter(
        (logprob for c in completions for logprob in c.sampler_logprobs), np.float32
    )
    batch = dataclasses.replace(
        batch, sampler_logprobs=sampler_logprobs, drawable=_lay_out_drawable(completions, batch)
    )
    return batch if version is None else add_token_ages(batch, completions, version)


def add_token_ages(batch: TrainBatch, completions: Sequence[Completion], version: int) -> TrainBatch:
    """Adds `TrainBatch.token_ages`. Args: version: of the weights that are to be trained."""
    ages: Any = np.zeros(batch.tokens.shape, np.int32)
    if completions:
        ages[batch.completion_mask > 0] = version - np.concatenate([c.token_versions for c in completions])
    return dataclasses.replace(batch, token_ages=ages)


def _lay_out_drawable(completions: Sequence[Completion], batch: TrainBatch) -> Any:
    """[B, T, W] uint32, 0 outside the completions; None where all tokens could be drawn."""
    words = [c.drawable for c in completions if c.drawable is not None]
    if not words:
        return None
    if len(words) != len(completions):
        raise ValueError("either all completions say which tokens could be drawn, or none does")
    drawable = np.zeros((*batch.tokens.shape, words[0].shape[1]), np.uint32)
    drawable[np.asarray(batch.completion_mask) > 0] = np.concatenate(words)
    return drawable


def make_sft_batch(examples: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int) -> TrainBatch:
    """Puts (prompt, response) pairs of token ids into rows, for supervised fine-tuning.

    Returns:
        A batch as from `make_train_batch`, the responses as completions, `sampler_logprobs` 0.
    """
    for i, (prompt, response) in enumerate(examples):
        _check_row(f"example {i}", prompt, response)
    return _lay_out(examples, pad_id)


def _check_row(name: str, prompt: Sequence[int], completion: Sequence[int]) -> None:
    # A completion in column 0 could not be trained: no token comes before it to predict it from.
    if not prompt or not completion:
        raise ValueError(
            f"{name}: {len(prompt)} prompt and {len(completion)} completion tokens; 1 is the least"
        )


def _lay_out(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> TrainBatch:
    """Rows of prompt, completion, padding; advantages and log-probabilities 0."""
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
    """Takes completions out of the loss and out of its denominators: their rows have an empty mask.

    Args:
        batch: one completion a row.
        is_kept: [B] bool.
    """
    keep = lambda field: None if field is None else np.where(is_kept[:, None], field, np.float32(0))
    names = ("completion_mask", "sampler_logprobs", "advantages", "old_logprobs", "ref_logprobs")
    kept: dict[str, Any] = {name: keep(getattr(batch, name)) for name in names}
    return dataclasses.replace(batch, **kept)


def split_minibatches(num_rows: int, num_minibatches: int, *, seed: int | Sequence[int]) -> list[np.ndarray]:
    """Deals the rows of a batch out to mini-batches of equal size, one update each.

    Args:
        num_rows: B, divisible by `num_minibatches` (a rule of the configuration).
        num_minibatches: 1 keeps the order of the rows; with more they are permuted.
        seed: of the permutation; several integers, such as (seed, step), make one.

    Returns: the numbers of the rows of each mini-batch.
    """
    if num_rows % num_minibatches:
        raise ValueError(f"{num_rows} rows do not divide into {num_minibatches} mini-batches")
    if num_minibatches == 1:
        return [np.arange(num_rows)]
    return np.split(np.random.default_rng(seed).permutation(num_rows), num_minibatches)


def take_rows(batch: TrainBatch, rows: np.ndarray) -> TrainBatch:
    """Returns some of the rows of a batch on the host."""
    return jax.tree.map(lambda field: np.asarray(field)[rows], batch)


def add_loss_weights(batch: TrainBatch, mode: str, norm: float) -> TrainBatch:
    """Adds the weight of each token in the loss of this mini-batch; see `loss.loss_weights`."""
    weights: Any = np.asarray(loss_weights(batch.completion_mask, mode, norm))
    return dataclasses.replace(batch, loss_weights=weights)
