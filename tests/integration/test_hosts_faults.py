"""Runs of several processes of which one dies, fails or stands still: all end soon, and one line says why."""

import random
import re
import signal
import time
from pathlib import Path

import hosts_helpers as hosts
import integration_helpers as helpers
import pytest

HANGING = Path(__file__).with_name("hanging.py")
SOON_S = 30
OVERRIDES = {
    "mesh.fsdp": -1,
    "rollout.temperature": 1.2,
    "trainer.num_steps": 6,
    "trainer.total_epochs": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.max_to_keep": 9,
}
pytestmark = pytest.mark.slow  # test_hosts.py has one that is killed


@pytest.fixture
def overrides(reward_file):
    return OVERRIDES | {"reward.function": f"{reward_file}:score"}


def wait_for_line(process, start):
    for line in process.stdout:
        if line.startswith(start):
            return
    raise AssertionError(process.stderr.read())


def ends_soon(processes):
    begin = time.monotonic()
    results = hosts.finish(processes)
    assert time.monotonic() - begin < SOON_S
    return results


def error_lines(results):
    return [line for result in results for line in result.err.splitlines() if line.startswith("error:")]


def test_where_the_first_process_is_killed_the_next_one_says_it(tmp_path, overrides):
    argv = helpers.train_argv(tmp_path / "run", overrides)
    with hosts.started(argv, 2) as processes:
        wait_for_line(processes[0], "  Step 3/3")
        processes[0].kill()
        first, second = ends_soon(processes)
    assert (first.code, second.code) == (-signal.SIGKILL, 1)
    (line,) = error_lines([second])
    assert re.match(r"error: phase \w+: process 0 on \S+ \(pid \d+\) has died", line)
    hosts.train_ok(tmp_path / "run", overrides, 2)
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == list(range(1, 7))


def test_one_that_falls_silent_is_given_up(tmp_path, overrides):
    with hosts.started(helpers.train_argv(tmp_path / "run", overrides), 2) as processes:
        wait_for_line(processes[0], "  Step 1/3")
        processes[1].send_signal(signal.SIGSTOP)
        (first,) = ends_soon(processes[:1])
        assert first.code == 1
        (line,) = error_lines([first])
        assert re.search(r"process 1 on \S+ \(pid \d+\) has said nothing for 1\d s", line)
        processes[1].send_signal(signal.SIGCONT)
        (second,) = ends_soon(processes[1:])
        assert second.code in (1, -signal.SIGABRT)  # JAX may notice sooner that the others have gone


def test_sigterm_to_any_of_them_saves_and_stops_all(tmp_path, overrides):
    with hosts.started(helpers.train_argv(tmp_path / "run", overrides), 2) as processes:
        wait_for_line(processes[0], "  Step 1/3")
        processes[1].terminate()
        results = ends_soon(processes)
    assert [result.code for result in results] == [130, 130]
    assert "everything is saved. The same command goes on." in results[0].out
    assert error_lines(results) == []


def test_a_failure_of_any_of_them_is_told_by_the_first(tmp_path, overrides):
    raising = tmp_path / "raises.py"
    raising.write_text(
        "import os\n"
        "from grpo_jax.algorithm.advantages import grpo_advantages\n"
        "def estimator(rewards, lengths):\n"
        "    if len(rewards) == 4 and os.environ['JAX_PROCESS_ID'] == '1':\n"
        "        raise ValueError('not here')\n"
        "    return grpo_advantages(rewards, lengths)\n"
    )
    overrides = overrides | {"algorithm.adv_estimator": f"{raising}:estimator"}
    with hosts.started(helpers.train_argv(tmp_path / "run", overrides), 2) as processes:
        results = hosts.finish(processes)
    assert [result.code for result in results] == [1, 1]
    (line,) = error_lines(results)
    assert re.match(r"error: phase step: process 1 on \S+: .*not here", line)


def test_a_reward_that_fails_ends_all(tmp_path, overrides):
    raising = tmp_path / "raises.py"
    raising.write_text("def score(**kwargs):\n    raise ValueError('no reward')\n")
    overrides = overrides | {"reward.function": f"{raising}:score"}
    with hosts.started(helpers.train_argv(tmp_path / "run", overrides), 2) as processes:
        results = hosts.finish(processes)
    assert [result.code for result in results] == [1, 1]
    (line,) = error_lines(results)
    assert "no reward" in line and line.startswith("error: phase reward: ")


def test_what_is_done_is_saved_by_all_where_the_first_one_fails(tmp_path, overrides):
    """In the fourth step, a reward; nothing was due to be saved before the end."""
    overrides = overrides | {
        "reward.function": helpers.write_failing_reward(tmp_path),
        "eval.before_training": False,
        "eval.every_steps": 0,
        "checkpoint.every_steps": 0,
        "reward.num_workers": 1,
        "reward.on_error": "stop",
    }
    with hosts.started(helpers.train_argv(tmp_path / "run", overrides), 2) as processes:
        results = hosts.finish(processes)
    assert [result.code for result in results] == [1, 1]
    (line,) = error_lines(results)
    assert "the fourth step" in line and line.endswith("the last good checkpoint is that of step 3")
    assert line.startswith("error: phase reward: ")
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == [1, 2, 3]
    results = hosts.train_ok(tmp_path / "run", overrides, 2)
    assert "Going on after step 3 of 6." in results[0].out


@pytest.mark.parametrize(("place", "phase"), [("advantages", "step"), ("generation", "gen")])
def test_the_process_that_stands_still_is_named(tmp_path, overrides, place, phase):
    overrides = overrides | {
        "algorithm.adv_estimator": f"{HANGING}:estimator",
        "algorithm.policy_loss": f"{HANGING}:loss",
        "trainer.phase_timeout_s": 600.0,
    }
    argv = [place, 1, *helpers.train_argv(tmp_path / "run", overrides)]
    with hosts.started(argv, 2, program=[HANGING], GRPO_JAX_TEST_HANGS_RANK="1") as processes:
        results = hosts.finish(processes)
    assert [result.code for result in results] == [1, 1]
    (line,) = error_lines(results)
    assert line.startswith(f"error: phase {phase}: has taken ")
    assert "(trainer.phase_timeout_s=0.5); process 1 on " in line
    reports = sorted(path.name.partition("-process-")[2] for path in (tmp_path / "run" / "hangs").iterdir())
    assert reports == ["0.txt", "1.txt"]


def test_kills_at_any_moment(tmp_path, overrides):
    """The moments are of the whole life of the run: joining, compiling, steps, saves."""
    # One that dies before it has joined is not known to the other, which waits for it.
    overrides = overrides | {
        "trainer.num_steps": 30,
        "trainer.total_epochs": 10,
        "trainer.join_timeout_s": 25.0,
    }
    rng, argv = random.Random(5), helpers.train_argv(tmp_path / "run", overrides)
    for number in range(6):
        with hosts.started(argv, 2) as processes:
            time.sleep(rng.uniform(3, 30))
            victim = rng.randrange(2)
            if any(process.poll() is not None for process in processes):
                assert [process.wait() for process in processes] == [0, 0]
                break
            processes[victim].kill()
            begin = time.monotonic()
            (survivor,) = hosts.finish([processes[1 - victim]])
            assert time.monotonic() - begin < SOON_S + 10, (number, survivor.err)
            assert survivor.code in (1, 2), (number, survivor.err)
            assert len(error_lines([survivor])) == 1, (number, survivor.err)
    hosts.train_ok(tmp_path / "run", overrides, 2)
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == list(range(1, 31))
