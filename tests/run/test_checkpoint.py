"""Checkpoints: damage of any kind is found, a good one is kept, and what fails in the background is known."""

import json
import logging
import resource
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import CheckpointSection, ConfigError, MeshSection
from grpo_jax.model.sharding import abstract_like, make_mesh
from grpo_jax.run import checkpoint
from grpo_jax.run.checkpoint import Checkpointer, CheckpointError, Progress, find_checkpoint, load_for_export
from grpo_jax.run.retention import MARK, saved_steps
from grpo_jax.types import TrainState

MESH = make_mesh(MeshSection(data=1, fsdp=1, tensor=1), jax.devices()[:1])
SHARDING = NamedSharding(MESH, PartitionSpec())


def state_of(step, size=64, sharding=SHARDING):
    """A train state whose numbers tell its step."""
    values = np.random.default_rng(step).normal(size=(size, 64)).astype(np.float32)
    put = lambda value: jax.device_put(value, sharding)
    return TrainState(
        step=jax.device_put(np.int32(step), NamedSharding(sharding.mesh, PartitionSpec())),
        params={"a": put(values), "b": put(values + 1)},
        opt_state={"a": {"mu": put(values + 2)}, "b": {"mu": put(values + 3)}},
    )


def abstract_of(state):
    return abstract_like(state, jax.tree.map(lambda x: x.sharding, state))


def progress_of(step):
    return Progress(step, step, 0, {"at": step}, "F32", step, [], 0.1)


def open_checkpoints(folder, is_offloaded=False, **changes):
    return Checkpointer(folder, CheckpointSection(**changes), is_offloaded=is_offloaded)


def save(checkpointer, step, **facts):
    checkpointer.save(state_of(step), progress_of(step), **facts)
    checkpointer.commit()
    checkpointer.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with steps 1 and 2, for tests to copy."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    checkpointer = open_checkpoints(folder)
    save(checkpointer, 1)
    save(checkpointer, 2)
    checkpointer.close()
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def restored_step(folder):
    """The step that is found, after its arrays have been compared with those that were saved."""
    checkpointer = open_checkpoints(folder)
    try:
        step = checkpointer.find_good()
        state, progress, _ = checkpointer.restore(abstract_of(state_of(1)))
        assert progress == progress_of(step)
        jax.tree.map(np.testing.assert_array_equal, state, state_of(step))
        return step
    finally:
        checkpointer.close()


def largest_file(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def all_files(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def remove_manifest_of(folder):
    (folder / "manifest.json").unlink()


DAMAGES = {
    "a flipped byte of the parameters": lambda f: flip(largest_file(f / "params"), -100),
    "a flipped byte of the optimizer": lambda f: flip(largest_file(f / "optimizer"), 9),
    "a truncated file": lambda f: largest_file(f / "params").write_bytes(b"\1" * 5),
    "an empty file": lambda f: largest_file(f / "optimizer").write_bytes(b""),
    "a zeroed file": lambda f: largest_file(f).write_bytes(bytes(largest_file(f).stat().st_size)),
    "a longer file": lambda f: (f / "progress" / "metadata").open("a").write(" "),
    "a missing file": lambda f: largest_file(f).unlink(),
    "a missing item": lambda f: shutil.rmtree(f / "optimizer"),
    "another number in progress": lambda f: (f / "progress" / "metadata").write_text(
        (f / "progress" / "metadata").read_text().replace('"policy_version": 2', '"policy_version": 3')
    ),
    "no manifest": remove_manifest_of,
    "an empty manifest": lambda f: (f / "manifest.json").write_text(""),
    "a manifest that is no object": lambda f: (f / "manifest.json").write_text("[]"),
    "a manifest of other files": lambda f: (f / "manifest.json").write_text(
        (f / "manifest.json").read_text().replace('"size": ', '"size": 1')
    ),
    "a flipped byte of the manifest": lambda f: flip(f / "manifest.json", -10),
    "nothing left": lambda f: [shutil.rmtree(f), f.mkdir()],
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_taken(kind, folder, capsys):
    DAMAGES[kind](folder / "2")
    assert find_checkpoint(folder.parent) == folder / "1"
    assert saved_steps(folder) == [1, 2]  # export moves nothing
    with pytest.raises(ConfigError, match=r"^--checkpoint=.*damaged|^--checkpoint=.*no checkpoint"):
        find_checkpoint(folder / "2")
    assert restored_step(folder) == 1
    assert saved_steps(folder) == [1] and (folder.parent / "checkpoints-damaged" / "2").is_dir()


@pytest.mark.parametrize(("before", "good", "left"), [(3, 2, [1, 2]), (2, 1, [1]), (1, None, [1, 2])])
def test_going_back_removes_what_is_later_than_the_good_one(folder, before, good, left):
    checkpointer = open_checkpoints(folder)
    assert checkpointer.go_back(before) == good
    checkpointer.close()
    assert saved_steps(folder) == left and {path.name for path in folder.iterdir()} == set(map(str, left))


def test_going_back_passes_by_a_damaged_one(folder):
    flip(largest_file(folder / "2"), 5)
    checkpointer = open_checkpoints(folder)
    assert checkpointer.go_back(3) == 1 and saved_steps(folder) == [1]
    save(checkpointer, 2)  # a step that has been there before
    checkpointer.close()
    assert restored_step(folder) == 2


def test_going_back_waits_for_the_save_that_is_under_way(folder):
    checkpointer = open_checkpoints(folder, max_to_keep=3)
    checkpointer.save(state_of(3), progress_of(3))
    checkpointer.commit()
    assert checkpointer.go_back(3) == 2
    checkpointer.close()
    assert saved_steps(folder) == [1, 2]


def test_every_single_byte_counts(folder):
    """One flipped bit in any file of the checkpoint is found."""
    files = all_files(folder / "2")
    assert len(files) > 8
    for file in files:
        if size := file.stat().st_size:
            flip(file, size // 2)
            assert find_checkpoint(folder) == folder / "1", file
            flip(file, size // 2)
    assert find_checkpoint(folder) == folder / "2"


def test_where_none_is_whole_nothing_is_moved_and_nothing_begins_anew(folder):
    flip(largest_file(folder / "1"), 7)
    largest_file(folder / "2" / "params").unlink()
    for _ in range(2):
        checkpointer = open_checkpoints(folder)
        with pytest.raises(
            ConfigError, match=r"no checkpoint is whole \(step 2: params/.* is missing; step 1: "
        ):
            checkpointer.find_good()
        checkpointer.close()
    assert saved_steps(folder) == [1, 2]


def test_a_checkpoint_from_before_manifests_is_restored_and_said_to_be_unverified(folder, capsys):
    (folder / "2" / "manifest.json").unlink()
    metadata = folder / "2" / "progress" / "metadata"
    held = json.loads(metadata.read_text())
    assert held.pop(MARK) is True
    metadata.write_text(json.dumps(held))
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logging.getLogger("grpo_jax.run.retention").addHandler(handler)
    try:
        assert restored_step(folder) == 2
    finally:
        logging.getLogger("grpo_jax.run.retention").removeHandler(handler)
    assert len(messages) == 1 and "cannot be verified" in messages[0]
    # It makes way for verified ones, and none of them for it.
    checkpointer = open_checkpoints(folder, max_to_keep=1)
    save(checkpointer, 3)
    checkpointer.close()
    assert saved_steps(folder) == [3]


def test_without_commit_there_is_no_checkpoint(folder):
    """As when a run dies before the step's line is on disk."""
    checkpointer = open_checkpoints(folder)
    checkpointer.save(state_of(3), progress_of(3))
    while not list(folder.glob("3.*.tmp/manifest.json")):
        time.sleep(0.01)
    assert checkpointer.latest_step == 2
    checkpointer.wait()
    assert checkpointer.latest_step == 2 and sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    save(checkpointer, 3)
    checkpointer.close()
    assert saved_steps(folder) == [2, 3]


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_a_failed_background_save_is_known_without_waiting(folder, is_offloaded):
    checkpointer = open_checkpoints(folder, is_offloaded=is_offloaded)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))  # as a full disk: no file grows beyond
    try:
        with pytest.raises(CheckpointError, match="the checkpoint of step 3 could not be written: "):
            checkpointer.save(state_of(3, size=4096), progress_of(3))
            checkpointer.commit()
            for _ in range(1000):
                checkpointer.check()
                time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]
    save(checkpointer, 4)  # space is back
    checkpointer.close()
    assert restored_step(folder) == 4 and saved_steps(folder) == [2, 4]


def test_too_little_space_is_said_before_anything_is_written(folder, monkeypatch):
    checkpointer = open_checkpoints(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 9 * 10**8, 10**8))
    with pytest.raises(CheckpointError, match=r"a checkpoint takes 0\.00 GB, and 0\.10 GB are free in"):
        checkpointer.save(state_of(3), progress_of(3))
    checkpointer.close()
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("memory", ["device", "pinned_host"])
def test_what_is_not_finite_is_not_saved(folder, value, memory):
    bad, sharding = state_of(3), SHARDING.with_memory_kind(memory)
    moments = jax.device_put(bad.opt_state["b"]["mu"].at[5, 6].set(value), sharding)
    bad_moments = TrainState(bad.step, bad.params, bad.opt_state | {"b": {"mu": moments}})
    params = bad.params | {"a": bad.params["a"].at[63, 63].set(value)}
    bad_params = TrainState(bad.step, params, bad.opt_state)
    checkpointer = open_checkpoints(folder, max_to_keep=1)
    for state, name in ((bad_moments, "optimizer b/mu"), (bad_params, "parameters a")):
        with pytest.raises(CheckpointError, match=f"{name} hold a number that is not finite after step 3"):
            checkpointer.save(state, progress_of(3))
    checkpointer.close()
    assert saved_steps(folder) == [1, 2]


@pytest.mark.parametrize("is_on_host", [True, False])
def test_a_save_compiles_nothing(tmp_path, monkeypatch, is_on_host):
    """Training would stand still for that. Accelerators look at their arrays by a program that is there before."""
    if not is_on_host:
        monkeypatch.setattr(checkpoint, "_is_on_host", lambda leaf: False)
    state = state_of(1, size=72)  # of no other test
    checkpoint.compile_check(abstract_of(state))
    checkpointer = open_checkpoints(tmp_path / "checkpoints")
    compiled = []
    log = logging.getLogger("jax._src.interpreters.pxla")
    monkeypatch.setattr(log, "filters", [lambda record: compiled.append(record.getMessage())])
    jax.config.update("jax_log_compiles", True)
    try:
        checkpointer.save(state, progress_of(1))
    finally:
        jax.config.update("jax_log_compiles", False)
    checkpointer.close()
    assert not [message for message in compiled if message.startswith("Compiling")]


def test_it_is_restored_onto_another_mesh(saved):
    mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    checkpointer = open_checkpoints(saved)
    state, _, _ = checkpointer.restore(abstract_of(state_of(2, sharding=sharding)))
    checkpointer.close()
    assert state.params["a"].sharding == sharding and mesh.size == 8
    jax.tree.map(np.testing.assert_array_equal, state, state_of(2))
    params, progress = load_for_export(saved / "1", abstract_of(state_of(1)).params, are_on_host=False)
    assert progress == progress_of(1)
    np.testing.assert_array_equal(params["b"], state_of(1).params["b"])


def test_what_stays(tmp_path):
    """Two newest, every second epoch, and the best, which the later equal one does not replace."""
    folder = tmp_path / "checkpoints"
    changes = {"max_to_keep": 2, "keep_every_epochs": 2, "keep_best": "val/accuracy"}
    checkpointer = open_checkpoints(folder, **changes)
    accuracy, seen = {1: 0.25, 2: 0.75, 3: None, 4: 0.5, 5: 0.75, 6: 0.5}, {}
    for step, value in accuracy.items():
        metrics = {"val/accuracy": value} if value is not None else {"reward/mean": 9.0}
        save(checkpointer, step, epoch=step - 2 if step > 2 else None, metrics=metrics)
        seen[step] = saved_steps(folder)
    assert seen == {1: [1], 2: [1, 2], 3: [2, 3], 4: [2, 3, 4], 5: [2, 4, 5], 6: [2, 4, 5, 6]}
    assert checkpointer.best_value() == 0.75
    checkpointer.close()
    assert open_checkpoints(folder).best_value() is None  # not asked for
    assert not jnp.isnan(open_checkpoints(folder, **changes).best_value())
