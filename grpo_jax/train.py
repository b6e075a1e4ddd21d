"""GRPO training, from a configuration to a Hugging Face folder.

    python -m grpo_jax.train --config=FILE.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

One step (`grpo_step`), in seven sentences:

1. `prompts.py` takes the next P prompts from a shuffled dataset over Parquet.
2. `rollout/` asks the rollout engine for G completions each, with the log-probability of every token.
3. `rewards/` turns (prompt, completion) into a number.
4. `advantages.py` turns rewards [P, G] into advantages [P, G].
5. `batching.py` packs the completions into a `TrainBatch`; `losses.py` is the mathematics.
6. `update.py` holds the jitted steps: score (old and reference log-probabilities) and update.
7. `weight_sync/` gives the new weights to the engine; `checkpoint.py` saves, `metrics.py` reports.

The same command goes on where a run stopped: by itself, by Ctrl-C or by a crash.
"""

import contextlib
import dataclasses
import functools
import logging
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm.advantages import estimate_advantages
from grpo_jax.algorithm.kl import kl_of_tokens
from grpo_jax.config import Config
from grpo_jax.config.command_line import one_line_errors, parse_command_line
from grpo_jax.config.user_code import load_estimator
from grpo_jax.evaluate import evaluate, rollout_records, write_jsonl
from grpo_jax.learner.batching import (
    add_advantages,
    add_loss_weights,
    batch_table,
    keep_completions,
    make_sft_batch,
    make_train_batch,
    split_minibatches,
)
from grpo_jax.learner.update import score_rows, to_micro_batches
from grpo_jax.model.hf import save_folder
from grpo_jax.model.sharding import num_batch_shards
from grpo_jax.model.transformer import num_params
from grpo_jax.rewards import make_reward
from grpo_jax.rewards.base import RewardResult
from grpo_jax.rollout import check_devices, check_engine, eval_sampling
from grpo_jax.rollout.dynamic import Scored
from grpo_jax.run import summary as report
from grpo_jax.run.checkpoint import Checkpointer, Progress
from grpo_jax.run.metrics import MetricsWriter, Timers, merge_updates, performance_metrics, rollout_metrics
from grpo_jax.run.prepare import (
    keep_compiled,
    make_model,
    make_room_on_host,
    open_mesh,
    read_inputs,
    set_determinism,
    share_gpus,
)
from grpo_jax.run.stages import Stages, build_stages, derive_seed, give_weights, start_engine
from grpo_jax.run.stopping import RunWatch, reported_failure, stop_on_signal
from grpo_jax.run.workdir import Workdir, start_logging
from grpo_jax.types import Metrics, Params, RolloutGroup, TrainBatch, TrainState

logger = logging.getLogger("grpo_jax.train")  # __name__ is "__main__" when run as a command


@dataclasses.dataclass(frozen=True)
class StepResult:
    groups: list[RolloutGroup]
    rewards: np.ndarray
    """[P, G] float32."""
    dropped: Scored
    """Groups that were sampled and are not trained on: dynamic sampling."""
    updates: list[Metrics]
    metrics: Metrics


def grpo_step(stages: Stages, state: TrainState, step: int) -> tuple[TrainState, StepResult]:
    """Step number `step`, counted from 0: prompts, rollouts, rewards, advantages, updates, new weights."""
    groups, scored, dropped, sampled = sample(stages)
    batch = make_train_batch(groups, pad_id=stages.inputs.tokenizer.pad_token_id or 0, max_length=None)
    batch = with_host_logprobs(stages, state.params, batch)
    batch, penalty = with_advantages(stages, batch, scored.rewards)
    batch = with_loss_terms(stages, batch, groups)
    state, updates = run_updates(stages, state, batch, step)
    give_weights(stages, state.params, version=step + 1)
    metrics = rollout_metrics(groups, scored, stages.config) | sampled | merge_updates(updates) | penalty
    metrics |= update_reference(stages, state.params, metrics, step + 1)
    metrics["training/policy_lag"] = step - metrics["training/policy_version"]
    metrics["reward/num_errors"] = len(scored.errors)
    _log_reward_errors(scored.errors)
    return state, StepResult(groups, scored.rewards, dropped, updates, metrics)


def sample(stages: Stages) -> tuple[list[RolloutGroup], RewardResult, Scored, Metrics]:
    """The groups of a step and their rewards; with dynamic sampling also those that are left out, and numbers."""
    if stages.dynamic is not None:
        batch = stages.dynamic.take()
        stages.engine.sleep()
        return batch.groups, batch.rewards, batch.dropped, batch.metrics
    with stages.timers("gen"):
        groups = stages.rollouts.take()
        stages.engine.sleep()
    with stages.timers("reward"):
        scored = stages.reward.score(groups)
    return groups, scored, ([], scored.take([])), {}


def with_host_logprobs(stages: Stages, params: Params, batch: TrainBatch) -> TrainBatch:
    """Adds the old and the reference log-probabilities where the rewards, which come first, hold a KL penalty."""
    config = stages.config
    if config.algorithm.kl_in != "reward":
        return batch
    score = functools.partial(score_rows, stages.score, batch=batch, shape=stages.shape, mesh=stages.mesh)
    old: Any = batch.sampler_logprobs
    if config.needs_old_logprobs:
        with stages.timers("old_log_prob"):
            old = score(stages.update.cast(params))
    with stages.timers("ref"):
        ref: Any = score(stages.reference.on_device())
    return dataclasses.replace(batch, old_logprobs=old, ref_logprobs=ref)


def with_advantages(stages: Stages, batch: TrainBatch, rewards: np.ndarray) -> tuple[TrainBatch, Metrics]:
    """Adds the advantages, from rewards less the KL penalty where it belongs to them; and its metric."""
    algorithm, mask = stages.config.algorithm, np.asarray(batch.completion_mask)
    penalties, metrics = None, {}
    if algorithm.kl_in == "reward":
        assert (
            batch.old_logprobs is not None and batch.ref_logprobs is not None
        )  # the config's rules see to it
        kl = np.asarray(
            kl_of_tokens(
                batch.old_logprobs, batch.ref_logprobs, batch.completion_mask, algorithm.kl_estimator
            )
        )
        penalties = np.float32(stages.reference.kl_coef) * kl
        metrics["kl/reward_penalty"] = float((kl.sum(axis=1) / mask.sum(axis=1)).mean())
    advantages = estimate_advantages(rewards, mask, penalties, algorithm.adv_estimator, stages.estimator)
    return add_advantages(batch, advantages), metrics


def with_loss_terms(stages: Stages, batch: TrainBatch, groups: Sequence[RolloutGroup]) -> TrainBatch:
    """Leaves truncated completions out of the loss where configured; adds the KL's coefficient where it moves."""
    if stages.config.algorithm.mask_truncated:
        is_kept = np.array([c.finish_reason != "length" for group in groups for c in group.completions])
        batch = keep_completions(batch, is_kept)
    return with_kl_coef(stages, batch)


def with_kl_coef(stages: Stages, batch: TrainBatch) -> TrainBatch:
    """Adds the coefficient of the KL in the loss, where it changes from step to step."""
    if not stages.reference.is_adaptive or stages.config.algorithm.kl_in != "loss":
        return batch
    # On every token: the scalar has to follow its rows wherever they are placed or packed.
    coef: Any = np.full(batch.tokens.shape, stages.reference.kl_coef, np.float32)
    return dataclasses.replace(batch, kl_coef=coef)


def update_reference(stages: Stages, params: Params, metrics: Metrics, steps_done: int) -> Metrics:
    """Adapts the coefficient of the KL and refreshes the reference, where configured; returns their metrics."""
    reference = stages.reference
    changed: Metrics = {}
    if reference.is_adaptive:
        changed["kl/coef"] = reference.kl_coef
        kl = metrics["kl/reward_penalty"] if "kl/reward_penalty" in metrics else metrics["kl/mean"]
        reference.adapt(kl, stages.config.completions_per_step)
    if reference.is_refreshed:
        changed["kl/is_refreshed"] = int(reference.refresh(params, steps_done))
    return changed


def run_updates(
    stages: Stages, state: TrainState, batch: TrainBatch, step: int
) -> tuple[TrainState, list[Metrics]]:
    """One optimizer step a mini-batch, `num_epochs` times over the same mini-batches.

    With one update a step the old log-probabilities are the update's own; the sampler's came with the
    completions. Devices are kept busy: all is asked for before anything is waited for, and that is done in
    order, which gives the timers each phase's part.
    """
    config, timers = stages.config, stages.timers
    minibatches = split_minibatches(batch, config.actor.num_minibatches, seed=(config.trainer.seed, step))
    placed = [_place(stages, minibatch) for minibatch in minibatches]
    scored = {}  # phase -> field
    if config.needs_old_logprobs and batch.old_logprobs is None:
        scored["old_log_prob"] = "old_logprobs"
        with timers("old_log_prob"):
            # Nothing here may hold on to the cast copy, which would stay in memory during the updates.
            placed = _score(stages, stages.update.cast(state.params), placed, "old_logprobs")
    if config.uses_reference and batch.ref_logprobs is None:
        scored["ref"] = "ref_logprobs"
        with timers("ref"):
            placed = _score(stages, stages.reference.on_device(), placed, "ref_logprobs")
    metrics = []
    with timers("update_actor"):
        for minibatch in placed * config.actor.num_epochs:
            state, update_metrics = stages.update(state, minibatch)
            metrics.append(update_metrics)
    for phase, field in scored.items():
        with timers(phase):
            jax.block_until_ready([getattr(micro, field) for minibatch in placed for micro in minibatch])
    with timers("update_actor"):
        return state, jax.device_get(metrics)


def warm_up(stages: Stages, state: TrainState) -> TrainState:
    """Compiles the steps, while the engine may still be starting, and finds out whether they fit the memory.

    They run on completions whose advantage is not a number: such an update changes nothing.
    """
    config = stages.config
    examples = [([0], [0])] * config.actor.num_minibatches
    batch = make_sft_batch(examples, pad_id=0)
    batch = with_kl_coef(stages, with_host_logprobs(stages, state.params, batch))
    batch = add_advantages(batch, np.full((len(examples), 1), np.nan, np.float32))
    state, _ = run_updates(stages, state, batch, step=0)
    stages.timers.collect()
    return state


def _place(stages: Stages, minibatch: TrainBatch) -> list[TrainBatch]:
    """A mini-batch, packed, on the devices."""
    algorithm = stages.config.algorithm
    if algorithm.old_logprobs == "sampler":
        minibatch = dataclasses.replace(minibatch, old_logprobs=minibatch.sampler_logprobs)
    minibatch = add_loss_weights(minibatch, algorithm.loss_agg, stages.config.loss_norm)
    return to_micro_batches(minibatch, stages.shape, stages.mesh)[0]


def _score(
    stages: Stages, params: Params, placed: list[list[TrainBatch]], field: str
) -> list[list[TrainBatch]]:
    """Puts the log-probabilities under `params` into a field of every micro-batch; they stay on the devices."""
    score = lambda micro: dataclasses.replace(micro, **{field: stages.score(params, micro)})
    return [[score(micro) for micro in minibatch] for minibatch in placed]


# ---- the run around the steps ----


def train(config: Config, path: Path) -> None:
    """Runs the whole training of a configuration in the workdir `path`, or what is left of it.

    Raises:
        ConfigError: something about the configuration or its files is wrong; nothing was written.
        SystemExit: 1 after a failure, 130 after Ctrl-C; a checkpoint is left in both cases.
    """
    workdir = Workdir(path)
    workdir.check(config)
    start_logging()
    # Until the steps begin, where both wait for the end of a step, SIGTERM is Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    check_engine(config.rollout)
    inputs = read_inputs(config, workdir)
    set_determinism(config.trainer)
    share_gpus(config.rollout)
    make_room_on_host(config, inputs.model_config)
    estimator = load_estimator(config.algorithm.adv_estimator)
    limit = config.data.max_response_length
    with make_reward(config.reward, max_response_length=limit) as reward, contextlib.ExitStack() as stack:
        mesh = open_mesh(config)
        check_devices(config.rollout, mesh)
        keep_compiled(config.trainer)
        workdir.open(config)
        timers = Timers()
        checkpointer = Checkpointer(
            workdir.checkpoints, config.checkpoint.max_to_keep, is_offloaded=config.optim.offload
        )
        stack.callback(checkpointer.close)
        with reported_failure(timers, checkpointer), jax.set_mesh(mesh):
            folder = make_model(config, inputs, workdir, mesh)
            engine = start_engine(config, inputs, folder, mesh)
            stack.callback(engine.close)
            # With rollout.sleep both do not fit side by side: it starts and sleeps before anything is loaded.
            engine.sleep()
            stages, state, first = build_stages(
                config, workdir, inputs, folder, mesh, reward, estimator, engine, timers, checkpointer
            )
            workdir.record(config)
            state = warm_up(stages, state)
            give_weights(stages, state.params, version=first or 0, is_first=True)
            writer = MetricsWriter(workdir, config, resume_step=first)
            stack.callback(writer.close)
            _print_plan(stages, workdir, first)
            _run_steps(stages, state, first, workdir, checkpointer, writer)


def _run_steps(
    stages: Stages,
    state: TrainState,
    first: int | None,
    workdir: Workdir,
    checkpointer: Checkpointer,
    writer: MetricsWriter,
) -> None:
    """Validation before training, every step with what is due after it, and the report at the end."""
    config, per_epoch = stages.config, stages.prompts.steps_per_epoch
    if first is None and config.eval.before_training:
        metrics = _validate(stages, workdir, writer, step=0)
        logger.info("Before training: val_accuracy=%.4g", metrics["val/accuracy"])
        writer.write(metrics | stages.timers.collect(), step=0, epoch=0)
    watch = RunWatch(config.trainer, stages.reward)
    with stop_on_signal() as stop:
        for step in range(first or 0, stages.num_steps):
            done, epoch = step + 1, step // per_epoch + 1
            with stages.timers("step"):
                state, result = grpo_step(stages, state, step)
            metrics = result.metrics | {"training/global_step": done, "training/epoch": epoch}
            if _is_due(done, config.eval.every_steps, config.eval.every_epochs, stages):
                metrics |= _validate(stages, workdir, writer, step=done)
            timings = stages.timers.collect()
            lengths = np.array([len(g.prompt.token_ids) + len(c.token_ids)
                                for g in result.groups for c in g.completions])  # fmt: skip
            devices = stages.mesh.devices.size
            metrics |= timings | performance_metrics(stages.folder.config, lengths, devices, timings)
            metrics["perf/memory_planned_gb"] = stages.memory_plan.peak / 1e9
            watch.look(result.groups, result.rewards, result.updates)
            stopping = stop.requested  # read once: what is asked for after saving is for the next step
            # While updates are skipped, the checkpoint from before the trouble is the good one.
            must_save = (stopping or done == stages.num_steps) and not watch.is_lost
            if watch.is_healthy or must_save:
                _save(stages, state, done, workdir, checkpointer, stopping)
            metrics |= stages.timers.collect()
            _report_step(stages, result, metrics, done, epoch, workdir, writer)
            watch.stop_if_lost()
            if stopping and done < stages.num_steps:
                checkpointer.wait()
                logger.info("Stopped after step %d; everything is saved. The same command goes on.", done)
                raise SystemExit(130)
    checkpointer.wait()
    report.print_report(config, workdir, _final_model(stages, workdir))


def _is_due(done: int, every_steps: int, every_epochs: int, stages: Stages) -> bool:
    """True after each `every_steps` steps and `every_epochs` epochs (0: never); at the end if either is set."""
    every = every_epochs * stages.prompts.steps_per_epoch
    at_end = done == stages.num_steps and bool(every_steps or every)
    return at_end or bool(every_steps and done % every_steps == 0) or bool(every and done % every == 0)


def _validate(stages: Stages, workdir: Workdir, writer: MetricsWriter, *, step: int) -> Metrics:
    config = stages.config
    with stages.timers("testing"):
        result = evaluate(
            stages.engine,
            stages.inputs.val_prompts,
            stages.reward,
            eval_sampling(config),
            seed=derive_seed(config.trainer.seed, step, "validation"),
            progress="validation",
        )
    records = result.records()
    write_jsonl(workdir.validation / f"step-{step:06d}.jsonl", records)
    texts = [_show(r) for r in records[: config.logging.num_text_samples]]
    writer.write_text("val/completions", texts, step=step)
    _log_reward_errors(result.errors)
    summary = {name: value for name, value in result.summary().items() if name != "num"}
    return {f"val/{name}": value for name, value in (summary | {"num_errors": len(result.errors)}).items()}


def _log_reward_errors(errors: Sequence[str]) -> None:
    for error in errors:
        logger.warning("reward error, counted as 0: %s", error)


def _save(
    stages: Stages, state: TrainState, done: int, workdir: Workdir, checkpointer: Checkpointer, stopping: bool
) -> None:
    """Writes the Hugging Face folder and the checkpoint that are due after step `done`."""
    section, per_epoch = stages.config.checkpoint, stages.prompts.steps_per_epoch
    is_last = done == stages.num_steps
    with stages.timers("save_checkpoint"):
        every = section.hf_every_epochs * per_epoch
        if is_last or (every and done % every == 0):
            target = workdir.epoch_model(done // per_epoch) if done % per_epoch == 0 else workdir.final_model
            save_folder(
                target,
                state.params,
                stages.folder.config,
                files_from=workdir.model_files,
                dtype=stages.folder.dtype,
            )
        if stopping or is_last or _is_due(done, section.every_steps, section.every_epochs, stages):
            progress = Progress(
                global_step=done,
                policy_version=done,
                seed=stages.config.trainer.seed,
                prompt_iterator=stages.rollouts.state(),
                hf_dtype=stages.folder.dtype,
                num_rollout_batches=stages.rollouts.num_taken,
                surplus=[] if stages.dynamic is None else stages.dynamic.state(),
                kl_coef=stages.reference.kl_coef,
            )
            reference = stages.reference.params if stages.reference.is_refreshed else None
            checkpointer.save(state, progress, reference)


def _report_step(
    stages: Stages,
    result: StepResult,
    metrics: Metrics,
    done: int,
    epoch: int,
    workdir: Workdir,
    writer: MetricsWriter,
) -> None:
    per_epoch, section = stages.prompts.steps_per_epoch, stages.config.logging
    writer.write(metrics, step=done, epoch=epoch)
    writer.console(metrics, epoch=epoch, step=(done - 1) % per_epoch + 1, steps_per_epoch=per_epoch)
    records = rollout_records(result.groups, result.rewards)
    writer.write_text("rollouts", [_show(r) for r in records[: section.num_text_samples]], step=done)
    if section.save_rollouts:
        groups, rewards = result.dropped
        dropped = [record | {"is_dropped": True} for record in rollout_records(groups, rewards.rewards)]
        write_jsonl(workdir.rollouts / f"step-{done:06d}.jsonl", [*records, *dropped])


def _final_model(stages: Stages, workdir: Workdir) -> Path:
    epochs, rest = divmod(stages.num_steps, stages.prompts.steps_per_epoch)
    return workdir.final_model if rest else workdir.epoch_model(epochs)


def _print_plan(stages: Stages, workdir: Workdir, first: int | None) -> None:
    shards = num_batch_shards(stages.mesh)
    rows = [
        ("model", f"{stages.folder.path} ({num_params(stages.folder.config):,} parameters)"),
        ("devices", f"{stages.mesh.devices.size} x {jax.devices()[0].device_kind}"),
        *batch_table(stages.config, num_data_shards=shards, steps_per_epoch=stages.prompts.steps_per_epoch),
        ("workdir", str(workdir.path)),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        logger.info("  %s  %s", name.ljust(width), value)
    if first is not None and first >= stages.num_steps:
        logger.info("This run is finished: all of its %d steps are done, and nothing is trained.", first)
        logger.info("To go on with it, raise trainer.total_epochs or trainer.num_steps.")
    elif first is not None:
        logger.info("Going on after step %d of %d.", first, stages.num_steps)


def _show(record: dict[str, Any]) -> str:
    verdict = f"[reward {record['reward']:g}, ground truth {record['ground_truth']}]"
    return f"{record['prompt']}{record['completion']}\n{verdict}"


def main() -> None:
    with one_line_errors():
        config, path = parse_command_line("grpo_jax.train", __doc__)
        train(config, path)


if __name__ == "__main__":
    main()
