"""A workdir that holds another run is refused, and not a byte of it changes; unless one insists."""

import fcntl
import json
import shutil

import integration_helpers as helpers
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.run import lock

LONGER = {"checkpoint.resume": "force", "trainer.num_steps": 7, "trainer.total_epochs": 3}


@pytest.mark.parametrize(
    ("key", "value", "old"),
    [
        ("optim.learning_rate", 0.005, "0.01"),
        ("algorithm.group_size", 2, "4"),
        ("trainer.seed", 1, "0"),
        ("data.shuffle", False, "True"),
        ("random_model.hidden_size", 64, "32"),
    ],
)
def test_another_runs_workdir_is_refused(key, value, old, tmp_path, whole_run, whole_run_overrides):
    workdir, _ = whole_run
    before = helpers.tree_digest(workdir)
    result = helpers.run_train(workdir, whole_run_overrides | {key: value})
    assert result.code == 2
    assert result.err.startswith(f"error: {key}={value}: ") and result.err.count("\n") == 1
    assert f"the run in {workdir} has {old}" in result.err
    assert "--workdir" in result.err and "checkpoint.resume=force" in result.err
    assert helpers.tree_digest(workdir) == before


def test_total_epochs_are_not_free_where_the_schedule_depends_on_them(tmp_path, whole_run_overrides):
    overrides = whole_run_overrides | {"optim.schedule": "cosine", "trainer.num_steps": 1}
    helpers.train_ok(tmp_path / "run", overrides)
    before = helpers.tree_digest(tmp_path)
    result = helpers.run_train(tmp_path / "run", overrides | {"trainer.total_epochs": 3})
    assert result.code == 2 and "trainer.total_epochs=3" in result.err
    assert helpers.tree_digest(tmp_path) == before


def test_who_insists_goes_on(tmp_path, whole_run, whole_run_overrides):
    """With another learning rate, from the parameters that are there."""
    workdir = tmp_path / "run"
    shutil.copytree(whole_run[0], workdir)
    changed = {"optim.learning_rate": 0.005, "trainer.num_steps": 7, "trainer.total_epochs": 3}
    out = helpers.train_ok(workdir, whole_run_overrides | changed | {"checkpoint.resume": "force"})
    assert "Going on after step 6 of 7." in out
    lines = helpers.read_lines(workdir)
    assert [line["step"] for line in lines] == list(range(8))
    assert lines[6]["actor/lr"] == pytest.approx(0.01) and lines[7]["actor/lr"] == pytest.approx(0.005)
    # From now on it is a run with the new learning rate.
    result = helpers.run_train(workdir, whole_run_overrides)
    assert result.code == 2 and "optim.learning_rate=0.01" in result.err


def test_who_insists_on_other_arrays_is_told(tmp_path, whole_run, whole_run_overrides):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run[0], workdir)
    before = helpers.tree_digest(workdir)
    for key, value in {
        "optim.offload": True,
        "optim.moments_dtype": "bfloat16",
        "model.param_dtype": "bfloat16",
        "algorithm.ref_refresh_every": 2,
    }.items():
        also = {"optim.beta2": 0.99} if key == "optim.moments_dtype" else {"algorithm.kl_coef": 0.1}
        result = helpers.run_train(workdir, whole_run_overrides | LONGER | also | {key: value})
        assert result.code == 2
        assert len(result.err.splitlines()) == 1 and key in result.err and "hold other arrays" in result.err
    assert helpers.tree_digest(workdir) == before


def test_a_checkpoint_that_lacks_an_item_is_named_and_nothing_is_lost(
    tmp_path, whole_run, whole_run_overrides
):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run[0], workdir)
    checkpoint = workdir / "checkpoints" / "6"
    shutil.rmtree(checkpoint / "optimizer")
    (checkpoint / "manifest.json").unlink()  # as from a version that wrote none
    progress = json.loads((checkpoint / "progress" / "metadata").read_text())
    del progress["has_manifest"]
    (checkpoint / "progress" / "metadata").write_text(json.dumps(progress))
    before = (workdir / "config.json").read_text()
    result = helpers.run_train(workdir, whole_run_overrides | LONGER | {"optim.weight_decay": 0.5})
    assert result.code == 2 and len(result.err.splitlines()) == 1
    assert "step 6 does not hold the arrays" in result.err and "optimizer" in result.err
    assert (workdir / "config.json").read_text() == before


def test_what_is_only_reported_may_change(tmp_path, whole_run, whole_run_overrides):
    workdir = tmp_path / "run"
    shutil.copytree(whole_run[0], workdir)
    free = {
        "eval.every_steps": 0,
        "eval.num_prompts": 2,
        "checkpoint.every_steps": 1,
        "checkpoint.max_to_keep": 9,
        "logging.num_text_samples": 0,
        "logging.loggers": ("tensorboard",),
        "trainer.total_epochs": 3,
        "trainer.num_steps": 8,
        "trainer.flat_reward_steps": 50,
        "algorithm.ref_offload": True,
        "rollout.batch_size": 16,
    }
    out = helpers.train_ok(workdir, whole_run_overrides | free)
    assert "Going on after step 6 of 8." in out
    steps = {path.name for path in (workdir / "checkpoints").iterdir()}
    assert steps == {"4", "6", "7", "8"}


def test_processes_that_look_at_the_same_time_are_no_run(tmp_path):
    """Those of one run do, each with a file of its own open; who holds the lock refuses all of them."""
    file = tmp_path / "lock"
    file.write_text("{}")
    with file.open() as another:
        fcntl.flock(another, fcntl.LOCK_SH)  # as one that looks
        lock.check_free(file)
    with lock.hold(file), pytest.raises(ConfigError, match="is in use by"):
        lock.check_free(file)
    lock.check_free(file)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("reward.function", "gsm8kk", "did you mean gsm8k?"),
        ("reward.function", "absent.py:score", "there is no file absent.py"),
        ("model.path", "nosuch", "there is no such folder"),
        ("algorithm.adv_estimator", "grpoo", "did you mean grpo?"),
        ("lora.path", "nosuch", "missing"),
    ],
)
def test_a_name_that_leads_nowhere_comes_before_the_run_that_is_there(
    key, value, said, whole_run, whole_run_overrides
):
    before = helpers.tree_digest(whole_run[0])
    changes = {key: value} | ({"lora.rank": 4} if key == "lora.path" else {})
    result = helpers.run_train(whole_run[0], whole_run_overrides | changes)
    assert result.code == 2 and result.err.count("\n") == 1
    assert result.err.startswith(f"error: {key}='{value}") and said in result.err
    assert "resume=force" not in result.err and "--workdir" not in result.err
    assert helpers.tree_digest(whole_run[0]) == before


def test_force_is_advised_where_it_helps_alone(whole_run, whole_run_overrides):
    result = helpers.run_train(whole_run[0], whole_run_overrides | {"model.param_dtype": "bfloat16"})
    assert result.code == 2 and "force" not in result.err
    assert "choose another --workdir: its checkpoints hold other arrays" in result.err
    result = helpers.run_train(whole_run[0], whole_run_overrides | {"mesh.tensor": 3})
    assert result.code == 2 and "insist on going on, where that fits the devices, with" in result.err
