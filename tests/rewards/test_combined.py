"""Several functions with weights, the length penalty, and the functions for the form alone."""

import numpy as np
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rewards import formats, make_reward
from grpo_jax.rewards.base import RewardError, RewardResult
from grpo_jax.rewards.combined import LengthPenalty
from grpo_jax.types import Completion, Prompt, RolloutGroup

LONG = (
    "def length_of(*, solution_str, **_):\n    return len(solution_str)\n\ndef overlong(**_):\n    return 0\n"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(LONG)
    return path


def group(*texts, num_tokens=1):
    completions = tuple(Completion((1,) * num_tokens, (0.0,) * num_tokens, t, "stop", 0) for t in texts)
    return RolloutGroup(Prompt("train/0", (1,), "Q", "18", "s", {}), completions)


def test_functions_are_added_up_with_their_weights(reward_section, file):
    section = reward_section(
        function="gsm8k", extra_functions=("gsm8k_format", f"{file}:length_of"), weights=(1.0, 0.25, -0.125)
    )
    with make_reward(section, max_response_length=8) as reward:
        result = reward.score([group("#### 18", "#### 7", "18"), group("", "#### 18 ", "#### 1,8")])
        said = reward.explain(group("#### 7").prompt, group("#### 7").completions[0], 0.0)
    correct, marked, length = [[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 1, 1]], [[7, 6, 2], [0, 8, 8]]
    expected = np.array(correct) + 0.25 * np.array(marked) - 0.125 * np.array(length)
    np.testing.assert_allclose(result.rewards, expected, rtol=1e-6)
    assert list(result.parts) == ["gsm8k", "gsm8k_format", "length_of"]
    for name, values in zip(result.parts, (correct, marked, length), strict=True):
        np.testing.assert_array_equal(result.parts[name], values)
    np.testing.assert_array_equal(result.correctness, correct)  # the first function's alone
    assert all(values.dtype == np.float32 for values in (result.rewards, *result.parts.values()))
    assert 'gsm8k 0 times 1 (answer "7" is not "18")' in said
    assert 'gsm8k_format 1 times 0.25 (answer "7" is marked)' in said and "length_of 6 times -0.125" in said


def test_without_weights_each_counts_once(reward_section):
    section = reward_section(function="gsm8k", extra_functions=("gsm8k_format",))
    with make_reward(section, max_response_length=8) as reward:
        assert reward.score([group("#### 18", "#### 7")]).rewards.tolist() == [[2.0, 1.0]]


def test_errors_of_all_functions_are_told(reward_section, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text("def a(**_):\n    raise KeyError\n\ndef b(**_):\n    return 'x'\n")
    section = reward_section(function=f"{path}:a", extra_functions=(f"{path}:b",), on_error="zero")
    with make_reward(section, max_response_length=8) as reward:
        result = reward.score([group("t")])
    assert len(result.errors) == 2 and ":a raised KeyError" in result.errors[0] and ":b" in result.errors[1]


@pytest.mark.parametrize(
    ("weights", "values"),
    [((2.0, 1.0), "3e38 0"), ((1.0, 1.0), "3e38 3e38"), ((4.0, -4.0), "3e38 3e38")],  # inf, inf, inf - inf
)
def test_a_sum_that_float32_cannot_hold_is_an_error(reward_section, tmp_path, weights, values):
    path = tmp_path / "large.py"
    path.write_text(
        "def first(*, solution_str, **_):\n    return float(solution_str.split()[0])\n\n"
        "def second(*, solution_str, **_):\n    return float(solution_str.split()[1])\n"
    )
    options = dict(function=f"{path}:first", extra_functions=(f"{path}:second",), weights=weights)
    line = "prompt train/0, completion 1: the sum of its rewards, times their weights, is no finite float32"
    with make_reward(reward_section(**options, on_error="zero"), max_response_length=8) as reward:
        result = reward.score([group("1 0", values)])
    assert result.rewards.tolist() == result.unshaped.tolist() == [[weights[0], 0.0]]
    assert result.errors == (line,)
    with (
        make_reward(reward_section(**options, on_error="stop"), max_response_length=8) as reward,
        pytest.raises(RewardError, match=f"^{line}$"),
    ):
        reward.score([group("1 0", values)])


@pytest.mark.parametrize(
    ("length", "expected"), [(1, 0), (12, 0), (13, -0.125), (16, -0.5), (20, -1), (25, -1)]
)
def test_the_length_penalty_by_hand(length, expected):
    """Limit 20, buffer 8: nothing up to 12, then an eighth a token."""
    penalty = LengthPenalty(limit=20, buffer=8, penalty=1.0)
    np.testing.assert_allclose(penalty.of_lengths(np.array([[length]])), [[expected]], rtol=1e-6)
    twice = LengthPenalty(limit=20, buffer=8, penalty=2.0)
    np.testing.assert_allclose(twice.of_lengths(np.array([[length]])), [[2 * expected]], rtol=1e-6)


def test_the_length_penalty_is_a_part_of_its_own(reward_section):
    section = reward_section(function="gsm8k", overlong_buffer=4, overlong_penalty=0.5)
    with make_reward(section, max_response_length=8) as reward:
        result = reward.score(
            [group("#### 18", "#### 7", num_tokens=6), group("#### 18", "no", num_tokens=8)]
        )
        said = reward.explain(group("no").prompt, group("no", num_tokens=8).completions[0], 0.0)
    np.testing.assert_allclose(result.rewards, [[0.75, -0.25], [0.5, -0.5]])
    np.testing.assert_array_equal(result.unshaped, [[1, 0], [1, 0]])
    np.testing.assert_allclose(result.parts["overlong"], [[-0.25, -0.25], [-0.5, -0.5]])
    np.testing.assert_array_equal(result.correctness, [[1, 0], [1, 0]])
    assert said.endswith("overlong -0.5")


def test_results_can_be_taken_apart_and_put_together():
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(3, 2)).astype(np.float32) for _ in range(4)]
    result = RewardResult(*arrays[:3], {"a": arrays[3]}, ("oh",))
    joined = RewardResult.join([result.take([2]), result.take([0, 1])])
    for got, given in zip((joined.rewards, joined.unshaped, joined.correctness), arrays, strict=False):
        np.testing.assert_array_equal(got, given[[2, 0, 1]])
    np.testing.assert_array_equal(joined.parts["a"], arrays[3][[2, 0, 1]])
    assert joined.errors == () and RewardResult.join([result, result]).errors == ("oh", "oh")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("  <think>a\nb</think>\n\n<answer>18</answer>\n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("a <think>b</think><answer>c</answer>", 0.0),
        ("<think>a</think><answer>b</answer> c", 0.0),
        ("<think>a</think> b <answer>c</answer>", 0.0),
        ("<think>a</think><think>b</think><answer>c</answer>", 0.0),
        ("<think>a<answer>b</answer></think><answer>c</answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a</think>", 0.0),
        ("", 0.0),
    ],
)
def test_think_format(text, expected):
    kwargs = dict(data_source="s", ground_truth="18", extra_info={})
    assert formats.think_format(solution_str=text, **kwargs) == expected
    is_good = formats.explain_think_format(text, "18") == "thought and answer are in their tags"
    assert is_good == bool(expected)


@pytest.mark.parametrize(
    ("text", "expected"), [("#### 18", 1.0), ("#### 7", 1.0), ("18", 0.0), ("####18", 0.0)]
)
def test_gsm8k_format(text, expected):
    kwargs = dict(data_source="s", ground_truth="18", extra_info={})
    assert formats.gsm8k_format(solution_str=text, **kwargs) == expected


# Bad input


@pytest.mark.parametrize(
    ("changes", "key", "complaint"),
    [
        (
            {"extra_functions": ("gsm8k",)},
            "reward.extra_functions",
            "another part of the reward with the name gsm8k",
        ),
        ({"extra_functions": ("gsm8k_formt",)}, "reward.extra_functions", "did you mean gsm8k_format?"),
        ({"extra_functions": ("absent.py:f",)}, "reward.extra_functions", "there is no file absent.py"),
        ({"function": "mine.py:overlong"}, "reward.function", "with the name overlong"),
    ],
)
def test_what_cannot_be_meant_is_refused(reward_section, file, monkeypatch, changes, key, complaint):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ConfigError) as caught:
        make_reward(reward_section(**changes), max_response_length=8)
    assert caught.value.key == key and complaint in str(caught.value)


def test_a_function_that_cannot_be_had_leaves_no_process_of_the_others(reward_section, file):
    import subprocess

    with pytest.raises(ConfigError):
        make_reward(
            reward_section(function=f"{file}:length_of", extra_functions=(f"{file}:no",)),
            max_response_length=8,
        )
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(file) not in processes
