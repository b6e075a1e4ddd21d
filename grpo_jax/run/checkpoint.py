"""Orbax checkpoints: all that a run needs to go on as if it had never stopped.

Parameters and optimizer state are separate items, so that `export` reads the parameters alone. Saving is
asynchronous: the next step runs while the files are written. Of state on the host it is not, for want of memory.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from grpo_jax.config import ConfigError
from grpo_jax.run.workdir import saved_steps
from grpo_jax.types import Params, TrainState


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, as JSON."""

    global_step: int
    """GRPO steps done; the seed of step s is made from `seed` and s, so this is the random state too."""
    policy_version: int
    seed: int
    prompt_iterator: dict[str, Any]
    hf_dtype: str
    """In which the Hugging Face folders of this run are written."""
    num_rollout_batches: int
    """Batches of prompts sampled and taken; the seed of the next one is made from it. One a step, but for dynamic
    sampling."""
    surplus: list[dict[str, Any]]
    """Groups that dynamic sampling has left for the next step."""
    kl_coef: float
    """As the adaptive coefficient is now."""
    initial_kl_coef: float | None = None
    """As it was configured; None in checkpoints from before this was saved."""


HOST_GB = 8
"""The most that is copied within the host at once, of state that lives there; one array at least."""


class Checkpointer:
    """Saves to and restores from DIR/STEP."""

    def __init__(self, folder: Path, max_to_keep: int, *, is_offloaded: bool):
        """Args: is_offloaded: the optimizer's state fills the host's memory, with no room for a copy of it."""
        self._folder, self._is_offloaded = folder.absolute(), is_offloaded
        options = ocp.CheckpointManagerOptions(max_to_keep=max_to_keep, cleanup_tmp_directories=True)
        limits = dict(save_device_host_concurrent_gb=HOST_GB, restore_concurrent_gb=HOST_GB)
        arrays = lambda: ocp.PyTreeCheckpointHandler(**(limits if is_offloaded else {}))
        handlers: dict[str, Any] = {name: arrays() for name in ("params", "optimizer", "reference")}
        handlers["progress"] = ocp.JsonCheckpointHandler()
        self._manager = ocp.CheckpointManager(self._folder, options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, state: TrainState, progress: Progress, reference: Params = None) -> None:
        """Saves once a step; a second call for the same step does nothing.

        Args: reference: parameters of a reference that changes during the run.
        """
        if self.latest_step == progress.global_step:
            return
        rest = _rest(state)
        items = {
            "params": ocp.args.PyTreeSave(state.params),
            "optimizer": ocp.args.PyTreeSave(rest),
            "progress": ocp.args.JsonSave(dataclasses.asdict(progress)),
        }
        if reference is not None:
            items["reference"] = ocp.args.PyTreeSave(reference)
        self._manager.save(progress.global_step, args=ocp.args.Composite(**items))
        if self._is_offloaded:
            self.wait()  # what is still to be copied is given back by the next update

    def restore(
        self, abstract: TrainState, abstract_reference: Params = None
    ) -> tuple[TrainState, Progress, Params]:
        """Reads the latest checkpoint straight into its shards.

        Args:   both `jax.ShapeDtypeStruct`s with shardings; without the second no reference is read.
        Raises: ConfigError: it holds other arrays, as of another model after checkpoint.resume=force.
        """
        rest = _rest(abstract)
        items = {
            "params": _restore_like(abstract.params),
            "optimizer": _restore_like(rest),
            "progress": ocp.args.JsonRestore(),
        }
        if abstract_reference is not None:
            items["reference"] = _restore_like(abstract_reference)
        try:
            restored = self._manager.restore(self.latest_step, args=ocp.args.Composite(**items))
        except (KeyError, ValueError) as error:
            rule = (
                f"step {self.latest_step} does not hold the arrays that this configuration asks for "
                f"({' '.join(str(error).split())[:300]})"
            )
            raise ConfigError("checkpoint", str(self._folder), rule) from error
        state = TrainState(params=restored.params, **restored.optimizer)
        return state, Progress(**restored.progress), restored.get("reference")

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self._manager.close()


def _rest(state: TrainState) -> dict[str, Any]:
    """All of a train state but the parameters."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    return rest if state.loss_scale is None else rest | {"loss_scale": state.loss_scale}


def _restore_like(abstract: Any, **options: Any) -> Any:
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), **options
    )


def find_checkpoint(folder: Path) -> Path:
    """Resolves WORKDIR, WORKDIR/checkpoints or WORKDIR/checkpoints/STEP to the latter, the latest step.

    Raises: ConfigError: there is no checkpoint.
    """
    candidates = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if (candidates / "params").is_dir():
        return candidates
    steps = saved_steps(candidates)
    if not steps:
        raise ConfigError("--checkpoint", str(folder), "there is no checkpoint in this folder")
    return candidates / str(max(steps))


def load_for_export(
    step_folder: Path, abstract_params: Params, *, are_on_host: bool
) -> tuple[Params, Progress]:
    """Reads the parameters and the progress of one checkpoint, and nothing else of it.

    Args: are_on_host: the parameters that the optimizer changes were on the host, among its state.
    """
    item, abstract, options = "params", abstract_params, {}
    if are_on_host:
        masters = jax.tree.map(lambda x: {"master": x}, abstract_params)
        item, abstract, options = "optimizer", {"opt_state": masters}, {"partial_restore": True}
    arguments = {item: _restore_like(abstract, **options), "progress": ocp.args.JsonRestore()}
    with ocp.CheckpointManager(
        step_folder.parent.absolute(), options=ocp.CheckpointManagerOptions(read_only=True)
    ) as manager:
        restored = manager.restore(
            int(step_folder.name),
            args=ocp.args.Composite(**arguments),
        )
    params = restored[item]
    if are_on_host:
        params = jax.tree.map(lambda _, leaf: leaf["master"], abstract_params, params["opt_state"])
    return params, Progress(**restored.progress)
