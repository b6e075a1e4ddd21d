"""What the fuzz tests share: how many examples they take, and values that nobody would put there."""

import math
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

STEADY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def lengths(quick, long):
    """Parametrizes `num_examples`: a few in the default suite, the same and many more in the slow one."""
    slow = pytest.param(long, id="long", marks=pytest.mark.slow)
    return pytest.mark.parametrize("num_examples", [pytest.param(quick, id="quick"), slow])


ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=20)  # surrogates included
NAMES = st.sampled_from(
    [
        *("", " ", ".", "..", "/", "../../outside", "/dev/null", "/proc/self/mem", "~", "a\0b", "a" * 300),
        *("\n", "\x1b[31m", "\u2028", "\ud800", "nowhere.py:f", "random", "None", "x/../../y", "a.parquet"),
    ]
)
INTEGERS = st.one_of(
    st.integers(-3, 9),
    st.integers(),
    st.sampled_from([2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**18, 10**400, -(2**31)]),
)
FLOATS = st.one_of(
    st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 5e-324, 1e308, 3.5e38, 1e-46, -0.0])
)
SCALARS = st.one_of(st.none(), st.booleans(), INTEGERS, FLOATS, ANY_TEXT, NAMES)
STRANGE = st.sampled_from(
    [
        *(b"bytes", {1, 2}, frozenset(), range(3), 1j, object(), int, len, Ellipsis, pathlib.Path("x")),
        *(np.float32(0.5), np.float64(0.5), np.int64(3), np.bool_(True), np.arange(3), np.array("x")),
        *(config_dict.placeholder(int), config_dict.required_placeholder(float), ConfigDict({"a": 1})),
    ]
)
VALUES = st.recursive(
    SCALARS | STRANGE,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=2),
    ),
    max_leaves=4,
)
"""Of any type, as a configuration file may return them."""

JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
"""What a JSON file may hold, and more: NaN and infinity, as Python writes and reads them."""


LONGEST_LINE = 1500
"""Characters: a value, shortened, and the rule with all choices."""


def check_refusal(error):
    """A `ConfigError` is a line that names key, value and rule, of a length that one reads."""
    line = " ".join(str(error).splitlines())
    assert error.rule and line.startswith(" ".join(f"{error.key}=".splitlines())) and len(line) < LONGEST_LINE
    assert error.rule in str(error)


@st.composite
def damages(draw, whole):
    """The bytes `whole` after what disks, networks and editors do to them."""
    kind = draw(st.sampled_from(["cut", "flip", "zero", "insert", "remove", "replace"]))
    at = draw(st.integers(0, max(0, len(whole) - 1)))
    size = draw(st.integers(1, 64))
    if kind == "cut":
        return whole[:at]
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ 1 << draw(st.integers(0, 7))]) + whole[at + 1 :]
    if kind == "zero":
        return whole[:at] + b"\0" * min(size, len(whole) - at) + whole[at + size :]
    if kind == "remove":
        return whole[:at] + whole[at + size :]
    new = draw(st.binary(min_size=size, max_size=size))
    return whole[:at] + new + whole[at if kind == "insert" else at + size :]
