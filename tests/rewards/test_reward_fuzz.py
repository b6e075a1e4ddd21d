"""Whatever a model writes: our rules answer with a number of their range, soon, and say why in a line.

The completions are random, and the same in every run.
"""

import contextlib
import decimal
import fractions
import math as numbers
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from grpo_jax.rewards import UnreadableError, formats, gsm8k, make_reward, math
from grpo_jax.rewards.combined import LengthPenalty
from grpo_jax.rewards.worker import FLOAT32_MAX, as_score
from grpo_jax.types import Completion, Prompt, RolloutGroup

QUICK = {
    "gsm8k": (gsm8k.compute_score, gsm8k.explain),
    "gsm8k_flexible": (gsm8k.compute_score_flexible, gsm8k.explain_flexible),
    "gsm8k_format": (formats.gsm8k_format, formats.explain_gsm8k_format),
    "think_format": (formats.think_format, formats.explain_think_format),
}
"""Rules that run in the trainer's process, and what explains them."""

PIECES = [
    *("#### ", "####", "18", "-", ".", ",", "1,234.5", "18.0", "%", "$", "$$", "\n", " ", "\t", "x", "="),
    *("<think>", "</think>", "<answer>", "</answer>", "<think", "<answer>18</answer>"),
    *(r"\boxed{", r"\boxed{18}", "{", "}", r"\frac{", r"\frac{1}{2}", r"\sqrt{", r"\infty", "^", "_", "!"),
    *("\\", r"\text{", r"\left(", r"\right)", "(", ")", "[", "]", "1/0", "0/0", "nan", "inf", "1e999", "i"),
    *("\0", "\ud800", "\udfff", "\u202e", "\u200f", "\ufeff", "\u2028", "\U0010ffff", "e\u0301", "\u00a0"),
    *("١٨", "१८", "一八", "１８", "Ⅷ", "½", "𝟏𝟖", "−18", "١٬٢٣٤٫٥", "✓"),
]
"""What the rules look for, halves of it, and what looks like it: other scripts' digits, signs and spaces."""

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=40)  # surrogates included
TEXTS = st.lists(st.sampled_from(PIECES) | ANY_TEXT, max_size=12).map("".join)

LONG = {
    "digits": "#### " + "9" * 100_000,
    "digits of another script": "#### " + "٩" * 100_000,
    "digits in a box": r"\boxed{" + "9" * 100_000 + "}",
    "more digits than Python turns into a number": r"\boxed{" + "7" * 5_000 + "}",
    "commas": "1," * 50_000,
    "open braces": r"\boxed" + "{" * 50_000,
    "boxes within boxes": r"\boxed{" * 5_000 + "18" + "}" * 5_000,
    "parentheses": "(" * 5_000 + "18" + ")" * 5_000,
    "dollars": "$" * 100_000,
    "backslashes": "\\" * 100_000,
    "spaces between the tags": " " * 50_000
    + "<think>"
    + " " * 50_000
    + "</think>"
    + " " * 50_000
    + "<answer>",
    "open tags": "<think>" * 20_000,
    "NUL": "\0" * 100_000,
    "lone surrogates": "\ud800\udc00"[::-1] * 50_000,
    "right to left": "\u202e#### 18" * 10_000,
}

STEADY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def scored(function, text, truth="18"):
    return function(data_source="s", solution_str=text, ground_truth=truth, extra_info={})


@pytest.mark.parametrize("name", QUICK)
@given(text=TEXTS)
@settings(STEADY, max_examples=100)
def test_our_rules_give_0_or_1(name, text):
    function, explain = QUICK[name]
    value = scored(function, text)
    assert type(value) is float and value in (0.0, 1.0)
    said = explain(text, "18")
    assert said and "\n" not in said
    said.encode()  # it can be printed


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_our_rules_are_quick(name, text):
    start = time.perf_counter()
    value = scored(QUICK[name][0], text)
    QUICK[name][1](text, "18")
    assert time.perf_counter() - start < 0.5  # milliseconds, but for the machine
    # "#### " of the digits is not among the last 300 characters.
    assert value == float(text == LONG["right to left"] and name != "think_format")


@given(text=TEXTS)
@settings(STEADY, max_examples=100)
def test_only_plain_digits_are_the_answer(text):
    """Text after the answer does not undo it, nor do digits of other scripts count as digits."""
    marked = text + "#### 18"
    assert scored(gsm8k.compute_score, marked) == 1.0
    assert scored(gsm8k.compute_score, marked + "٠") == 1.0  # an Arabic zero is no digit of the answer
    assert scored(gsm8k.compute_score, text + "#### ١٨", "١٨") == 0.0


@given(thought=TEXTS, answer=TEXTS)
@settings(STEADY, max_examples=100)
def test_the_form_is_there_whatever_is_within_the_tags(thought, answer):
    has_tags = any(tag in part for part in (thought, answer) for tag in formats.THINK_TAGS)
    text = f"<think>{thought}</think>\u2003\n<answer>{answer}</answer>"
    if not has_tags:
        assert scored(formats.think_format, text) == 1.0
        assert scored(formats.think_format, text + "x") == 0.0
    assert scored(formats.think_format, text.replace("</think>", "")) == 0.0


@given(text=TEXTS)
@example(r"\boxed{9^{9^{9^9}}}")
@settings(STEADY, max_examples=60)
def test_math_gives_0_or_1_or_does_not_read_it(text):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(math, "PARSE_TIMEOUT_S", 1)
        patch.setattr(math, "COMPARE_TIMEOUT_S", 1)
        try:
            value = scored(math.compute_score, text)
        except UnreadableError as error:
            assert str(error) == "could not be read within 1 s"
            return
        assert type(value) is float and value in (0.0, 1.0)
        assert math.explain(text, "18")


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_math_is_done_with_long_ones_in_its_time(text):
    start = time.perf_counter()
    with contextlib.suppress(UnreadableError):
        assert scored(math.compute_score, text, "17") == 0.0
    assert time.perf_counter() - start < math.PARSE_TIMEOUT_S + math.COMPARE_TIMEOUT_S + 2


@given(truth=TEXTS)
@settings(STEADY, max_examples=40)
def test_a_ground_truth_is_read_or_refused(truth):
    try:
        assert scored(math.compute_score, r"\boxed{18}", truth) in (0.0, 1.0)
    except ValueError as error:
        assert str(error) == f"math-verify cannot read the ground truth {truth!r}"


NUMBERS = st.one_of(
    st.floats(),
    st.integers(),
    st.sampled_from([10**400, -(10**5000), 1 << 127, True, 0]),
    st.decimals(),
    st.fractions(),
    st.complex_numbers(),
    st.floats(width=16).map(np.float16),
    st.lists(st.floats(), max_size=3).map(np.array),
)
VALUES = st.one_of(
    NUMBERS, st.none(), ANY_TEXT, st.binary(max_size=4), st.dictionaries(st.just("score"), NUMBERS)
)


@given(value=VALUES)
@example({"score": {"score": 1.0}})
@example(decimal.Decimal("sNaN"))
@example(fractions.Fraction(10**400))
@settings(STEADY, max_examples=200)
def test_what_a_function_returns_is_a_finite_float32_or_refused(value):
    try:
        score = as_score(value)
    except ValueError:
        assert not (isinstance(value, float | int) and abs(value) <= FLOAT32_MAX)
        return
    assert type(score) is float and abs(score) <= FLOAT32_MAX
    assert numbers.isfinite(np.float32(score))


@given(
    lengths=st.lists(st.integers(0, 1 << 40), min_size=1, max_size=5),
    limit=st.integers(1, 1 << 30),
    share=st.floats(0, 1),
    penalty=st.floats(0, 1e30),
)
@settings(STEADY, max_examples=100)
def test_the_length_penalty_keeps_its_range(lengths, limit, share, penalty):
    values = LengthPenalty(limit, max(1, int(share * limit)), penalty).of_lengths(np.array(lengths))
    assert values.dtype == np.float32 and values.shape == (len(lengths),)
    assert np.all((values <= 0) & (values >= -np.float32(penalty)))


@pytest.fixture(scope="module")
def counting(reward_section, tmp_path_factory):
    """A function in a worker process that sums up the code points of what it gets."""
    path = tmp_path_factory.mktemp("counting") / "counting.py"
    path.write_text("def count(*, solution_str, **_):\n    return sum(map(ord, solution_str)) % 65521\n")
    section = reward_section(function=f"{path}:count", num_workers=2, on_error="stop")
    with make_reward(section, max_response_length=8) as reward:
        yield reward


@given(texts=st.lists(TEXTS | st.sampled_from(list(LONG.values())), min_size=1, max_size=4))
@settings(STEADY, max_examples=40)
def test_a_function_gets_each_completion_as_it_is(counting, texts):
    prompt = Prompt("train/0", (1,), "\ud800", "18", "\0", {"\udfff": "\u202e"})
    completions = tuple(Completion((1,), (0.0,), text, "stop", 0) for text in texts)
    result = counting.score([RolloutGroup(prompt, completions)])
    assert result.rewards.tolist() == [[sum(map(ord, text)) % 65521 for text in texts]]
