"""A run that diverges goes back to a good checkpoint, and on in another order; or ends in one line.

An advantage estimator of the test's own gives infinite advantages to one batch, which it knows by its rewards.
"""

import json
import signal

import integration_helpers as helpers
import numpy as np
import pytest

from grpo_jax.run.audit import audit
from grpo_jax.run.workdir import Workdir

POISONED = """
import numpy as np

POISON = {poison!r}  # rewards of batches whose loss is not finite

def estimate(rewards, index):
    if rewards.ravel().tolist() in POISON:
        return np.full(rewards.shape, np.inf, np.float32)
    return rewards - rewards.mean(axis=1, keepdims=True)
"""


def rewards_of(workdir, step):
    return [
        record["reward"] for record in helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
    ]


@pytest.fixture(scope="module")
def overrides(whole_run_overrides):
    """Two epochs of three steps; the first bad update is reason enough."""
    return whole_run_overrides | {
        "algorithm.ref_refresh_every": 2,
        "checkpoint.every_steps": 1,
        "checkpoint.max_to_keep": 9,
        "checkpoint.hf_every_epochs": 0,
        "eval.before_training": False,
        "eval.every_steps": 0,
        "eval.every_epochs": 0,
        "trainer.max_nonfinite_updates": 1,
        "trainer.max_rollbacks": 1,
    }


def with_poison(folder, overrides, *batches):
    file = folder / "poisoned.py"
    file.write_text(POISONED.format(poison=batches))
    return overrides | {"algorithm.adv_estimator": f"{file}:estimate"}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, overrides):
    """Three steps without any poison; its rewards say what to poison."""
    folder = tmp_path_factory.mktemp("healthy")
    helpers.train_ok(folder / "run", with_poison(folder, overrides) | {"trainer.num_steps": 3})
    return folder / "run"


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory, overrides, healthy):
    """A run whose third step has an infinite loss: (workdir, overrides, what was printed)."""
    folder = tmp_path_factory.mktemp("rolled_back")
    overrides = with_poison(folder, overrides, rewards_of(healthy, 3))
    return folder / "run", overrides, helpers.train_ok(folder / "run", overrides)


def alarms_of(workdir):
    lines = helpers.read_jsonl(workdir / "alarms.jsonl")
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def same_end(workdir, other):
    """Whether two runs have left the same: last checkpoint, metrics and alarms."""
    ends = []
    for run in (workdir, other):
        lines = [helpers.without_clock(line) for line in helpers.read_lines(run)]
        ends.append((helpers.read_checkpoint(run, 6), lines, alarms_of(run)))
    return ends[0] == ends[1]


def test_it_goes_back_to_weights_that_a_good_step_has_measured(rolled_back):
    """The bad step is the third. No good number of the weights of step 2 was seen, so it goes back to step 1."""
    workdir, _, out = rolled_back
    [line] = [line for line in out.splitlines() if "Going back" in line]
    assert line.startswith("WARNING: alarm since step 3: not-finite (")
    assert "from step 3 to the checkpoint of step 1" in line and "(roll-back 1 of 1)" in line
    [event] = alarms_of(workdir)  # that of step 3 went with its step
    assert (event["event"], event["step"], event["back_from"], event["number"]) == ("roll-back", 1, 3, 1)
    progress = {step: helpers.read_checkpoint(workdir, step)[1]["num_rollbacks"] for step in range(1, 7)}
    assert progress == {1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 1}


def test_every_step_is_reported_once_and_finite(rolled_back):
    workdir, _, _ = rolled_back
    lines = helpers.read_lines(workdir)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["actor/skipped_updates"] == 0 and line["actor/loss"] is not None for line in lines)
    assert all(line["training/policy_lag"] == 0 for line in lines)
    scalars, texts = helpers.read_events(workdir)  # none of which may be there twice
    assert [scalars["reward/mean", step] for step in range(1, 7)] == pytest.approx(
        [line["reward/mean"] for line in lines]
    )
    assert [step for name, step in texts if name.startswith("alarms/roll-back")] == [2]


def test_every_completion_is_accounted_for(rolled_back):
    """The ledger has one line a step, and each prompt once an epoch."""
    found = audit(Workdir(rolled_back[0]))
    assert found.num_steps == 6 and found.problems == []


def prompts_of(workdir, step):
    records = helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")
    return [record["prompt"] for record in records[::4]]


def test_the_rest_of_the_epoch_comes_in_another_order_and_each_prompt_once(rolled_back, healthy):
    workdir, _, _ = rolled_back
    ours, theirs = ([prompts_of(run, step) for step in (1, 2, 3)] for run in (workdir, healthy))
    assert ours[0] == theirs[0] and ours[1] != theirs[1] and ours[2] != theirs[2]
    assert len({prompt for batch in ours for prompt in batch}) == 12


@pytest.mark.slow
def test_a_run_that_ends_and_goes_on_after_it_ends_in_the_same_bits(tmp_path, rolled_back):
    workdir, overrides, _ = rolled_back
    helpers.train_ok(tmp_path / "run", overrides | {"trainer.num_steps": 4})
    assert helpers.read_checkpoint(tmp_path / "run", 4)[1]["num_rollbacks"] == 1
    helpers.train_ok(tmp_path / "run", overrides)
    assert same_end(tmp_path / "run", workdir)


@pytest.mark.slow
@pytest.mark.parametrize("last", ["Going back", "  Step 2/3", "  Step 3/3", "Epoch 2/2"])
def test_a_kill_after_it_changes_no_bit(tmp_path, rolled_back, reward_file, last):
    workdir, overrides, _ = rolled_back
    slow = reward_file.with_name("slow")
    slow.touch()
    try:
        with helpers.start("grpo_jax.train", helpers.train_argv(tmp_path / "run", overrides)) as process:
            has_gone_back = False
            for line in process.stdout:
                has_gone_back |= "Going back" in line
                if has_gone_back and (last in line):
                    break
            process.kill()
            process.wait()
    finally:
        slow.unlink()
    assert process.returncode == -signal.SIGKILL
    helpers.train_ok(tmp_path / "run", overrides)
    assert same_end(tmp_path / "run", workdir)


def failure(result):
    assert result.code == 1
    return result.err.splitlines()[-1]


@pytest.mark.slow
def test_without_a_good_checkpoint_the_run_ends_in_a_line(tmp_path, overrides, healthy):
    """The second step is bad: the weights of step 1 are in doubt."""
    overrides = with_poison(tmp_path, overrides, rewards_of(healthy, 2))
    error = failure(helpers.run_train(tmp_path / "run", overrides))
    assert error.startswith("error: phase update_actor: alarm since step 2: not-finite (")
    assert "there is no checkpoint from before it to go back to" in error
    assert error.endswith("the last good checkpoint is that of step 1")
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2]
    assert [line["event"] for line in alarms_of(tmp_path / "run")] == ["begins"]


@pytest.mark.slow
def test_when_the_roll_backs_are_used_up_the_run_ends_in_a_line(tmp_path, overrides, rolled_back, healthy):
    """The batch that takes the place of the bad one is bad too."""
    workdir, _, _ = rolled_back
    poison = [rewards_of(healthy, 3), rewards_of(workdir, 3)]
    error = failure(helpers.run_train(tmp_path / "run", with_poison(tmp_path, overrides, *poison)))
    assert error.startswith("error: phase update_actor: alarm since step 3: not-finite (")
    assert "trainer.max_rollbacks=1 is used up" in error
    assert [line["event"] for line in alarms_of(tmp_path / "run")] == ["roll-back", "begins"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["trainer"]["max_rollbacks"] == 1


@pytest.mark.slow
def test_another_roll_back_takes_another_order(tmp_path, overrides, rolled_back, healthy):
    workdir, _, _ = rolled_back
    poison = [rewards_of(healthy, 3), rewards_of(workdir, 3)]
    overrides = with_poison(tmp_path, overrides, *poison) | {
        "trainer.max_rollbacks": 2,
        "trainer.num_steps": 3,
    }
    helpers.train_ok(tmp_path / "run", overrides)
    runs = (healthy, workdir, tmp_path / "run")
    orders = [prompts_of(run, 2) + prompts_of(run, 3) for run in runs]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])
    assert [line["number"] for line in alarms_of(tmp_path / "run")] == [1, 2]
    assert np.isfinite([line["actor/loss"] for line in helpers.read_lines(tmp_path / "run")]).all()


SPIKES = """
import numpy as np

START, left = {start!r}, 0  # rewards of the first of three batches with advantages of the wrong size

def estimate(rewards, index):
    global left
    left = 3 if rewards.ravel().tolist() == START else max(left - 1, 0)
    return (1e4 if left else 1.0) * (rewards - rewards.mean(axis=1, keepdims=True))
"""


@pytest.mark.slow
def test_three_spikes_in_a_row_are_a_divergence(tmp_path, overrides):
    """Loss and gradient of steps 22 to 24 are 10^4 times the usual; the first 21 have a window to be seen in."""
    healthy, spikes = tmp_path / "healthy.py", tmp_path / "spikes.py"
    overrides = overrides | {"trainer.total_epochs": 9, "trainer.max_nonfinite_updates": 3}
    healthy.write_text(SPIKES.format(start=[]))
    first = {"algorithm.adv_estimator": f"{healthy}:estimate", "trainer.num_steps": 22}
    helpers.train_ok(tmp_path / "healthy", overrides | first)
    spikes.write_text(SPIKES.format(start=rewards_of(tmp_path / "healthy", 22)))
    overrides |= {"algorithm.adv_estimator": f"{spikes}:estimate"}
    out = helpers.train_ok(tmp_path / "run", overrides)
    [line] = [line for line in out.splitlines() if "Going back" in line]
    assert (
        line.startswith("WARNING: alarm since step 22: ") and "grad-norm-spike (actor/grad_norm is " in line
    )
    assert "Going back from step 24 to the checkpoint of step 20," in line
    lines = helpers.read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 28))
    assert max(line["actor/grad_norm"] for line in lines) < 100
    assert "roll-back" in [line["event"] for line in alarms_of(tmp_path / "run")]
    # Without permission to go back they are alarms, and the run ends as it began.
    out = helpers.train_ok(tmp_path / "warned", overrides | {"trainer.max_rollbacks": 0})
    assert "WARNING: alarm grad-norm-spike at step 22: " in out and "Going back" not in out
    assert [line["step"] for line in helpers.read_lines(tmp_path / "warned")] == list(range(1, 28))
