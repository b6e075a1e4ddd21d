"""The ledger of a run and its audit: what a step writes, and that every kind of disagreement is found."""

import copy
import dataclasses
import json
import zlib

import numpy as np
import pytest
from config_helpers import gsm8k

from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.position import Position
from grpo_jax.run import audit
from grpo_jax.run.ledger import Ledger, ledger_entry, parse_line, to_line
from grpo_jax.run.writer import read_lines
from grpo_jax.types import (
    Completion,
    Prompt,
    RewardResult,
    RolloutGroup,
    ScoredBatch,
    StepResult,
    TokenUse,
)

ZERO = {"actor/skipped_updates": 0}


def completion(length, version, *, changes=(), end="stop"):
    return Completion(tuple(range(length)), (-1.0,) * length, "", end, version, changes)


def group(origin, *completions):
    return RolloutGroup(
        Prompt(f"train/{origin[0] * 2 + origin[1]}", (1,), "", "", "s", {}), completions, origin
    )


def scored(groups, rewards, dropped=None, kept=()):
    return ScoredBatch(groups, RewardResult.of_one(np.array(rewards, np.float32), ()), dropped, kept)


def entry_of(result, step=1, num_batches=1, lost=(), **changes):
    """Of two prompts a batch and five batches an epoch."""
    config = gsm8k(**{"data.train_batch_size": 2, "algorithm.group_size": 2, "trainer.seed": 7} | changes)
    position = Position({}, num_batches, lost=lost)
    entry = ledger_entry(config, result, position, step=step, steps_per_epoch=5)
    return json.loads(to_line(entry, "")[0].partition("\t")[0])  # as it is read back


def plain_step(step):
    """Step number `step`, from 1, of an on-policy run: the two prompts of batch step - 1, two samples of each."""
    version, number = step - 1, step - 1
    groups = [
        group((number, 0), completion(3, version), completion(4, version)),
        group((number, 1), completion(2, version), completion(5, version)),
    ]
    use = TokenUse(np.zeros(4, int), np.array([3, 4, 2, 5]))
    result = StepResult(scored(groups, [[0, 1], [0.1, 1]]), use, [ZERO], {})
    return entry_of(result, step=step, num_batches=step)


METRICS = {
    "reward/mean": 2.1 / 4, "reward/max": 1.0, "reward/min": 0.0,
    "response_length/mean": 14 / 4, "response_length/max": 5, "response_length/min": 2,
    "training/token_age_mean": 0.0, "training/token_age_max": 0, "actor/skipped_updates": 0,
}  # fmt: skip


def test_what_a_plain_step_writes():
    entry = plain_step(2)
    trained = entry["trained"]
    assert (entry["step"], entry["num_batches"], entry["num_updates"]) == (2, 2, 1)
    assert trained["prompt"] == ["train/2", "train/3"] and trained["batch"] == [1, 1]
    assert trained["seeds"] == {"1": derive_seed(7, 1, "rollout")}
    assert trained["tokens"] == [3, 4, 2, 5] and trained["version"] == [1] * 4
    assert trained["reward"] == [0.0, 1.0, 0.1, 1.0]  # of float32, and yet short
    assert trained["crc"][2] == zlib.crc32(np.array([0, 1], np.int32).tobytes())
    assert entry["left_out"] == entry["masked_tokens"] == {} and entry["no_spread"] is None
    assert audit.totals([plain_step(1), entry]) == ({"trained": 8}, {"weigh": 28, "masked": 0})


def hard_step():
    """Two mini-batches of two rows, three of four updates skipped; one row truncated, one rejected."""
    groups = [
        group((0, 0), completion(3, 0, end="length"), completion(4, 0)),
        group((1, 1), completion(2, 1, changes=((1, 2),)), completion(5, 2)),
    ]
    left = scored([group((0, 1), completion(1, 0), completion(1, 0))], [[1, 1]])
    kept = (group((1, 0), completion(1, 2), completion(1, 2)),)
    use = TokenUse(np.array([0, 1, 0, 1]), np.array([0, 4, 0, 3]))
    updates = [{"actor/skipped_updates": s} for s in (0, 1, 1, 1)]  # those of mini-batches 0, 1, 0, 1
    result = StepResult(scored(groups, [[0, 1], [0, 1]], left, kept), use, updates, {})
    return entry_of(result, 3, 2, **{"algorithm.mask_truncated": True})


def test_each_fate_has_a_name():
    entry = hard_step()
    assert entry["left_out"] == {"truncated": [0], "skipped update": [1, 3], "rejected": [2]}
    assert entry["masked_tokens"] == {"0": 3, "2": 2, "3": 2}
    assert entry["skipped_updates"] == [1, 2, 3] and entry["minibatch"] == [0, 1, 0, 1]
    assert entry["trained"]["changes"] == {"2": [[1, 2]]} and entry["kept"] == [[1, 0]]
    fates = {
        "truncated": 1, "skipped update": 2, "rejected": 1, "trained": 0, "no spread": 2,
        "kept for the next step": 2,
    }  # fmt: skip
    assert audit.totals([entry])[0] == fates
    assert not list(audit.check_once([entry])) and not list(audit.check_entry(entry))


def test_token_versions_reach_the_metrics_that_are_compared():
    # Tokens of step 3, versions 0 (3 + 4 tokens), 1 (1 token), 2 (1 + 5): ages 2, 1, 0.
    line = METRICS | {
        "reward/mean": 0.5, "training/policy_version": 0, "actor/skipped_updates": 3,
        "training/token_age_mean": (7 * 2 + 1) / 14, "training/token_age_max": 2,
    }  # fmt: skip
    assert not list(audit.check_metrics(hard_step(), line))
    (problem,) = audit.check_metrics(hard_step(), line | {"training/token_age_max": 1})
    assert problem == "step 3: metrics.jsonl has training/token_age_max 1, the ledger 2"


def changed(entries, change):
    entries = copy.deepcopy(entries)
    change(entries)
    return entries


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e: e.append(e[1]), "the ledger's line 4 is that of step 2"),
        (lambda e: e.pop(1), "the ledger's line 2 is that of step 3"),
    ],
)
def test_steps_are_there_once(change, said):
    assert list(audit.check_steps(changed([plain_step(s) for s in (1, 2, 3)], change))) == [said]


def move(entry, origin):
    entry["trained"]["batch"][1], entry["trained"]["place"][1] = origin


def rename(entry, prompt):
    entry["trained"]["prompt"][0] = prompt


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda e: move(e[1], (0, 1)),
            ["prompt 1 of batch 0 was trained or left out 2 times", "prompt 1 of batch 1 was neither trained"],
        ),
        (lambda e: e[2].update(num_batches=4), [f"prompt {i} of batch 3 was neither" for i in (0, 1)]),
        (lambda e: e[2].update(kept=[[2, 0]]), ["prompt 0 of batch 2 was trained or left out, and waits"]),
        (lambda e: e[2].update(kept=[[3, 0], [3, 1]], num_batches=4), []),
        (lambda e: e[2].update(lost=[[3, 0]], kept=[[3, 1]], num_batches=4), []),
        (lambda e: rename(e[1], "train/0"), ["prompt train/0 came 2 times in epoch 1"]),
    ],
)  # fmt: skip
def test_each_completion_once(change, said):
    entries = [plain_step(step) for step in (1, 2, 3)]
    assert not list(audit.check_once(entries))
    found = list(audit.check_once(changed(entries, change)))
    assert len(found) == len(said) and all(a in b for a, b in zip(said, found, strict=True))


def test_a_prompt_may_come_again_in_the_next_epoch():
    entries = [plain_step(step) for step in range(1, 7)]  # five batches an epoch
    entries[5]["trained"]["prompt"] = ["train/0", "train/1"]
    assert not list(audit.check_once(entries))
    entries[4]["trained"]["prompt"] = ["train/0", "train/9"]
    assert list(audit.check_once(entries)) == ["prompt train/0 came 2 times in epoch 1"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["seeds"].update({"1": 5}), "batch 1 was sampled with seed 5"),
        (lambda t: t["reward"].pop(), "3 values of reward, for 4 completions"),
        (lambda t: t["version"].__setitem__(0, 2), "policy versions [2]"),  # newer than what step 2 trains
        (lambda t: t["changes"].update({"0": [[1, 0]]}), "policy versions [1, 0] from tokens [0, 1]"),
        (lambda t: t["changes"].update({"0": [[3, 1]]}), "completion 0 has policy versions"),
    ],
)
def test_what_is_wrong_within_a_step(change, said):
    entry = plain_step(2)
    change(entry["trained"])
    (found,) = audit.check_entry(entry)
    assert found.startswith("step 2, trained: ") and said in found


def test_checkpoints_go_on_where_the_ledger_has_ended():
    entry, progress = hard_step(), {"num_rollout_batches": 2, "surplus": [{"origin": [1, 0]}]}
    assert not list(audit.check_progress(entry, progress))
    assert "after 3 batches, the ledger after 2" in next(
        audit.check_progress(entry, progress | {"num_rollout_batches": 3})
    )
    assert "other groups" in next(audit.check_progress(entry, progress | {"surplus": []}))


# The file


def written(tmp_path, num_steps=3):
    ledger = Ledger(tmp_path, last_step=0)
    for step in range(1, num_steps + 1):
        ledger.append(plain_step(step))
    return tmp_path / "steps.jsonl"


def test_what_is_written_is_read_back(tmp_path):
    entries, problems = audit.read_ledger(written(tmp_path))
    assert entries == [plain_step(step) for step in (1, 2, 3)] and problems == []


def flip(lines):
    lines[1] = lines[1].replace('"reward":[0.0,', '"reward":[1.0,')


@pytest.mark.parametrize(
    ("damage", "number"),
    [
        (flip, 2),
        (lambda lines: lines.pop(0), 1),
        (lambda lines: lines.insert(2, lines[1]), 3),
        (lambda lines: lines.__setitem__(2, lines[2][:50]), 3),
        (lambda lines: lines.__setitem__(1, "\0" * 40 + "\n"), 2),
    ],
)
def test_no_line_can_be_changed_left_out_or_put_in(tmp_path, damage, number):
    file = written(tmp_path)
    lines = file.read_text().splitlines(keepends=True)
    damage(lines)
    file.write_text("".join(lines))
    entries, (problem, *more) = audit.read_ledger(file)
    assert problem.startswith(f"line {number} of ledger/steps.jsonl is damaged")
    assert len(entries) + 1 + len(more) == len(file.read_text().splitlines()) and len(more) <= 1
    # A run that goes on leaves it as it is, unless it is an end that was cut short.
    Ledger(tmp_path, last_step=9)
    left = audit.read_ledger(file)[1]
    assert left == [problem, *more] or (not file.read_text().splitlines()[2:] and left == [])


def test_a_ledger_without_lines_is_an_account_of_nothing(tmp_path):
    assert audit.read_ledger(written(tmp_path, num_steps=0)) == ([], [])
    assert audit.totals([]) == ({"trained": 0}, {}) and not list(audit.check_once([]))


def test_damaged_lines_of_metrics_are_named(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 0}\n{"step": 1}\ngarbage\n[]\n{"step": 4, "a": "\xff"}\n{"step": 5')
    lines, damaged = read_lines(file)
    assert [line["step"] for line in lines] == [0, 1, 4] and damaged == [3, 4]
    lines = {line["step"]: line for line in lines[1:]}
    entries = {step: plain_step(step) for step in (1, 2, 3, 4, 5)}
    missing = [f"step {step} is in the ledger, and not in metrics.jsonl" for step in (2, 3)]
    assert list(audit._missing(lines, entries)) == missing  # the last one may be on its way
    assert "reward/mean x, the ledger" in next(audit.check_metrics(plain_step(1), {"reward/mean": "x"}))


@pytest.mark.parametrize("last", [0, 1, 3])
def test_what_is_done_again_is_cut_off(tmp_path, last):
    file = written(tmp_path)
    whole = file.read_text()
    file.write_text(whole + '{"step": 4')  # a kill in the middle of a line
    ledger = Ledger(tmp_path, last_step=last)
    assert len(audit.read_ledger(file)[0]) == last
    for step in range(last + 1, 4):
        ledger.append(plain_step(step))
    assert file.read_text() == whole


def test_a_line_is_bound_to_the_one_before():
    line, chain = to_line(plain_step(1), "")
    assert parse_line(line, "") == plain_step(1) and line.endswith(f"\t{chain}\n")
    with pytest.raises(ValueError, match="the line before"):
        parse_line(line, chain)


def test_a_finished_position_tells_what_a_forced_resume_has_lost():
    held = Position({}, 1, ahead=()).to_json("r")
    groups = [group((0, place), completion(1, 0), completion(1, 0)) for place in (0, 1)]
    one = scored(groups[:1], [[0, 1]]).rewards
    position = dataclasses.replace(Position({}, 1), surplus=tuple(_scored_group(g, one) for g in groups))
    held = json.loads(json.dumps(position.to_json("r")))
    again = Position.from_json(held, [groups[1].prompt], 2, "r")
    assert [s.group.origin for s in again.surplus] == [(0, 1)] and again.lost == ((0, 0),)


def _scored_group(one, rewards):
    from grpo_jax.rollout.position import ScoredGroup

    return ScoredGroup(one, rewards)
