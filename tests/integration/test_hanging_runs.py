"""Runs that stand still, each in another phase: which is named, what is written down, and how they end."""

import os
import subprocess
import sys
from pathlib import Path

import integration_helpers as helpers
import pytest

HANGING = Path(__file__).with_name("hanging.py")
OVERRIDES = {
    "algorithm.adv_estimator": f"{HANGING}:estimator",
    "algorithm.policy_loss": f"{HANGING}:loss",
    "trainer.num_steps": 2,
    "trainer.phase_timeout_s": 600.0,
    "checkpoint.every_steps": 1,
    "eval.every_steps": 1,
}


def train_and_hang(workdir, place, end_s):
    """Returns (exit code, lines of stderr)."""
    done = subprocess.run(
        [sys.executable, str(HANGING), place, str(end_s), *helpers.train_argv(workdir, OVERRIDES)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
        cwd=helpers.ROOT,
        env=os.environ | {"PYTHONPATH": str(helpers.ROOT)},
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("place", "phase", "where", "left"),
    [
        ("device", "update_actor", "fetch (sharding.py:", None),  # the default suite's
        *[
            pytest.param(*case, marks=pytest.mark.slow, id=case[0])
            for case in (
                ("inputs", "read_inputs", "open_run (run.py:", ""),
                ("trial", "open_devices", "PolicyLoss.__call__ (policy_losses.py:", ""),
                ("compilation", "compile", "", "; there is no checkpoint yet"),
                ("generation", "gen", "", "; there is no checkpoint yet"),
                (
                    "advantages",
                    "step",
                    "AdvantageEstimator.__call__ (advantages.py:",
                    "; there is no checkpoint yet",
                ),
                ("validation", "testing", "Run._validate (run.py:", "; there is no checkpoint yet"),
                ("console", "report", "Run._report (run.py:", "; there is no checkpoint yet"),
                ("background save", "save_checkpoint", "Checkpointer.wait (checkpoint.py:", None),
            )
        ],
    ],
)
def test_a_phase_that_stands_still_is_named_and_ended_and_the_run_goes_on(
    tmp_path, place, phase, where, left
):
    """Args: left: of checkpoints, in the last line; None: no signal reaches the main thread, or its end hangs."""
    code, lines = train_and_hang(tmp_path / "run", place, end_s=1 if left is None else 60)
    assert code == 1
    # A run that closes slowly is said to be ending after its last words.
    lines = [line for line in lines if not line.endswith("it is ended in any case")]
    assert lines[-1].startswith(f"error: phase {phase}: has taken ") and ", since " in lines[-1], lines[-5:]
    assert "(trainer.phase_timeout_s=0.5); it is in " in lines[-1]
    assert where in lines[-1]
    (report,) = (tmp_path / "run" / "hangs").iterdir()
    assert report.name.endswith(f"-{phase}.txt") and f"were then: {report}" in lines[-1]
    assert lines[-1].endswith("; it cannot be ended in order" if left is None else f"{report}{left}")
    text = report.read_text()
    assert f" phase {phase} has taken " in text and "hanging.py" in text and "in stand_still" in text
    helpers.train_ok(tmp_path / "run", OVERRIDES)
    assert [line["training/global_step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_a_thread_that_keeps_the_interpreter_to_itself_is_ended(tmp_path):
    """No Python runs any more, that of the watch neither."""
    code, lines = train_and_hang(tmp_path / "run", "holding the interpreter", end_s=3)
    assert code == 1 and any(line.startswith("Timeout (0:") for line in lines)
    assert any("hanging.py" in line and "in estimator" in line for line in lines)
    helpers.train_ok(tmp_path / "run", OVERRIDES)
    assert [line["training/global_step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2]


@pytest.mark.slow
def test_what_hangs_while_it_closes_hides_no_success(tmp_path):
    code, _ = train_and_hang(tmp_path / "run", "close", end_s=60)
    assert code == 0
    assert "the engine: PhaseTimedOut: has taken" in (tmp_path / "run" / "train.log").read_text()
    assert [path.name.endswith("-close.txt") for path in (tmp_path / "run" / "hangs").iterdir()] == [True]
