"""Rewards for the form of a completion alone, whatever its answer: 1 where it has the form, else 0."""

import re
from typing import Any

from grpo_jax.rewards import gsm8k

THINK_TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_THINK = re.compile(r"\s*<think>.*</think>\s*<answer>.*</answer>\s*", re.DOTALL)


def gsm8k_format(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """1.0 if the strict rule of `gsm8k.py` finds an answer, right or wrong, else 0.0."""
    return float(gsm8k.extract(solution_str) is not None)


def explain_gsm8k_format(solution_str: str, ground_truth: str) -> str:
    """Says in a few words whether the form is there."""
    answer = gsm8k.extract(solution_str)
    return gsm8k.explain(solution_str, ground_truth) if answer is None else f'answer "{answer}" is marked'


def think_format(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """1.0 for <think>...</think> <answer>...</answer> and nothing else, each tag once, else 0.0.

    The form that DeepSeek-R1-Zero was rewarded for, arXiv:2501.12948 (section 2.2.2).
    """
    # Each tag once first: otherwise the pattern would find a third tag within the text of the second.
    has_tags_once = all(solution_str.count(tag) == 1 for tag in THINK_TAGS)
    return float(has_tags_once and _THINK.fullmatch(solution_str) is not None)


def explain_think_format(solution_str: str, ground_truth: str) -> str:
    """Says in a few words what keeps the form from being there."""
    for tag in THINK_TAGS:
        if solution_str.count(tag) != 1:
            return f"{tag} is there {solution_str.count(tag)} times"
    is_right = _THINK.fullmatch(solution_str) is not None
    return "thought and answer are in their tags" if is_right else "something is out of place among the tags"
