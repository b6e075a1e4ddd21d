"""Supervised fine-tuning on worked examples, as a warm start: the same model, batches and update as GRPO.

    python -m grpo_jax.sft --config=configs/quickstart.py

writes the Hugging Face folder WORKDIR/sft-model. `train` does the same by itself where sft.num_steps > 0.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from grpo_jax.algorithm.loss import nll_loss
from grpo_jax.config import Config
from grpo_jax.learner.batching import add_loss_weights, make_sft_batch, micro_batch_shape
from grpo_jax.learner.update import (
    at_rest,
    init_state,
    make_optimizer,
    make_schedule,
    make_update_step,
    to_micro_batches,
)
from grpo_jax.model.hf import ModelFolder, load_params, save_folder
from grpo_jax.model.sharding import num_batch_shards

logger = logging.getLogger("grpo_jax.sft")  # __name__ is "__main__" when run as a command


def warm_start(
    config: Config,
    folder: ModelFolder,
    tokenizer: Any,
    examples: Sequence[tuple[Sequence[int], Sequence[int]]],
    mesh: Mesh,
    *,
    target: Path,
) -> float:
    """Fine-tunes the model of `folder` on `examples` and writes it to `target`.

    Args:    examples: (prompt ids, response ids); the response is what is learned.
    Returns: the loss of the last update, nats a token.
    Raises:  FloatingPointError: it is not finite.
    """
    section = config.sft
    optim = dataclasses.replace(
        config.optim,
        learning_rate=section.learning_rate,
        schedule="cosine",
        warmup_steps=max(1, section.num_steps // 10),
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.0,
    )
    schedule = make_schedule(optim, section.num_steps)
    optimizer = make_optimizer(optim, schedule)
    rng = np.random.default_rng([config.trainer.seed, 1])
    pad_id = tokenizer.pad_token_id or 0
    with jax.set_mesh(mesh):
        params = load_params(folder, at_rest(folder.config, optim), mesh)
        state = init_state(params, folder.config, optimizer, mesh, offload=optim.offload)
        update = make_update_step(
            folder.config,
            mesh,
            optimizer,
            schedule,
            nll_loss,
            optim=optim,
            temperature=1.0,
            chunk_tokens=config.actor.logits_chunk_tokens,
        )
        shape = micro_batch_shape(config, section.batch_size, num_batch_shards(mesh))
        order = np.empty(0, np.int64)
        logger.info("warm start: %d updates of %d examples", section.num_steps, section.batch_size)
        for step in tqdm(
            range(section.num_steps), desc="warm start", unit="update", disable=None, leave=False
        ):
            while len(order) < section.batch_size:  # a new permutation for every pass over the examples
                order = np.concatenate([order, rng.permutation(len(examples))])
            chosen, order = order[: section.batch_size], order[section.batch_size :]
            batch = make_sft_batch([examples[i] for i in chosen], pad_id=pad_id)
            batch = add_loss_weights(batch, "token-mean", 1.0)
            state, metrics = update(state, to_micro_batches(batch, shape, mesh)[0])
            if (step + 1) % max(1, section.num_steps // 5) == 0:
                logger.info("  update %d/%d: loss=%.3f", step + 1, section.num_steps, metrics["actor/loss"])
        loss = float(metrics["actor/loss"])
        if not math.isfinite(loss):
            raise FloatingPointError(f"the warm start's loss is {loss}; lower sft.learning_rate")
        save_folder(target, state.params, folder.config, files_from=folder.path, dtype=folder.dtype)
    logger.info("warm-started model: %s", target)
    return loss


def main() -> None:
    from grpo_jax.config import ConfigError
    from grpo_jax.config.command_line import one_line_errors, parse_command_line
    from grpo_jax.run.prepare import (
        keep_compiled,
        make_model,
        make_room_on_host,
        open_mesh,
        read_inputs,
        set_determinism,
    )
    from grpo_jax.run.workdir import Workdir, start_logging

    with one_line_errors():
        config, path = parse_command_line("grpo_jax.sft", __doc__)
        workdir = Workdir(path)
        if not config.sft.num_steps:
            raise ConfigError("sft.num_steps", 0, "must be above 0 to fine-tune")
        if workdir.sft_model.exists():
            raise ConfigError("--workdir", str(path), f"already holds {workdir.sft_model.name}")
        workdir.check(config)
        start_logging()
        inputs = read_inputs(config, workdir)
        set_determinism(config.trainer)
        make_room_on_host(config, inputs.model_config)
        mesh = open_mesh(config)
        keep_compiled(config.trainer)
        workdir.open(config)
        try:
            make_model(config, inputs, workdir, mesh)
        except FloatingPointError as error:
            raise SystemExit(f"error: {error}") from None  # exit code 1


if __name__ == "__main__":
    main()
