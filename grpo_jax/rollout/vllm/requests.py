"""Rollouts under way: dealt out to the engines, collected, and asked for again when an engine is lost."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from grpo_jax.rollout.base import SamplingParams
from grpo_jax.rollout.vllm.replicas import AnswerStream, Replicas, TimedOut, call_errors, wait_for_answers
from grpo_jax.rollout.vllm.server import Request
from grpo_jax.types import Prompt, RolloutGroup

WAIT_S = 0.5  # for answers, between two looks for engines that are silent

OnLoss = Callable[[AnswerStream, Exception], None]
"""What is done about an engine that fails with an error while its answers are waited for."""


class PendingRollouts:
    """Rollouts that engines were asked for: what has come back, and what each engine still owes."""

    def __init__(
        self,
        replicas: Replicas,
        requests: Sequence[Request],
        sampling: SamplingParams,
        *,
        stop_token_ids: tuple[int, ...],
        silence_s: float,
        finished: Mapping[int, RolloutGroup],
        decode: Callable[[int, dict[str, Any]], RolloutGroup],
        revive: Callable[[int, Exception], None],
        forget: Callable[["PendingRollouts"], None],
        progress: str,
    ):
        """Sends the requests.

        Args:
            requests: see `make_requests`.
            silence_s: an engine that finishes nothing for so long, of whatever batch, is lost.
            finished: groups that are there already, by the number of their prompt.
            decode: (number of a prompt, answer of `EngineActor.generate` to it) -> its group.
            revive: (number of an engine, its error) -> restarts it and gives it the current weights.
            forget: called once all groups have come back, or never will.
            progress: label of a progress bar; "" shows none.
        """
        self._replicas, self._requests, self._sampling = replicas, requests, sampling
        self._stop_token_ids, self._silence_s, self._progress = stop_token_ids, silence_s, progress
        self._decode, self._revive, self._forget = decode, revive, forget
        self._groups = dict(finished)
        self._owed = deal_out([r for r in requests if r[0] not in finished], len(replicas))
        self._streams: dict[int, AnswerStream] = {}
        self._losses: list[tuple[AnswerStream, Exception]] = []
        """Seen while nobody waited, to be dealt with by who waits next."""
        for number in range(len(replicas)):
            self._ask(number)

    def __call__(self) -> list[RolloutGroup]:
        """See `PendingGroups`. Engines that fail are revived."""
        try:
            self._collect(self._revive_and_ask)
            return [self._groups[i] for i in range(len(self._requests))]
        finally:
            self._forget(self)

    def finished(self) -> dict[int, RolloutGroup]:
        """See `PendingGroups`. An engine that has failed is dealt with when its answers are waited for."""
        keep = lambda stream, error: self._losses.append((stream, error))
        lost = lambda: {stream.number for stream, _ in self._losses}
        while streams := [s for s in self._streams.values() if not s.is_stale and s.number not in lost()]:
            ready = wait_for_answers(streams, 0)
            if not ready:
                break
            for stream in ready:
                self._take(stream, keep)
        return dict(self._groups)

    def drain(self) -> None:
        """Waits until every engine has finished or failed. One that fails is killed; what it owes stays owed."""
        self._collect(self._give_up)

    def ask_again(self) -> None:
        """Asks for what is still owed after `drain`."""
        for number, owed in self._owed.items():
            if owed and number not in self._streams:
                self._ask(number)

    def _ask(self, number: int) -> None:
        """Asks an engine for all that it owes."""
        requests = [self._requests[i] for i in sorted(self._owed[number])]
        if requests:
            self._streams[number] = self._replicas.ask(number, requests, self._sampling, self._stop_token_ids)
        else:
            self._streams.pop(number, None)

    def _collect(self, on_loss: OnLoss) -> None:
        """Takes answers until no engine has any left."""
        size = self._sampling.num_samples
        heard = dict.fromkeys(self._owed, time.monotonic())
        with tqdm(
            total=len(self._requests) * size, initial=len(self._groups) * size, desc=self._progress,
            unit="completion", leave=False, disable=None if self._progress else True,
        ) as bar:  # fmt: skip
            while self._streams:
                while self._losses:
                    on_loss(*self._losses.pop())
                for number, stream in list(self._streams.items()):
                    if stream.is_stale:  # it was restarted while another batch was waited for
                        self._ask(number)
                for stream in wait_for_answers(self._streams.values(), WAIT_S):
                    bar.update(self._take(stream, on_loss) * size)
                    heard[stream.number] = time.monotonic()
                self._notice_silence(heard, on_loss)

    def _take(self, stream: AnswerStream, on_loss: OnLoss) -> int:
        """Takes one answer. Returns the number of groups in it: 1, or 0 if the stream or its engine has ended."""
        try:
            i, answer = next(stream)
        except StopIteration:
            del self._streams[stream.number]
            return 0
        except call_errors() as error:
            on_loss(stream, error)
            return 0
        self._groups[i] = self._decode(i, answer)
        self._owed[stream.number].discard(i)
        return 1

    def _notice_silence(self, heard: dict[int, float], on_loss: OnLoss) -> None:
        """Gives up engines that finish nothing. One that is busy with another batch first is waited for."""
        for number in [n for n in self._streams if time.monotonic() - heard[n] > self._silence_s]:
            silence = self._replicas.silence(number)
            heard[number] = time.monotonic() - silence
            if silence > self._silence_s:
                error = TimedOut(
                    f"engine {number} finished nothing for {self._silence_s:g} s (rollout.timeout_s)"
                )
                on_loss(self._streams[number], error)
                heard.update(dict.fromkeys(heard, time.monotonic()))

    def _revive_and_ask(self, stream: AnswerStream, error: Exception) -> None:
        if not stream.is_stale:
            self._revive(stream.number, error)
        self._ask(stream.number)

    def _give_up(self, stream: AnswerStream, error: Exception) -> None:
        self._replicas.kill(stream.number)
        del self._streams[stream.number]


def make_requests(prompts: Sequence[Prompt], seed: int) -> list[Request]:
    """One request a prompt, each with a seed of its own."""
    seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint32)
    # vLLM gives sample g the seed of its prompt plus g; 2^31 leaves room for any G.
    return [
        (i, list(prompt.token_ids), int(s) % 2**31)
        for i, (prompt, s) in enumerate(zip(prompts, seeds, strict=True))
    ]


def deal_out(requests: Sequence[Request], num_replicas: int) -> dict[int, set[int]]:
    """Number of an engine -> numbers of its prompts, so that all engines read about as many tokens."""
    order = [i for i, *_ in sorted(requests, key=lambda request: -len(request[1]))]
    return {number: set(order[number::num_replicas]) for number in range(num_replicas)}
