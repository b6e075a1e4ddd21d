"""Rollouts that vLLM engines were asked for: dealt out, collected, and asked for again when an engine is lost."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from grpo_jax.rollout.base import SamplingParams
from grpo_jax.rollout.vllm import cluster as ray_cluster
from grpo_jax.types import Prompt, RolloutGroup

if TYPE_CHECKING:
    from grpo_jax.rollout.vllm.engine import VllmEngine

WAIT_S = 0.5  # for one look at what has come back


class PendingRollouts:
    """Rollouts that were asked for: what has come back, and what each replica still owes."""

    def __init__(
        self,
        engine: "VllmEngine",
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        seed: int,
        progress: str,
    ):
        self._engine, self._prompts, self._sampling, self._progress = engine, prompts, sampling, progress
        seeds = np.random.SeedSequence(seed).generate_state(len(prompts), np.uint32)
        # vLLM gives sample g the seed of its prompt plus g; 2^31 leaves room for any G.
        self._requests = [
            (i, list(prompt.token_ids), int(s) % 2**31)
            for i, (prompt, s) in enumerate(zip(prompts, seeds, strict=True))
        ]
        self._groups: dict[int, RolloutGroup] = {}
        self._owed: dict[int, set[int]] = {n: set() for n in range(engine.num_engines)}
        # Dealt out in the order of their lengths, so that every replica reads about the same number of tokens.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].token_ids))
        for place, i in enumerate(order):
            self._owed[place % engine.num_engines].add(i)
        self._streams: dict[int, Any] = {}
        self._lives: dict[int, int] = {}
        for replica in self._owed:
            self._ask(replica)

    def _ask(self, replica: int) -> None:
        """Asks a replica for all that it owes."""
        self._lives[replica] = self._engine.lives(replica)
        requests = [self._requests[i] for i in sorted(self._owed[replica])]
        if requests:
            self._streams[replica] = self._engine.ask(replica, requests, self._sampling)
        else:
            self._streams.pop(replica, None)

    def result(self) -> list[RolloutGroup]:
        """Waits for all groups and returns them in the order of the prompts."""
        self.collect()
        self._engine.forget(self)
        return [self._groups[i] for i in range(len(self._prompts))]

    def ask_again(self) -> None:
        """Asks for what replicas owe that were lost during `collect` without a revival."""
        for replica, owed in self._owed.items():
            if owed and replica not in self._streams:
                self._ask(replica)

    def collect(self, *, revive: bool = True) -> None:
        """Waits for all groups; without `revive`, for those of the engines that live."""
        import ray

        size = self._sampling.num_samples
        heard = dict.fromkeys(self._owed, time.monotonic())
        with tqdm(
            total=len(self._prompts) * size, initial=len(self._groups) * size, desc=self._progress,
            unit="completion", leave=False, disable=None if self._progress else True,
        ) as bar:  # fmt: skip
            while self._streams:
                for replica in list(self._streams):
                    # It was replaced while another batch was waited for.
                    if self._lives[replica] != self._engine.lives(replica):
                        self._ask(replica)
                by_stream = {id(stream): replica for replica, stream in self._streams.items()}
                ready, _ = ray.wait(list(self._streams.values()), timeout=WAIT_S)
                for stream in ready:
                    replica = by_stream[id(stream)]
                    bar.update(self._take(replica, stream, revive) * size)
                    heard[replica] = time.monotonic()
                self._notice_silence(heard, revive)

    def _take(self, replica: int, stream: Any, revive: bool) -> int:
        """Takes what a replica has ready: 1 group, or 0 at the end of its stream or its life."""
        import ray

        try:
            number, answer = ray.get(next(stream))
        except StopIteration:
            del self._streams[replica]
            return 0
        except ray_cluster.dead_errors() as error:
            self._lost(replica, error, revive)
            return 0
        self._groups[number] = self._engine.to_group(self._prompts[number], answer)
        self._owed[replica].discard(number)
        return 1

    def _notice_silence(self, heard: dict[int, float], revive: bool) -> None:
        now = time.monotonic()
        for replica in [r for r in self._streams if now - heard[r] > self._engine.timeout_s]:
            silence = f"no group finished for {self._engine.timeout_s:g} s (rollout.timeout_s)"
            self._lost(replica, ray_cluster.TimedOut(silence), revive)
            heard.update(dict.fromkeys(heard, time.monotonic()))

    def _lost(self, replica: int, error: Exception, revive: bool) -> None:
        if not revive:
            self._engine.bury(replica)
            del self._streams[replica]
            return
        if self._lives[replica] == self._engine.lives(replica):
            self._engine.revive([replica], error)
        self._ask(replica)
