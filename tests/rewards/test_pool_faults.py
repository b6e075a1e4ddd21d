"""Reward functions that fork, write into their own answers, do not read, or start what they do not end."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from grpo_jax.rewards import keeper, make_reward
from grpo_jax.types import Completion, Prompt, RolloutGroup

# The completion's text is evaluated; `extra_info` is there as `info`.
CODE = """\
import os, signal, subprocess, sys, time
from grpo_jax.rewards import messages

FD = int(sys.argv[1])  # of the worker's socket

def compute_score(data_source, solution_str, ground_truth, extra_info):
    return eval(solution_str, globals(), {"info": extra_info, "text": solution_str})

def fork(value):
    if os.fork() == 0:
        return -1.0
    return value

def exit_code_of_a_child(error):
    pid = os.fork()
    if pid == 0:
        raise error
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def terminated_child():
    pid = os.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    time.sleep(0.2)  # Python drops a signal that comes while it forks
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def start(pid_file, **options):
    child = subprocess.Popen(["/bin/sleep", "60"], **options)
    with open(pid_file, "a") as file:
        file.write(f"{os.getpid()} {child.pid} ")
    return 1.0

def daemon(pid_file):
    if os.fork() == 0:
        os.setsid()
        start(pid_file)
        os._exit(0)
    return 1.0

def loop():
    while True:
        pass
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "custom.py"
    path.write_text(CODE)
    return path


@pytest.fixture
def reward_of(reward_section, file):
    """Returns `reward_of(...)`: the file's function as a reward; errors count as zero."""

    def make(**changes):
        options = {"num_workers": 2, "timeout_s": 10.0, "on_error": "zero"} | changes
        section = reward_section(function=f"{file}:compute_score", **options)
        return make_reward(section, max_response_length=8)

    return make


def group(*texts, **extra_info):
    prompt = Prompt("train/0", (1,), "Q", "18", "s", extra_info)
    return RolloutGroup(prompt, tuple(Completion((1,), (0.0,), text, "stop", 0) for text in texts))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for_end(pids, seconds=20.0):
    """Whether all processes are gone within so many seconds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(map(is_running, pids)):
        time.sleep(0.02)
    return not any(map(is_running, pids))


def wait_for_pids(file, count):
    """The first `count` numbers in a file, as soon as they are there."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if file.exists() and len(pids := file.read_text().split()) >= count:
            return [int(pid) for pid in pids]
        time.sleep(0.02)
    raise AssertionError(f"{file} does not hold {count} numbers")


# What is answered


def test_a_child_of_a_function_never_answers_for_its_parent(reward_of):
    with reward_of() as reward:
        result = reward.score([group(*(f"fork({i}.0)" for i in range(60)))])
    assert result.errors == ()
    assert result.rewards.tolist() == [list(range(60))]


@pytest.mark.parametrize(
    ("error", "code"),
    [("SystemExit(3)", 3), ("SystemExit()", 0), ("SystemExit('no')", 1), ("KeyError()", 1)],
)
def test_a_child_that_raises_ends_as_it_would_elsewhere(reward_of, error, code):
    with reward_of(num_workers=1) as reward:
        result = reward.score([group(f"exit_code_of_a_child({error})", "2.0")])
    assert (result.rewards.tolist(), result.errors) == ([[code, 2.0]], ())


def test_an_answer_to_another_job_is_not_taken(reward_of):
    forged = "[os.write(FD, messages.frame_of_answer(number, 'ok', 9.0)) for number in (0, 2, None)]"
    with reward_of(num_workers=1) as reward:
        result = reward.score([group("1.0", f"({forged}, 0.5)[1]", "2.0", "3.0")])
    assert (result.rewards.tolist(), result.errors) == ([[1.0, 0.5, 2.0, 3.0]], ())


@pytest.mark.parametrize(
    "nonsense",
    [
        "b'\\xff' * 100",
        "b'\\0' * 7 + b'\\2' + b'[['",
        "b'\\0' * 7 + b'\\1' + b'7'",
        "b'\\0' * 7 + b'\\1' + b'\\xff'",
    ],
)
def test_a_worker_that_writes_nonsense_is_replaced(reward_of, nonsense):
    with reward_of(num_workers=1) as reward:
        result = reward.score([group(f"(os.write(FD, {nonsense}), loop())", "2.0")])
    assert result.rewards.tolist() == [[0.0, 2.0]]
    [line] = result.errors
    assert line.endswith("custom.py:compute_score wrote into the answers of its process")


def test_a_message_is_one_that_can_be_printed(reward_of):
    with reward_of(num_workers=1) as reward:
        result = reward.score([group("int('\\ud800' * 5000)", "1.0")])
    [line] = result.errors
    assert "\\ud800" in line and len(line.encode()) < 10_000  # six letters for each of at most 1,000
    assert result.rewards.tolist() == [[0.0, 1.0]]


# Deadlines


def test_half_an_answer_counts_as_none(reward_of):
    start = time.monotonic()
    with reward_of(timeout_s=0.5) as reward:
        result = reward.score([group("1.0", "(os.write(FD, b'\\0\\0\\0'), time.sleep(60))", "3.0")])
    assert time.monotonic() - start < 10
    assert result.rewards.tolist() == [[1.0, 0.0, 3.0]]
    [line] = result.errors
    assert line.endswith("gave no answer within 0.5 s")


def test_an_answer_in_drops_has_the_same_deadline(reward_of):
    drops = "[(os.write(FD, b'\\0'), time.sleep(0.2)) for _ in range(100)]"
    start = time.monotonic()
    with reward_of(timeout_s=0.5) as reward:
        result = reward.score([group(drops, "2.0")])
    assert time.monotonic() - start < 10
    assert result.rewards.tolist() == [[0.0, 2.0]]


def test_a_worker_that_does_not_read_is_late(reward_of):
    """More than a socket holds has to be sent to a process that is stopped."""
    text = "len(text) / 4e6 #" + "x" * (4_000_000 - 17)
    with reward_of(num_workers=1, timeout_s=1.0) as reward:
        assert reward.score([group(text)]).rewards.tolist() == [[1.0]]
        [pid] = reward.score([group("os.getpid()")]).rewards[0]
        os.kill(int(pid), signal.SIGSTOP)
        start = time.monotonic()
        result = reward.score([group(text, "2.0")])
    assert time.monotonic() - start < 10
    assert result.rewards.tolist() == [[0.0, 2.0]]
    [line] = result.errors
    assert line.endswith("gave no answer within 1 s")


# Signals and processes


def test_sigterm_to_every_process_of_a_job_leaves_the_rewards(reward_of):
    """The trainer finishes its step and saves after it, and needs the workers for that."""
    with reward_of() as reward:
        pids = {int(pid) for pid in reward.score([group(*["os.getpid()"] * 20)]).rewards[0]}
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        time.sleep(0.2)
        again = {int(pid) for pid in reward.score([group(*["os.getpid()"] * 20)]).rewards[0]}
        child = reward.score([group("terminated_child()")])
    assert again == pids and len(pids) == 2
    assert child.rewards.tolist() == [[-signal.SIGTERM]]  # of its own children a function is the master


HOW_STARTED = {
    "in the group": "start(info['pids'])",
    "in a session of its own": "start(info['pids'], start_new_session=True)",
    "that and no environment": "start(info['pids'], start_new_session=True, env={})",
    "as a daemon": "daemon(info['pids'])",
}


@pytest.mark.parametrize("how", HOW_STARTED.values(), ids=HOW_STARTED)
def test_nothing_that_a_function_started_survives_close(reward_of, how, tmp_path):
    with reward_of() as reward:
        assert reward.score([group(how, pids=str(tmp_path / "pids"))]).rewards.tolist() == [[1.0]]
        pids = wait_for_pids(tmp_path / "pids", 2)
        assert is_running(pids[1])
    assert wait_for_end(pids)


def test_nothing_that_a_function_started_survives_its_timeout(reward_of, tmp_path):
    hang = f"({HOW_STARTED['that and no environment']}, time.sleep(60))"
    with reward_of(timeout_s=1.0) as reward:
        other = reward.score([group("os.getpid()", "os.getpid()")]).rewards[0]
        reward.score([group(hang, pids=str(tmp_path / "pids"))])
        worker, child = wait_for_pids(tmp_path / "pids", 2)
        assert wait_for_end([worker, child])
        assert any(is_running(int(pid)) for pid in other if pid != worker)  # the other worker is as before


def test_a_worker_that_died_takes_along_what_it_started(reward_of, tmp_path):
    text = f"({HOW_STARTED['in a session of its own']}, os._exit(5))"
    with reward_of() as reward:
        result = reward.score([group(text, pids=str(tmp_path / "pids"))])
        assert result.errors[0].endswith("ended its process (exit code 5)")
        assert wait_for_end(wait_for_pids(tmp_path / "pids", 2))


def test_a_process_that_is_just_being_started_is_waited_for(monkeypatch, tmp_path):
    """For a moment Linux has neither its environment nor where that ends; its parent may be gone already.

    Beside it are a thread of the kernel and a process without an environment, which will never have one.
    """
    marker = f"{keeper.VARIABLE}=mine-1"
    stat = lambda flags, end: " ".join(["7 (a (b) S 1", *"0000", str(flags), *["0"] * 41, str(end), "0"])
    for pid, (flags, end) in {"11": (0, 0), "12": (0x00200000, 0), "13": (0, 5000)}.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "stat").write_text(stat(flags, end))
        (tmp_path / pid / "environ").write_text("")
    sent = []
    monkeypatch.setattr(keeper, "PROC", str(tmp_path))
    monkeypatch.setattr(keeper, "_send", lambda pid, number: sent.append((pid, number)))
    begin = time.monotonic()

    def go_on():
        (tmp_path / "11" / "environ").write_text(f"A=b\0{marker}\0")
        (tmp_path / "11" / "stat").write_text(stat(0, 5000))

    timer = threading.Timer(0.2, go_on)
    timer.start()
    keeper.end_family("mine")
    assert sent == [(11, signal.SIGSTOP), (11, signal.SIGKILL)]
    assert 0.2 <= time.monotonic() - begin < keeper.START_S
    sent.clear()
    keeper.end_family("others")  # the two others are not waited for
    assert not sent and time.monotonic() - begin < keeper.START_S


TRAINER = """
    import sys
    from grpo_jax.config import Config
    from grpo_jax.rewards import make_reward
    from grpo_jax.types import Completion, Prompt, RolloutGroup
    import dataclasses

    file, pids, text = sys.argv[1:]
    section = dataclasses.replace(Config().reward, function=f"{file}:compute_score", num_workers=2)
    reward = make_reward(section, max_response_length=8)
    prompt = Prompt("train/0", (1,), "Q", "18", "s", {"pids": pids})
    completions = [Completion((1,), (0.0,), text, "stop", 0)] * 2
    reward.score([RolloutGroup(prompt, tuple(completions))])
"""


def test_nothing_outlives_a_trainer_that_is_killed(file, tmp_path):
    """Workers that loop and read nothing any more, and what they started, in a group of their own or not."""
    pid_file = tmp_path / "pids"
    text = f"({HOW_STARTED['in a session of its own']}, loop())"
    trainer = subprocess.Popen([sys.executable, "-c", textwrap.dedent(TRAINER), file, pid_file, text])
    try:
        pids = wait_for_pids(pid_file, 4)
        assert all(map(is_running, pids))
    finally:
        trainer.kill()
        trainer.wait(10)
    assert wait_for_end(pids)


def test_a_worker_whose_trainer_was_killed_says_nothing(file):
    """Its answer lies unread in the trainer's socket: its end resets the connection in place of closing it."""
    ours, theirs = socket.socketpair()
    with theirs:
        command = [
            sys.executable,
            "-m",
            "grpo_jax.rewards.worker",
            str(theirs.fileno()),
            file,
            "compute_score",
        ]
        worker = subprocess.Popen(command, pass_fds=[theirs.fileno()], stderr=subprocess.PIPE, text=True)
    ours.recv(1, socket.MSG_PEEK)  # its answer is there
    ours.close()
    assert worker.communicate(timeout=20) == (None, "") and worker.returncode == 0


def keepers():
    """Process ids of the keepers that this process started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"grpo_jax.rewards.keeper" in command and str(os.getpid()).encode() in command:
            found.append(int(folder.name))
    return found


def test_the_keeper_is_there_as_long_as_the_workers(reward_of):
    with reward_of() as reward:
        [first] = keepers()
        os.kill(first, signal.SIGKILL)
        assert wait_for_end([first])
        reward.score([group("1.0")])
        [second] = keepers()
        assert second != first
    assert not keepers()


def test_without_proc_a_worker_ends_with_its_group(reward_of, tmp_path, monkeypatch):
    monkeypatch.setattr(keeper, "_all_processes", lambda: [])  # as on macOS
    with reward_of() as reward:
        reward.score([group(HOW_STARTED["in the group"], pids=str(tmp_path / "pids"))])
        pids = wait_for_pids(tmp_path / "pids", 2)
    assert wait_for_end(pids)
