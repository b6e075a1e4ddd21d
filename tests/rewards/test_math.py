"""Mathematical answers: equal in value is equal, whatever they look like."""

import dataclasses
import time

import pytest
import sympy
from math_verify import parser

from grpo_jax.rewards import UnreadableError, make_reward, math
from grpo_jax.rewards.base import RewardError
from grpo_jax.rewards.pool import PoolReward, WorkerPool
from grpo_jax.types import Completion, Prompt, RolloutGroup

PROMPT = Prompt("train/0", (1,), "Q", "18", "math", {})


def completions_of(*texts):
    return tuple(Completion((1,), (0.0,), text, "stop", 0) for text in texts)


def score(text, truth):
    return math.compute_score(data_source="math", solution_str=text, ground_truth=truth, extra_info={})


@pytest.mark.parametrize(
    ("text", "truth", "expected"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"The answer is $0.5$", r"\frac{1}{2}", 1.0),
        (r"The answer is $\frac{1}{2}$", r"$\frac{1}{2}$", 1.0),
        (r"\boxed{1,234}", "1234", 1.0),
        (r"\boxed{2x + x}", "3x", 1.0),
        (r"\boxed{\sqrt{8}}", r"\boxed{2\sqrt{2}}", 1.0),
        (r"\boxed{18} or rather \boxed{19}", "18", 0.0),
        (r"\boxed{\frac{1}{3}}", "0.5", 0.0),
        ("I do not know.", "18", 0.0),
        ("", "18", 0.0),
    ],
)
def test_answers_are_compared_by_value(text, truth, expected):
    assert score(text, truth) == expected


def test_a_ground_truth_that_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="cannot read the ground truth"):
        score(r"\boxed{18}", r"\boxed{}")


def test_a_comparison_that_never_ends_is_a_wrong_answer(monkeypatch):
    monkeypatch.setattr(math, "COMPARE_TIMEOUT_S", 1)
    assert score("It is $10^{10^{10}}$", "18") == 0.0


SLOW = r"\boxed{((x))}"
# Many parentheses are slow to read, but only until the parser has learned them, which an alarm need not interrupt.
IN_A_HURRY = """
import time
from grpo_jax.rewards import math
math.PARSE_TIMEOUT_S = 1
parse = math.parse

def slow_with_parentheses(text, **options):
    if "((" in text:
        time.sleep(1.2)
    return parse(text, **options)

math.parse = slow_with_parentheses
compute_score, explain = math.compute_score, math.explain
"""


def test_an_answer_that_takes_too_long_to_read_is_counted_and_stops_nothing(tmp_path):
    (tmp_path / "hurry.py").write_text(IN_A_HURRY)
    pool = WorkerPool(str(tmp_path / "hurry.py"), "compute_score", num_workers=2, timeout_s=30.0)
    texts = (r"\boxed{18.0}", SLOW)
    groups = [
        RolloutGroup(dataclasses.replace(PROMPT, ground_truth=truth), completions_of(*texts))
        for truth in ("18", "17")
    ]
    with PoolReward(pool, "math", on_error="stop", function="compute_score", explain="explain") as reward:
        result = reward.score(groups)
        assert result.rewards.tolist() == [[1.0, 0.0], [0.0, 0.0]]
        assert result.errors == ("prompt train/0, completion 1: math could not be read within 1 s",) * 2
        assert reward.explain(PROMPT, groups[0].completions[1], 0.0) == "it could not be read within 1 s"
        # A ground truth of that kind is the data's fault.
        (of_data,) = completions_of(r"\boxed{18}")
        with pytest.raises(RewardError, match="cannot read the ground truth"):
            reward.score([RolloutGroup(dataclasses.replace(PROMPT, ground_truth=SLOW), (of_data,))])


def test_half_of_an_answer_is_not_remembered(monkeypatch):
    """What math-verify calls has clauses that catch everything, its alarm too: it then keeps what it has."""

    def catches_everything(latex, **options):
        try:
            time.sleep(10.0)
        except BaseException:
            return sympy.Integer(18)

    monkeypatch.setattr(math, "PARSE_TIMEOUT_S", 1)
    with monkeypatch.context() as patched:
        patched.setattr(parser, "latex2sympy", catches_everything)
        with pytest.raises(UnreadableError, match="could not be read within 1 s"):
            score(r"\boxed{3 + 4 \cdot 3}", "18")
    assert score(r"\boxed{3 + 4 \cdot 3}", "18") == 0.0
    assert score(r"\boxed{3 + 4 \cdot 3}", "15") == 1.0


def test_the_pool_scores_and_explains(reward_section):
    texts = (r"\boxed{18.0}", r"\boxed{17}", "no idea")
    group = RolloutGroup(PROMPT, completions_of(*texts))
    section = reward_section(function="math", num_workers=1, timeout_s=20.0, on_error="stop")
    with make_reward(section, max_response_length=8) as reward:
        assert reward.score([group]).rewards.tolist() == [[1.0, 0.0, 0.0]]
        reasons = [reward.explain(PROMPT, completion, 0.0) for completion in group.completions]
    assert reasons == [
        'answer "18.0" equals "18"',
        'answer "17" does not equal "18"',
        "no answer that math-verify can read",
    ]
