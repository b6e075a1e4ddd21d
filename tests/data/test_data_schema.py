"""Parquet in verl's schema: what is read, and what is refused with file and row."""

import math

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.data.schema import read_rows, write_rows, write_tables

KEY = "data.train_files"


def row(**changes):
    """A row of verl's; reward_model takes ground_truth=..."""
    truth = changes.pop("ground_truth", "18")
    return {
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "Six times three?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"split": "train", "index": 0, "answer": "#### 18", "question": "Six times three?"},
    } | changes


def refusal(files):
    with pytest.raises(ConfigError) as caught:
        read_rows(files, KEY)
    assert caught.value.key == KEY
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_rows_come_back_numbered_and_in_the_order_of_the_files(tmp_path):
    write_rows(tmp_path / "b.parquet", [row(ground_truth="1"), row(ground_truth="2")])
    write_rows(tmp_path / "a.parquet", [row(ground_truth="3", prompt="Plain text")])
    rows = read_rows([tmp_path / "b.parquet", str(tmp_path / "a.parquet")], KEY)
    assert [r["prompt_id"] for r in rows] == ["b/0", "b/1", "a/0"]
    assert [r["reward_model"]["ground_truth"] for r in rows] == ["1", "2", "3"]
    assert rows[0]["prompt"] == [{"role": "user", "content": "Six times three?"}]
    assert rows[2]["prompt"] == "Plain text"
    assert rows[0]["extra_info"]["answer"] == "#### 18"


def test_files_of_one_stem_keep_distinct_prompt_ids(tmp_path):
    for folder in ("x", "y"):
        write_rows(tmp_path / folder / "train.parquet", [row()])
    rows = read_rows([tmp_path / "x" / "train.parquet", tmp_path / "y" / "train.parquet"], KEY)
    assert [r["prompt_id"] for r in rows] == [f"{tmp_path}/x/train/0", f"{tmp_path}/y/train/0"]


@pytest.mark.parametrize(
    ("value", "text"),
    [("1,234", "1,234"), (18, "18"), (-5, "-5"), (18.0, "18"), (0.5, "0.5"), (1e20, "100000000000000000000")],
)
def test_ground_truth_becomes_a_string(tmp_path, value, text):
    write_rows(tmp_path / "t.parquet", [row(ground_truth=value)])
    assert read_rows([tmp_path / "t.parquet"], KEY)[0]["reward_model"]["ground_truth"] == text


def test_extra_info_may_be_missing_or_null(tmp_path):
    without = row()
    del without["extra_info"]
    write_rows(tmp_path / "without.parquet", [without])
    write_rows(tmp_path / "null.parquet", [row(extra_info=None), row()])
    rows = read_rows([tmp_path / "without.parquet", tmp_path / "null.parquet"], KEY)
    assert [bool(r["extra_info"]) for r in rows] == [False, False, True]


def test_fields_that_a_message_lacks_do_not_become_null(tmp_path):
    messages = [{"role": "user", "content": "Hi", "name": "Ann"}, {"role": "assistant", "content": "Hello"}]
    write_rows(tmp_path / "t.parquet", [row(prompt=messages)])
    assert read_rows([tmp_path / "t.parquet"], KEY)[0]["prompt"] == messages


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"prompt": [{"role": "user", "content": " "}]}, "the prompt is empty"),
        ({"prompt": [{"role": "user", "content": None}]}, "content must be a string, is None"),
        ({"prompt": [{"role": "user", "text": "Hi"}]}, "content must be a string, is None"),
        ({"ground_truth": None}, "ground_truth is empty"),
        ({"ground_truth": "  "}, "ground_truth is empty"),
        ({"data_source": None}, "data_source must be a string, is None"),
    ],
)
def test_a_bad_row_is_named_with_its_file(tmp_path, changes, complaint):
    file = tmp_path / "t.parquet"
    write_rows(file, [row(), row(**changes)])
    message = refusal([file])
    assert str(file) in message
    assert "row 1: " in message
    assert complaint in message


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_an_empty_plain_prompt_is_refused(tmp_path, prompt):
    write_rows(tmp_path / "t.parquet", [row(prompt=prompt)])
    assert "row 0: the prompt is empty" in refusal([tmp_path / "t.parquet"])


@pytest.mark.parametrize(
    ("truth", "complaint"),
    [(True, "must be a string or a number"), ([1], "must be a string or a number"), (math.nan, "finite")],
)
def test_a_ground_truth_of_another_kind_is_refused(tmp_path, truth, complaint):
    write_rows(tmp_path / "t.parquet", [row(ground_truth=truth)])
    assert complaint in refusal([tmp_path / "t.parquet"])


@pytest.mark.parametrize("column", ["data_source", "prompt", "reward_model"])
def test_a_missing_column_is_named(tmp_path, column):
    incomplete = row()
    del incomplete[column]
    write_rows(tmp_path / "good.parquet", [row()])
    write_rows(tmp_path / "bad.parquet", [incomplete])
    message = refusal([tmp_path / "good.parquet", tmp_path / "bad.parquet"])
    assert "bad.parquet" in message
    assert f"has no column '{column}'" in message


def test_a_missing_field_of_reward_model_is_named(tmp_path):
    write_rows(tmp_path / "t.parquet", [row(reward_model={"style": "rule"})])
    assert "has no field 'ground_truth'" in refusal([tmp_path / "t.parquet"])


def test_files_that_are_no_parquet_are_refused(tmp_path):
    (tmp_path / "text.parquet").write_text("question,answer\n")
    write_rows(tmp_path / "whole.parquet", [row()])
    (tmp_path / "half.parquet").write_bytes((tmp_path / "whole.parquet").read_bytes()[:-20])
    pq.write_table(pa.table({"data_source": [], "prompt": [], "reward_model": []}), tmp_path / "none.parquet")
    assert "there is no such file" in refusal([tmp_path / "absent.parquet"])
    assert "there is no such file" in refusal([tmp_path])
    assert "cannot be read as Parquet" in refusal([tmp_path / "text.parquet"])
    assert "cannot be read as Parquet" in refusal([tmp_path / "half.parquet"])
    assert "no field 'ground_truth'" in refusal([tmp_path / "none.parquet"])


def test_a_file_without_rows_is_refused(tmp_path):
    write_rows(tmp_path / "t.parquet", [row()])
    pq.write_table(pq.read_table(tmp_path / "t.parquet").slice(0, 0), tmp_path / "empty.parquet")
    assert "has no rows" in refusal([tmp_path / "t.parquet", tmp_path / "empty.parquet"])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    def write_half(table, path):
        path.write_bytes(b"PAR1")
        raise OSError("disk full")

    file = tmp_path / "t.parquet"
    write_rows(file, [row(ground_truth="old")])
    monkeypatch.setattr(pq, "write_table", write_half)
    with pytest.raises(OSError, match="disk full"):
        write_rows(file, [row(ground_truth="new")])
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]
    assert read_rows([file], KEY)[0]["reward_model"]["ground_truth"] == "old"


def test_of_several_tables_none_has_its_name_before_all_are_complete(tmp_path, monkeypatch):
    write, calls = pq.write_table, []

    def second_fails(table, path):
        calls.append(sorted(p.name for p in tmp_path.glob("*.parquet")))
        if len(calls) == 2:
            raise OSError("disk full")
        write(table, path)

    monkeypatch.setattr(pq, "write_table", second_fails)
    tables = {tmp_path / f"{name}.parquet": [row(ground_truth=name)] for name in ("train", "test")}
    with pytest.raises(OSError, match="disk full"):
        write_tables(tables)
    assert calls == [[], []] and not list(tmp_path.iterdir())
    write_tables(tables)
    assert read_rows([tmp_path / "test.parquet"], KEY)[0]["reward_model"]["ground_truth"] == "test"
