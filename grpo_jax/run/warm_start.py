"""Supervised fine-tuning on worked examples, before GRPO: the same model, batches and update."""

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from grpo_jax.algorithm.loss import nll_loss
from grpo_jax.config import Config, OptimSection
from grpo_jax.learner import make_optimizer
from grpo_jax.learner.batching import add_loss_weights, make_sft_batch
from grpo_jax.learner.forward import make_forward_step, to_micro_batches
from grpo_jax.learner.packing import micro_batch_shape
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.hf import ModelFolder, param_readers, save_folder
from grpo_jax.model.sharding import fetch, num_batch_shards

logger = logging.getLogger(__name__)

SKIPPED = ("actor/skipped_updates", "actor/overflows")
"""Metrics of updates that changed nothing."""

Example = tuple[Sequence[int], Sequence[int]]
"""(prompt ids, response ids)"""


def warm_start(
    config: Config,
    folder: ModelFolder,
    tokenizer: Any,
    examples: Sequence[Example],
    mesh: Mesh,
    *,
    target: Path,
) -> float:
    """Fine-tunes the model of `folder` on the responses of `examples` and writes it to `target`.

    Returns: the loss of the last update, nats a token.
    Raises:  FloatingPointError: it is not finite.
    """
    section, optim = config.sft, warm_start_optim(config)
    model = folder.config
    shape = micro_batch_shape(config, section.batch_size, num_batch_shards(mesh))
    batches = _example_batches(examples, section.batch_size, [config.trainer.seed, 1])
    logger.info("warm start: %d updates of %d examples", section.num_steps, section.batch_size)
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(optim, model, mesh, section.num_steps)
        state = optimizer.init_state(param_readers(folder, model, mesh))
        chunk_tokens = config.actor.logits_chunk_tokens
        forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=chunk_tokens)
        update = make_update_step(model, mesh, optimizer, forward, nll_loss, optim=optim)
        steps, lost = range(1, section.num_steps + 1), []
        for step in tqdm(steps, desc="warm start", unit="update", disable=None, leave=False):
            batch = make_sft_batch(next(batches), pad_id=tokenizer.pad_token_id or 0)
            batch = add_loss_weights(batch, "token-mean", 1.0)
            state, metrics = update(state, to_micro_batches(batch, shape, mesh)[0])
            lost += [metrics[name] for name in SKIPPED if name in metrics]
            if step % max(1, section.num_steps // 5) == 0:
                logger.info("  update %d/%d: loss=%.3f", step, section.num_steps, metrics["actor/loss"])
        loss = float(metrics["actor/loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the warm start's loss is {loss}; lower sft.learning_rate")
        _check_lost(int(sum(fetch(lost))), section.num_steps, config)
        save_folder(target, optimizer.masters(state), model, files_from=folder.path, dtype=folder.dtype)
    logger.info("warm-started model: %s", target)
    return loss


def _check_lost(num_lost: int, num_steps: int, config: Config) -> None:
    """Raises: FloatingPointError: all updates were skipped."""
    if not num_lost:
        return
    cure = "optim.loss_scale" if config.model.dtype == "float16" else "sft.learning_rate"
    text = f"{num_lost} of {num_steps} updates of the warm start had gradients that were not finite"
    if num_lost == num_steps:
        raise FloatingPointError(f"{text}, and nothing was trained; lower {cure}")
    logger.warning("WARNING: %s, and were skipped; a lower %s may help", text, cure)


def warm_start_optim(config: Config) -> OptimSection:
    """The optimizer of the warm start: the run's, with a learning rate and a schedule of its own."""
    section = config.sft
    return dataclasses.replace(
        config.optim,
        learning_rate=section.learning_rate,
        schedule="cosine",
        warmup_steps=max(1, section.num_steps // 10),
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,
    )


def _example_batches(examples: Sequence[Example], size: int, seed: Sequence[int]) -> Iterator[list[Example]]:
    """Endless batches, permuted anew for every pass over the examples."""
    rng, order = np.random.default_rng(seed), np.empty(0, np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, rng.permutation(len(examples))])
        chosen, order = order[:size], order[size:]
        yield [examples[i] for i in chosen]
