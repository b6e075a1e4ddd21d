"""Batches ahead of the trainer: the order of the calls, how far ahead, and where a resumed run goes on."""

import contextlib
import json

import pytest

from grpo_jax.data.prompts import PromptIterator
from grpo_jax.rollout import SamplingParams
from grpo_jax.rollout.base import derive_seed
from grpo_jax.rollout.batches import Ahead
from grpo_jax.rollout.position import Position
from grpo_jax.types import Completion, Prompt, RolloutGroup

SAMPLING = SamplingParams(num_samples=2, temperature=1.0, max_tokens=4)
NUM_STEPS = 7  # more than the 5 batches of an epoch
PROMPTS = [Prompt(f"test/{i}", (i,), "", "", "test", {}) for i in range(11)]


def make_iterator():
    return PromptIterator(PROMPTS, batch_size=2, seed=5, shuffle=True)


def batches_from(iterator, count):
    return [[prompt.prompt_id for prompt in next(iterator)] for _ in range(count)]


def answer(prompt, word="new"):
    return RolloutGroup(prompt, (Completion((1,), (-0.5,), word, "stop", 0),) * 2)


def prompt_names(groups):
    return [group.prompt.prompt_id for group in groups]


class Pending:
    """Groups that come back when they are waited for; `finished` are there before."""

    def __init__(self, wait, finished):
        self.wait, self.there = wait, dict(finished)

    def __call__(self):
        return self.wait()

    def finished(self):
        return self.there


SEEDS = [derive_seed(7, step, "rollout") for step in range(20)]


class Recorder:
    """An engine that writes down what it is asked, and answers it; and the reward."""

    def __init__(self):
        self.calls, self.batches, self.seeds, self.outstanding = [], [], [], 0
        self.pending, self.finished = [], []

    def submit(self, prompts, sampling, *, seed, finished, progress=""):
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
            return [pending.there.get(i) or answer(p) for i, p in enumerate(prompts)]

        self.finished.append(dict(finished))
        pending = Pending(wait, finished)
        self.pending.append(pending)
        return pending

    def sleep(self):
        self.calls.append("sleep")

    def score(self, groups):
        self.calls.append("score")
        return len(groups)


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


def through_json(position):
    """As a checkpoint holds it."""
    return Position.from_json(json.loads(json.dumps(position.to_json("r"))), PROMPTS, 2, "r")


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
    batches = [rollouts.take() for _ in range(NUM_STEPS)]
    assert [prompt_names(batch.groups) for batch in batches] == expected
    assert [[g.origin for g in batch.groups] for batch in batches] == [[(n, 0), (n, 1)] for n in range(7)]
    assert engine.batches == expected
    assert engine.seeds == SEEDS[:7]


@pytest.mark.parametrize("max_lag", [0, 1, 3])
@pytest.mark.parametrize("num_taken", [0, 1, 4, 6])  # 4 taken, 3 ahead: beyond the end of the epoch
def test_a_resumed_run_asks_again_for_what_was_ahead(max_lag, num_taken):
    rollouts, _ = make(max_lag)
    for _ in range(num_taken):
        rollouts.take()
    position = through_json(rollouts.state())
    assert position.num_rollout_batches == num_taken and not position.surplus
    resumed, engine = make(max_lag)
    resumed.restore(position)
    rest = NUM_STEPS - num_taken
    assert resumed.state() == position  # a checkpoint before the first step is the one that was restored
    taken = [prompt_names(resumed.take().groups) for _ in range(rest)]
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
    taken = [prompt_names(rollouts.take().groups) for _ in range(NUM_STEPS - 1)]
    assert taken == batches_from(make_iterator(), NUM_STEPS)[1:]
    assert engine.seeds == SEEDS[1:NUM_STEPS]


def test_what_has_come_back_of_batches_ahead_is_not_asked_for_again():
    rollouts, engine = make(3)
    rollouts.take()
    asked = batches_from(make_iterator(), 4)
    by_name = {prompt.prompt_id: prompt for prompt in PROMPTS}
    second = answer(by_name[asked[2][1]], word="back already")
    engine.pending[2].there[1] = second  # of the batches 1, 2, 3 that are ahead, one group of number 2
    position = through_json(rollouts.state())
    resumed, engine = make(3)
    resumed.restore(position)
    assert through_json(resumed.state()) == position  # also before anything is asked for
    resumed.take()
    assert [list(finished) for finished in engine.finished] == [[], [1], [], []]
    held = engine.finished[1][1]
    assert (held.prompt, held.completions, held.origin) == (second.prompt, second.completions, (2, 1))
    assert [c.text for c in resumed.take().groups[1].completions] == ["back already"] * 2
    assert prompt_names(resumed.take().groups) == asked[3]


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
