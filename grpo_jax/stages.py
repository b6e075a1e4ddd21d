"""Everything that the steps work with, built once: engine, jitted steps, prompts, and the state to start from."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.checkpoint import Checkpointer, abstract_like
from grpo_jax.config import Config
from grpo_jax.losses import grpo_loss
from grpo_jax.metrics import Timers
from grpo_jax.model.hf import ModelFolder, copy_side_files, load_params
from grpo_jax.model.transformer import ModelConfig, abstract_params
from grpo_jax.prepare import Inputs
from grpo_jax.prompts import PromptIterator
from grpo_jax.rewards.base import Reward
from grpo_jax.rollout import RolloutEngine, make_engine
from grpo_jax.types import Metrics, Params, TrainBatch, TrainState
from grpo_jax.update import (
    copy_params,
    init_state,
    make_optimizer,
    make_schedule,
    make_score_step,
    make_update_step,
    state_shardings,
)
from grpo_jax.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the steps work with. All of it stays the same, or looks after its own state."""

    config: Config
    folder: ModelFolder
    mesh: Mesh
    inputs: Inputs
    prompts: PromptIterator
    engine: RolloutEngine
    reward: Reward
    score: Callable[[Params, TrainBatch], jax.Array]
    update: Callable[[TrainState, TrainBatch], tuple[TrainState, Metrics]]
    ref_params: Params
    timers: Timers
    num_steps: int


def build_stages(
    config: Config,
    workdir: Workdir,
    inputs: Inputs,
    folder: ModelFolder,
    mesh: Mesh,
    reward: Reward,
    timers: Timers,
    checkpointer: Checkpointer,
) -> tuple[Stages, TrainState, int | None]:
    """Builds the stages; the state is new, or restored and then with the step that it was saved after."""
    model = folder.config
    prompts = PromptIterator(
        inputs.train_prompts,
        batch_size=config.data.train_batch_size,
        seed=config.trainer.seed,
        shuffle=config.data.shuffle,
    )
    num_steps = config.trainer.total_epochs * prompts.steps_per_epoch
    num_steps = min(num_steps, config.trainer.num_steps or num_steps)
    schedule = make_schedule(config.optim, num_steps * config.updates_per_step)
    optimizer = make_optimizer(config.optim, schedule)
    common: dict[str, Any] = dict(
        temperature=config.rollout.temperature, chunk_tokens=config.actor.logits_chunk_tokens
    )
    params = load_params(folder, model, mesh)
    stages = Stages(
        config=config,
        folder=folder,
        mesh=mesh,
        inputs=inputs,
        prompts=prompts,
        engine=make_engine(
            config.rollout,
            model=model,
            mesh=mesh,
            tokenizer=inputs.tokenizer,
            eos_token_ids=folder.eos_token_ids,
        ),
        reward=reward,
        score=make_score_step(model, mesh, **common),
        update=make_update_step(
            model,
            mesh,
            optimizer,
            schedule,
            functools.partial(grpo_loss, algorithm=config.algorithm),
            loss_agg=config.algorithm.loss_agg,
            loss_norm=config.loss_norm,
            **common,
        ),
        ref_params=copy_params(params, model.dtype) if config.uses_reference else None,
        timers=timers,
        num_steps=num_steps,
    )
    if checkpointer.latest_step is None:
        workdir.model_files.mkdir(exist_ok=True)  # there, but perhaps not complete, after a crash
        copy_side_files(folder.path, workdir.model_files)
        state, first = init_state(params, model, optimizer, mesh), None
        version = 0
    else:
        del params  # before the restored ones come
        state, progress = checkpointer.restore(abstract_state(model, optimizer, mesh))
        prompts.restore(progress.prompt_iterator)
        first, version = progress.global_step, progress.policy_version
    stages.engine.load_weights(state.params, version=version)
    return stages, state, first


def abstract_state(model: ModelConfig, optimizer: Any, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the train state."""
    params = abstract_params(model)[0]
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), np.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=jax.eval_shape(optimizer.init, params),
    )
    return abstract_like(shapes, state_shardings(model, optimizer, mesh))
