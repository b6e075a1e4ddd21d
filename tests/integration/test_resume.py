"""Through any number of interruptions a run ends in the same bits.

The run of `whole_run` (six steps in two epochs, two updates a step, a reference model) is started as a
process, stopped by Ctrl-C in the first epoch, started again, killed in the second, and finished.
"""

import shutil
import signal
import time

import integration_helpers as helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from grpo_jax.config import CheckpointSection, MeshSection
from grpo_jax.model.sharding import abstract_like, make_mesh
from grpo_jax.run.checkpoint import Checkpointer, Progress
from grpo_jax.types import TrainState


def read_until(process, start):
    """Reads the output of a process up to a line that begins with `start`; returns what was read."""
    read = []
    for line in process.stdout:
        read.append(line)
        if line.startswith(start):
            return "".join(read)
    raise AssertionError(f"no line {start!r} in:\n{''.join(read)}\n{process.stderr.read()}")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, whole_run, whole_run_overrides, reward_file):
    """Runs the run in three pieces; returns the workdir and what was seen on the way."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    argv = helpers.train_argv(workdir, whole_run_overrides)
    slow, seen = reward_file.with_name("slow"), {}
    slow.touch()  # 16 completions, a twentieth of a second each: time enough within a step
    try:
        with helpers.start("grpo_jax.train", argv) as process:
            out = read_until(process, "  Step 1/3:")
            process.send_signal(signal.SIGINT)
            rest, seen["sigint_err"] = process.communicate(timeout=120)
        seen["sigint_out"], seen["sigint_code"] = out + rest, process.returncode
        seen["sigint_lines"] = helpers.read_lines(workdir)
        seen["sigint_checkpoints"] = {p.name for p in (workdir / "checkpoints").iterdir()}

        with helpers.start("grpo_jax.train", argv) as process:
            out = read_until(process, "Epoch 2/2:") + read_until(process, "  Step 2/3:")
            wait_for(lambda: (workdir / "checkpoints" / "4").exists())
            process.kill()
        seen["kill_out"], seen["kill_code"] = out, process.wait()
        with (workdir / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "epo')  # as if it had been killed while it wrote
        seen["kill_lines"] = (workdir / "metrics.jsonl").read_text().splitlines()
    finally:
        slow.unlink()
    seen["last_out"] = helpers.train_ok(workdir, whole_run_overrides)
    return workdir, seen


@pytest.mark.slow  # by default, test_kills.py
def test_ctrl_c_stops_after_the_step_and_says_how_to_go_on(interrupted):
    _, seen = interrupted
    assert seen["sigint_code"] == 130, seen["sigint_err"]
    assert seen["sigint_err"] == ""
    assert "Stopping after this step" in seen["sigint_out"]
    assert "Stopped after step 2; everything is saved. The same command goes on." in seen["sigint_out"]
    assert [line["step"] for line in seen["sigint_lines"]] == [0, 1, 2]
    assert seen["sigint_checkpoints"] == {"2"}  # none was due before step 4


@pytest.mark.slow  # by default, test_kills.py
def test_it_goes_on_where_it_stopped(interrupted):
    _, seen = interrupted
    assert "Going on after step 2 of 6." in seen["kill_out"]
    steps = [line for line in seen["kill_out"].splitlines() if line.startswith(("Epoch", "  Step"))]
    assert [line.split(":")[0] for line in steps] == [
        "Epoch 1/2", "  Step 3/3", "Epoch 2/2", "  Step 1/3", "  Step 2/3",
    ]  # fmt: skip


@pytest.mark.slow  # by default, test_kills.py
def test_what_a_kill_left_beyond_the_checkpoint_is_dropped(interrupted):
    workdir, seen = interrupted
    assert seen["kill_code"] == -signal.SIGKILL
    assert len(seen["kill_lines"]) == 7 and '"step": 5' in seen["kill_lines"][5]
    assert "Going on after step 4 of 6." in seen["last_out"]
    assert [line["step"] for line in helpers.read_lines(workdir)] == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.slow  # by default, test_kills.py
def test_parameters_and_optimizer_end_in_the_same_bits(interrupted, whole_run):
    workdir, _ = interrupted
    whole, _ = whole_run
    for step in (4, 6):
        arrays, progress = helpers.read_checkpoint(workdir, step)
        expected_arrays, expected_progress = helpers.read_checkpoint(whole, step)
        assert arrays == expected_arrays
        assert progress == expected_progress
        assert progress["global_step"] == progress["policy_version"] == step
    assert helpers.read_checkpoint(whole, 4)[0] != helpers.read_checkpoint(whole, 6)[0]
    for epoch in (1, 2):
        name = f"checkpoint-epoch-{epoch}"
        assert helpers.tree_digest(workdir / name) == helpers.tree_digest(whole / name)


@pytest.mark.slow  # by default, test_kills.py
def test_metrics_and_completions_are_the_same(interrupted, whole_run):
    workdir, _ = interrupted
    whole, _ = whole_run
    lines, expected = helpers.read_lines(workdir), helpers.read_lines(whole)
    assert [helpers.without_clock(line) for line in lines] == [
        helpers.without_clock(line) for line in expected
    ]
    assert [set(line) for line in lines] == [set(line) for line in expected]
    for folder in ("rollouts", "validation"):
        assert helpers.tree_digest(workdir / folder) == helpers.tree_digest(whole / folder)


@pytest.mark.slow  # by default, test_kills.py
def test_tensorboard_shows_no_step_twice(interrupted):
    workdir, _ = interrupted
    assert len(list((workdir / "tensorboard").iterdir())) == 3  # one a start
    scalars, texts = helpers.read_events(workdir)  # which fails where a step is there twice
    expected = {
        (name, line["step"]): np.float32(value)
        for line in helpers.read_lines(workdir)
        for name, value in line.items()
        if name not in ("step", "epoch", "time")
    }
    assert scalars == expected
    assert {step for tag, step in texts if tag.startswith("rollouts")} == {1, 2, 3, 4, 5, 6}


def test_a_run_that_left_no_checkpoint_starts_again(tmp_path, whole_run, whole_run_overrides):
    whole, _ = whole_run
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints")
    helpers.train_ok(workdir, whole_run_overrides | {"trainer.num_steps": 2})
    lines = helpers.read_lines(workdir)
    expected = helpers.read_lines(whole)[:3]
    assert [helpers.without_clock(line) for line in lines] == [
        helpers.without_clock(line) for line in expected
    ]
    assert {step for _, step in helpers.read_events(workdir)[0]} == {0, 1, 2}


def test_a_finished_run_changes_nothing_and_says_so(tmp_path, whole_run, whole_run_overrides):
    whole, _ = whole_run
    workdir = tmp_path / "run"
    shutil.copytree(whole, workdir)
    out = helpers.train_ok(workdir, whole_run_overrides)
    assert "This run is finished: all of its 6 steps are done" in out
    assert "Step 1/3" not in out
    assert (workdir / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    for folder in ("checkpoints", "checkpoint-epoch-1", "checkpoint-epoch-2", "rollouts", "random-model"):
        assert helpers.tree_digest(workdir / folder) == helpers.tree_digest(whole / folder)
    assert helpers.read_events(workdir) == helpers.read_events(whole)


def test_a_finished_run_can_be_made_longer(tmp_path, whole_run, whole_run_overrides):
    """A run of two steps that then gets two more is the run of four steps."""
    whole, _ = whole_run
    workdir = tmp_path / "run"
    helpers.train_ok(workdir, whole_run_overrides | {"trainer.num_steps": 2})
    out = helpers.train_ok(workdir, whole_run_overrides | {"trainer.num_steps": 4})
    assert "Going on after step 2 of 4." in out
    assert helpers.read_checkpoint(workdir, 4)[0] == helpers.read_checkpoint(whole, 4)[0]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path, whole_run, whole_run_overrides):
    whole, _ = whole_run
    two_steps = whole_run_overrides | {"trainer.num_steps": 2}
    helpers.train_ok(tmp_path / "same", two_steps)
    # The other run gets the model and the problems of the first: what is left is the order and the sampling.
    files = {f"data.{split}_files": (str(whole / "data" / f"{split}.parquet"),) for split in ("train", "val")}
    inputs = {"model.path": whole / "random-model", "arithmetic.num_train": 0, **files}
    helpers.train_ok(tmp_path / "same-files", two_steps | inputs)
    helpers.train_ok(tmp_path / "other", two_steps | inputs | {"trainer.seed": 1})

    def lines(workdir):
        return [helpers.without_clock(line) for line in helpers.read_lines(workdir)][:3]

    def rollouts(workdir):
        return [helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl") for step in (1, 2)]

    expected = helpers.read_checkpoint(tmp_path / "same", 2)[0]
    assert lines(tmp_path / "same") == lines(tmp_path / "same-files") == lines(whole)
    assert rollouts(tmp_path / "same") == rollouts(tmp_path / "same-files") == rollouts(whole)
    assert helpers.read_checkpoint(tmp_path / "same-files", 2)[0] == expected
    assert helpers.read_checkpoint(tmp_path / "other", 2)[0] != expected
    ours, others = rollouts(whole)[0], rollouts(tmp_path / "other")[0]
    assert [r["prompt_id"] for r in ours] != [r["prompt_id"] for r in others]
    texts = [{r["completion"] for r in records} for records in (ours, others)]
    assert len(texts[0] & texts[1]) < len(texts[0]) / 2


def test_what_is_saved_is_what_was_there_when_saving_began(tmp_path):
    """The next update takes the state's memory over while the files are still being written."""
    mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(1024, 2048)).astype(np.float32) for name in ("a", "b", "mu", "nu")}
    # Through a computation: memory that is numpy's could not be donated.
    put = lambda name: jax.jit(jnp.negative, out_shardings=sharding)(-values[name])
    scalar = jax.device_put(np.int32(3), NamedSharding(mesh, PartitionSpec()))
    state = TrainState(
        step=scalar, params={"a": put("a"), "b": put("b")}, opt_state={"mu": put("mu"), "nu": put("nu")}
    )
    abstract = abstract_like(state, jax.tree.map(lambda x: x.sharding, state))
    update = jax.jit(lambda s: jax.tree.map(lambda x: -x - 1, s), donate_argnums=0)
    update(jax.tree.map(jnp.copy, state))  # compiled beforehand, so that the next one is quick

    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSection(), is_offloaded=False)
    progress = Progress(
        global_step=3,
        policy_version=3,
        seed=0,
        prompt_iterator={"at": 1},
        hf_dtype="F32",
        num_rollout_batches=4,
        surplus=[{"rewards": [0.1]}],
        kl_coef=0.1 / 3,
    )
    checkpointer.save(state, progress, reference={"a": state.params["b"]})
    for _ in range(5):
        state = update(state)  # donates
    jax.block_until_ready(state)
    checkpointer.commit()
    checkpointer.close()

    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSection(), is_offloaded=False)
    restored, restored_progress, reference = checkpointer.restore(abstract, {"a": abstract.params["a"]})
    checkpointer.close()
    assert restored_progress == progress and int(restored.step) == 3
    for name in ("a", "b"):
        np.testing.assert_array_equal(restored.params[name], values[name])
        assert restored.params[name].sharding == sharding
    np.testing.assert_array_equal(reference["a"], values["b"])
    for name in ("mu", "nu"):
        np.testing.assert_array_equal(restored.opt_state[name], values[name])
