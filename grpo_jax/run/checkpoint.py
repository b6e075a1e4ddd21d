"""Orbax checkpoints: all that a run needs to go on as if it had never stopped.

Parameters and optimizer state are separate items, so that `export` reads the parameters alone. Saving is
asynchronous: the next step runs while the files are written, and then read once more for their checksums. Of state
on the host it is not, for want of memory.
"""

import concurrent.futures
import contextlib
import dataclasses
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from grpo_jax.config import CheckpointSection, ConfigError
from grpo_jax.learner.compiling import compile_ahead
from grpo_jax.run.hosts import ALONE, Hosts
from grpo_jax.run.retention import (
    MARK,
    best_step,
    damage_of,
    find_whole,
    read_all_facts,
    remove_checkpoint,
    rotate,
    saved_steps,
    set_aside,
    value_of,
)
from grpo_jax.storage.files import replace_folder, temporary_beside
from grpo_jax.storage.manifest import has_manifest, size, write_manifest
from grpo_jax.types import Metrics, Params, TrainState

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Progress:
    """Where a run stands, as JSON."""

    global_step: int
    """GRPO steps done; the seed of step s is made from `seed` and s, so this is the random state too."""
    policy_version: int
    seed: int
    prompt_iterator: dict[str, Any]
    """This, `num_rollout_batches`, `surplus` and `ahead`: as `Position.to_json` writes them."""
    hf_dtype: str
    """In which the Hugging Face folders of this run are written."""
    num_rollout_batches: int
    """Batches of prompts sampled and taken; the seed of the next one is made from it. One a step, but for dynamic
    sampling."""
    surplus: list[dict[str, Any]]
    """Groups that dynamic sampling has left for the next step."""
    kl_coef: float
    """As the adaptive coefficient is now."""
    ahead: list[list[dict[str, Any]]] = dataclasses.field(default_factory=list)
    """Groups of batches ahead that have come back."""
    initial_kl_coef: float | None = None
    """As it was configured; None in checkpoints from before this was saved."""
    num_rollbacks: int = 0
    """How often the run had gone back to an earlier checkpoint; the order of its prompts follows from it."""


HOST_GB = 8
"""The most that is copied within the host at once, of state that lives there; one array at least."""
SPARE_BYTES = 100 * 10**6
"""Left free on the disk beside a checkpoint."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot or must not be written; the message says why."""


@dataclasses.dataclass
class _Save:
    """A checkpoint on its way to the disk."""

    step: int
    temporary: Path
    facts: dict[str, Any]
    is_written: threading.Event
    """Nothing of the state is read any more."""
    is_decided: threading.Event
    is_wanted: bool = False
    """Whether it gets its name; decided by `commit`, or by whoever waits without it."""
    future: "concurrent.futures.Future[None] | None" = None
    """None: until its files are being written."""


class Checkpointer:
    """Saves to and restores from DIR/STEP.

    A folder has that name only when its files have reached the disk, its manifest has their checksums, and
    `commit` has been called. One save is under way at a time.
    """

    def __init__(
        self,
        folder: Path,
        section: CheckpointSection,
        hosts: Hosts = ALONE,
        *,
        is_offloaded: bool,
        about: Mapping[str, Any] | None = None,
    ):
        """Args:
        section: says which checkpoints stay.
        hosts: all of which write their parts of the arrays; the first one does the rest.
        is_offloaded: the optimizer's state fills the host's memory, with no room for a copy of it.
        about: JSON that every manifest gets, by which the run is known.
        """
        self._folder, self._section, self._is_offloaded = folder.absolute(), section, is_offloaded
        self._hosts = hosts
        self._about = dict(about or {})
        self._orbax = ocp.AsyncCheckpointer(_handler(is_offloaded))
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._under_way: _Save | None = None

    @property
    def latest_step(self) -> int | None:
        return max(saved_steps(self._folder), default=None)

    def best_value(self) -> float | None:
        """The largest checkpoint.keep_best of all checkpoints; None: of none."""
        facts = read_all_facts(self._folder)
        best = best_step(facts, self._section.keep_best)
        return None if best is None else value_of(facts[best], self._section.keep_best)

    # ---- saving ----

    def save(
        self,
        state: TrainState,
        progress: Progress,
        reference: Params = None,
        *,
        epoch: int | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """Begins to save, once a step: a second call for the same step does nothing. Then `commit`.

        Returns when the state may be given away.

        Args:
            reference: parameters of a reference that changes during the run.
            epoch: that ended with this step; None: none did.
            metrics: of this step, among which checkpoint.keep_best is looked for.

        Raises: CheckpointError: the state is not finite, or there is no space; and what a save before failed with.
        """
        step = progress.global_step
        under_way = self._under_way.step if self._under_way else None
        if self._hosts.from_first(lambda: step in (self.latest_step, under_way)):
            return
        self.wait()
        check_finite(state, step, self._hosts)
        rest = _rest(state)
        if self._hosts.is_first:
            self._check_space((state.params, rest, reference))
        items = {
            "params": ocp.args.PyTreeSave(state.params),
            "optimizer": ocp.args.PyTreeSave(rest),
            "progress": ocp.args.JsonSave(dataclasses.asdict(progress) | {MARK: True}),
        }
        if reference is not None:
            items["reference"] = ocp.args.PyTreeSave(reference)
        name = self._section.keep_best
        measured = {name: float(metrics[name])} if metrics and name in metrics else {}
        facts = self._about | {"step": step, "epoch": epoch, "metrics": measured}
        temporary = Path(self._hosts.from_first(lambda: str(temporary_beside(self._folder / str(step)))))
        save = _Save(step, temporary, facts, threading.Event(), threading.Event())
        if self._hosts.is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._under_way = save  # known before it begins: Ctrl-C may come at any moment
        try:
            self._orbax.save(temporary, args=ocp.args.Composite(**items))
        except BaseException:
            self._under_way = None
            self._remove(temporary)
            raise
        save.future = self._thread.submit(self._finish, save)
        if self._is_offloaded:
            save.is_written.wait()  # what is still to be copied is given back by the next update

    def commit(self) -> None:
        """Lets the checkpoint that is under way, if any, have its name: all that is to be there before it is."""
        if self._under_way is not None:
            self._under_way.is_wanted = True
            self._under_way.is_decided.set()

    def check(self) -> None:
        """Raises: CheckpointError: the save that was under way has failed since. Waits for nothing."""
        future = None if self._under_way is None else self._under_way.future
        if future is not None and future.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything committed is on disk. What is not committed by now never will be.

        Raises: CheckpointError: it could not be written.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        save.is_decided.set()
        if save.future is None:
            return
        try:
            save.future.result()
        except Exception as error:
            # Orbax's other writes failed with this one; asyncio would report each whenever it is collected, after
            # the run's last line too.
            logging.getLogger("asyncio").addFilter(_is_retrieved)
            text = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"the checkpoint of step {save.step} could not be written: {text}"
            ) from error

    def close(self) -> None:
        """Waits and lets go. Raises: CheckpointError: as `wait`."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._orbax.close()

    def _finish(self, save: _Save) -> None:
        """In the background: from files that are being written to a checkpoint."""
        try:
            try:
                self._orbax.wait_until_finished()
            finally:
                save.is_written.set()
            if not self._hosts.is_first:
                return
            write_manifest(save.temporary, save.facts)
            save.is_decided.wait()
            if save.is_wanted:
                replace_folder(save.temporary, self._folder / str(save.step))
                rotate(self._folder, self._section)
        finally:
            self._remove(save.temporary)

    def _remove(self, temporary: Path) -> None:
        """Removes what a save has left, also under the name that Orbax gives it while it writes."""
        for _ in range(20):  # where one file failed, Orbax may still be writing others
            left = list(temporary.parent.glob(temporary.name + "*")) if self._hosts.is_first else []
            if not left:
                return
            for path in left:
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(0.05)

    def _check_space(self, arrays: Any) -> None:
        """Raises: CheckpointError: the disk has less left than the last checkpoint took, or the arrays would."""
        needed = sum(x.nbytes for x in jax.tree.leaves(arrays))
        with contextlib.suppress(ValueError):
            if (last := self.latest_step) is not None:
                needed = size(self._folder / str(last))
        self._folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self._folder).free
        if free < needed + SPARE_BYTES:
            raise CheckpointError(
                f"a checkpoint takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free in {self._folder}"
            )

    # ---- restoring ----

    def find_good(self) -> int | None:
        """The latest step whose checkpoint is whole; None: there are no checkpoints.

        Damaged ones that are later are moved aside. One from before there were manifests is taken as it is.

        Raises: ConfigError: there are checkpoints, and none is whole.
        """
        return self._hosts.from_first(self._find_good)

    def _find_good(self) -> int | None:
        good, damaged = find_whole(self._folder)
        for step, reason in damaged.items():
            set_aside(self._folder / str(step), reason)
        return good

    def go_back(self, before: int) -> int | None:
        """The latest whole checkpoint of a step below `before`; later ones are removed, and it is the latest then.

        Returns: None where there is no such checkpoint; nothing is removed then.
        Raises:  CheckpointError: as `wait`.
        """
        self.wait()
        return self._hosts.from_first(lambda: self._go_back(before))

    def _go_back(self, before: int) -> int | None:
        steps = saved_steps(self._folder)
        whole = (
            step for step in reversed(steps) if step < before and not damage_of(self._folder / str(step))
        )
        good = next(whole, None)
        for step in reversed(steps):  # the latest first: a kill in between leaves an end of the same run
            if good is not None and step > good:
                remove_checkpoint(self._folder / str(step))
        return good

    def restore(
        self, abstract: TrainState, abstract_reference: Params = None
    ) -> tuple[TrainState, Progress, Params]:
        """Reads the latest checkpoint straight into its shards.

        Args:   both `jax.ShapeDtypeStruct`s with shardings; without the second no reference is read.
        Raises: ConfigError: it holds other arrays, as of another model after checkpoint.resume=force.
        """
        items = {
            "params": _restore_like(abstract.params),
            "optimizer": _restore_like(_rest(abstract)),
            "progress": ocp.args.JsonRestore(),
        }
        if abstract_reference is not None:
            items["reference"] = _restore_like(abstract_reference)
        folder = self._folder / str(self._hosts.from_first(lambda: self.latest_step))
        restored = _restore(self._orbax, folder, items, "checkpoint")
        state = TrainState(params=restored.params, **restored.optimizer)
        return state, _progress(restored.progress), restored.get("reference")


def check_finite(state: TrainState, step: int, hosts: Hosts = ALONE) -> None:
    """Raises: CheckpointError: a number of the parameters or of the optimizer's state is not finite."""
    leaves = _floating_leaves(state)
    on_device = [leaf for _, leaf in leaves if not _is_on_host(leaf)]
    answers = iter(jax.device_get(_are_finite(on_device)) if on_device else [])
    finite = [_is_finite_on_host(leaf) if _is_on_host(leaf) else next(answers) for _, leaf in leaves]
    if hosts.any_of(not all(finite)):  # each has looked at its own parts
        bad = [name for (name, _), is_finite in zip(leaves, finite, strict=True) if not is_finite]
        place, _, rest = bad[0].partition("/") if bad else ("0", "", "of another process")
        what = ("parameters", "optimizer")[int(place)]
        text = f"{what} {rest} hold a number that is not finite after step {step}; nothing was saved"
        raise CheckpointError(text)


def compile_check(abstract: TrainState) -> None:
    """Compiles what `check_finite` has devices compute, so that no step waits for that.

    Args: abstract: of `jax.ShapeDtypeStruct`s with shardings.
    """
    if leaves := [leaf for _, leaf in _floating_leaves(abstract) if not _is_on_host(leaf)]:
        compile_ahead(_are_finite, leaves)


def _floating_leaves(state: TrainState) -> list[tuple[str, jax.Array]]:
    leaves = jax.tree_util.tree_leaves_with_path((state.params, state.opt_state))
    name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [(name(path), leaf) for path, leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


@jax.jit
def _are_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _is_on_host(leaf: jax.Array) -> bool:
    """Whether NumPy reads it without a copy, and without the second that compiling takes."""
    return jax.default_backend() == "cpu" or leaf.sharding.memory_kind == "pinned_host"


def _is_finite_on_host(leaf: jax.Array) -> bool:
    """One shard at a time: the host has no room for a copy of all."""
    return all(bool(np.isfinite(np.asarray(shard.data)).all()) for shard in leaf.addressable_shards)


def _handler(is_offloaded: bool) -> ocp.CompositeCheckpointHandler:
    limits = (
        dict(save_device_host_concurrent_gb=HOST_GB, restore_concurrent_gb=HOST_GB) if is_offloaded else {}
    )
    handlers: dict[str, Any] = {
        name: ocp.PyTreeCheckpointHandler(**limits) for name in ("params", "optimizer", "reference")
    }
    return ocp.CompositeCheckpointHandler(**handlers, progress=ocp.JsonCheckpointHandler())


def _is_retrieved(record: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in record.getMessage()


def _restore(orbax: Any, folder: Path, items: dict[str, Any], key: str) -> Any:
    """Raises: ConfigError: the checkpoint holds other arrays."""
    try:
        return orbax.restore(folder, args=ocp.args.Composite(**items))
    except (KeyError, ValueError, FileNotFoundError) as error:
        rule = (
            f"step {folder.name} does not hold the arrays that this configuration asks for "
            f"({' '.join(str(error).split())[:300]})"
        )
        if not has_manifest(folder):
            rule += "; or it is damaged, which nothing tells of a checkpoint without a manifest"
        raise ConfigError(key, str(folder.parent), rule) from error


def _rest(state: TrainState) -> dict[str, Any]:
    """All of a train state but the parameters."""
    rest = {"step": state.step, "opt_state": state.opt_state}
    return rest if state.loss_scale is None else rest | {"loss_scale": state.loss_scale}


def _restore_like(abstract: Any, **options: Any) -> Any:
    return ocp.args.PyTreeRestore(
        abstract, restore_args=ocp.checkpoint_utils.construct_restore_args(abstract), **options
    )


def _progress(held: dict[str, Any]) -> Progress:
    return Progress(**{name: value for name, value in held.items() if name != MARK})


def find_checkpoint(folder: Path) -> Path:
    """Resolves WORKDIR, WORKDIR/checkpoints or WORKDIR/checkpoints/STEP to the latter, the latest that is whole.

    Raises: ConfigError: there is no checkpoint, or it is damaged.
    """
    candidates = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    if (candidates / "params").is_dir() or has_manifest(candidates):
        if reason := damage_of(candidates):
            raise ConfigError("--checkpoint", str(folder), f"is damaged ({reason}); name another step")
        return candidates
    good, damaged = find_whole(candidates, "--checkpoint")
    if good is None:
        raise ConfigError("--checkpoint", str(folder), "there is no checkpoint in this folder")
    for step, reason in damaged.items():
        logger.warning("WARNING: the checkpoint of step %d is damaged (%s), and left out", step, reason)
    return candidates / str(good)


def load_for_export(
    step_folder: Path, abstract_params: Params, *, are_on_host: bool
) -> tuple[Params, Progress]:
    """Reads the parameters and the progress of one checkpoint, and nothing else of it.

    Args:   are_on_host: the parameters that the optimizer changes were on the host, among its state.
    Raises: ConfigError: it holds other arrays.
    """
    item, abstract, options = "params", abstract_params, {}
    if are_on_host:
        masters = jax.tree.map(lambda x: {"master": x}, abstract_params)
        item, abstract, options = "optimizer", {"opt_state": masters}, {"partial_restore": True}
    arguments = {item: _restore_like(abstract, **options), "progress": ocp.args.JsonRestore()}
    with ocp.Checkpointer(_handler(is_offloaded=False)) as orbax:
        restored = _restore(orbax, step_folder.absolute(), arguments, "--checkpoint")
    params = restored[item]
    if are_on_host:
        params = jax.tree.map(lambda _, leaf: leaf["master"], abstract_params, params["opt_state"])
    return params, _progress(restored.progress)
