"""Everything that the steps work with, built once: engine, jitted steps, prompts, and the state to start from."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.algorithm.advantages import Estimator
from grpo_jax.algorithm.loss import grpo_loss
from grpo_jax.config import Config
from grpo_jax.data.prompts import PromptIterator
from grpo_jax.learner.batching import micro_batch_shape
from grpo_jax.learner.memory import MemoryPlan, plan_memory
from grpo_jax.learner.offload import abstract_offloaded, on_host
from grpo_jax.learner.reference import Reference, make_reference_params
from grpo_jax.learner.update import (
    Score,
    UpdateStep,
    at_rest,
    init_state,
    make_optimizer,
    make_schedule,
    make_score_step,
    make_update_step,
    score_rows,
    state_shardings,
)
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.hf import ModelFolder, copy_side_files, load_params
from grpo_jax.model.sharding import abstract_like, num_batch_shards
from grpo_jax.model.transformer import abstract_params, param_shardings
from grpo_jax.rewards.base import Reward
from grpo_jax.rollout import RolloutEngine, make_engine, rollout_sampling
from grpo_jax.rollout.ahead import RolloutsAhead
from grpo_jax.rollout.dynamic import DynamicSampling, Scored
from grpo_jax.run.checkpoint import Checkpointer, Progress
from grpo_jax.run.metrics import Timers
from grpo_jax.run.prepare import Inputs
from grpo_jax.run.probe import Probe, make_probe
from grpo_jax.run.workdir import Workdir
from grpo_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Stages:
    """What the steps work with. All of it stays the same, or looks after its own state."""

    config: Config
    folder: ModelFolder
    mesh: Mesh
    inputs: Inputs
    prompts: PromptIterator
    engine: RolloutEngine
    rollouts: RolloutsAhead
    dynamic: DynamicSampling | None
    """Takes from `rollouts`; None: a batch is what was sampled."""
    probe: Probe | None
    """Compares engine and trainer; None where both are one."""
    reward: Reward
    estimator: Estimator
    score: Score
    update: UpdateStep
    shape: tuple[int, int]
    """[R, T] of every micro-batch."""
    reference: Reference
    memory_plan: MemoryPlan
    timers: Timers
    num_steps: int


def derive_seed(seed: int, step: int, purpose: str) -> int:
    """A seed of its own for each step and purpose, below 2**31."""
    words = [seed, step, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1)[0]) & 0x7FFFFFFF


def start_engine(config: Config, inputs: Inputs, folder: ModelFolder, mesh: Mesh) -> RolloutEngine:
    """The rollout engine, which may go on starting while the trainer loads. The caller closes it."""
    return make_engine(
        config.rollout,
        folder=folder,
        mesh=mesh,
        tokenizer=inputs.tokenizer,
        max_model_len=config.data.max_prompt_length + config.data.max_response_length,
    )


def give_weights(stages: Stages, params: Params, version: int, *, is_first: bool = False) -> None:
    """Gives the engine the policy's weights, and compares both where that is due.

    Raises: WeightSyncError: the weights did not arrive, or the engine computes something else with them.
    """
    with stages.timers("update_weights"):
        stages.engine.load_weights(params, version=version)
    every = stages.config.rollout.probe_every
    if stages.probe is not None and (is_first or (every and version % every == 0)):
        with stages.timers("probe"):
            stages.probe(stages.engine, params)


def build_stages(
    config: Config,
    workdir: Workdir,
    inputs: Inputs,
    folder: ModelFolder,
    mesh: Mesh,
    reward: Reward,
    estimator: Estimator,
    engine: RolloutEngine,
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
    state, ref_params, progress = _begin(config, workdir, folder, optimizer, mesh, checkpointer)
    if progress is not None:
        prompts.restore(progress.prompt_iterator)
    is_dynamic = config.algorithm.dynamic_sampling_rounds > 0
    rollouts = RolloutsAhead(
        prompts,
        engine,
        rollout_sampling(config),
        lambda number: derive_seed(config.trainer.seed, number, "rollout"),
        max_lag=config.rollout.max_lag,
        first_step=progress.num_rollout_batches if progress else 0,
        # How many batches dynamic sampling will want is not known before: the last steps may ask for some in vain.
        num_steps=sys.maxsize if is_dynamic else num_steps,
    )
    dynamic = make_dynamic(config, rollouts, reward, timers) if is_dynamic else None
    if dynamic is not None and progress is not None:
        dynamic.restore(progress.surplus, inputs.train_prompts)
    kl_coef = progress.kl_coef if progress else config.algorithm.kl_coef
    score = make_score_step(model, mesh, **common)
    shape = micro_batch_shape(config, config.completions_per_update, num_batch_shards(mesh))
    stages = Stages(
        config=config,
        folder=folder,
        mesh=mesh,
        inputs=inputs,
        prompts=prompts,
        engine=engine,
        rollouts=rollouts,
        dynamic=dynamic,
        probe=_make_probe(config, inputs, score, shape, mesh),
        reward=reward,
        estimator=estimator,
        score=score,
        update=make_update_step(
            model,
            mesh,
            optimizer,
            schedule,
            functools.partial(grpo_loss, algorithm=config.algorithm),
            optim=config.optim,
            **common,
        ),
        shape=shape,
        reference=Reference(
            ref_params, config.algorithm, model.dtype, param_shardings(model, mesh), kl_coef=kl_coef
        ),
        memory_plan=plan_memory(config, model, mesh),
        timers=timers,
        num_steps=num_steps,
    )
    return stages, state, progress.global_step if progress else None


def _begin(
    config: Config,
    workdir: Workdir,
    folder: ModelFolder,
    optimizer: Any,
    mesh: Mesh,
    checkpointer: Checkpointer,
) -> tuple[TrainState, Params, Progress | None]:
    """State and reference parameters to begin with: new, or of the latest checkpoint, then with its progress."""
    model, is_new, params, ref_params = folder.config, checkpointer.latest_step is None, None, None
    is_refreshed = config.algorithm.ref_refresh_every > 0  # and saved then
    needs_reference = config.uses_reference and (is_new or not is_refreshed)
    if is_new or needs_reference:
        params = load_params(folder, at_rest(model, config.optim), mesh)
    if needs_reference:
        shardings = param_shardings(model, mesh)
        ref_params = make_reference_params(params, config.algorithm, model.dtype, shardings)
    if is_new:
        workdir.model_files.mkdir(exist_ok=True)  # there, but perhaps not complete, after a crash
        copy_side_files(folder.path, workdir.model_files)
        state = init_state(params, model, optimizer, mesh, offload=config.optim.offload)
        return state, ref_params, None
    del params  # before the restored ones come
    state, progress, restored = checkpointer.restore(
        abstract_state(config, model, optimizer, mesh),
        abstract_reference(config, model, mesh) if is_refreshed else None,
    )
    return state, restored if is_refreshed else ref_params, progress


def make_dynamic(config: Config, rollouts: RolloutsAhead, reward: Reward, timers: Timers) -> DynamicSampling:
    """Dynamic sampling whose rounds are the batches of `rollouts`, in their order."""

    def next_round() -> Scored:
        with timers("gen"):
            groups = rollouts.take()
        with timers("reward"):
            return groups, reward.score(groups)

    rounds = config.algorithm.dynamic_sampling_rounds
    return DynamicSampling(next_round, num_groups=config.data.train_batch_size, max_rounds=rounds)


def _make_probe(
    config: Config, inputs: Inputs, score: Score, shape: tuple[int, int], mesh: Mesh
) -> Probe | None:
    if config.rollout.engine == "local":  # the trainer's own parameters and functions
        return None
    return make_probe(
        inputs.train_prompts,
        rollout_sampling(config),
        functools.partial(score_rows, score, shape=shape, mesh=mesh),
        threshold=config.rollout.probe_threshold,
        pad_id=inputs.tokenizer.pad_token_id or 0,
    )


def abstract_state(config: Config, model: ModelConfig, optimizer: Any, mesh: Mesh) -> TrainState:
    """Shape, dtype and sharding of every leaf of the train state."""
    offload = config.optim.offload
    params = abstract_params(at_rest(model, config.optim))[0]
    shapes = TrainState(
        step=jax.ShapeDtypeStruct((), np.int32),  # type: ignore[arg-type]
        params=params,
        opt_state=abstract_offloaded(model, optimizer) if offload else jax.eval_shape(optimizer.init, params),
    )
    return abstract_like(shapes, state_shardings(model, optimizer, mesh, offload=offload))


def abstract_reference(config: Config, model: ModelConfig, mesh: Mesh) -> Params:
    """Shape, dtype and sharding of the parameters of a reference that is saved."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, model.dtype), abstract_params(model)[0])
    shardings = param_shardings(model, mesh)
    return abstract_like(shapes, on_host(shardings) if config.algorithm.ref_offload else shardings)
