"""`python -m grpo_jax.data.gsm8k`: verl's rows, and one line with exit code 2 for what cannot be read."""

import json
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax.data.gsm8k import at_most, main, num_calculations, to_row
from grpo_jax.data.schema import read_rows

DATA = Path(__file__).parent


@pytest.fixture
def source(tmp_path):
    """A folder with the original files, 64 and 32 lines of them."""
    folder = tmp_path / "source"
    folder.mkdir()
    for split in ("train", "test"):
        shutil.copy(DATA / f"gsm8k_sample_{split}.jsonl", folder / f"{split}.jsonl")
    return folder


def refusal(capsys, *argv):
    """Runs the command, which must fail; returns the one line that it prints."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    out, err = capsys.readouterr()
    assert caught.value.code == 2
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def test_rows_are_verls(source, tmp_path, capsys):
    main([f"--local_dir={tmp_path / 'out'}", f"--source={source}"])
    assert "64 rows" in capsys.readouterr().out
    assert len(pq.read_table(tmp_path / "out" / "train.parquet")) == 64
    rows = pq.read_table(tmp_path / "out" / "test.parquet").to_pylist()
    assert len(rows) == 32
    original = json.loads((source / "test.jsonl").read_text().splitlines()[0])
    assert original["question"].startswith("Janet’s ducks lay 16 eggs per day.")
    assert rows[0] == {
        "data_source": "openai/gsm8k",
        "prompt": [
            {
                "role": "user",
                "content": original["question"]
                + ' Let\'s think step by step and output the final answer after "####".',
            }
        ],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "18"},
        "extra_info": {
            "split": "test",
            "index": 0,
            "answer": original["answer"],
            "question": original["question"],
        },
    }
    assert rows[31]["extra_info"]["index"] == 31
    read_rows([tmp_path / "out" / "train.parquet"], "data.train_files")  # refuses nothing


@pytest.mark.parametrize(
    ("answer", "truth"),
    [("So\n#### 1,234", "1234"), ("#### -5", "-5"), ("#### 2,000,000 or so", "2000000"), ("#### 1.5", "1.5")],
)
def test_ground_truth_has_no_commas(answer, truth):
    row = to_row({"question": "How many?", "answer": answer}, "train", 7)
    assert row["reward_model"]["ground_truth"] == truth
    assert row["extra_info"]["answer"] == answer


@pytest.mark.parametrize("folder", ["main", "."])
def test_parquet_files_of_the_hub_give_the_same_rows(source, tmp_path, folder):
    hub = tmp_path / "hub"
    (hub / folder).mkdir(parents=True)
    for split in ("train", "test"):
        lines = [json.loads(line) for line in (source / f"{split}.jsonl").read_text().splitlines()]
        half = len(lines) // 2
        for part, examples in enumerate((lines[:half], lines[half:])):
            table = pa.Table.from_pylist(examples)
            pq.write_table(table, hub / folder / f"{split}-0000{part}-of-00002.parquet")
    main([f"--local_dir={tmp_path / 'a'}", f"--source={source}"])
    main([f"--local_dir={tmp_path / 'b'}", f"--source={hub}"])
    for split in ("train", "test"):
        a, b = (pq.read_table(tmp_path / name / f"{split}.parquet") for name in "ab")
        assert a.equals(b)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"question": "Q", "ans', "is not JSON"),
        (b"\xff", "is not JSON"),
        (b'["Q", "#### 1"]', "must be an object"),
        (b'{"question": "Q"}', "answer must be a string"),
        (b'{"question": " ", "answer": "#### 1"}', "question must be a string that is not empty"),
        (b'{"question": "Q", "answer": "about 5"}', 'has no "#### NUMBER"'),
    ],
)
def test_a_malformed_line_is_named_and_nothing_written(source, tmp_path, capsys, line, complaint):
    lines = (source / "test.jsonl").read_bytes().splitlines()
    lines[2] = line
    (source / "test.jsonl").write_bytes(b"\n".join(lines))
    message = refusal(capsys, f"--local_dir={tmp_path / 'out'}", f"--source={source}")
    assert f"{source / 'test.jsonl'} line 3" in message
    assert complaint in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("He has 48/2 = <<48/2=24>>24.\n48+24 = <<48+24=72>>72\n#### 72", 2),
        ("It is $<<5=5>>5 and <<2*2.5=5>>5, <<10=10>>10 in all\n#### 10", 3),
        ("As 3 < 4 << 5 > 2 >> 1 says\n#### 4", 0),
        ("Nothing is marked: 2+2=4\n#### 4", 0),
    ],
)
def test_marked_calculations_are_counted(answer, number):
    assert num_calculations(answer) == number


def test_harder_problems_and_those_that_mark_nothing_are_left_out(source, tmp_path, capsys):
    numbers = [0, 1, 2, 3, 2]
    answers = ["".join(f"<<{i}+1={i + 1}>>{i + 1} " for i in range(n)) + "\n#### 7" for n in numbers]
    lines = [json.dumps({"question": f"Question {i}?", "answer": a}) for i, a in enumerate(answers)]
    (source / "train.jsonl").write_text("\n".join(lines))
    (source / "test.jsonl").write_text("\n".join(lines[:2]))
    main([f"--local_dir={tmp_path / 'out'}", f"--source={source}", "--max_calculations=2"])
    out = capsys.readouterr().out
    assert "train.parquet: 3 rows, 2 left out" in out and "test.parquet: 1 rows, 1 left out" in out
    rows = pq.read_table(tmp_path / "out" / "train.parquet").to_pylist()
    # A row keeps its number of the whole split.
    assert [row["extra_info"]["index"] for row in rows] == [1, 2, 4]
    assert at_most(rows, 0) == rows


def test_a_selection_of_nothing_is_refused(source, tmp_path, capsys):
    (source / "test.jsonl").write_text(json.dumps({"question": "2+2?", "answer": "4\n#### 4"}))
    flags = (f"--local_dir={tmp_path / 'out'}", f"--source={source}")
    assert "leaves no problem of test.parquet" in refusal(capsys, *flags, "--max_calculations=2")
    assert "must be at least 0" in refusal(capsys, *flags, "--max_calculations=-1")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_missing_or_incomplete_is_refused(source, tmp_path, capsys):
    out = f"--local_dir={tmp_path / 'out'}"
    assert "no such folder" in refusal(capsys, out, f"--source={tmp_path / 'absent'}")
    (source / "test.jsonl").write_text("\n")
    assert "test split is empty" in refusal(capsys, out, f"--source={source}")
    (source / "test.jsonl").unlink()
    assert "must hold test.jsonl, or main/test-00000" in refusal(capsys, out, f"--source={source}")
    (source / "test-00000-of-00001.parquet").write_text("no Parquet")
    assert "cannot be read as Parquet" in refusal(capsys, out, f"--source={source}")
    assert not (tmp_path / "out").exists()


def test_an_unreachable_hub_points_to_the_source_flag(tmp_path, capsys, monkeypatch):
    import huggingface_hub

    def unreachable(*_, **__):
        raise OSError("Connection refused\nTry again later.")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    message = refusal(capsys, f"--local_dir={tmp_path / 'out'}")
    assert "--source='openai/gsm8k'" in message
    assert "Connection refused" in message
    assert "pass --source=FOLDER" in message


def test_the_hub_is_asked_for_the_parquet_files_alone(source, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, **kwargs):
        asked.append((name, kwargs))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    main([f"--local_dir={tmp_path / 'out'}"])
    assert asked == [("openai/gsm8k", {"repo_type": "dataset", "allow_patterns": ["main/*.parquet"]})]


def test_bad_usage_is_one_line(source, tmp_path, capsys):
    out = f"--local_dir={tmp_path / 'out'}"
    assert "--local_dir" in refusal(capsys, f"--source={source}")
    assert "--sourc: there is no such flag (did you mean --source?)" in refusal(capsys, out, "--sourc=x")
    assert "unrecognized arguments: x" in refusal(capsys, out, "x")
    blocked = tmp_path / "file"
    blocked.write_text("")
    message = refusal(capsys, f"--local_dir={blocked}", f"--source={source}")
    assert "--local_dir=" in message and "cannot be written to" in message
