"""A reward is a program: what it pays for is what a run learns, so it has a test."""

import pytest
from reward import score


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<answer>odd</answer>", 1.0),
        (" <answer>odd</answer>\n", 1.0),
        ("<answer>even</answer>", 0.1),
        ("odd", 0.0),
        ("<answer></answer>", 0.0),
        ("<answer>even</answer><answer>odd</answer>", 0.0),  # guessing twice pays nothing
        ("", 0.0),
    ],
)
def test_score(completion, expected):
    got = score(data_source="odd_or_even", solution_str=completion, ground_truth="odd", extra_info={})
    assert got == expected
