"""What is saved after which step: checkpoints, and Hugging Face or PEFT folders."""

import time
from pathlib import Path

import jax

from grpo_jax.config import Config
from grpo_jax.learner.learner import Learner
from grpo_jax.model.hf import ModelFolder, save_folder
from grpo_jax.model.peft import save_adapter
from grpo_jax.rollout.position import Position, reward_settings
from grpo_jax.run.checkpoint import Checkpointer, Progress, check_finite
from grpo_jax.run.hosts import Hosts
from grpo_jax.run.workdir import Workdir
from grpo_jax.types import Metrics, Params, TrainState


def is_due(done: int, every_steps: int, every: int, num_steps: int) -> bool:
    """True after each `every_steps` and each `every` steps, and at the end of the run; 0 is never."""
    at_end = done == num_steps and bool(every_steps or every)
    return at_end or bool(every_steps and done % every_steps == 0) or bool(every and done % every == 0)


class Saver:
    """Decides after each step what is saved, and saves it."""

    def __init__(
        self,
        config: Config,
        workdir: Workdir,
        checkpointer: Checkpointer,
        learner: Learner,
        folder: ModelFolder,
        hosts: Hosts,
        *,
        num_steps: int,
        steps_per_epoch: int,
    ):
        """Args: folder: of the model; num_steps: of the whole run."""
        self._config, self._workdir, self._checkpointer = config, workdir, checkpointer
        self._learner, self._folder, self._hosts = learner, folder, hosts
        self._num_steps, self._per_epoch = num_steps, steps_per_epoch
        self.num_rollbacks = 0
        """The run's, for checkpoints."""
        self.last_step: tuple[TrainState, int, Position] | None = None
        """For `rescue`: the last whole step, as far as it is worth saving."""
        self.restart_clock()

    def restart_clock(self) -> None:
        """From now on `checkpoint.every_minutes` counts."""
        self._saved_at = time.monotonic()

    def save_what_is_due(
        self, state: TrainState, done: int, position: Position, metrics: Metrics, *, is_stopping: bool
    ) -> None:
        """Writes the checkpoint and the Hugging Face folder that are due after `done` steps.

        Raises: CheckpointError: the state is not finite, or this save or the one before cannot be written.
        """
        section, per_epoch, is_last = self._config.checkpoint, self._per_epoch, done == self._num_steps
        epoch = done // per_epoch if done % per_epoch == 0 else None
        is_checked = False  # which reads the whole state, once
        is_due_now = lambda: self._is_checkpoint_due(done, epoch, metrics)  # by the clock, among others
        if self._hosts.from_first(lambda: is_stopping or is_last or is_due_now()):
            progress, reference = self._progress(done, position), self._saved_reference()
            self._checkpointer.save(state, progress, reference, epoch=epoch, metrics=metrics)
            self.restart_clock()
            is_checked = True
        every = section.hf_every_epochs * per_epoch
        if is_last or (every and done % every == 0):
            if not is_checked:
                check_finite(state, done, self._hosts)
            target = self._workdir.final_model if epoch is None else self._workdir.epoch_model(epoch)
            self._save_folder(target, self._learner.masters(state))

    def _save_folder(self, target: Path, params: Params) -> None:
        """Writes a Hugging Face folder; of a run with adapters, a PEFT folder. Args: params: that are trained."""
        folder = self._folder
        if folder.config.lora is not None:
            save_adapter(target, params, folder.config, folder)
            return
        files = self._workdir.model_files
        save_folder(target, params, folder.config, files_from=files, dtype=folder.dtype)

    def rescue(self) -> None:
        """After a failure: saves `last_step`, unless its state is gone.

        The state is gone once an update has begun, which takes it; it is there where an engine or a reward fails
        while a batch is sampled.
        """
        if self.last_step is None:
            return
        state, done, position = self.last_step
        if not any(x.is_deleted() for x in jax.tree.leaves(state)):
            self._checkpointer.save(state, self._progress(done, position), self._saved_reference())
            self._checkpointer.commit()

    def _saved_reference(self) -> Params:
        """The parameters of a reference that changes, which checkpoints hold; None of another."""
        reference = self._learner.reference
        return reference.params if reference.is_refreshed else None

    def _is_checkpoint_due(self, done: int, epoch: int | None, metrics: Metrics) -> bool:
        """Args: epoch: that has ended; metrics: of the step."""
        section = self._config.checkpoint
        if epoch and section.keep_every_epochs and epoch % section.keep_every_epochs == 0:
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        if section.every_minutes and minutes >= section.every_minutes:
            return True
        if section.keep_best in metrics:
            best = self._checkpointer.best_value()
            if best is None or metrics[section.keep_best] > best:
                return True
        return is_due(done, section.every_steps, section.every_epochs * self._per_epoch, self._num_steps)

    def _progress(self, done: int, position: Position) -> Progress:
        return Progress(
            global_step=done,
            policy_version=done,
            seed=self._config.trainer.seed,
            hf_dtype=self._folder.dtype,
            kl_coef=self._learner.reference.kl_coef,
            initial_kl_coef=self._config.algorithm.kl_coef,
            num_rollbacks=self.num_rollbacks,
            **position.to_json(reward_settings(self._config)),
        )
