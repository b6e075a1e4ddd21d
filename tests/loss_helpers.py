"""What the tests of losses share: an algorithm, batches, a loss with its gradient, and packing."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm import loss as losses
from grpo_jax.config import AlgorithmSection
from grpo_jax.types import TrainBatch

GOLDEN = json.loads((pathlib.Path(__file__).parent / "data" / "golden_verl_0.9.1.json").read_text())

ALGORITHM = AlgorithmSection(group_size=2, dual_clip=0.0, ref_offload=False)


def array(values):
    return jnp.asarray(values, jnp.float32)


def make_batch(mask, *, advantages=None, sampler=None, old=None, ref=None):
    """A batch of which only what the losses read is filled in."""
    zeros = jnp.zeros(np.shape(mask), jnp.float32)
    return TrainBatch(
        tokens=zeros.astype(jnp.int32),
        positions=zeros.astype(jnp.int32),
        segment_ids=zeros.astype(jnp.int32) + 1,  # one sequence a row
        completion_mask=array(mask),
        sampler_logprobs=zeros if sampler is None else array(sampler),
        advantages=zeros if advantages is None else array(advantages),
        old_logprobs=None if old is None else array(old),
        ref_logprobs=None if ref is None else array(ref),
    )


def grpo_loss(logprobs, entropy, batch, weights, algorithm):
    """`loss.grpo_loss` of a section, with the weights beside the batch."""
    return losses.grpo_loss(logprobs, entropy, batch.replace(loss_weights=weights), Algorithm.of(algorithm))


def loss_and_grad(logprobs, batch, weights, algorithm, entropy=None):
    """Returns the loss, its metrics by name, and its gradient with respect to `logprobs`."""
    entropy = jnp.zeros_like(array(logprobs)) if entropy is None else array(entropy)
    loss = functools.partial(grpo_loss, algorithm=algorithm)
    (value, metrics), grad = jax.value_and_grad(loss, has_aux=True)(array(logprobs), entropy, batch, weights)
    return value, metrics.summary(), np.asarray(grad)


def assert_equals_golden(case, mode=None, **changes):
    """Value, gradient and metrics of a loss are verl's, to 1e-5, on verl's inputs.

    Args:
        case: of GOLDEN["policy_loss"].
        mode: of aggregation; the case's own if None.
        changes: of ALGORITHM, beside the bounds, which are the case's.
    """
    mask = array(GOLDEN["mask"])
    batch = make_batch(mask, advantages=GOLDEN["advantages"]["grpo"], old=GOLDEN["old_logprobs"])
    bounds = {"clip_low": case["config"]["clip_ratio_low"], "clip_high": case["config"]["clip_ratio_high"]}
    algorithm = dataclasses.replace(ALGORITHM, **bounds | changes)
    weights = losses.loss_weights(mask, mode or case["agg"], GOLDEN["T"])
    value, metrics, grad = loss_and_grad(GOLDEN["logprobs"], batch, weights, algorithm)
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=0)
    close(value, case["value"])
    close(grad, case["grad_logprobs"])
    close(metrics["actor/loss"], case["value"])
    close(metrics["actor/pg_clipfrac"], case["clip_fraction"])
    close(metrics["actor/pg_clipfrac_lower"], case["dual_clip_fraction"])
    close(metrics["actor/ppo_kl"], case["ppo_kl"])


def random_batch(seed, num_rows=6, length=7, **without):
    """Logprobs, entropy and a batch with rows of different lengths, the last but one without a completion."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(3, length + 1, num_rows)
    starts = rng.integers(1, 3, num_rows)
    columns = np.arange(length)
    mask = ((columns >= starts[:, None]) & (columns < ends[:, None])).astype(np.float32)
    mask[-2] = 0
    logprobs, old, ref, sampler = -rng.exponential(size=(4, num_rows, length))
    advantages = rng.normal(size=(num_rows, 1)) * mask
    entropy = rng.exponential(size=mask.shape)
    fields = {"advantages": advantages, "sampler": sampler, "old": old, "ref": ref} | without
    segment_ids = jnp.asarray(columns < ends[:, None], jnp.int32)
    return array(logprobs), array(entropy), make_batch(mask, **fields).replace(segment_ids=segment_ids)


def pack(rows, *, fill):
    """Packs sequences two a row: rows 0 and 1 one after the other, 2 and 3, and so on.

    Args:
        rows: name -> [B, T] array with its padding on the right, "segment_ids" among them; B even.
        fill: what stands on the padding of arrays of log-probabilities, entropies and advantages.

    Returns:
        name -> [B / 2, 2 T]; the sequences of a row are numbered 1 and 2.
    """
    lengths = (np.asarray(rows["segment_ids"]) > 0).sum(axis=1)
    num_rows, width = np.shape(rows["segment_ids"])
    packed = {}
    for name, values in rows.items():
        values = np.asarray(values)
        must_be_zero = name in ("completion_mask", "weights") or values.dtype.kind == "i"
        packed[name] = np.full((num_rows // 2, 2 * width), 0 if must_be_zero else fill, values.dtype)
        for b, length in enumerate(lengths):
            start = lengths[b - 1] if b % 2 else 0
            part = (b % 2 + 1) if name == "segment_ids" else values[b, :length]
            packed[name][b // 2, start : start + length] = part
    return packed


def unpack(packed, segment_ids):
    """Undoes `pack` for one array: [B, T] from [B / 2, 2 T], 0 on the padding; segment_ids: before packing."""
    lengths = (np.asarray(segment_ids) > 0).sum(axis=1)
    rows = np.zeros(np.shape(segment_ids), np.float32)
    for b, length in enumerate(lengths):
        start = lengths[b - 1] if b % 2 else 0
        rows[b, :length] = np.asarray(packed)[b // 2, start : start + length]
    return rows
