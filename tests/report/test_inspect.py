"""A run and a step on the terminal."""

import io
import shutil
import sys

import pytest
from rich.console import Console
from run_folders import write_run
from step_files import step_result, write_step
from test_run_page import HOSTILE

from grpo_jax import inspect
from grpo_jax.report import __main__ as report_command
from grpo_jax.report import terminal
from grpo_jax.report.rollouts import read_step
from grpo_jax.rollout.evaluation import rollout_records, write_jsonl
from grpo_jax.run.workdir import Workdir


@pytest.fixture
def workdir(tmp_path, tokenizer_folder):
    path = write_run(tmp_path / "run", 12)
    shutil.copytree(tokenizer_folder, path / "model_files")
    write_step(path, 2)
    return Workdir(path)


def inspected(monkeypatch, capsys, *argv):
    """(exit code, what was printed)"""
    monkeypatch.setattr(sys, "argv", ["inspect", *map(str, argv)])
    monkeypatch.setenv("COLUMNS", "160")
    code = 0
    try:
        inspect.main()
    except SystemExit as stop:
        code = stop.code
    return code, "".join(capsys.readouterr())


def test_a_run(workdir, monkeypatch, capsys):
    code, out = inspected(monkeypatch, capsys, workdir.path)
    assert code == 0 and "finished, step 12 of 12" in out and "steps with rollouts: 2" in out
    assert "step 7: loss-spike begins: actor/loss=9" in out
    assert f"reward/mean {1 / 101:.4g} {12 / 112:.4g}" in " ".join(out.split())  # n / (n + 100)


def test_a_step(workdir, monkeypatch, capsys):
    code, out = inspected(monkeypatch, capsys, workdir.path, "--step=2")
    assert code == 0 and "3 of 3 groups" in out and "group 0 · train/0 · ground truth 7" in out
    assert "reward 1 · reward/format 0.5 · advantage -1.5 · 3 tokens · stop" in out
    assert "mismatch 0.375" in out and "1 clipped" in out and "dropped" in out


def test_a_group_and_a_filter(workdir, monkeypatch, capsys):
    _, out = inspected(monkeypatch, capsys, workdir.path, "--step=2", "--show=clipped", "--sort=mismatch")
    assert "1 of 3 groups" in out and "group 1" in out and "group 0" not in out
    _, out = inspected(monkeypatch, capsys, workdir.path, "--step=2", "--group=2", "--colour=version")
    assert "group 2" in out and "group 1" not in out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--step=99"], "--step=99: there are no rollouts of it to be read: saved are those of step 2\n"),
        (["--group=1"], "--group=1: needs --step=N"),
        (["--most=2"], "--most=2: needs --step=N"),
        (["--step=2", "--group=9"], "--group=9: step 2 has groups 0 to 2"),
        (["--step=x"], "invalid int value"),
        (["--step=2", "--colour=red"], "invalid choice"),
        (["--stp=2"], "did you mean --step"),
    ],
)
def test_mistakes_are_one_line(workdir, monkeypatch, capsys, flags, told):
    code, out = inspected(monkeypatch, capsys, workdir.path, *flags)
    assert code == 2 and told in out and out.count("\n") == 1


def without_tokens(workdir, damage):
    """Step 2 as lines of JSON, its Parquet file gone, or damaged."""
    batch = step_result().rollouts
    write_jsonl(workdir.rollouts / "step-000002.jsonl", rollout_records(batch.groups, batch.rewards.rewards))
    file = workdir.rollouts / "step-000002.parquet"
    file.unlink() if damage is None else file.write_bytes(damage)


@pytest.mark.parametrize(
    ("damage", "told"),
    [(None, "step-000002.parquet is missing"), (b"PAR1", "step-000002.parquet cannot be read")],
)
def test_without_tokens_nothing_is_said_of_them(workdir, monkeypatch, capsys, damage, told):
    without_tokens(workdir, damage)
    code, out = inspected(monkeypatch, capsys, workdir.path, "--step=2", "--sort=longest")
    assert code == 0 and told in out and "#### 8" in out and "3 tokens" in out
    assert "mismatch" not in out
    for flag in ("--sort=mismatch", "--colour=ratio", "--colour=sampler", "--show=clipped"):
        code, out = inspected(monkeypatch, capsys, workdir.path, "--step=2", flag)
        name, _, value = flag.partition("=")
        assert code == 2 and out.count("\n") == 1
        assert out.startswith(f"error: {name}='{value}': needs the tokens of step 2: {told}")


def damage_run(path):
    """Lines 3 and 5 of metrics.jsonl, of which the first has step 0, and config.json."""
    lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[2], lines[4] = "{damaged\n", "[]\n"
    (path / "metrics.jsonl").write_text("".join(lines))
    (path / "config.json").write_text("{")


@pytest.mark.parametrize("command", [inspect, report_command])
def test_damaged_files_are_named(workdir, monkeypatch, capsys, command):
    damage_run(workdir.path)
    monkeypatch.setattr(inspect, "main", command.main)
    code, out = inspected(monkeypatch, capsys, workdir.path)
    assert code == 0 and "metrics.jsonl: damaged, and left out: lines 3, 5\n" in clean(out)
    assert "config.json cannot be read (JSONDecodeError)\n" in clean(out)


def clean(text):
    """Without the spaces that fill the lines of a terminal."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_what_is_no_run(tmp_path, monkeypatch, capsys):
    for path in (tmp_path, tmp_path / "none"):
        assert inspected(monkeypatch, capsys, path, "--step=1")[0] == 2


def shown(view):
    console = Console(file=io.StringIO(), force_terminal=True, width=160, color_system="truecolor")
    console.print(view)
    return console.file.getvalue()


def test_colours_are_those_of_the_quantity(workdir):
    saved = read_step(workdir, 2)
    [first, _], [_, last] = saved.groups[0].completions, saved.groups[1].completions
    styles = lambda c, quantity: [str(span.style) for span in terminal.tokens(c, saved, quantity).spans]
    assert styles(first, "difference") == []  # there is none
    full = "white on rgb(200,30,30)"
    assert styles(last, "difference") == [full, full, f"{full} underline"]  # -0.375; the last was clipped
    *_, clipped = styles(last, "ratio")
    assert clipped == "white on rgb(20,50,200) underline"  # 1.5
    older, _, newer = styles(last, "version")
    assert older != newer


def test_no_text_acts_on_the_terminal(workdir):
    write_step(workdir.path, 2, text=HOSTILE + "[bold red]:smile:")
    saved = read_step(workdir, 2)
    for group in saved.groups:
        for completion in group.completions:
            completion["token_ids"] = None  # so that the text itself is shown
    out = shown(terminal.step_view(saved, quantity="sampler", sort="sampled", show="all", most=9, group=None))
    assert "\x1b[31m" not in out and "\x00" not in out and "\u202e" not in out
    assert "␀␛[31m⟨U+202E⟩" in out and "[bold red]:smile:" in out


def test_the_names_of_the_flags_are_those_of_the_views():
    names = (inspect.QUANTITIES, inspect.SORTS, inspect.FILTERS)
    assert names == tuple(map(tuple, (terminal.QUANTITIES, terminal.SORTS, terminal.FILTERS)))
