"""Writes the problems of this example, in place of those that you have: python make_problems.py FILE.jsonl"""

import json
import random
import sys
from pathlib import Path


def problems(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Different numbers. Two thirds of the solutions lack the form that is paid for: GRPO has to find it."""
    rng = random.Random(seed)
    made = []
    for number in rng.sample(range(10_000), count):
        right = ("even", "odd")[number % 2]
        solution = f"It is {right}." if rng.random() < 2 / 3 else f"<answer>{right}</answer>"
        question = f"Is {number} odd or even?"
        made.append({"question": question, "right": right, "solution": solution})
    return made


if __name__ == "__main__":
    lines = [json.dumps(problem) + "\n" for problem in problems(1408)]
    Path(sys.argv[1]).write_text("".join(lines))
