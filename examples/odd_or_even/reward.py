"""The reward of this example: 1 for the right word between the tags, 0.1 for the tags alone."""

import re

ANSWER = re.compile(r"<answer>(\w+)</answer>")


def score(*, data_source, solution_str, ground_truth, extra_info):
    """Args: solution_str: the completion; ground_truth: a string, whatever the JSON line had."""
    found = ANSWER.fullmatch(solution_str.strip())
    if found is None:
        return 0.0
    return 1.0 if found[1] == ground_truth else 0.1
