"""What the first process of a run has, as the others get it."""

import numpy as np
import pytest
from group_helpers import make_group

from grpo_jax.rewards.base import Reward
from grpo_jax.rollout.shared import SharedEngine, SharedReward, pack_groups, unpack_groups
from grpo_jax.run.hosts import FirstFailed
from grpo_jax.types import Completion, RewardResult, RolloutGroup

WORDS = np.arange(6, dtype=np.uint32).reshape(2, 3) + 2**31
GROUPS = [
    (
        Completion((5, 2**31 - 1), (-0.1, -1e-300), "a\ud83d\nü", "stop", 3, ((1, 4),), WORDS),
        Completion((7, 8, 9), (-1 / 3, 0.0, float("-inf")), "", "length", 3),
    ),
    (Completion((1,), (-2.5,), "x", "stop", 0),),
]


def groups_of(prompts):
    return [RolloutGroup(prompt, completions) for prompt, completions in zip(prompts, GROUPS, strict=True)]


def prompts():
    return [make_group([1.0]).prompt, make_group([0.0]).prompt]


def same(groups, expected):
    assert [g.prompt for g in groups] == [g.prompt for g in expected]
    for group, other in zip(groups, expected, strict=True):
        for c, o in zip(group.completions, other.completions, strict=True):
            assert (c.token_ids, c.sampler_logprobs, c.text) == (o.token_ids, o.sampler_logprobs, o.text)
            assert (c.finish_reason, c.policy_version, c.changes) == (
                o.finish_reason, o.policy_version, o.changes
            )  # fmt: skip
            np.testing.assert_array_equal(c.drawable, o.drawable)
            assert (c.drawable is None) == (o.drawable is None)


def test_groups_come_back_to_the_last_bit():
    expected = groups_of(prompts())
    same(unpack_groups(pack_groups(expected), prompts()), expected)
    assert unpack_groups(pack_groups([]), []) == []


class Wire:
    """A channel whose two ends are called one after the other."""

    def __init__(self):
        self.said = []

    def end(self, *, is_first):
        return End(self, is_first)


class End:
    def __init__(self, wire, is_first):
        self._wire, self.is_first = wire, is_first

    def from_first(self, make):
        if not self.is_first:
            said = self._wire.said.pop(0)
            if isinstance(said, Exception):
                raise FirstFailed(str(said))
            return said
        try:
            value = make()
        except Exception as error:
            self._wire.said.append(error)
            raise
        self._wire.said.append(value)
        return value

    bytes_from_first = from_first


class Engine:
    """Pushes as an engine does that is started again while its rollouts are awaited."""

    def __init__(self, tell, groups):
        self.tell, self._groups, self.params = tell, groups, None

    def load_weights(self, params, version):
        self.params = (params, version)
        assert self.tell("push")

    def submit(self, prompts, sampling, *, seed, finished, progress):
        def wait():
            assert self.tell("push") and self.tell("push")
            return self._groups

        return wait

    def close(self):
        assert not self.tell("close")  # the others may be gone


class Helper:
    def __init__(self):
        self.told, self.is_closed = [], False

    def __call__(self, command, params):
        self.told.append((command, params))

    def close(self):
        self.is_closed = True


def test_the_others_do_what_the_first_tells_them_and_get_its_groups():
    wire, helper, expected = Wire(), Helper(), groups_of(prompts())

    def make(tell):
        assert tell("start")
        return Engine(tell, expected)

    first = SharedEngine(wire.end(is_first=True), make, None)
    other = SharedEngine(wire.end(is_first=False), None, lambda: helper)
    assert helper.told == [("start", None)]
    first.load_weights("weights", version=4)
    other.load_weights("their part", version=4)
    pushed = ("push", "their part")
    assert helper.told[1:] == [pushed]
    same(first.generate(prompts(), None, seed=0), expected)
    same(other.generate(prompts(), None, seed=0), expected)
    assert helper.told[1:] == [pushed] * 3 and wire.said == []
    first.close()
    other.close()
    assert helper.is_closed and wire.said == []


def test_an_engine_that_fails_in_the_first_process_fails_in_all():
    wire = Wire()

    class Failing(Engine):
        def load_weights(self, params, version):
            assert self.tell("push")
            raise RuntimeError("no push")

    first = SharedEngine(wire.end(is_first=True), lambda tell: Failing(tell, []), None)
    helper = Helper()
    other = SharedEngine(wire.end(is_first=False), None, lambda: helper)
    with pytest.raises(RuntimeError, match="no push"):
        first.load_weights("weights", version=1)
    with pytest.raises(FirstFailed, match="no push"):
        other.load_weights("their part", version=1)
    assert helper.told == [("push", "their part")] and wire.said == []
    first.close()  # and tells nothing: the others do not listen


class Scored(Reward):
    RESULT = RewardResult(
        np.array([[1 / 3, 1e-30]], np.float32),
        np.array([[0.5, 0.25]], np.float32),
        np.array([[1.0, 0.0]], np.float32),
        {"part": np.array([[0.1, 0.2]], np.float32)},
        ("one error",),
    )

    def score(self, groups):
        return self.RESULT

    def explain(self, prompt, completion, reward):
        return "because"


def test_rewards_come_to_all_with_their_errors():
    wire = Wire()
    first, other = (
        SharedReward(wire.end(is_first=True), Scored),
        SharedReward(wire.end(is_first=False), Scored),
    )
    for result in (first.score([]), other.score([])):
        for name in ("rewards", "unshaped", "correctness"):
            np.testing.assert_array_equal(getattr(result, name), getattr(Scored.RESULT, name))
            assert getattr(result, name).dtype == np.float32
        np.testing.assert_array_equal(result.parts["part"], Scored.RESULT.parts["part"])
        assert result.errors == ("one error",)
    assert first.explain(None, None, 1.0) == "because" and other.explain(None, None, 1.0) == ""
