"""The page is written while a run trains, and what started the run is noted down."""

import json
import time

import jax
from config_helpers import gsm8k
from run_folders import write_run

from grpo_jax.report import live
from grpo_jax.report.live import reported
from grpo_jax.report.read import read_run
from grpo_jax.report.starts import Recipe
from grpo_jax.run.hosts import ALONE


def wait_for(what):
    for _ in range(500):
        if what():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come")


def test_the_page_is_written_again_and_again_and_at_the_end(tmp_path):
    path = write_run(tmp_path / "run", 3)
    page = path / "report.html"
    with reported(gsm8k(**{"logging.report_every_s": 0.01}), path, ALONE, None) as report:
        assert not page.exists()
        report.begin(3)
        wait_for(page.exists)
        page.unlink()
        wait_for(page.exists)
        page.unlink(missing_ok=True)
    assert page.exists()


def test_with_zero_seconds_it_is_written_at_the_end_alone(tmp_path):
    path = write_run(tmp_path / "run", 3)
    with reported(gsm8k(**{"logging.report_every_s": 0.0}), path, ALONE, None) as report:
        report.begin(3)
        time.sleep(0.1)
        assert not (path / "report.html").exists()
    assert (path / "report.html").exists()


def test_a_run_that_did_not_begin_gets_no_page(tmp_path):
    with reported(gsm8k(), tmp_path / "run", ALONE, None):
        pass
    assert not (tmp_path / "run").exists()


def test_a_page_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch):
    path, told = write_run(tmp_path / "run", 3), []
    (path / "report.html").mkdir()
    monkeypatch.setattr(live.logger, "warning", lambda text, *args, **_: told.append(text % args))
    with reported(gsm8k(), path, ALONE, None) as report:
        report.begin(3)
    [line] = told
    assert line.startswith(f"WARNING: {path / 'report.html'} was not written")


def test_what_was_started_is_noted_down(tmp_path):
    path = write_run(tmp_path / "run", 3)
    with reported(gsm8k(), path, ALONE, Recipe("my.py:smoke", {"optim.learning_rate": 5e-7})) as report:
        report.begin(77)
    first, start = read_run(path).starts
    assert first["num_steps"] == 3 and start["num_steps"] == 77
    assert start["recipe"] == "my.py:smoke" and start["replaced"] == {"optim.learning_rate": 5e-7}
    assert start["versions"]["jax"] == jax.__version__ and "cpu" in start["devices"]
    page = (path / "report.html").read_text()
    assert "my.py:smoke" in page and json.dumps(5e-7) in page
