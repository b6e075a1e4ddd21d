"""The tokens of a step on disk, and its page."""

import json
import shutil
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest
import step_files
from run_folders import write_run
from step_files import write_step
from test_run_page import HOSTILE, data_of

from grpo_jax.config import ConfigError
from grpo_jax.report import __main__ as report_command
from grpo_jax.report import step_page as page_module
from grpo_jax.report import write
from grpo_jax.report.rollouts import mismatch, read_step
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.evaluation import rollout_records, write_jsonl
from grpo_jax.run.workdir import Workdir


@pytest.fixture
def workdir(tmp_path, tokenizer_folder):
    path = write_run(tmp_path / "run", 3)
    shutil.copytree(tokenizer_folder, path / "model_files")
    write_step(path, 2)
    return Workdir(path)


def page_data(workdir, step=2):
    return data_of(write.write_step(workdir, step))


def test_the_file_has_a_row_a_completion_and_an_element_a_token(workdir):
    rows = pq.read_table(workdir.rollouts / "step-000002.parquet").to_pylist()
    assert [(r["group"], r["sample"], r["is_dropped"]) for r in rows] == [
        (0, 0, False), (0, 1, False), (1, 0, False), (1, 1, False), (0, 0, True), (0, 1, True),
    ]  # fmt: skip
    third = rows[3]
    assert third["token_ids"] == [4, 5, 6] and third["sampler_logprobs"] == [-1, -1, -1]
    assert third["trainer_logprobs"] == [-1.375] * 3  # nothing of prompt or padding
    assert third["token_advantages"] == [1.5] * 3 and third["token_versions"] == [2, 2, 3]
    assert third["is_clipped"] == [False, False, True]
    assert rows[0]["weighs"] == [False] * 3 and third["weighs"] == [True] * 3
    assert rows[4]["trainer_logprobs"] is None  # it was not trained
    assert rows[0]["seed"] == derive_seed(3, 0, "rollout") and rows[0]["reward/format"] == 0.5
    assert [r["is_correct"] for r in rows] == [True, False, False, False, False, False]


def test_the_page_has_every_number_of_every_token(workdir):
    data = page_data(workdir)
    first, second, dropped = data["groups"]
    assert (first["prompt"], first["truth"], first["wrong"], second["wrong"]) == (
        "What is 0?",
        "7",
        False,
        True,
    )
    last = second["completions"][1]
    assert last["tokens"] == {
        "token_ids": [4, 5, 6], "sampler_logprobs": -1, "trainer_logprobs": -1.375, "old_logprobs": -1.375,
        "logprobs": -0.9695, "token_advantages": 1.5, "is_clipped": [0, 0, 1], "weighs": 1,
        "token_versions": [2, 2, 3],
    }  # fmt: skip
    assert last["mismatch"] == 0.375 and second["mismatch"] == 0.375
    assert last["parts"] == {"format": 0.5} and last["advantage"] == 1.5
    assert (
        dropped["completions"][0]["dropped"] and "trainer_logprobs" not in dropped["completions"][0]["tokens"]
    )


def test_tokens_are_shown_as_the_tokenizer_has_them(workdir, tokenizer):
    texts = page_data(workdir)["texts"]
    assert texts == {str(i): tokenizer.decode([i]) for i in (4, 5, 6)}


def test_the_page_of_the_run_links_to_it(workdir):
    write_step(workdir.path, 10)
    page = write.write_report([workdir.path]).read_text()
    assert '<a href="report/step-000002.html">2</a>' in page
    step = (workdir.step_pages / "step-000002.html").read_text()
    assert '<a href="../report.html">' in step and '<a href="step-000010.html">step 10 →</a>' in step


def test_a_page_gets_the_link_to_a_step_that_came_later(workdir):
    write.write_report([workdir.path])
    page = workdir.step_pages / "step-000002.html"
    assert "→" not in page.read_text()
    write_step(workdir.path, 3)
    write.write_report([workdir.path])
    assert "step 3 →" in page.read_text()


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([0.0, -0.123456, 1e-7 / 3, 98765.4], [0.0, -0.1235, 3.333e-08, 98770.0]),
        ([float("nan"), -1.0, float("-inf")], [None, -1.0, None]),
        ([-0.5, -0.5], -0.5),
        ([2.0], [2.0]),
    ],
)
def test_numbers_to_four_digits(values, shown):
    assert page_module._tokens(np.array(values)) == shown


def test_a_page_is_made_again_when_its_rollouts_have_changed(workdir):
    write.write_report([workdir.path])
    page = workdir.step_pages / "step-000002.html"
    before = page.stat().st_mtime_ns
    write.write_report([workdir.path])
    assert page.stat().st_mtime_ns == before
    write_step(workdir.path, 2, text="another")
    write.write_report([workdir.path])
    assert data_of(page)["groups"][0]["completions"][0]["text"] == "another"


def test_no_text_of_a_completion_becomes_html(workdir):
    write_step(workdir.path, 2, text=HOSTILE)
    page = write.write_step(workdir, 2)
    assert page.read_text().count("<script") == 2 and "alert" not in page.read_text()
    assert data_of(page)["groups"][0]["completions"][0]["text"] == HOSTILE.replace("\ud800", "?")


def test_the_groups_with_the_largest_mismatch_stay_on_a_page_that_is_full(workdir, monkeypatch):
    monkeypatch.setattr(page_module, "MOST_TOKENS", 7)  # one group has 6
    page = write.write_step(workdir, 2)
    assert [group["number"] for group in data_of(page)["groups"]] == [1]
    assert "1 of 3 groups are shown" in page.read_text()


def test_without_tokens_the_texts_are_shown(workdir):
    result = step_files.step_result().rollouts
    write_jsonl(
        workdir.rollouts / "step-000003.jsonl", rollout_records(result.groups, result.rewards.rewards)
    )
    with (workdir.rollouts / "step-000003.jsonl").open("a") as file:
        file.write("{damaged\n")
    page = write.write_step(workdir, 3)
    groups = data_of(page)["groups"]
    assert [[c["text"] for c in g["completions"]] for g in groups] == [["#### 7", "#### 8"], ["a", "b"]]
    assert groups[0]["completions"][0]["length"] == 3 and groups[0]["completions"][0]["tokens"] == {}
    assert (
        "no tokens to show" in page.read_text()
        and "step-000003.jsonl: damaged, and left out: line 5" in page.read_text()
    )


@pytest.mark.parametrize("damage", [b"", b"PAR1 and no more"])
def test_a_damaged_file_is_one_line(workdir, damage):
    (workdir.rollouts / "step-000002.parquet").write_bytes(damage)
    with pytest.raises(ConfigError, match="there are no rollouts of it to be read"):
        write.write_step(workdir, 2)
    assert "step 2 has no page" in write.write_report([workdir.path]).read_text()


def test_without_the_tokenizer_ids_are_shown(workdir):
    (workdir.model_files / "tokenizer.json").write_text("{")
    saved = read_step(workdir, 2)
    assert saved.texts == {} and "ids are shown" in saved.notes[0]


def test_mismatch_of_values_that_are_not_finite():
    sampler = np.array([-1.5, -1.0])
    assert mismatch({"trainer_logprobs": np.array([-1.0, np.nan]), "sampler_logprobs": sampler}) == 0.5
    assert mismatch({"trainer_logprobs": None, "sampler_logprobs": sampler}) is None
    known = {"trainer_logprobs": np.float32([-1]), "sampler_logprobs": np.float32([-1.5])}
    assert json.dumps(mismatch(known)) == "0.5" and mismatch({}) is None


def reported(monkeypatch, capsys, *argv):
    """(exit code, what was printed)"""
    monkeypatch.setattr(sys, "argv", ["report", *map(str, argv)])
    code = 0
    try:
        report_command.main()
    except SystemExit as stop:
        code = stop.code
    return code, "".join(capsys.readouterr())


def test_the_command(workdir, tmp_path, monkeypatch, capsys):
    code, out = reported(monkeypatch, capsys, workdir.path)
    assert code == 0 and out.startswith(f"{workdir.report}   (0.") and out.endswith("MB)\n")
    other = write_run(tmp_path / "other", 2)
    code, out = reported(monkeypatch, capsys, workdir.path, other)
    assert code == 0 and data_of(workdir.path / "comparison.html")["runs"] == ["run", "other"]
    (workdir.step_pages / "step-000002.html").unlink()
    assert reported(monkeypatch, capsys, workdir.path, "--step=2")[0] == 0
    assert (workdir.step_pages / "step-000002.html").exists()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["RUN", "--step=7"], "--step=7: there are no rollouts of it to be read"),
        (["RUN", "RUN", "--step=2"], "--step is for one WORKDIR"),
        (["EMPTY", "--step=2"], "holds no run"),
        (["EMPTY"], "holds no run"),
        (["RUN", "EMPTY/none"], "there is no such folder"),
        (["RUN", "--ouput=x"], "did you mean --output"),
        ([], "required: WORKDIR"),
    ],
)
def test_mistakes_of_the_command_are_one_line(workdir, tmp_path, monkeypatch, capsys, argv, told):
    (tmp_path / "empty").mkdir()
    names = {"RUN": str(workdir.path), "EMPTY": str(tmp_path / "empty")}
    argv = [names.get(arg, arg.replace("EMPTY", names["EMPTY"])) for arg in argv]
    code, out = reported(monkeypatch, capsys, *argv)
    assert code == 2 and told in out and out.count("\n") == 1
