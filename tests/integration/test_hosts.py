"""One run in several processes: the numbers of one process, one log, checkpoints that any number of them can read.

Each test starts processes with a part of eight virtual devices each, and compares with one process that has all.
"""

import hosts_helpers as hosts
import integration_helpers as helpers
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

# As many parts as there are: two updates a step of a batch that does not divide by the devices, a KL in the reward
# with a reference that is refreshed, dynamic sampling, validation, checkpoints.
EVERYTHING = {
    "algorithm.kl_coef": 0.1,
    "algorithm.kl_in": "reward",
    "algorithm.ref_refresh_every": 2,
    "algorithm.dynamic_sampling_rounds": 3,
    "algorithm.rollout_is": "token",
    "algorithm.group_size": 3,
    "actor.num_minibatches": 2,
    "optim.learning_rate": 1e-3,
    "rollout.temperature": 1.2,
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "trainer.total_epochs": 3,
    "trainer.num_steps": 5,
    "eval.every_steps": 2,
    "checkpoint.every_steps": 2,
    "checkpoint.max_to_keep": 9,
    "logging.save_rollouts": True,
}


@pytest.fixture(scope="module")
def overrides(reward_file):
    return EVERYTHING | {"reward.function": f"{reward_file}:score"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, overrides):
    """The workdir of the run that one process made."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert len(jax.devices()) == hosts.DEVICES
    helpers.train_ok(workdir, overrides)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory, overrides):
    """(workdir, results) of the same run by two processes."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    return workdir, hosts.train_ok(workdir, overrides, 2)


def same_numbers(workdir, expected):
    lines, others = helpers.read_lines(workdir), helpers.read_lines(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        line, other = helpers.without_clock(line), helpers.without_clock(other)
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for file in sorted((expected / "rollouts").iterdir()):
        assert (workdir / "rollouts" / file.name).read_text() == file.read_text()


def same_model(workdir, expected):
    weights = load_file(workdir / "checkpoint-final" / "model.safetensors")
    for name, value in load_file(expected / "checkpoint-final" / "model.safetensors").items():
        np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


def test_two_processes_train_as_one(together, alone):
    workdir, _ = together
    same_numbers(workdir, alone)
    same_model(workdir, alone)


def test_the_first_one_speaks_and_the_others_write_a_log(together):
    workdir, (first, second) = together
    assert "Step 1/3" in first.out and "Done: 5 steps." in first.out
    assert second.out == second.err == ""
    assert "warm" not in (workdir / "train-1.log").read_text()
    assert sorted(path.name for path in workdir.glob("train*.log")) == ["train-1.log", "train.log"]
    assert not (workdir / "hosts.json").exists()


def test_every_completion_is_accounted_for(together):
    from grpo_jax import audit

    result = helpers.call(audit.main, [together[0]])
    assert result.code == 0, result.out


def test_one_process_goes_on_with_what_two_have_left(together, alone, overrides, tmp_path):
    import shutil

    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    out = helpers.train_ok(workdir, overrides | {"trainer.num_steps": 7})
    assert "Going on after step 5 of 7." in out
    reference = tmp_path / "alone"
    shutil.copytree(alone, reference)
    helpers.train_ok(reference, overrides | {"trainer.num_steps": 7})
    same_numbers(workdir, reference)
