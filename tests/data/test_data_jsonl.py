"""Own JSON lines to Parquet: rows as the schema has them, splits that share no prompt, bad lines by number."""

import json

import pyarrow.parquet as pq
import pytest

from grpo_jax.config.command_line import ConfigError
from grpo_jax.data import jsonl, schema


def write(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return path


def convert(tmp_path, source, *flags):
    jsonl.main.__wrapped__([f"--source={source}", f"--local_dir={tmp_path / 'out'}", *flags])
    found = sorted((tmp_path / "out").glob("*.parquet"))
    return {path.stem: pq.read_table(path).to_pylist() for path in found}


def numbered(count):
    return [{"question": f"What is {i} + 1?", "result": i + 1} for i in range(count)]


FIELDS = ("--prompt=question", "--answer=result")


def test_a_row_has_what_its_line_and_the_flags_say(tmp_path):
    lines = [
        {"q": "Largest?", "a": 18.0, "s": "Ü #### 18", "level": 3},
        {"q": [{"role": "user", "content": "Chat"}], "a": "no", "s": "no", "level": 4, "other": None},
    ]
    source = write(tmp_path / "mine.jsonl", lines)
    flags = ["--prompt=q", "--answer=a", "--solution=s", "--extra", "level", "--system=Be brief."]
    tables = convert(tmp_path, source, *flags, "--num_val=1", "--seed=1")
    assert sorted(map(len, tables.values())) == [1, 1]
    by_level = {row["extra_info"]["level"]: row for rows in tables.values() for row in rows}
    system = {"role": "system", "content": "Be brief."}
    assert by_level[3]["prompt"] == [system, {"role": "user", "content": "Largest?"}]
    assert by_level[4]["prompt"] == [system, {"role": "user", "content": "Chat"}]
    assert by_level[3]["reward_model"] == {"style": "rule", "ground_truth": "18"}
    assert by_level[3]["extra_info"]["answer"] == "Ü #### 18"
    assert {row["data_source"] for row in by_level.values()} == {"mine"}
    for split in tables:
        assert tables[split][0]["extra_info"]["split"] == split
        assert schema.read_rows([tmp_path / "out" / f"{split}.parquet"], "k")[0]["prompt_id"] == f"{split}/0"


def test_the_draw_is_the_seeds_and_no_prompt_is_on_both_sides(tmp_path):
    examples = [*numbered(20), *numbered(5)]  # five prompts occur twice
    source = write(tmp_path / "mine.jsonl", examples)
    first = convert(tmp_path, source, *FIELDS, "--num_val=15")
    assert (len(first["train"]), len(first["val"])) == (10, 15)
    texts = {name: [row["prompt"][0]["content"] for row in rows] for name, rows in first.items()}
    assert texts["val"] == [f"What is {i} + 1?" for i in range(5, 20)]
    small = convert(tmp_path, source, *FIELDS, "--num_val=3")
    assert convert(tmp_path, source, *FIELDS, "--num_val=3") == small
    assert convert(tmp_path, source, *FIELDS, "--num_val=3", "--seed=1")["val"] != small["val"]
    with pytest.raises(
        ConfigError, match=r"--num_val=16: must be less than the 25 lines, and at most the 15"
    ):
        convert(tmp_path, source, *FIELDS, "--num_val=16")


def test_validation_from_a_file_of_its_own(tmp_path, capsys):
    source, val = write(tmp_path / "a.jsonl", numbered(3)), write(tmp_path / "b.jsonl", numbered(1))
    tables = convert(tmp_path, source, *FIELDS, f"--val_source={val}", "--data_source=sums")
    assert (len(tables["train"]), len(tables["val"])) == (3, 1)
    assert tables["val"][0]["data_source"] == tables["train"][0]["data_source"] == "sums"
    assert "WARNING: 1 prompts of" in capsys.readouterr().out


def test_empty_lines_count_and_a_separator_of_lines_within_a_text_ends_none(tmp_path):
    good = json.dumps({"prompt": "a\u2028b", "answer": "x"}, ensure_ascii=False)
    (tmp_path / "mine.jsonl").write_text(f"\n{good}\r\n\n{good.replace('a', 'c', 1)}\nnull\n")
    with pytest.raises(ConfigError, match=r"line 5': must be an object, is None"):
        convert(tmp_path, tmp_path / "mine.jsonl", "--num_val=1")


BAD = [
    ("{", "is not JSON"),
    ("[1]", r"must be an object, is \[1\]"),
    ("[" * 100_000, "is not JSON"),
    ('{"prompt": "p"}', r"has no field 'answer' \(it has prompt\)"),
    ("{}", r"has no field 'prompt' \(it has none\)"),
    ('{"prompt": " ", "answer": 1}', "the prompt is empty"),
    ('{"prompt": 5, "answer": 1}', "the prompt must be a string or a list"),
    ('{"prompt": [{"role": "user"}], "answer": 1}', "content must be a string"),
    ('{"prompt": "p", "answer": null}', "ground_truth is empty"),
    ('{"prompt": "p", "answer": NaN}', "must be finite"),
    ('{"prompt": "p", "answer": true}', "must be a string or a number"),
    ('{"prompt": "p\\ud800", "answer": 1}', "half of a character"),
    (b'{"prompt": "\xff", "answer": 1}', "is not JSON: 'utf-8' codec"),
    ('{"prompt": [{"role": "system", "content": "s"}], "answer": 1}', "has a system message already"),
]


@pytest.mark.parametrize(("line", "rule"), BAD, ids=range(len(BAD)))
def test_bad_lines_are_named_by_number_and_nothing_is_written(tmp_path, line, rule):
    good = b'{"prompt": "p", "answer": 1}\n'
    line = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "mine.jsonl").write_bytes(good + line + b"\n" + good + b"oh\n")
    with pytest.raises(ConfigError, match=rf"mine.jsonl line 2': .*{rule}") as caught:
        convert(tmp_path, tmp_path / "mine.jsonl", "--system=S", "--num_val=1")
    assert str(caught.value).endswith(" (bad too: line 4)")
    assert not (tmp_path / "out").exists()


def test_flags_that_do_not_go_together(tmp_path):
    source = write(tmp_path / "mine.jsonl", [{"prompt": p, "answer": 1} for p in "pq"])
    for flags, rule in (
        ((), "give one of --num_val and --val_source"),
        (("--num_val=1", f"--val_source={source}"), "give one of"),
        (("--num_val=-1",), "must be at least 0"),
        (("--num_val=2",), "must be less than the 2 lines"),
        (("--num_val=1", "--extra", "split"), "extra_info has already"),
        (("--val_source=absent",), "--val_source='absent': there is no such file"),
    ):
        with pytest.raises(ConfigError, match=rule):
            convert(tmp_path, source, *flags)
    mixed = [{"prompt": str(i), "answer": 1, "x": x} for i, x in enumerate((1, "s", 1))]
    both = write(tmp_path / "three.jsonl", mixed)
    with pytest.raises(ConfigError, match=r"--extra=\['x'\]: a field has no one type in all lines"):
        convert(tmp_path, both, f"--val_source={both}", "--extra", "x")
