r"""Mathematical answers, compared by math-verify: 1 where the answer equals the ground truth, else 0.

`\boxed{...}`, LaTeX between dollars and plain numbers are found, "1/2" equals "0.5". Runs in the worker
processes: importing sympy takes a second, and a comparison may take for ever. math-verify stops itself by
SIGALRM after the times below; what a signal cannot interrupt, the pool kills. An answer that cannot be read in
time scores 0 and is counted as an error, but does not end the run: no run is to be at the mercy of what a model
writes. One that cannot be compared in time is as good as wrong.
"""

import functools
import logging
import time
from typing import Any

from math_verify import parse, parser, verify
from math_verify.errors import TimeoutException

from grpo_jax.rewards import UnreadableError

# Whole seconds, as SIGALRM counts. Together below reward.timeout_s as shipped (10 s), which is for the pool.
PARSE_TIMEOUT_S = 2
COMPARE_TIMEOUT_S = 3

logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # it reports each timeout, with the traceback


def compute_score(
    *, data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]
) -> float:
    """Returns 1.0 if the answer in `solution_str` equals `ground_truth`, else 0.0.

    Raises:
        ValueError: math-verify cannot read the ground truth.
        UnreadableError: nor the answer, in the time that it has.
    """
    return float(_is_equal(_parse_truth(ground_truth), _parse(solution_str)))


def explain(solution_str: str, ground_truth: str) -> str:
    """Says in a few words why the answer did or did not count."""
    try:
        answer = _parse(solution_str)
    except UnreadableError as error:
        return f"it {error}"
    if not answer:
        return "no answer that math-verify can read"
    verdict = "equals" if _is_equal(_parse_truth(ground_truth), answer) else "does not equal"
    return f'answer "{answer[-1]}" {verdict} "{ground_truth}"'  # math-verify puts the text last


def _parse(text: str) -> list[Any]:
    """What math-verify finds, or nothing. Raises: UnreadableError: it takes too long."""
    begin = time.monotonic()
    try:
        found = parse(text, parsing_timeout=PARSE_TIMEOUT_S, raise_on_error=True)
    except TimeoutException:
        found = None
    except Exception:  # what math-verify itself takes for an answer that is none
        found = []
    # What it calls may catch the exception of its alarm, go on with half of an answer, and keep that for the
    # next time that the same formula is read.
    if found is None or time.monotonic() - begin >= PARSE_TIMEOUT_S:
        for remembering in (parser.parse_latex_cached, parser.parse_expr_cached, parser.extract_latex):
            remembering.cache_clear()
        raise UnreadableError(f"could not be read within {PARSE_TIMEOUT_S} s")
    return found


def _is_equal(truth: list[Any], answer: list[Any]) -> bool:
    return verify(truth, answer, timeout_seconds=COMPARE_TIMEOUT_S)


@functools.lru_cache(maxsize=64)  # the completions of a group share it
def _parse_truth(ground_truth: str) -> list[Any]:
    # Data sets hold the bare expression, in which LaTeX would not be looked for.
    try:
        truth = _parse(ground_truth if r"\boxed" in ground_truth else rf"\boxed{{{ground_truth}}}")
    except UnreadableError:
        truth = []
    if not truth:
        raise ValueError(f"math-verify cannot read the ground truth {ground_truth!r}")
    return truth
