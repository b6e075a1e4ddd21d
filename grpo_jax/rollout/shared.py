"""Engine and reward of a run with several processes: the first one has them, and all get what they answer.

The others do as they are told meanwhile: an engine that dies while rollouts are awaited is started again and wants
the weights, and bringing those together is the work of all.
"""

from __future__ import annotations

import array
import functools
import itertools
import json
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np

from grpo_jax.rewards.base import Reward
from grpo_jax.rollout.position import rewards_from_json, rewards_to_json
from grpo_jax.types import Completion, Params, Prompt, RewardResult, RolloutGroup

if TYPE_CHECKING:
    from grpo_jax.rollout.base import PendingGroups, RolloutEngine, SamplingParams

T = TypeVar("T")

DONE = "done"


class Channel(Protocol):
    """The processes of a run: `run.hosts.Hosts`."""

    rank: int
    count: int

    @property
    def is_first(self) -> bool: ...

    @property
    def address(self) -> str: ...

    @property
    def is_called(self) -> bool: ...

    def from_all(self, value: Any) -> list[Any]: ...

    def from_first(self, make: Callable[[], T]) -> T: ...

    def bytes_from_first(self, make: Callable[[], bytes]) -> bytes: ...


class Helper(Protocol):
    """What the processes beside the first one do for its engine."""

    def __call__(self, command: Any, params: Params) -> None:
        """Does as it is told. Args: params: the ones of the last `load_weights`."""

    def close(self) -> None:
        """Ends what it has here."""


class SharedEngine:
    """See `RolloutEngine`."""

    def __init__(
        self,
        channel: Channel,
        make: Callable[[Callable[[Any], bool]], RolloutEngine],
        make_helper: Callable[[], Helper],
    ):
        """Args:
        make: (tell) -> the engine, in the first process; `tell(command)` has the others' helpers do something,
            and returns whether they listen.
        make_helper: in the others.
        """
        self._channel, self._is_heard = channel, False
        self._params: Params = None
        self._engine: RolloutEngine | None = None
        self._helper = None if channel.is_first else make_helper()
        self._engine = self._together(lambda: make(self._tell))

    def load_weights(self, params: Params, version: int) -> None:
        """See `RolloutEngine.load_weights`."""
        self._params = params
        self._together(lambda: self._own.load_weights(params, version=version))

    def submit(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        seed: int,
        finished: Mapping[int, RolloutGroup] = {},
        progress: str = "",
    ) -> PendingGroups:
        """See `RolloutEngine.submit`."""
        if self._helper is not None:
            return _Shared(self, prompts, None)
        pending = self._own.submit(prompts, sampling, seed=seed, finished=finished, progress=progress)
        return _Shared(self, prompts, pending)

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        return self.submit(prompts, sampling, seed=seed, progress=progress)()

    def wait_for(self, prompts: Sequence[Prompt], pending: PendingGroups | None) -> list[RolloutGroup]:
        """The groups of a submission. Args: pending: of the engine; None: in the other processes."""
        groups = self._together(lambda: pending() if pending else [])
        data = self._channel.bytes_from_first(lambda: pack_groups(groups or []))
        return unpack_groups(data, prompts) if groups is None else groups

    def score(self, groups: Sequence[RolloutGroup], *, temperature: float) -> list[np.ndarray]:
        """See `RolloutEngine.score`."""
        scores = self._together(lambda: self._own.score(groups, temperature=temperature))
        held = self._channel.from_first(lambda: [row.tolist() for row in scores or []])
        return [np.array(row, np.float32) for row in held]

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""
        self._together(lambda: self._own.sleep())

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        for end in (self._engine, self._helper):
            if end is not None:
                end.close()

    @property
    def _own(self) -> RolloutEngine:
        """The engine, in the first process."""
        assert self._engine is not None
        return self._engine

    def _tell(self, command: Any) -> bool:
        if self._is_heard:
            self._channel.from_first(lambda: command)
        return self._is_heard

    def _together(self, work: Callable[[], T]) -> T | None:
        """What `work` returns, in the first process; None in the others, which do as it tells them meanwhile."""
        if self._helper is not None:
            while (command := self._channel.from_first(lambda: DONE)) != DONE:
                self._helper(command, self._params)
            return None
        self._is_heard = True
        try:
            result = work()
            self._tell(DONE)
            return result
        except Exception as error:
            self._channel.from_first(functools.partial(raise_again, error))  # the others hear of it
            raise
        finally:
            self._is_heard = False


def raise_again(error: Exception) -> Any:
    raise error


def pack_groups(groups: Sequence[RolloutGroup]) -> bytes:
    """The completions of groups as bytes, to the last bit: what JSON is slow at follows it as arrays."""
    completions = [c for group in groups for c in group.completions]
    head = {
        "sizes": [len(group.completions) for group in groups],
        "lengths": [len(c.token_ids) for c in completions],
        "rest": [(c.text, c.finish_reason, c.policy_version, c.changes) for c in completions],
        "words": [0 if c.drawable is None else c.drawable.shape[1] for c in completions],
    }
    text = json.dumps(head).encode()
    parts = [np.int64(len(text)).tobytes(), text]
    parts += [array.array("i", c.token_ids).tobytes() for c in completions]
    parts += [array.array("d", c.sampler_logprobs).tobytes() for c in completions]
    parts += [c.drawable.tobytes() for c in completions if c.drawable is not None]
    return b"".join(parts)


def unpack_groups(data: bytes, prompts: Sequence[Prompt]) -> list[RolloutGroup]:
    """What `pack_groups` was given. Args: prompts: of the groups."""
    start = 8 + int(np.frombuffer(data, np.int64, 1)[0])
    head = json.loads(data[8:start])
    total = sum(head["lengths"])
    of_ids, of_logprobs = start, start + 4 * total
    words, at = np.frombuffer(data[start + 12 * total :], np.uint32), 0
    completions, first = [], 0
    for length, (text, reason, version, changes), width in zip(
        head["lengths"], head["rest"], head["words"], strict=True
    ):
        # Straight to tuples: to lists of all numbers first takes twice as long.
        ids = struct.unpack_from(f"{length}i", data, of_ids + 4 * first)
        logprobs = struct.unpack_from(f"{length}d", data, of_logprobs + 8 * first)
        drawable = words[at : at + length * width].reshape(length, width) if width else None
        changed = tuple((token, version) for token, version in changes)
        completions.append(Completion(ids, logprobs, text, reason, version, changed, drawable))
        first, at = first + length, at + length * width
    rest = iter(completions)
    return [
        RolloutGroup(prompt, tuple(itertools.islice(rest, size)))
        for prompt, size in zip(prompts, head["sizes"], strict=True)
    ]


class _Shared:
    """See `PendingGroups`."""

    def __init__(self, engine: SharedEngine, prompts: Sequence[Prompt], pending: PendingGroups | None):
        self._engine, self._prompts, self._pending = engine, prompts, pending

    def __call__(self) -> list[RolloutGroup]:
        return self._engine.wait_for(self._prompts, self._pending)

    def finished(self) -> dict[int, RolloutGroup]:
        """Nothing in the other processes: the first one saves them."""
        return self._pending.finished() if self._pending is not None else {}


class SharedReward(Reward):
    """Scores in the first process: a function on a busy host may time out in one and not in another."""

    def __init__(self, channel: Channel, make: Callable[[], Reward]):
        """Args: make: the reward, in the first process."""
        self._channel = channel
        self._reward = make() if channel.is_first else None

    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        """See `Reward.score`."""

        def held() -> dict[str, Any]:
            assert self._reward is not None
            result = self._reward.score(groups)
            return rewards_to_json(result) | {"errors": list(result.errors)}

        scored = self._channel.from_first(held)
        return rewards_from_json(scored, scored["errors"])

    def explain(self, prompt: Prompt, completion: Completion, reward: float) -> str:
        """See `Reward.explain`; "" in the other processes, which explain nothing."""
        return self._reward.explain(prompt, completion, reward) if self._reward else ""

    def close(self) -> None:
        """See `Reward.close`."""
        if self._reward is not None:
            self._reward.close()
