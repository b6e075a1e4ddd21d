"""Batches ahead of the trainer: the order of the calls, how far ahead, and where a resumed run goes on."""

import contextlib
import dataclasses
import json

import pytest

from grpo_jax.data.prompts import PromptIterator
from grpo_jax.rollout import SamplingParams
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.batches import Ahead, Position
from grpo_jax.types import Prompt

SAMPLING = SamplingParams(num_samples=2, temperature=1.0, max_tokens=4)
NUM_STEPS = 7  # more than the 5 batches of an epoch
PROMPTS = [Prompt(f"test/{i}", (i,), "", "", "test", {}) for i in range(11)]


def make_iterator():
    return PromptIterator(PROMPTS, batch_size=2, seed=5, shuffle=True)


def batches_from(iterator, count):
    return [[prompt.prompt_id for prompt in next(iterator)] for _ in range(count)]


SEEDS = [derive_seed(7, step, "rollout") for step in range(20)]


class Recorder:
    """An engine that writes down what it is asked, and answers with the names of the prompts; and their reward."""

    def __init__(self):
        self.calls, self.batches, self.seeds, self.outstanding = [], [], [], 0

    def submit(self, prompts, sampling, *, seed, progress=""):
        assert sampling == SAMPLING
        step = SEEDS.index(seed)
        names = [prompt.prompt_id for prompt in prompts]
        self.calls.append(("submit", step))
        self.batches.append(names)
        self.seeds.append(seed)
        self.outstanding += 1

        def wait():
            self.calls.append(("wait", step))
            self.outstanding -= 1
            return names

        return wait

    def sleep(self):
        self.calls.append("sleep")

    def score(self, names):
        self.calls.append("score")
        return len(names)


def make(max_lag):
    """Batches whose engine and reward are one recorder, which also sees the phases that are timed."""
    recorder = Recorder()

    @contextlib.contextmanager
    def timer(phase):
        recorder.calls.append(phase)
        yield

    ahead = Ahead(
        make_iterator(), recorder, recorder, timer,
        sampling=SAMPLING, seed=7, max_lag=max_lag, num_batches=NUM_STEPS,
    )  # fmt: skip
    return ahead, recorder


def requests(recorder):
    """What was asked of the engine: submissions and waits, in order."""
    return [call for call in recorder.calls if isinstance(call, tuple)]


def submitted(*steps):
    return [("submit", step) for step in steps]


def waited(step):
    return [("wait", step)]


def test_without_lag_a_batch_is_asked_for_when_it_is_wanted():
    rollouts, engine = make(0)
    for step in range(NUM_STEPS):
        assert not engine.outstanding
        rollouts.take()
        assert requests(engine) == [*submitted(step), *waited(step)]
        engine.calls.clear()


def test_one_step_ahead():
    rollouts, engine = make(1)
    rollouts.take()
    assert requests(engine) == [*submitted(0), *waited(0), *submitted(1)]
    for step in range(1, NUM_STEPS):
        engine.calls.clear()
        rollouts.take()
        coming = [step + 1] if step + 1 < NUM_STEPS else []
        assert requests(engine) == [*waited(step), *submitted(*coming)]


@pytest.mark.parametrize("max_lag", [2, 3, 20])
def test_several_steps_ahead(max_lag):
    rollouts, engine = make(max_lag)
    rollouts.take()
    assert requests(engine) == [*submitted(0), *waited(0), *submitted(*range(1, min(max_lag + 1, NUM_STEPS)))]
    for step in range(1, NUM_STEPS):
        engine.calls.clear()
        rollouts.take()
        coming = [step + max_lag] if step + max_lag < NUM_STEPS else []
        assert requests(engine) == [*waited(step), *submitted(*coming)]
        assert engine.outstanding == min(max_lag, NUM_STEPS - 1 - step)
    assert not engine.outstanding  # at the end of the run nothing is under way


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_batches_and_seeds_are_those_of_the_steps_whatever_the_lag(max_lag):
    rollouts, engine = make(max_lag)
    expected = batches_from(make_iterator(), NUM_STEPS)
    assert len({tuple(names) for names in expected}) == NUM_STEPS
    assert [rollouts.take().groups for _ in range(NUM_STEPS)] == expected
    assert engine.batches == expected
    assert engine.seeds == SEEDS[:7]


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@pytest.mark.parametrize("num_taken", [0, 1, 4, 6])  # 4 taken, 3 ahead: beyond the end of the epoch
def test_a_resumed_run_asks_again_for_what_was_ahead(max_lag, num_taken):
    rollouts, _ = make(max_lag)
    for _ in range(num_taken):
        rollouts.take()
    position = Position(
        **json.loads(json.dumps(dataclasses.asdict(rollouts.state())))
    )  # as a checkpoint holds it
    assert position.num_rollout_batches == num_taken and position.surplus == []
    resumed, engine = make(max_lag)
    resumed.restore(position)
    rest = NUM_STEPS - num_taken
    assert resumed.state() == position  # a checkpoint before the first step is the one that was restored
    taken = [resumed.take().groups for _ in range(rest)]
    assert taken == batches_from(make_iterator(), NUM_STEPS)[num_taken:]
    assert engine.seeds == SEEDS[num_taken:NUM_STEPS]


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_a_run_that_goes_back_throws_away_what_was_ahead(max_lag):
    rollouts, engine = make(max_lag)
    rollouts.take()
    position = rollouts.state()
    for _ in range(3):
        rollouts.take()
    engine.calls.clear()
    rollouts.abandon()
    assert not engine.outstanding  # an engine may hold on to what nobody has waited for
    assert requests(engine) == [call for step in range(4, 4 + max_lag) for call in waited(step)][:3]
    rollouts.restore(position)
    engine.seeds.clear()
    taken = [rollouts.take().groups for _ in range(NUM_STEPS - 1)]
    assert taken == batches_from(make_iterator(), NUM_STEPS)[1:]
    assert engine.seeds == SEEDS[1:NUM_STEPS]


def test_the_state_of_a_batch_does_not_depend_on_the_lag():
    states = []
    for max_lag in (0, 2):
        rollouts, _ = make(max_lag)
        states.append([(rollouts.take(), rollouts.state())[1] for _ in range(NUM_STEPS)])
    assert states[0] == states[1]


def test_a_batch_is_sampled_then_the_engine_sleeps_then_it_is_scored():
    ahead, recorder = make(0)
    batch = ahead.take()
    assert recorder.calls == ["gen", ("submit", 0), ("wait", 0), "sleep", "reward", "score"]
    assert batch.rewards == len(batch.groups) == 2 and batch.dropped is None and batch.metrics == {}


def test_between_the_rounds_of_a_batch_the_engine_stays_awake():
    ahead, recorder = make(0)
    ahead.take_round()
    assert recorder.calls == ["gen", ("submit", 0), ("wait", 0), "reward", "score"]
    ahead.release_engine()
    assert recorder.calls[-1] == "sleep"
