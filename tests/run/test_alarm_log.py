"""How alarms are told: when, where, and once, however often a run is interrupted."""

import contextlib
import json
import logging

import pytest
from config_helpers import gsm8k
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from grpo_jax.run.alarm_log import AlarmLog, AlarmStates
from grpo_jax.run.workdir import Workdir
from grpo_jax.run.writer import MetricsWriter

MISMATCH = "training/rollout_probs_diff_mean"
GOOD = {"actor/loss": 0.0, MISMATCH: 0.001}
BAD, BROKEN = GOOD | {MISMATCH: 0.02}, {"actor/loss": float("nan"), "actor/skipped_updates": 1}


def told_at(lines):
    """[(step, event)] of the alarms of steps 1, 2, ..."""
    states = AlarmStates(gsm8k())
    return [(step, told.event) for step, line in enumerate(lines, 1) for told in states.advance(line, step)]


def test_an_alarm_that_lasts_is_told_ever_more_seldom_and_when_it_is_over():
    told = told_at([GOOD] * 2 + [BAD] * 80 + [GOOD] * 20)
    # It begins at 3; 10, 20, 40 steps later it lasts; its last step is 82, and 92 is ten later.
    assert told == [(3, "begins"), (13, "lasts"), (33, "lasts"), (73, "lasts"), (92, "ends")]


def test_one_that_comes_and_goes_is_one():
    assert told_at([BAD, *[GOOD] * 9, BAD, *[GOOD] * 10, BAD]) == [
        (1, "begins"),
        (11, "lasts"),
        (21, "ends"),
        (22, "begins"),
    ]


def test_a_run_has_diverged_after_three_steps_in_a_row():
    states, seen = AlarmStates(gsm8k()), []
    for step, line in enumerate([GOOD, BROKEN, BROKEN, GOOD, BAD, BROKEN, BROKEN, BROKEN], 1):
        states.advance(line, step)
        seen.append((states.trouble_since, states.has_diverged))
    # A mismatch at 5 is an alarm, but not of the diverging kind.
    expected = [None, 2, 2, None, None, 6, 6, 6]
    assert seen == [(since, step == 8) for step, since in enumerate(expected, 1)]


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return Workdir(tmp_path / "run")


def go_on(workdir, lines, *, after=None, num_rollbacks=0, then=None, **changes):
    """Writes the lines of the steps after `after`, as a run does that goes on; returns what was logged."""
    config, logged = gsm8k(**changes), []
    logger = logging.getLogger("grpo_jax.run.alarm_log")
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with contextlib.closing(MetricsWriter(workdir, config, resume_step=after)) as writer:
            log = AlarmLog(workdir, config, writer, num_rollbacks=num_rollbacks)
            for step, line in enumerate(lines, (after or 0) + 1):
                added = log.note(line, step, lambda: "  completion:   ab")
                writer.write(line | added, step=step, epoch=1)
            if then is not None:
                then(log)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return logged


def read(workdir):
    lines = [json.loads(line) for line in workdir.alarms.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_where_an_alarm_is_told(workdir):
    [logged] = go_on(workdir, [GOOD, BROKEN])
    assert logged.startswith(
        "WARNING: alarm not-finite at step 2: loss or gradient was not finite in 1 update(s)"
    )
    assert (
        "Likely cause: the learning rate is too high" in logged
        and "Remedy: lower optim.learning_rate" in logged
    )
    [line] = read(workdir)
    assert line["step"] == line["since"] == 2 and line["event"] == "begins" and line["alarm"] == "not-finite"
    assert (
        line["values"] == {"actor/skipped_updates": 1}
        and line["cause"] in logged
        and line["remedy"] in logged
    )
    shown = EventAccumulator(str(workdir.tensorboard))
    shown.Reload()
    scalars = lambda name: [(event.step, event.value) for event in shown.Scalars(name)]
    assert scalars("alarms/num_sounding") == [(1, 0), (2, 1)] and scalars("alarms/not-finite") == [(2, 1)]
    [text] = shown.Tensors("alarms/not-finite/text_summary")
    assert text.step == 2 and logged in text.tensor_proto.string_val[0].decode()


def test_a_useless_batch_shows_a_completion(workdir):
    flat = GOOD | {"frac_reward_zero_std": 1.0, "reward/max": 0.0, "reward/min": 0.0}
    [logged] = go_on(workdir, [flat] * 2, **{"trainer.flat_reward_steps": 2})
    assert logged.startswith("WARNING: alarm zero-reward at step 2") and logged.endswith(
        "\n  completion:   ab"
    )


def test_a_number_that_is_not_finite_is_null(workdir):
    go_on(workdir, [GOOD | {MISMATCH: 0.02, "training/token_mult_prob_error": float("inf")}])
    assert read(workdir)[0]["values"] == {MISMATCH: 0.02, "training/token_mult_prob_error": None}


@pytest.mark.parametrize("after", [1, 4, 5, 16, 30])
def test_a_run_that_goes_on_has_each_alarm_once(workdir, after):
    lines = [*[GOOD] * 4, *[BAD] * 12, *[GOOD] * 24, BROKEN]
    logged = go_on(workdir, lines)
    whole = read(workdir)
    assert [(line["step"], line["event"]) for line in whole] == [
        (5, "begins"), (15, "lasts"), (26, "ends"), (41, "begins"),
    ]  # fmt: skip
    with workdir.alarms.open("a") as file:
        file.write('{"step": 3, "ev')  # as if it had been killed while it wrote
    again = go_on(workdir, lines[after:], after=after)
    assert read(workdir) == whole
    assert again == logged[len(logged) - len(again) :] and len(again) == sum(
        line["step"] > after for line in whole
    )


def test_roll_backs_stay_as_far_as_the_checkpoint_knows_of_them(workdir):
    def go_back(log):
        log.tell_rollback(log.explain_trouble(), back_from=4, to=2, number=1)

    rolls = {"trainer.max_rollbacks": 2}
    logged = go_on(workdir, [GOOD, GOOD, BROKEN, BROKEN], then=go_back, **rolls)
    assert "alarm since step 3: not-finite" in logged[-1] and "(roll-back 1 of 2)" in logged[-1]
    assert "from step 4 to the checkpoint of step 2" in logged[-1]
    go_on(workdir, [GOOD], after=2, num_rollbacks=1, **rolls)
    [line] = read(workdir)
    assert (line["event"], line["step"], line["back_from"], line["number"]) == ("roll-back", 2, 4, 1)
    # A checkpoint from before the roll-back: it will be done again.
    go_on(workdir, [GOOD], after=2, num_rollbacks=0, **rolls)
    assert read(workdir) == []


def test_weights_are_in_doubt_only_where_the_run_may_go_back(workdir):
    seen = []
    note = lambda log: seen.append((log.may_roll_back, log.has_diverged))
    go_on(workdir, [BROKEN] * 2, then=note, **{"trainer.max_rollbacks": 1})
    go_on(workdir, [BROKEN] * 2, then=note)
    go_on(workdir, [GOOD], then=note, **{"trainer.max_rollbacks": 1})
    assert seen == [(True, False), (False, False), (False, False)]
