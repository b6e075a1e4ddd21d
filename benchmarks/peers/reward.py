"""The reward of benchmarks/step.py, for every trainer: spread, but nothing to learn. Standard library only."""

import zlib
from typing import Any


def compute_score(
    data_source: str = "", solution_str: str = "", ground_truth: str = "", extra_info: Any = None, **_: Any
) -> float:
    """A number in [0, 1) that depends on the completion alone."""
    return zlib.crc32(solution_str.encode()) % 7 / 7
