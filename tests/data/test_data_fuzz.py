"""Whatever a Parquet file holds: prompts come out of it, or one line says what is wrong, of which file and row.

The examples are random, and the same in every run.
"""

import datetime
import decimal

import fuzz_helpers as fuzz
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from grpo_jax.config import ConfigError
from grpo_jax.data.prompts import encode_prompts, fingerprint, sft_examples
from grpo_jax.data.schema import read_rows
from grpo_jax.rewards import messages

TEXT = st.text(max_size=12)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "", "ü"]), "content": TEXT}, optional={"name": TEXT}
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    TEXT,
    st.binary(max_size=4),
    st.decimals(allow_nan=False, places=2, min_value=-999, max_value=999),
    st.datetimes(),
    st.dates(),
    st.timedeltas(datetime.timedelta(0), datetime.timedelta(9)),
)
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, min_size=1, max_size=2)
    ),
    max_leaves=3,
)
GOOD = {
    "data_source": TEXT,
    "prompt": st.lists(MESSAGE, min_size=1, max_size=3) | TEXT,
    "reward_model": st.fixed_dictionaries({"ground_truth": TEXT}),
    "extra_info": st.fixed_dictionaries({"answer": TEXT}),
}
BAD = {
    "reward_model": st.fixed_dictionaries({"ground_truth": LEAVES}),
    "extra_info": st.dictionaries(st.sampled_from(["answer", "index"]), ANYTHING, min_size=1),
    "prompt": st.lists(st.fixed_dictionaries({"role": LEAVES, "content": LEAVES}), max_size=2),
}


@st.composite
def tables(draw):
    """An Arrow table whose columns are there or not, and good, of a good form, or anything."""
    num_rows = draw(st.integers(0, 3))
    columns = {}
    for name, good in GOOD.items():
        kind = draw(st.sampled_from(["good"] * 5 + ["bad", "any", "missing"]))
        if kind != "missing":
            of_kind = {"good": good, "bad": BAD.get(name, LEAVES), "any": ANYTHING}[kind]
            columns[name] = draw(st.lists(of_kind, min_size=num_rows, max_size=num_rows))
    if draw(st.booleans()):
        columns["more"] = list(range(num_rows))
    arrays = {}
    for name, values in columns.items():
        try:
            arrays[name] = pa.array(values)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):  # values of no one type
            assume(False)
    if draw(st.integers(0, 4)) == 0:  # text that is not UTF-8, as Parquet's writers need not check
        texts = draw(st.lists(st.binary(max_size=4), min_size=num_rows, max_size=num_rows))
        arrays[draw(st.sampled_from(["data_source", "prompt"]))] = pa.array(texts, pa.binary()).view(
            pa.string()
        )
    return pa.table(arrays)


def read(file, tokenizer):
    """Reads a file as a run does, for prompts and for a warm start."""
    rows = read_rows([file], "data.train_files")
    prompts, counts = encode_prompts(
        rows, tokenizer, max_prompt_length=40, overlong="truncate", key="data.train_files"
    )
    assert counts.num_rows == len(rows) == len(prompts)
    assert len(fingerprint(prompts)) == 64
    for prompt in prompts:
        assert 0 < len(prompt.token_ids) <= 40 and prompt.ground_truth.strip()
        # It is what a reward function in a process of its own gets.
        messages.frame_of_job(0, "score", {"extra_info": prompt.extra_info})
    sft_examples(rows, tokenizer, 40, 40)


def check(file, tokenizer):
    try:
        read(file, tokenizer)
    except ConfigError as error:
        fuzz.check_refusal(error)


@fuzz.lengths(60, 2000)
def test_columns_of_any_type(num_examples, tmp_path, tokenizer):
    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(table=tables())
    def holds(table):
        try:
            pq.write_table(table, tmp_path / "a.parquet")
        except pa.ArrowException:
            reject()  # Parquet has no such type
        check(tmp_path / "a.parquet", tokenizer)

    holds()


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    """The bytes of a good file."""
    file = tmp_path_factory.mktemp("whole") / "a.parquet"
    rows = [
        {
            "data_source": "d",
            "prompt": [{"role": "user", "content": f"What is 2 + {i}?"}],
            "reward_model": {"ground_truth": str(2 + i)},
            "extra_info": {"answer": f"#### {2 + i}", "price": decimal.Decimal("1.5")},
        }
        for i in range(50)
    ]
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.read_bytes()


@fuzz.lengths(60, 2000)
def test_bytes_that_are_damaged(num_examples, tmp_path, tokenizer, whole_file):
    @settings(fuzz.STEADY, max_examples=num_examples)
    @given(damaged=fuzz.damages(whole_file))
    def holds(damaged):
        (tmp_path / "a.parquet").write_bytes(damaged)
        check(tmp_path / "a.parquet", tokenizer)

    holds()
