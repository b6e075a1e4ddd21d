"""The GSM8K rule, as verl 0.9.1 has it: 1 where the final number is the ground truth, as a string, else 0.

Strict takes the number after the last "#### "; flexible takes the last number of any kind. Both look at the
end of the completion only. The oddities ("18." and "18.0" are not "18"; flexible leaves commas in) are verl's
and kept on purpose, so that rewards can be compared.
"""

import re
from typing import Any

SEARCHED_CHARS = 300  # an answer stands at the end; searching all of a long completion is slow

_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_NUMBER = re.compile(r"-?[0-9.,]+")


def compute_score(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """Strict: 1.0 if the number after the last "#### " is `ground_truth`, else 0.0."""
    return float(extract(solution_str) == ground_truth)


def compute_score_flexible(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """Flexible: 1.0 if the last number is `ground_truth`, else 0.0."""
    return float(extract_flexible(solution_str) == ground_truth)


def extract(solution_str: str) -> str | None:
    """Returns the number after the last "#### ", without commas; None if there is none."""
    numbers = _STRICT.findall(solution_str[-SEARCHED_CHARS:])
    return numbers[-1].replace(",", "") if numbers else None


def extract_flexible(solution_str: str) -> str | None:
    """Returns the last number that is more than a full stop, the first one if all are; None without any."""
    numbers = _NUMBER.findall(solution_str[-SEARCHED_CHARS:])
    if not numbers:
        return None
    return next((number for number in reversed(numbers) if number != "."), numbers[0])


def explain(solution_str: str, ground_truth: str) -> str:
    """Says in a few words why the strict rule did or did not count the answer."""
    answer = extract(solution_str)
    if answer is not None:
        return _compare(answer, ground_truth)
    if "####" in solution_str[-SEARCHED_CHARS:]:
        return 'no number after "####" and one space'
    if "####" in solution_str:
        return f'no "####" in the last {SEARCHED_CHARS} characters, only before them'
    return 'no "####" before the answer'


def explain_flexible(solution_str: str, ground_truth: str) -> str:
    """Says in a few words why the flexible rule did or did not count the answer."""
    answer = extract_flexible(solution_str)
    if answer is None:
        return f"no number in the last {SEARCHED_CHARS} characters"
    return _compare(answer, ground_truth)


def _compare(answer: str, ground_truth: str) -> str:
    if answer == ground_truth:
        return f'answer "{answer}" is right'
    return f'answer "{answer}" is not "{ground_truth}"'
