"""Custom reward functions: whatever one of them does, its completion is named and the others are scored."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from grpo_jax.config import ConfigError, RewardSection
from grpo_jax.rewards import make_reward
from grpo_jax.rewards.base import RewardError
from grpo_jax.types import Completion, Prompt, RolloutGroup

# The completion's text says what the function is to do. Line numbers below count from the first line of it.
CODE = """\
import os, subprocess, sys, time
import beside

def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0.0):
    if solution_str == "raise":
        raise KeyError("two\\nlines")
    if solution_str == "sleep":
        time.sleep(60)
    if solution_str == "sleep with a child":
        child = subprocess.Popen(["sleep", "60"])
        open(extra_info["pid_file"], "w").write(str(child.pid))
        time.sleep(60)
    if solution_str == "die":
        os._exit(3)
    if solution_str == "sys.exit":
        sys.exit(1)
    if solution_str == "print":
        print("noise", flush=True)
        os.write(1, b"more noise")
        return 0.25
    if solution_str == "pid":
        return os.getpid()
    if solution_str == "arguments":
        return float((data_source, ground_truth, extra_info) == ("s", "18", {"index": 7}))
    if solution_str == "die later":
        import threading
        threading.Timer(0.1, os._exit, (4,)).start()
        return 0.5
    return eval(solution_str)

number = 5
"""


@pytest.fixture
def file(tmp_path):
    (tmp_path / "beside.py").write_text("")
    path = tmp_path / "custom.py"
    path.write_text(CODE)
    return path


def section(function, **changes):
    one_function = {"extra_functions": (), "weights": (), "overlong_buffer": 0, "overlong_penalty": 0.0}
    workers = {"num_workers": 2, "timeout_s": 10.0, "on_error": "zero"}
    return RewardSection(**({"function": function} | one_function | workers | changes))


def reward_of(file, **changes):
    return make_reward(section(f"{file}:compute_score", **changes), max_response_length=8)


def group(*texts, prompt_id="train/0", **extra_info):
    prompt = Prompt(prompt_id, (1,), "Q", "18", "s", extra_info)
    return RolloutGroup(prompt, tuple(Completion((1,), (0.0,), text, "stop", 0) for text in texts))


def test_numbers_of_any_kind_are_rewards_in_their_place(file):
    groups = [
        group("0.5", "1", "True"),
        group("{'score': 0.75, 'acc': 1}", "-2", "__import__('numpy').float32(4)"),
    ]
    with reward_of(file) as reward:
        result = reward.score(groups)
    assert result.rewards.tolist() == [[0.5, 1.0, 1.0], [0.75, -2.0, 4.0]]
    assert result.errors == ()


def test_it_is_called_as_verl_calls_it(file):
    with reward_of(file) as reward:
        assert reward.score([group("arguments", index=7)]).rewards.tolist() == [[1.0]]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("raise", "raised KeyError: 'two\\nlines' (custom.py:6)"),
        ("sys.exit", "raised SystemExit: 1 (custom.py:16)"),
        ("die", "ended its process (exit code 3)"),
        ("float('nan')", "returned nan, which is not a finite float32"),
        ("-1e400", "returned -inf, which is not a finite float32"),
        ("1e39", "returned 1e+39, which is not a finite float32"),
        ("None", "returned NoneType, which is not a number"),
        ("'1.0'", "returned str, which is not a number"),
        ("1j", "returned complex, which is not a number"),
        ("lambda: 0", "returned function, which is not a number"),  # cannot be pickled either
        ("{'acc': 1}", "returned a dictionary without 'score' (it has acc)"),
    ],
)
def test_a_failure_is_named_and_counts_zero(file, text, what):
    groups = [group("1", "1", prompt_id="train/3"), group("1", text, prompt_id="train/8")]
    with reward_of(file) as reward:
        for _ in range(2):  # the pool is as good as before
            result = reward.score(groups)
            assert result.rewards.tolist() == [[1.0, 1.0], [1.0, 0.0]]
            (line,) = result.errors
            assert line == f"prompt train/8, completion 1: {file}:compute_score {what}"


def test_a_hang_costs_its_own_completion_only(file):
    texts = ["1"] * 4 + ["sleep"] + ["1"] * 4 + ["sleep", "1"]
    start = time.monotonic()
    with reward_of(file, timeout_s=0.5) as reward:
        result = reward.score([group(*texts)])
    assert time.monotonic() - start < 10  # the two hang side by side, for half a second
    assert result.rewards.tolist() == [[float(text == "1") for text in texts]]
    assert [line.split(":")[0] for line in result.errors] == [
        "prompt train/0, completion 4",
        "prompt train/0, completion 9",
    ]
    assert all(line.endswith("gave no answer within 0.5 s") for line in result.errors)


def test_a_hang_ends_with_the_processes_it_started(file, tmp_path):
    pid_file = tmp_path / "pid"
    with reward_of(file, timeout_s=2.0) as reward:
        reward.score([group("sleep with a child", pid_file=str(pid_file))])
    pid = int(pid_file.read_text())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_stop_raises_at_once_and_names_the_completion(file):
    with reward_of(file, on_error="stop", timeout_s=30.0) as reward:
        start = time.monotonic()
        with pytest.raises(
            RewardError, match=r"^prompt train/5, completion 1: .*custom.py:compute_score raised"
        ):
            reward.score([group("sleep", "raise", prompt_id="train/5")])
        assert time.monotonic() - start < 10


def test_answers_of_a_stopped_batch_are_not_taken_for_the_next_ones(file):
    with reward_of(file, on_error="stop") as reward:
        with pytest.raises(RewardError):
            reward.score([group("(time.sleep(0.3), 9.0)[1]", "raise")])
        result = reward.score([group("(time.sleep(0.6), 1.0)[1]", "2", "3")])
    assert result.rewards.tolist() == [[1.0, 2.0, 3.0]]


def test_what_a_function_prints_harms_nothing(file, capfd):
    with reward_of(file) as reward:
        assert reward.score([group("print", "1", "print")]).rewards.tolist() == [[0.25, 1.0, 0.25]]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("more noise") == 2


def test_a_worker_that_dies_between_batches_is_replaced(file):
    with reward_of(file, num_workers=1) as reward:
        assert reward.score([group("die later")]).rewards.tolist() == [[0.5]]
        time.sleep(0.5)
        result = reward.score([group("1", "2")])
    assert result.rewards.tolist() == [[1.0, 2.0]]
    assert result.errors == ()


def test_all_workers_work_and_none_is_left(file):
    with reward_of(file, num_workers=3) as reward:
        pids = {int(pid) for pid in reward.score([group(*["pid"] * 60)]).rewards[0]}
        assert os.getpid() not in pids
        assert len(pids) == 3
        assert all(is_running(pid) for pid in pids)
    assert not any(is_running(pid) for pid in pids)
    reward.close()
    with pytest.raises(RewardError, match="closed"):
        reward.score([group("1")])


def test_explain_names_the_function(file):
    with reward_of(file) as reward:
        explanation = reward.explain(group("1").prompt, group("1").completions[0], 0.5)
    assert explanation == f"{file}:compute_score gave it 0.5"


@pytest.mark.parametrize(
    ("function", "complaint"),
    [
        ("gsm8", "did you mean gsm8k?"),
        ("custom.py", "FILE.py:NAME"),
        ("custom:f", "FILE.py:NAME"),
        ("custom.py:", "FILE.py:NAME"),
        ("absent.py:f", "there is no file absent.py"),
    ],
)
def test_a_function_that_cannot_be_meant_is_refused(function, complaint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        make_reward(section(function), max_response_length=8)
    assert caught.value.key == "reward.function"
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("compute_scor", CODE, "there is no 'compute_scor' in it (did you mean compute_score?)"),
        ("number", CODE, "'number' is not a function"),
        ("f", "import no_such_module_anywhere", "No module named 'no_such_module_anywhere' (bad.py:1)"),
        ("f", "def f(:", "SyntaxError"),
        ("f", "import os\nos._exit(7)", "ended its process (exit code 7)"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(file, tmp_path, name, code, complaint):
    (tmp_path / "bad.py").write_text(code)
    with pytest.raises(ConfigError) as caught:
        make_reward(section(f"{tmp_path / 'bad.py'}:{name}"), max_response_length=8)
    assert caught.value.key == "reward.function"
    assert "cannot be loaded" in str(caught.value)
    assert complaint in str(caught.value)


def test_a_file_that_breaks_during_the_run_stops_it(file):
    with reward_of(file) as reward:
        file.write_text("def compute_score(:")
        with pytest.raises(RewardError, match="cannot be loaded: SyntaxError"):
            reward.score([group("die", "1"), group("die", "1")])


def test_workers_import_nothing_heavy():
    code = """
        import sys
        import grpo_jax.rewards.worker
        print(sorted({"jax", "flax", "numpy", "transformers", "grpo_jax.types"} & set(sys.modules)))
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[]\n"
