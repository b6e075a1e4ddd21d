"""The GSM8K rule, string by string as verl has it."""

import json
from pathlib import Path

import numpy as np
import pytest

from grpo_jax.rewards import gsm8k, make_reward
from grpo_jax.types import Completion, Prompt, RolloutGroup

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "golden_verl_0.9.1.json").read_text())[
    "gsm8k_reward"
]


def score(function, text, truth):
    return function(data_source="openai/gsm8k", solution_str=text, ground_truth=truth, extra_info={})


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_both_rules_equal_verl(case):
    text, truth = case["response"], case["ground_truth"]
    assert score(gsm8k.compute_score, text, truth) == case["strict"]
    assert score(gsm8k.compute_score_flexible, text, truth) == case["flexible"]


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 5" + "x" * 294, "5", "5"),  # 300 characters: all of it is searched
        ("#### 5" + "x" * 295, None, "5"),  # the first # falls out, the number does not
        ("#### 1,2,3", "123", "1,2,3"),
        ("1 . .", None, "1"),
        (". .", None, "."),
        ("#### -5-6", "-5", "-6"),
        ("none", None, None),
    ],
)
def test_what_is_extracted(text, strict, flexible):
    assert gsm8k.extract(text) == strict
    assert gsm8k.extract_flexible(text) == flexible


@pytest.mark.parametrize(
    ("text", "strict", "flexible"),
    [
        ("#### 18", 'answer "18" is right', 'answer "18" is right'),
        ("#### 1,800", 'answer "1800" is not "18"', 'answer "1,800" is not "18"'),
        ("#### $18", 'no number after "####" and one space', 'answer "18" is right'),
        ("it is 18", 'no "####" before the answer', 'answer "18" is right'),
        (
            "#### 18" + "x" * 400,
            'no "####" in the last 300 characters, only before them',
            "no number in the last 300 characters",
        ),
    ],
)
def test_explanations(text, strict, flexible):
    assert gsm8k.explain(text, "18") == strict
    assert gsm8k.explain_flexible(text, "18") == flexible


@pytest.mark.parametrize(
    ("name", "expected", "reason"),
    [
        ("gsm8k", [[1, 0, 0], [0, 0, 1]], 'no "####" before the answer'),
        ("gsm8k_flexible", [[1, 1, 0], [0, 0, 1]], 'answer "18" is right'),
    ],
)
def test_groups_are_scored_in_place(name, expected, reason, reward_section):
    def group(truth, texts):
        prompt = Prompt("train/0", (1,), "Q", truth, "openai/gsm8k", {})
        return RolloutGroup(prompt, tuple(Completion((1,), (0.0,), text, "stop", 0) for text in texts))

    groups = [group("18", ["#### 18", "18", "#### 7"]), group("7", ["#### 18", "18", "#### 7"])]
    section = reward_section(function=name, num_workers=1, timeout_s=1.0, on_error="stop")
    with make_reward(section, max_response_length=8) as reward:
        result = reward.score(groups)
        assert reward.explain(groups[0].prompt, groups[0].completions[1], 0.0) == reason
    assert result.rewards.dtype == np.float32
    np.testing.assert_array_equal(result.rewards, expected)
    assert result.errors == ()
