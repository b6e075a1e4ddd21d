"""Dynamic sampling: which groups are trained on, dropped and kept, and that none is lost."""

import contextlib
import json
import logging
import sys

import numpy as np
import pytest

from grpo_jax.data.prompts import PromptIterator
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.batches import Ahead
from grpo_jax.rollout.dynamic import Dynamic, NoSpreadError
from grpo_jax.rollout.position import Position, ScoredGroup
from grpo_jax.types import Completion, Prompt, RewardResult, RolloutGroup, ScoredBatch

PROMPTS = [Prompt(f"train/{i}", (i, i), f"question {i}", str(i), "s", {"index": i}) for i in range(60)]


def make_group(index, version):
    completions = tuple(
        Completion(
            (index, g), (-0.1 * index, -np.float32(0.3).item()), f"answer {index} {g}", "stop", version
        )
        for g in range(2)
    )
    return RolloutGroup(PROMPTS[index], completions, (index // 4, index % 4))


class Rounds:
    """Rounds of four groups in order; those whose index is in `spread` have rewards 0 and 1, others 0 twice."""

    def __init__(self, spread, first=0):
        self.spread, self.number, self.is_released = set(spread), first, False

    def take_round(self):
        assert not self.is_released
        indices = list(range(4 * self.number, 4 * self.number + 4))
        unshaped = np.array([[0, i in self.spread] for i in indices], np.float32)
        shaped = unshaped - np.float32([[0.1, 0.2]])  # a length penalty: no reason to keep a group
        self.number += 1
        groups = [make_group(i, self.number) for i in indices]
        result = RewardResult(shaped, unshaped, unshaped, {"f": unshaped}, (f"error {self.number}",))
        return ScoredBatch(groups, result)

    def release_engine(self):
        self.is_released = True

    def state(self):
        return Position({}, self.number)

    def abandon(self):
        pass

    def restore(self, position):
        self.number = position.num_rollout_batches


class Sampling(Dynamic):
    """Wakes the engine before each batch, as a push of weights does."""

    def __init__(self, spread, max_rounds=10):
        self.rounds = Rounds(spread)
        super().__init__(self.rounds, num_groups=4, max_rounds=max_rounds)

    def take(self):
        self.rounds.is_released = False
        batch = super().take()
        assert self.rounds.is_released
        return batch


def through_json(position, prompts=PROMPTS[::-1], group_size=2, reward="r"):
    return Position.from_json(json.loads(json.dumps(position.to_json("r"))), prompts, group_size, reward)


def left_over(position):
    return names([scored.group for scored in position.surplus])


def dropped_of(batch):
    return [] if batch.dropped is None else names(batch.dropped.groups)


def names(groups):
    return names_of([group.prompt for group in groups])


def names_of(prompts):
    return [int(prompt.prompt_id.split("/")[1]) for prompt in prompts]


def test_groups_without_spread_are_replaced_and_surplus_ones_wait():
    dynamic = Sampling([0, 2, 5, 6, 7, 8, 11, 13])
    first = dynamic.take()
    assert names(first.groups) == [0, 2, 5, 6] and dropped_of(first) == [1, 3, 4]
    numbers = {
        "num_rounds": 2,
        "num_carried": 0,
        "num_sampled": 8,
        "num_no_spread": 3,
        "num_filled": 0,
        "num_kept": 1,
    }
    assert {name: first.metrics[f"dynamic/{name}"] for name in numbers} == numbers
    # Of the 8 groups sampled 5 have rewards -0.1 and 0.8, the others -0.1 and -0.2.
    assert first.metrics["dynamic/reward_mean"] == pytest.approx((5 * 0.35 - 3 * 0.15) / 8, rel=1e-5)
    assert first.rewards.errors == ("error 1", "error 2")
    np.testing.assert_array_equal(first.rewards.unshaped, [[0, 1]] * 4)

    second = dynamic.take()
    assert names(second.groups) == [7, 8, 11, 13] and dropped_of(second) == [9, 10, 12, 14, 15]
    assert second.metrics["dynamic/num_carried"] == 1 and second.metrics["dynamic/num_kept"] == 0
    assert [group.completions[0].policy_version for group in second.groups] == [2, 3, 3, 4]


def test_nothing_is_lost_and_nothing_comes_twice():
    dynamic = Sampling(range(0, 60, 2), max_rounds=3)
    trained, dropped = [], []
    for _ in range(5):
        batch = dynamic.take()
        trained += names(batch.groups)
        dropped += dropped_of(batch)
        m = {name.removeprefix("dynamic/num_"): number for name, number in batch.metrics.items()}
        assert m["carried"] + m["sampled"] == 4 + len(dropped_of(batch)) + m["kept"]
        assert names(batch.kept) == left_over(dynamic.state())
    assert len(trained) == 20
    assert sorted([*trained, *dropped, *left_over(dynamic.state())]) == list(range(40))


def test_a_full_round_needs_no_other():
    batch = Sampling(range(60)).take()
    assert names(batch.groups) == [0, 1, 2, 3] and batch.dropped is None
    assert batch.metrics["dynamic/num_rounds"] == 1


def test_used_up_rounds_fill_the_batch_with_what_there_is(caplog):
    dynamic = Sampling([2, 5], max_rounds=2)
    batch = dynamic.take()
    assert names(batch.groups) == [2, 5, 0, 1] and dropped_of(batch) == [3, 4, 6, 7]
    assert batch.metrics["dynamic/num_filled"] == 2 and batch.metrics["dynamic/num_no_spread"] == 6
    np.testing.assert_array_equal(batch.rewards.unshaped, [[0, 1], [0, 1], [0, 0], [0, 0]])
    assert dynamic.state().surplus == () and batch.kept == ()


def test_no_group_with_spread_stops_and_shows_two_of_them():
    with pytest.raises(NoSpreadError) as caught:
        Sampling([], max_rounds=3).take()
    message = str(caught.value)
    assert "12 groups in 3 rounds" in message and "algorithm.dynamic_sampling_rounds" in message
    for index in (0, 1):
        assert f"question {index}\n" in message and f"ground truth: {index}\n" in message
        assert f"reward 0: answer {index} 0" in message and f"reward 0: answer {index} 1" in message
    assert "question 2" not in message


@pytest.mark.parametrize(("num_steps", "surplus"), [(1, []), (2, [10]), (3, [19])])
def test_surplus_groups_go_through_a_checkpoint(num_steps, surplus):
    spread = [0, 1, 2, 3, 5, 6, 7, 9, 10, 14, 15, *range(16, 60, 3)]
    whole = Sampling(spread)
    for _ in range(num_steps):
        whole.take()
    position = through_json(whole.state())
    assert left_over(position) == surplus
    resumed = Sampling(spread)
    resumed.restore(position)
    assert resumed.state().to_json("r") == whole.state().to_json("r")
    for _ in range(2):
        one, other = whole.take(), resumed.take()
        assert one.groups == other.groups and one.metrics == other.metrics
        for name in ("rewards", "unshaped", "correctness"):
            ours, theirs = getattr(one.rewards, name), getattr(other.rewards, name)
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_array_equal(one.rewards.parts["f"], other.rewards.parts["f"])


# With batches sampled ahead


class Engine:
    """Completes prompts when asked to, with the version of that moment; each third prompt has no spread."""

    def __init__(self):
        self.version, self.seeds = 0, []

    def submit(self, prompts, sampling, *, seed, finished, progress=""):
        self.seeds.append(seed)
        groups = [make_group(index, self.version) for index in names_of(prompts)]
        return Pending(finished.get(i, group) for i, group in enumerate(groups))

    def sleep(self):
        """Nothing to free."""


class Pending:
    """Groups that have all come back."""

    def __init__(self, groups):
        self.groups = list(groups)

    def __call__(self):
        return self.groups

    def finished(self):
        return dict(enumerate(self.groups))


class Reward:
    def score(self, groups):
        spread = np.array([[0, index % 3 > 0] for index in names(groups)], np.float32)
        return RewardResult(spread, spread, spread, {"f": spread}, ())


SEEDS = [derive_seed(0, number, "rollout") for number in range(100)]


def build(engine, max_lag):
    iterator = PromptIterator(PROMPTS, batch_size=4, seed=1, shuffle=True)
    timer = lambda phase: contextlib.nullcontext()
    ahead = Ahead(
        iterator, engine, Reward(), timer, sampling=None, seed=0, max_lag=max_lag, num_batches=sys.maxsize
    )
    return iterator, Dynamic(ahead, num_groups=4, max_rounds=9)


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_rounds_are_the_batches_in_their_order_whatever_the_lag(max_lag):
    engine, trained, dropped = Engine(), [], []
    _, dynamic = build(engine, max_lag)
    for step in range(12):
        batch = dynamic.take()
        versions = {c.policy_version for group in batch.groups for c in group.completions}
        # Surplus groups are one step older than the rounds, and no older: they come first in the next step.
        assert all(max(0, step - max_lag - 1) <= version <= step for version in versions)
        trained += names(batch.groups)
        dropped += dropped_of(batch)
        engine.version += 1
    position = dynamic.state()
    num_taken = position.num_rollout_batches
    assert engine.seeds == SEEDS[: num_taken + max_lag]
    assert all(index % 3 for index in trained) and not any(index % 3 for index in dropped)
    kept = left_over(position)
    iterator, _ = build(Engine(), max_lag)
    sampled = [i for _ in range(num_taken) for i in names_of(next(iterator))]
    assert sorted([*trained, *dropped, *kept]) == sorted(sampled)


@pytest.mark.parametrize("max_lag", [0, 2])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_an_interrupted_run_goes_on_with_the_same_groups(num_steps, max_lag):
    engine = Engine()
    _, dynamic = build(engine, max_lag)
    for _ in range(num_steps):
        dynamic.take()
        engine.version += 1
    again = Engine()
    again.version = engine.version
    _, resumed = build(again, max_lag)
    resumed.restore(through_json(dynamic.state()))
    for _ in range(4):
        one, other = dynamic.take(), resumed.take()
        assert one.groups == other.groups and one.metrics == other.metrics
        engine.version += 1
        again.version += 1


def test_a_run_that_goes_back_has_the_surplus_of_then():
    _, dynamic = build(Engine(), 2)
    begun, first = through_json(dynamic.state()), dynamic.take()
    while not dynamic.state().surplus:
        dynamic.take()
    dynamic.abandon()
    dynamic.restore(begun)
    assert not dynamic.state().surplus
    assert dynamic.take().groups == first.groups


def test_groups_that_do_not_fit_the_run_any_more_are_dropped(caplog, monkeypatch):
    """After checkpoint.resume=force: another group size, another reward, or prompts that are no longer there."""
    logger = logging.getLogger("grpo_jax")
    monkeypatch.setattr(logger, "propagate", True)  # a run in this process has turned it off
    _, dynamic = build(Engine(), 0)
    kept = []
    while len(kept) < 2:
        dynamic.take()
        position = through_json(dynamic.state())
        kept = left_over(position)
    gone = f"train/{kept[0]}"
    for prompts, group_size, reward, num_lost in (
        ([prompt for prompt in PROMPTS if prompt.prompt_id != gone], 2, "r", 1),
        (PROMPTS, 3, "r", len(kept)),
        (PROMPTS, 2, "another", len(kept)),
    ):
        caplog.clear()
        rounds = Rounds(set())
        resumed = Dynamic(rounds, num_groups=4, max_rounds=9)
        resumed.restore(through_json(position, prompts, group_size, reward))
        assert rounds.number == position.num_rollout_batches
        assert left_over(resumed.state()) == kept[num_lost:]
        assert f"{num_lost} of the {len(kept)} groups that dynamic sampling had left over" in caplog.text


def test_groups_of_an_older_version_have_a_name_too():
    held = json.loads(json.dumps(position_with([5, 9]).to_json("r")))
    for entry in held["surplus"]:
        del entry["origin"], entry["rewarded_by"]
        for c in entry["completions"]:
            index, g = c["policy_version"], 0  # it wrote lists, and no changes of weights
            del c["changes"]
            c["token_ids"], c["sampler_logprobs"] = [index, g], [-0.5, -0.25]
    position = Position.from_json(held, PROMPTS, 2, "r")
    assert [scored.group.origin for scored in position.surplus] == [(-1, 0), (-1, 1)]
    assert position.surplus[1].group.completions[0].sampler_logprobs == (-0.5, -0.25)
    assert position.lost == () and position.ahead == ()


def position_with(indices):
    groups = [make_group(index, 3) for index in indices]
    rewards = RewardResult.of_one(np.array([[0, 1]], np.float32), ())
    return Position({}, 4, tuple(ScoredGroup(group, rewards) for group in groups))
