"""Batches ahead of the trainer: the order of the calls, how far ahead, and where a resumed run goes on."""

import json

import pytest
from grpo_jax.rollout.ahead import RolloutsAhead

from grpo_jax.data.prompts import PromptIterator
from grpo_jax.rollout import SamplingParams
from grpo_jax.types import Prompt

SAMPLING = SamplingParams(num_samples=2, temperature=1.0, max_tokens=4)
NUM_STEPS = 7  # more than the 5 batches of an epoch
PROMPTS = [Prompt(f"test/{i}", (i,), "", "", "test", {}) for i in range(11)]


def make_iterator():
    return PromptIterator(PROMPTS, batch_size=2, seed=5, shuffle=True)


def batches_from(iterator, count):
    return [[prompt.prompt_id for prompt in next(iterator)] for _ in range(count)]


def seed_of(step):
    return 1000 + step


class Recorder:
    """An engine that writes down what it is asked, and answers with the names of the prompts."""

    def __init__(self):
        self.calls, self.batches, self.seeds, self.outstanding = [], [], [], 0

    def submit(self, prompts, sampling, *, seed, progress=""):
        assert sampling == SAMPLING
        step = seed - seed_of(0)
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


def make(max_lag, *, iterator=None, first_step=0, num_steps=NUM_STEPS):
    engine, iterator = Recorder(), iterator or make_iterator()
    rollouts = RolloutsAhead(
        iterator, engine, SAMPLING, seed_of, max_lag=max_lag, first_step=first_step, num_steps=num_steps
    )
    return rollouts, engine


def submitted(*steps):
    return [("submit", step) for step in steps]


def waited(step):
    return [("wait", step)]


def test_without_lag_a_batch_is_asked_for_when_it_is_wanted():
    rollouts, engine = make(0)
    for step in range(NUM_STEPS):
        assert not engine.outstanding
        rollouts.take()
        assert engine.calls == [*submitted(step), *waited(step)]
        engine.calls.clear()


def test_one_step_ahead():
    rollouts, engine = make(1)
    rollouts.take()
    assert engine.calls == [*submitted(0), *waited(0), *submitted(1)]
    for step in range(1, NUM_STEPS):
        engine.calls.clear()
        rollouts.take()
        coming = [step + 1] if step + 1 < NUM_STEPS else []
        assert engine.calls == [*waited(step), *submitted(*coming)]


@pytest.mark.parametrize("max_lag", [2, 3, 20])
def test_several_steps_ahead(max_lag):
    rollouts, engine = make(max_lag)
    rollouts.take()
    assert engine.calls == [*submitted(0), *waited(0), *submitted(*range(1, min(max_lag + 1, NUM_STEPS)))]
    for step in range(1, NUM_STEPS):
        engine.calls.clear()
        rollouts.take()
        coming = [step + max_lag] if step + max_lag < NUM_STEPS else []
        assert engine.calls == [*waited(step), *submitted(*coming)]
        assert engine.outstanding == min(max_lag, NUM_STEPS - 1 - step)
    assert not engine.outstanding  # at the end of the run nothing is under way


@pytest.mark.parametrize("max_lag", [0, 1, 3])
def test_batches_and_seeds_are_those_of_the_steps_whatever_the_lag(max_lag):
    rollouts, engine = make(max_lag)
    expected = batches_from(make_iterator(), NUM_STEPS)
    assert len({tuple(names) for names in expected}) == NUM_STEPS
    assert [rollouts.take() for _ in range(NUM_STEPS)] == expected
    assert engine.batches == expected
    assert engine.seeds == [1000, 1001, 1002, 1003, 1004, 1005, 1006]


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@pytest.mark.parametrize("num_taken", [0, 1, 4, 6])  # 4 taken, 3 ahead: beyond the end of the epoch
def test_a_resumed_run_asks_again_for_what_was_ahead(max_lag, num_taken):
    rollouts, _ = make(max_lag)
    for _ in range(num_taken):
        rollouts.take()
    state = json.loads(json.dumps(rollouts.state()))  # as a checkpoint holds it
    iterator = make_iterator()
    iterator.restore(state)
    resumed, engine = make(max_lag, iterator=iterator, first_step=num_taken)
    rest = NUM_STEPS - num_taken
    assert resumed.state() == state  # a checkpoint before the first step is the one that was restored
    assert [resumed.take() for _ in range(rest)] == batches_from(make_iterator(), NUM_STEPS)[num_taken:]
    assert engine.seeds == [seed_of(step) for step in range(num_taken, NUM_STEPS)]


def test_the_state_of_a_batch_does_not_depend_on_the_lag():
    states = []
    for max_lag in (0, 2):
        rollouts, _ = make(max_lag)
        states.append([(rollouts.take(), rollouts.state())[1] for _ in range(NUM_STEPS)])
    assert states[0] == states[1]
