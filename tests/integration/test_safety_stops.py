"""Runs that go wrong stop with the last good checkpoint named, or warn so that one cannot miss it."""

import re

import integration_helpers as helpers
import numpy as np

from grpo_jax.config.text import printable
from grpo_jax.run import run

HUGE_LATER = """
calls = 0

def score(*, data_source, solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    if calls > 16:  # from the second step on
        return (-1) ** calls * 3e38
    return sum(solution_str.encode()) % 5 / 4
"""


def parameters(workdir, step):
    arrays, _ = helpers.read_checkpoint(workdir, step)
    return {
        name: np.frombuffer(data, dtype).reshape(shape)
        for name, (dtype, shape, data) in arrays.items()
        if not name.startswith("optimizer['step']")
    }


def test_updates_that_are_not_finite_are_skipped_counted_and_stop_the_run(
    tmp_path, whole_run, whole_run_overrides
):
    file = tmp_path / "huge.py"
    file.write_text(HUGE_LATER)
    overrides = whole_run_overrides | {
        "reward.function": f"{file}:score",
        "eval.before_training": False,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 1,
        "checkpoint.max_to_keep": 9,
        "trainer.max_nonfinite_updates": 4,
    }
    result = helpers.run_train(tmp_path / "run", overrides)
    assert result.code == 1
    # Two updates a step, good ones in the first: the fourth bad one in a row is the last of step 3.
    error = result.err.splitlines()[-1]
    assert error.startswith("error: phase update_actor: ")
    assert "not finite in 4 updates in a row" in error and "trainer.max_nonfinite_updates" in error
    # What was due while updates were skipped was not saved.
    assert "the last good checkpoint is that of step 1" in error
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"1"}
    lines = helpers.read_lines(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert [line["actor/skipped_updates"] for line in lines] == [0, 2, 2]
    assert lines[1]["actor/loss"] is None  # NaN is not JSON
    assert all(np.isfinite(array).all() for array in parameters(tmp_path / "run", 1).values())
    # With a reward that is in order the same command goes on, from before the trouble.
    file.write_text(helpers.REWARD_FILE)
    out = helpers.train_ok(tmp_path / "run", overrides)
    assert "Going on after step 1 of 6." in out
    assert helpers.read_checkpoint(tmp_path / "run", 6) == helpers.read_checkpoint(whole_run[0], 6)


def test_a_learning_rate_that_is_absurd(tmp_path, whole_run_overrides):
    overrides = whole_run_overrides | {"optim.learning_rate": 1e30, "eval.before_training": False}
    result = helpers.run_train(tmp_path / "run", overrides | {"checkpoint.every_steps": 1})
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert "not finite in 3 updates in a row" in error and "a lower optim.learning_rate may help" in error
    # The very first step had an update that was skipped: none of its states is a good one.
    assert error.endswith("; there is no checkpoint yet")
    lines = helpers.read_lines(tmp_path / "run")
    assert [line["actor/skipped_updates"] for line in lines] == [1, 2]


def test_rewards_that_are_all_0_give_a_loud_warning(tmp_path, whole_run_overrides):
    """An untrained model never writes "####", so GSM8K's rule gives 0 throughout; and it seldom ends by itself."""
    overrides = whole_run_overrides | {
        "reward.function": "gsm8k",
        "trainer.flat_reward_steps": 2,
        "trainer.num_steps": 5,
    }
    out = helpers.train_ok(tmp_path / "run", overrides)
    lines = helpers.read_lines(tmp_path / "run")[1:]
    assert [line["frac_reward_zero_std"] for line in lines] == [1.0] * 5
    is_cut = [line["response_length/clip_ratio"] == 1 for line in lines]
    cut = [step for step in range(2, 6) if is_cut[step - 2] and is_cut[step - 1]][:1]
    expected = [("zero-reward", 2), *(("all-truncated", step) for step in cut)]
    warnings = re.split(r"^WARNING: ", out, flags=re.M)[1:]
    assert len(warnings) == len(expected)
    for (name, step), warning in zip(expected, warnings, strict=True):
        record = helpers.read_jsonl(tmp_path / "run" / "rollouts" / f"step-{step:06d}.jsonl")[0]
        assert warning.startswith(f"alarm {name} at step {step}: every ")
        assert f"  prompt:       {record['prompt'].strip()}\n" in warning
        assert f"  ground truth: {record['ground_truth']}\n" in warning
        shown = printable(record["completion"].strip())  # control characters as signs
        assert f"  completion:   {shown or '(empty)'}\n" in warning
        assert "  reward:       0, since " in warning
    assert "WARNING: alarm zero-reward" in (tmp_path / "run" / "train.log").read_text()
    told = helpers.read_jsonl(tmp_path / "run" / "alarms.jsonl")
    assert [(line["alarm"], line["step"]) for line in told] == expected
    assert lines[0]["alarms/num_sounding"] == 0 and lines[1]["alarms/zero-reward"] == 1


def test_rewards_with_spread_give_none(whole_run):
    assert "WARNING" not in whole_run[1] and not (whole_run[0] / "alarms.jsonl").exists()
    lines = helpers.read_lines(whole_run[0])
    assert all(line["frac_reward_zero_std"] < 1 for line in lines[1:])


def test_a_run_that_cannot_fit_its_device_is_refused_before_anything_is_written(
    tmp_path, whole_run_overrides, monkeypatch
):
    """A CPU does not say what it has: this one says 100 kB."""
    monkeypatch.setattr(run, "memory_limit", lambda: 100_000)
    result = helpers.run_train(tmp_path / "run", whole_run_overrides)
    assert result.code == 2 and not (tmp_path / "run").exists()
    error = result.err.splitlines()[-1]
    assert error.startswith("error: model.path='random': does not fit: phase update needs ")
    assert "parameters 0." in error


def test_what_is_done_is_saved_where_an_engine_or_a_reward_fails(tmp_path, whole_run, whole_run_overrides):
    """Nothing else was due to be saved before the end; the run goes on after that step, to the same bits."""
    overrides = whole_run_overrides | {
        "reward.function": helpers.write_failing_reward(tmp_path),
        "reward.num_workers": 1,
        "reward.on_error": "stop",
        "eval.before_training": False,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 0,
    }
    result = helpers.run_train(tmp_path / "run", overrides)
    assert result.code == 1
    error = result.err.splitlines()[-1]
    assert "the fourth step" in error and error.endswith("the last good checkpoint is that of step 3")
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2, 3]
    assert "Going on after step 3 of 6." in helpers.train_ok(tmp_path / "run", overrides)
    assert helpers.read_checkpoint(tmp_path / "run", 6) == helpers.read_checkpoint(whole_run[0], 6)
