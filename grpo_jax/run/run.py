"""A training run around its steps: it opens, reports, validates, saves and closes.

`open_run` checks every input, opens the devices and starts the engine, in that order. `Run.begin` loads or
restores the train state; `Run.after_step` does what is due after a step. The arithmetic of a step is the
`Learner`'s.
"""

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from grpo_jax.algorithm import Algorithm, load_algorithm, try_functions
from grpo_jax.config import Config, ConfigError
from grpo_jax.data.prompts import PromptIterator, reordered
from grpo_jax.learner import optimizer_class
from grpo_jax.learner.batching import make_sft_batch
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.optimizer import read_leaf
from grpo_jax.model.cards import find_card
from grpo_jax.model.hf import copy_side_files, write_eos_token_ids
from grpo_jax.model.lora import num_trained, split
from grpo_jax.model.sharding import num_batch_shards
from grpo_jax.model.transformer import num_params
from grpo_jax.rewards import make_reward
from grpo_jax.rewards.base import Reward
from grpo_jax.rollout import check_engine, eval_sampling, make_engine, rollout_sampling, shares_parameters
from grpo_jax.rollout.base import LONGEST_ERROR, derive_seed, one_line
from grpo_jax.rollout.batches import Ahead, RolloutBatches
from grpo_jax.rollout.dynamic import Dynamic
from grpo_jax.rollout.evaluation import evaluate, rollout_records, write_jsonl
from grpo_jax.rollout.position import Position, reward_settings
from grpo_jax.rollout.shared import SharedReward
from grpo_jax.run import gpus, summary
from grpo_jax.run.alarm_log import AlarmLog, example
from grpo_jax.run.checkpoint import Checkpointer, compile_check
from grpo_jax.run.devices import open_devices
from grpo_jax.run.hangs import watched
from grpo_jax.run.hosts import ALONE, Hosts
from grpo_jax.run.inputs import (
    Inputs,
    check_weights,
    check_workdir,
    first_params,
    make_model,
    read_inputs,
    read_model_config,
)
from grpo_jax.run.ledger import Ledger, ledger_entry
from grpo_jax.run.memory import Budget, memory_limit
from grpo_jax.run.metrics import Timers, performance_metrics, rollout_metrics, sequence_lengths
from grpo_jax.run.probe import make_probe
from grpo_jax.run.progress import Progress, live_line
from grpo_jax.run.saving import Saver, is_due
from grpo_jax.run.speed import WARM_UP, Speed
from grpo_jax.run.stopping import RunWatch, TrainingStopped, quietly, reported_failure, stop_on_signal
from grpo_jax.run.token_file import write_tokens
from grpo_jax.run.workdir import Workdir, start_logging
from grpo_jax.run.writer import MetricsWriter
from grpo_jax.types import Metrics, StepResult, TrainState

logger = logging.getLogger(__name__)

NUM_RANGE_PROMPTS = 64
"""Looked at to see whether float16 has the range for a model."""


@contextlib.contextmanager
def open_run(config: Config, path: Path, hosts: Hosts = ALONE) -> Iterator["Run"]:
    """The run of a configuration in the workdir `path`; closes what it has opened.

    Args: hosts: the processes of the run.

    Raises:
        ConfigError: something about the configuration or its files is wrong; nothing was written.
        SystemExit: 1 after a failure, 130 after Ctrl-C; a checkpoint is left in both cases.
    """
    workdir, timers = Workdir(path), Timers()
    with live_line(timers, is_shown=hosts.is_first) as progress, contextlib.ExitStack() as resources:
        # Closed last: what closes before it may hang too.
        watch = resources.enter_context(watched(timers, workdir.hangs, config.trainer.phase_timeout_s))
        resources.enter_context(hosts.watched(timers, watch))
        with timers.within("read_inputs"):
            check_workdir(config, workdir)
            start_logging(console=hosts.is_first)
            if hosts.is_first:
                check_engine(config.rollout)
            inputs = read_inputs(config, workdir, hosts)
            algorithm = load_algorithm(config)
        with timers.within("start_reward"):
            reward = resources.enter_context(_open_reward(config, hosts))
        with timers.within("open_devices"):
            mesh = open_devices(config, inputs.model_config, engine=config.rollout, num_processes=hosts.count)
            budget = Budget(config, read_model_config(config), mesh, memory_limit())
            budget.check_plan()
            try_functions(algorithm)
        hosts.wait_for_all()  # who looks into the workdir after this finds a run there
        if hosts.is_first:
            resources.enter_context(workdir.hold(config))
            workdir.open(config, inputs.beginning)
        hosts.wait_for_all()
        if not hosts.is_first:
            start_logging(workdir.log_of(hosts.rank), console=False)
        resources.enter_context(gpus.hold(gpus.gpus_of(mesh)))
        run = Run(config, algorithm, workdir, inputs, reward, budget, timers, resources, hosts)
        run.progress = progress
        with (
            reported_failure(timers, run.checkpointer, budget.explain, run.rescue, hosts),
            jax.set_mesh(mesh),
        ):
            run.start()
            yield run


def _open_reward(config: Config, hosts: Hosts) -> Reward:
    make = lambda: make_reward(config.reward, max_response_length=config.data.max_response_length)
    return make() if hosts.count == 1 else SharedReward(hosts, make)


class Run:
    """What surrounds the steps of one training run. Make it with `open_run`."""

    rollouts: RolloutBatches
    learner: Learner
    progress: Progress

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        workdir: Workdir,
        inputs: Inputs,
        reward: Reward,
        budget: Budget,
        timers: Timers,
        resources: contextlib.ExitStack,
        hosts: Hosts,
    ):
        """Args: budget: of the mesh that the run is on; resources: closes, after the run, what the run opens."""
        self.config, self.timers, self._hosts = config, timers, hosts
        self._rescue: Callable[[], None] = lambda: None
        self._lost: Sequence[tuple[int, int]] = ()  # groups that a checkpoint held in vain, for the ledger
        self.pad_id = inputs.tokenizer.pad_token_id or 0
        self.checkpointer = Checkpointer(
            workdir.checkpoints,
            config.checkpoint,
            hosts,
            is_offloaded=optimizer_class(config.optim).is_on_host,
            about={"config": config.to_dict(), "beginning": inputs.beginning.to_json()},
        )
        self._algorithm, self._workdir, self._inputs, self._reward = algorithm, workdir, inputs, reward
        self._budget, self._mesh, self._resources = budget, budget.mesh, resources
        self._close_at_end("the checkpoints", self.checkpointer.close)
        self._prompts = PromptIterator(
            inputs.train_prompts,
            batch_size=config.data.train_batch_size,
            seed=config.trainer.seed,
            shuffle=config.data.shuffle,
        )
        self.steps_per_epoch = self._prompts.steps_per_epoch
        self.num_steps = config.num_steps(self.steps_per_epoch)

    # ---- opening ----

    def start(self) -> None:
        """Makes the model's folder if there is none yet, starts the engine, and builds what the steps need."""
        config = self.config
        with self.timers.within("make_model"):
            self.folder = make_model(config, self._inputs, self._workdir, self._mesh, self._hosts)
        with self.timers.within("start_engine"):
            self.engine = make_engine(
                config.rollout,
                folder=self.folder,
                mesh=self._mesh,
                tokenizer=self._inputs.tokenizer,
                max_model_len=config.data.max_prompt_length + config.data.max_response_length,
                lora_push=config.lora.push,
                channel=None if self._hosts.count == 1 else self._hosts,
            )
            self._close_at_end("the engine", self.engine.close)
            # With rollout.sleep both do not fit side by side: it starts and sleeps before anything is loaded.
            self.engine.sleep()
        self.learner = Learner(
            config,
            self._algorithm,
            self.folder.config,
            self._mesh,
            num_steps=self.num_steps,
            timer=self.timers,
        )
        self._saver = Saver(
            config,
            self._workdir,
            self.checkpointer,
            self.learner,
            self.folder,
            self._hosts,
            num_steps=self.num_steps,
            steps_per_epoch=self.steps_per_epoch,
        )
        self._rescue = self._saver.rescue
        self.rollouts = self._make_rollouts()
        card = find_card(jax.local_devices()[0].device_kind)
        self._speed = Speed(config, self.folder.config, self._mesh, card)
        self._probe = None if shares_parameters(config.rollout) else self._make_probe()

    def _close_at_end(self, what: str, close: Callable[[], None]) -> None:
        def in_its_phase() -> None:
            with self.timers.within("close"):
                quietly(what, close)

        self._resources.callback(in_its_phase)

    def _make_rollouts(self) -> RolloutBatches:
        config, rounds = self.config, self.config.algorithm.dynamic_sampling_rounds
        ahead = Ahead(
            self._prompts,
            self.engine,
            self._reward,
            self.timers,
            sampling=rollout_sampling(config),
            seed=config.trainer.seed,
            max_lag=config.rollout.max_lag,
            # How many batches dynamic sampling will take is not known before: the last steps may ask in vain.
            num_batches=sys.maxsize if rounds else self.num_steps,
        )
        if not rounds:
            return ahead
        return Dynamic(
            ahead,
            num_groups=config.data.train_batch_size,
            max_rounds=rounds,
        )

    def _make_probe(self) -> Any:
        return make_probe(
            self._inputs.train_prompts,
            rollout_sampling(self.config),
            self.learner.score,
            threshold=self.config.rollout.probe_threshold,
            pad_id=self.pad_id,
        )

    def begin(self) -> TrainState:
        """The train state to begin with, new or restored; programs compiled, weights with the engine.

        With a checkpoint, the run goes on after its step.
        """
        with self.timers.within("find_checkpoint"):
            found = self.checkpointer.find_good()
        self.first_step, is_new = found or 0, found is None
        self._next_step = self.first_step
        with self.timers.within("load_model" if is_new else "restore"):
            state = self._new_state() if is_new else self._restored_state()
        if self._hosts.is_first:
            self._workdir.record(self.config)
            self._workdir.record_beginning(self._inputs.beginning)
            stops = (*self.folder.eos_token_ids, *self.config.rollout.stop_token_ids)
            write_eos_token_ids(self._workdir.model_files, stops)
        with self.timers.within("compile"):
            self._budget.check_compiled(self.learner.compile())
            compile_check(self.learner.optimizer.abstract_state())
            if is_new and self.config.model.dtype == "float16":
                self._check_range(state)
        self.give_weights(state, version=self.first_step, is_first=True)
        self._watch = RunWatch(self.config, is_new=is_new)
        if self._hosts.is_first:
            self._open_reports(None if is_new else self.first_step)
        self._print_plan(is_resumed=not is_new)
        if is_new and self.config.eval.before_training:
            metrics = self._validate(step=0)
            logger.info("Before training: val_accuracy=%.4g", metrics["val/accuracy"])
            timings = self.timers.collect()
            if self._hosts.is_first:
                self._writer.write(metrics | timings, step=0, epoch=0)
        self._saver.restart_clock()
        return state

    def _open_reports(self, last_step: int | None) -> None:
        """Args: last_step: of the checkpoint that the run goes on from; reports of later ones are dropped."""
        self._writer = MetricsWriter(self._workdir, self.config, resume_step=last_step)
        self._close_at_end("the metrics", self._writer.close)
        self._ledger = Ledger(self._workdir.ledger, last_step=last_step or 0)
        num_rollbacks = self._saver.num_rollbacks
        self._alarms = AlarmLog(self._workdir, self.config, self._writer, num_rollbacks=num_rollbacks)

    def _check_range(self, state: TrainState) -> None:
        """Raises: ConfigError: the model does not fit the range of float16."""
        prompts = [prompt.token_ids for prompt in self._inputs.train_prompts[:NUM_RANGE_PROMPTS]]
        rows = [(ids[:-1], ids[-1:]) for ids in prompts if len(ids) > 1]
        if not rows:
            return
        batch = make_sft_batch(rows, pad_id=self.pad_id)
        layer = self.learner.overflowing_layer(state, batch)
        if layer is not None:
            num_layers = self.folder.config.num_layers
            rule = (
                f"the results of layer {layer} (of {num_layers}, from 0) overflow: beyond 65,504 on its own "
            )
            rule += "prompts; take bfloat16, in another --workdir"
            raise ConfigError("model.dtype", "float16", rule)

    def _new_state(self) -> TrainState:
        if self._hosts.is_first:
            self._workdir.model_files.mkdir(exist_ok=True)  # after a crash it exists, but may not be complete
            copy_side_files(self.folder.path, self._workdir.model_files)
        state = self.learner.init(first_params(self.config, self.folder, self.folder.config, self._mesh))
        check_weights(self.learner.params(state), self.folder.path)
        return state

    def _restored_state(self) -> TrainState:
        reference = self.learner.reference
        model = self.learner.optimizer.stored_model(self.folder.config)
        frozen, trained = split(first_params(self.config, self.folder, model, self._mesh))
        self.learner.hold(frozen)
        if self.config.uses_reference and not reference.is_refreshed:
            reference.copy_from(jax.tree.map(read_leaf, trained))
        return self._restore()

    def _restore(self, order: int | None = None) -> TrainState:
        """Goes to the latest checkpoint. Args: order: a seed for the prompts left of its epoch; None: as it is."""
        reference, optimizer = self.learner.reference, self.learner.optimizer
        state, progress, saved_reference = self.checkpointer.restore(
            optimizer.abstract_state(), reference.abstract() if reference.is_refreshed else None
        )
        if reference.is_refreshed:
            reference.params = saved_reference
        kl_coef = self.config.algorithm.kl_coef
        if reference.is_adaptive and progress.initial_kl_coef in (None, kl_coef):
            reference.kl_coef = progress.kl_coef  # else checkpoint.resume=force has brought another one
        self._saver.num_rollbacks = max(self._saver.num_rollbacks, progress.num_rollbacks)
        config, held = self.config, dataclasses.asdict(progress)
        by, group_size = reward_settings(config), config.algorithm.group_size
        position = Position.from_json(held, self._inputs.train_prompts, group_size, by)
        self._lost = position.lost
        if order is not None:  # batches that were ahead held other prompts
            iterator = reordered(position.prompt_iterator, order)
            position = dataclasses.replace(position, prompt_iterator=iterator, ahead=())
        self.rollouts.restore(position)
        return state

    # ---- steps ----

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left, counted from 0.

        Ctrl-C and SIGTERM wait for the end of a step.
        """
        with stop_on_signal() as self._stop, self.timers.within("report"):  # what is not another phase
            while self._next_step < self.num_steps:  # which a roll-back puts back
                self.progress.step_done(self._next_step, self.num_steps, time.monotonic())
                yield self._next_step

    def give_weights(self, state: TrainState, version: int, *, is_first: bool = False) -> None:
        """Gives the engine the policy's parameters, and compares the log-probabilities of both where that is due.

        Raises: WeightSyncError: the weights did not arrive, or the engine computes something else with them.
        """
        params = self.learner.params(state)
        with self.timers("update_weights"):
            self.engine.load_weights(params, version=version)
        every = self.config.rollout.probe_every
        if self._probe is not None and (is_first or (every and version % every == 0)):
            with self.timers("probe"):
                self._probe(self.engine, params)

    def after_step(self, state: TrainState, result: StepResult, step: int) -> TrainState:
        """Validates, saves and reports as far as that is due after step number `step`; stops where asked to.

        Returns: the state to go on with: this one, or that of an earlier checkpoint where the run has diverged.
        Raises:
            TrainingStopped: too many updates in a row were not finite, or the run has diverged and cannot go back.
            SystemExit: 130 after Ctrl-C or SIGTERM.
        """
        done, rollouts, config = step + 1, result.rollouts, self.config
        with self.timers("save_checkpoint"):
            self.checkpointer.check()
        metrics = rollout_metrics(rollouts, step) | result.metrics
        metrics |= {"training/global_step": done, "training/epoch": step // self.steps_per_epoch + 1}
        for error in rollouts.rewards.errors:
            _log_reward_error(error)
        section, per_epoch = config.eval, self.steps_per_epoch
        if is_due(done, section.every_steps, section.every_epochs * per_epoch, self.num_steps):
            metrics |= self._validate(step=done)
        timings = self.timers.collect()
        lengths = sequence_lengths(rollouts.groups)
        num_passes, num_devices = config.actor.num_epochs, self._mesh.size
        metrics |= timings | performance_metrics(
            self.folder.config, lengths, timings, num_devices=num_devices, num_passes=num_passes
        )
        metrics |= self._speed.as_metrics(metrics)
        metrics["perf/memory_planned_gb"] = self._budget.plan.peak / 1e9
        self._watch.note(result.updates)
        if self._hosts.is_first:
            metrics |= self._alarms.note(metrics, done, lambda: example(rollouts, self._reward))
        is_lost, is_sound = self._hosts.from_first(self._judge)
        # Read once: a request that comes while saving is for the next step.
        is_stopping = self._hosts.any_of(self._stop.requested)
        # While updates are skipped, the checkpoint from before the trouble is the good one.
        must_save = (is_stopping or done == self.num_steps) and not is_lost
        position = dataclasses.replace(self.rollouts.state(), lost=self._lost)
        self._lost = ()
        if is_sound or must_save:
            with self.timers("save_checkpoint"):
                self._saver.save_what_is_due(state, done, position, metrics, is_stopping=is_stopping)
        if self._hosts.is_first:
            with self.timers("ledger"):
                entry = ledger_entry(config, result, position, step=done, steps_per_epoch=per_epoch)
                self._ledger.append(entry)
            if config.saves_rollouts(done):
                with self.timers("save_rollouts"):
                    self._save_rollouts(result, done)
            self._report(result, metrics | self.timers.collect(), done)
        self.checkpointer.commit()  # not before the step's line is on disk
        self._next_step = done
        if is_lost and self.config.trainer.max_rollbacks:
            state = self._roll_back(state, done)
        else:
            self._watch.stop_if_lost()
            self._saver.last_step = (state, done, position) if is_sound else None
        if is_stopping and self._next_step < self.num_steps:
            self.checkpointer.wait()
            text = "Stopped after step %d; everything is saved. The same command goes on."
            logger.info(text, self._next_step)
            raise SystemExit(130)
        return state

    def _judge(self) -> tuple[bool, bool]:
        """(whether the run cannot go on from here, whether this state is worth saving)"""
        may_roll_back = self._alarms.may_roll_back
        is_lost = self._watch.is_lost or (may_roll_back and self._alarms.has_diverged)
        return is_lost, self._watch.is_healthy and not may_roll_back

    def _roll_back(self, state: TrainState, done: int) -> TrainState:
        """The state of the last checkpoint from before the trouble; the run goes on from it in another order.

        The numbers of a step are of the weights that the step before has left. So those of a checkpoint are good
        where the step after it had no trouble.

        Args:   state: given up, to make room.
        Raises: TrainingStopped: no roll-back is left, or there is no such checkpoint.
        """
        limit = self.config.trainer.max_rollbacks
        why, since = self._hosts.from_first(
            lambda: (self._alarms.explain_trouble(), self._alarms.trouble_since)
        )
        if self._saver.num_rollbacks >= limit:
            raise TrainingStopped(f"{why}; trainer.max_rollbacks={limit} is used up")
        with self.timers("roll_back"):
            good = self.checkpointer.go_back(before=since - 1)
            if good is None:
                raise TrainingStopped(f"{why}; there is no checkpoint from before it to go back to")
            self.rollouts.abandon()
            for leaf in jax.tree.leaves(state):
                leaf.delete()
            self._saver.num_rollbacks += 1
            number = self._saver.num_rollbacks
            state = self._restore(derive_seed(self.config.trainer.seed, number, "roll-back"))
            if self._hosts.is_first:
                self._writer.close()
                self._open_reports(good)
                self._alarms.tell_rollback(why, back_from=done, to=good, number=number)
            self._watch = RunWatch(self.config, is_new=False)
            self._next_step = good
            self._saver.restart_clock()
        self.give_weights(state, version=good)
        return state

    def rescue(self) -> None:
        """After a failure: see `Saver.rescue`; nothing before there is something to save."""
        self._rescue()

    def finish(self) -> None:
        """Waits for the last checkpoint and prints the report of the whole run."""
        with self.timers("save_checkpoint"):
            self.checkpointer.wait()
        epochs, rest = divmod(self.num_steps, self.steps_per_epoch)
        model = self._workdir.final_model if rest else self._workdir.epoch_model(epochs)
        if not self._hosts.is_first:
            return
        with self.timers.within("report"):
            summary.print_report(self.config, self._workdir, model, self._speed, self.first_step)

    def _validate(self, *, step: int) -> Metrics:
        config = self.config
        with self.timers("testing"):
            result = evaluate(
                self.engine,
                self._inputs.val_prompts,
                self._reward,
                eval_sampling(config),
                seed=derive_seed(config.trainer.seed, step, "validation"),
                progress="validation",
            )
        if self._hosts.is_first:
            records = result.records()
            write_jsonl(self._workdir.validation / f"step-{step:06d}.jsonl", records)
            self._writer.write_text("val/completions", self._samples(records), step=step)
        for error in result.errors:
            _log_reward_error(error)
        numbers = {name: value for name, value in result.summary().items() if name != "num"}
        return {
            f"val/{name}": value for name, value in (numbers | {"num_errors": len(result.errors)}).items()
        }

    # ---- reports ----

    def _report(self, result: StepResult, metrics: Metrics, done: int) -> None:
        rollouts, per_epoch, writer = result.rollouts, self.steps_per_epoch, self._writer
        epoch, step_of_epoch = (done - 1) // per_epoch + 1, (done - 1) % per_epoch + 1
        writer.write(metrics, step=done, epoch=epoch)
        writer.console(metrics, epoch=epoch, step=step_of_epoch, steps_per_epoch=per_epoch)
        if done == self.first_step + WARM_UP + 1:
            for line in self._speed.compared([metrics]):
                logger.info(line)
        records = rollout_records(rollouts.groups, rollouts.rewards.rewards)
        writer.write_text("rollouts", self._samples(records), step=done)
        lengths = [len(c.token_ids) for group in rollouts.groups for c in group.completions]
        rewards = rollouts.rewards.rewards
        spreads = {"distribution/reward": rewards, "distribution/response_length": lengths}
        writer.write_histograms(spreads, step=done)

    def _save_rollouts(self, result: StepResult, done: int) -> None:
        rollouts = result.rollouts
        records = rollout_records(rollouts.groups, rollouts.rewards.rewards)
        if (dropped := rollouts.dropped) is not None:
            left_out = rollout_records(dropped.groups, dropped.rewards.rewards)
            records += [record | {"is_dropped": True} for record in left_out]
        write_jsonl(self._workdir.rollouts / f"step-{done:06d}.jsonl", records)
        write_tokens(self._workdir.rollouts / f"step-{done:06d}.parquet", result, self.config.trainer.seed)

    def _samples(self, records: Sequence[dict[str, Any]]) -> list[str]:
        """The first completions as texts."""
        show = lambda r: (
            f"{r['prompt']}{r['completion']}\n[reward {r['reward']:g}, ground truth {r['ground_truth']}]"
        )
        return [show(record) for record in records[: self.config.logging.num_text_samples]]

    def _print_plan(self, *, is_resumed: bool) -> None:
        mesh, model = self._mesh, self.folder.config
        shards = num_batch_shards(mesh)
        per_epoch = self.steps_per_epoch
        rows = [
            ("model", f"{self.folder.path} ({num_params(model):,} parameters)"),
            *([("adapters", f"{num_trained(model):,} of them, all that is trained")] if model.lora else []),
            ("devices", f"{mesh.size} x {jax.local_devices()[0].device_kind}"),
            *summary.batch_table(self.config, num_data_shards=shards, steps_per_epoch=per_epoch),
            ("workdir", str(self._workdir.path)),
        ]
        for line in summary.table_lines(rows):
            logger.info(line)
        for line in summary.doubts(self.config, self.num_steps):
            logger.warning(line)
        if is_resumed and self.first_step >= self.num_steps:
            logger.info(
                "This run is finished: all of its %d steps are done, and nothing is trained.", self.first_step
            )
            logger.info("To go on with it, raise trainer.total_epochs or trainer.num_steps.")
        elif is_resumed:
            logger.info("Going on after step %d of %d.", self.first_step, self.num_steps)


def _log_reward_error(error: str) -> None:
    logger.warning("reward error, counted as 0: %s", one_line(error, LONGEST_ERROR))
