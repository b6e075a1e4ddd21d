"""The page of a run: what is in it, for runs in any state; how it looks is for tests/report/test_browser.py."""

import json
import re

import numpy as np
import pytest
from run_folders import PHASES, write_run

from grpo_jax.config import ConfigError
from grpo_jax.report.document import unpacked
from grpo_jax.report.read import QUANTILES, read_run
from grpo_jax.report.thin import bin_means, thin
from grpo_jax.report.write import write_report

MB = 1e6


def data_of(file):
    """What the page's script gets."""
    return unpacked(re.search(r'<script type="text/plain" id="data">([^<]*)</script>', file.read_text())[1])


def charts_of(file):
    return {chart["title"]: chart for section in data_of(file)["sections"] for chart in section["charts"]}


def curve_of(file, title, label, run=0):
    [curve] = [c for c in charts_of(file)[title]["curves"] if (c["label"], c["run"]) == (label, run)]
    return dict(zip(curve["x"], curve["y"], strict=True))


def test_a_short_curve_is_shown_as_it_is(tmp_path):
    file = write_report([write_run(tmp_path / "run", 20)])
    assert curve_of(file, "Reward and accuracy", "reward/mean") == {
        step: float(f"{step / (step + 100):.5g}") for step in range(1, 21)
    }
    assert curve_of(file, "Reward and accuracy", "val/accuracy") == {0: 0, 10: 0.090909, 20: 0.16667}


def test_all_that_a_run_has_gets_a_chart(tmp_path):
    file = write_report([write_run(tmp_path / "run", 20)])
    wanted = {
        "Reward and accuracy",
        "KL to the reference",
        "Entropy",
        "Tokens of a completion",
        "Clipped tokens",
    }
    wanted |= {
        "Difference of probabilities",
        "Age of the tokens",
        "Seconds by phase",
        "Memory",
        "Devices idle",
    }
    wanted |= {"Distribution of rewards", "Distribution of lengths", "Parts of the reward"}
    assert wanted <= charts_of(file).keys()
    assert "Held-out pass@k" not in charts_of(file)  # which the run has none of


def test_seconds_by_phase_and_what_lies_between(tmp_path):
    file = write_report([write_run(tmp_path / "run", 3)])
    for phase, seconds in PHASES.items():
        assert curve_of(file, "Seconds by phase", phase) == {1: seconds, 2: seconds, 3: seconds}
    assert curve_of(file, "Seconds by phase", "between the phases") == {1: 0.25, 2: 0.25, 3: 0.25}
    # 4 + 1 + 1 + 3 of 10 s, and 0.01 s for the ledger
    assert curve_of(file, "Devices idle", "idle")[1] == pytest.approx(1 - 9 / 10.01, abs=1e-5)


def test_expected_seconds_stand_beside_the_measured(tmp_path):
    path = write_run(tmp_path / "run", 3)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    more = {"expected_s/gen": 2.0, "expected_s/update_actor": 2.5}
    text = "".join(json.dumps(line | more if line["step"] else line) + "\n" for line in lines)
    (path / "metrics.jsonl").write_text(text)
    file = write_report([path])
    assert curve_of(file, "Seconds by phase", "expected") == {1: 4.5, 2: 4.5, 3: 4.5}
    row = r'<tr class="slow"><td>gen</td><td class="n">2</td><td class="n">4</td></tr>'
    assert re.search(row, file.read_text())  # twice as long


def test_distributions_are_those_of_the_ledger(tmp_path):
    file = write_report([write_run(tmp_path / "run", 2, num_completions=4)])
    tokens = np.random.default_rng(0).integers(10, 200, 4)
    for percent, label in ((0, "lowest"), (25, "25 %"), (50, "median"), (100, "highest")):
        value = curve_of(file, "Distribution of lengths", label)[1]
        assert value == pytest.approx(np.percentile(tokens, percent), rel=1e-4)
    assert curve_of(file, "Distribution of rewards", "median")[1] == 0.5
    assert len(charts_of(file)["Distribution of rewards"]["curves"]) == len(QUANTILES)


def test_several_runs_beside_one_another(tmp_path):
    first, second = write_run(tmp_path / "a" / "run", 5), write_run(tmp_path / "b" / "run", 8)
    config = json.loads((second / "config.json").read_text())
    config["optim"]["learning_rate"] = 0.125
    (second / "config.json").write_text(json.dumps(config))
    file = write_report([first, second], tmp_path / "both.html")
    assert data_of(file)["runs"] == ["a/run", "b/run"]  # both folders are called the same
    assert max(curve_of(file, "Entropy", "actor/entropy", run=1)) == 8
    [row] = re.findall(r'<tr data-changed="1" data-different="1">.*', file.read_text())
    assert "optim.learning_rate" in row and "0.125" in row


def test_ten_thousand_steps_are_a_small_file(tmp_path):
    file = write_report([write_run(tmp_path / "run", 10_000, num_completions=2)])
    assert file.stat().st_size < 1 * MB
    curve = curve_of(file, "Gradient norm", "actor/grad_norm")
    assert max(curve.values()) == pytest.approx(0.6, abs=1e-4)  # the peaks of a sine are still there
    assert 1000 < len(curve) <= 1500 and {1, 10_000} <= curve.keys()


def test_command_versions_and_what_differs_from_the_recipe(tmp_path):
    page = write_report([write_run(tmp_path / "run", 1)]).read_text()
    for text in ("--config.optim.learning_rate=2e-6", "jax 0.10.2", "1 x NVIDIA H200", "configs/gsm8k.py"):
        assert text in page
    assert (
        "<td><code>optim.learning_rate</code></td><td><code>5e-07</code></td><td><code>1e-06</code></td>"
        in page
    )


# ---- runs in any state ----


def test_a_run_that_is_under_way(tmp_path):
    from grpo_jax.run import lock

    path = write_run(tmp_path / "run", 5, planned=40)
    assert read_run(path).state == "ended after step 5 of 40"
    with lock.hold(path / "lock"):
        assert read_run(path).state.startswith(
            "under way, after step 5 of 40, whose line was written 0 s ago"
        )
    assert read_run(write_run(tmp_path / "done", 5)).state == "finished, step 5 of 5"


def test_a_run_that_died_in_its_first_step(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    page = write_report([tmp_path]).read_text()
    assert "ended before its first step was done" in page and "No rollouts were saved" in page
    assert data_of(tmp_path / "report.html")["sections"] == []


def test_damaged_lines_are_left_out_and_counted(tmp_path):
    path = write_run(tmp_path / "run", 5)
    for name, damage in {
        "metrics.jsonl": b'{"step": 6, "reward/mean": \xff\x00}\n[1]\n{"step": "x"}\n{"step": 6, "rew',
        "alarms.jsonl": b"\x80\n7\n",
        "starts.jsonl": b"{\n",
        "ledger/steps.jsonl": b'{"step": 6}\tx\n\xff\n',
    }.items():
        with (path / name).open("ab") as file:
            file.write(damage)
    (path / "config.json").write_text("[")
    run = read_run(path)
    assert [line["step"] for line in run.lines] == [0, 1, 2, 3, 4, 5] and len(run.alarms) == 1
    assert [spread["step"] for spread in run.spreads] == [1, 2, 3, 4, 5]
    told = " ".join(run.notes)
    for name, number in {
        "metrics.jsonl": "damaged, and left out: lines 7, 8, 9",
        "alarms.jsonl": "damaged, and left out: lines 2, 3",
        "starts.jsonl": "damaged, and left out: line 2",
        "ledger": "2 of the 7",
    }.items():
        assert f"{name}: {number}" in told
    assert "config.json cannot be read" in told
    write_report([path])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", '"text"', "null", "true", "[1]", "{}"])
def test_values_that_are_no_finite_number_are_gaps(tmp_path, value):
    path = write_run(tmp_path / "run", 3)
    with (path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 4, "kl/mean": {value}, "timing_s/step": {value}, "timing_s/gen": {value}}}\n')
    file = write_report([path])
    assert curve_of(file, "KL to the reference", "kl/mean").keys() == {1, 2, 3}


def test_what_is_no_run_is_refused_in_one_line(tmp_path):
    with pytest.raises(ConfigError, match="there is no such folder"):
        write_report([tmp_path / "none"])
    with pytest.raises(ConfigError, match="holds no run"):
        write_report([tmp_path])


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\x00\x1b[31m\u202e\ud800"


def test_no_text_of_a_run_becomes_html(tmp_path):
    path = write_run(tmp_path / "run", 2)
    alarm = {
        "step": 1,
        "event": "begins",
        "alarm": HOSTILE,
        "seen": HOSTILE,
        "cause": HOSTILE,
        "remedy": HOSTILE,
    }
    (path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    (path / "starts.jsonl").write_text(
        json.dumps({"command": HOSTILE, "versions": {HOSTILE: HOSTILE}}) + "\n"
    )
    config = {"optim": {"learning_rate": HOSTILE}, HOSTILE: {HOSTILE: [HOSTILE]}}
    (path / "config.json").write_text(json.dumps(config))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 3, f"reward/{HOSTILE}/mean": 1.0}) + "\n")
    file = write_report([path])
    page = file.read_text()
    assert page.count("<script") == 3 and "<img" not in page and "alert(1)&lt;" in page
    assert data_of(file)["alarms"] == [{"run": 0, "step": 1, "name": HOSTILE}]


# ---- fewer points ----


def test_thinning_keeps_the_extremes():
    y = np.zeros(10_000)
    y[[1234, 1235]] = 5, -5
    x, kept = thin(range(10_000), y, 100)
    assert len(x) <= 100 and (np.diff(x) > 0).all()
    assert {(1234, 5), (1235, -5)} <= set(zip(x.tolist(), kept.tolist(), strict=True))


def test_means_of_stretches():
    x, means = bin_means([1, 2, 3, 4, 5], np.array([[1.0], [3], [5], [7], [9]]), 3)
    assert x.tolist() == [1, 3, 5] and means.tolist() == [[2], [6], [9]]
