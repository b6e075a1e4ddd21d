"""The trainer's side of the vLLM engines.

Prompts are dealt out to the engines, groups come back as they finish, and weights are pushed through the transport
that fits. An engine that dies or falls silent is started again, gets the current weights, and is asked again for
what it still owed.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import RolloutSection
from grpo_jax.model.hf import ModelFolder
from grpo_jax.rollout.base import EngineError, PendingGroups, SamplingParams
from grpo_jax.rollout.vllm.cargo import make_cargos
from grpo_jax.rollout.vllm.check import installed_vllm
from grpo_jax.rollout.vllm.cluster import root_cause
from grpo_jax.rollout.vllm.crew import Crew
from grpo_jax.rollout.vllm.devices import plan_engines
from grpo_jax.rollout.vllm.options import engine_options
from grpo_jax.rollout.vllm.push import WeightPusher
from grpo_jax.rollout.vllm.replicas import Replicas, call_errors
from grpo_jax.rollout.vllm.requests import PendingRollouts, make_requests
from grpo_jax.types import Completion, Params, Prompt, RolloutGroup
from grpo_jax.weight_sync import num_parts

logger = logging.getLogger(__name__)


class VllmEngine:
    """See `RolloutEngine`."""

    def __init__(
        self,
        section: RolloutSection,
        *,
        folder: ModelFolder,
        mesh: Mesh,
        tokenizer: Any,
        stop_token_ids: tuple[int, ...],
        max_model_len: int,
        lora_push: str,
        crew: Crew | None = None,
    ):
        """See `rollout.make_engine`. Args: crew: all processes of the run; None: there are no others."""
        self._section, self._tokenizer, self._stop_token_ids = section, tokenizer, stop_token_ids
        self._params: Params = None
        self._version = -1
        self._is_asleep = False
        self._pending: list[PendingRollouts] = []
        transport, num_replicas = plan_engines(section, mesh)
        before, cargo = make_cargos(section, folder.config, lora_push, num_parts(transport, mesh))
        rank = cargo.adapters.rank if cargo.adapters is not None else 0
        self._replicas = Replicas(
            section,
            engine_options(section, folder, max_model_len, adapter_rank=rank),
            num_replicas=num_replicas,
            installation=installed_vllm(section),
            crew=crew,
        )
        make_pusher = lambda cargo: WeightPusher(
            self._replicas,
            cargo,
            mesh,
            transport=transport,
            workers_per_engine=section.tensor_parallel_size,
            timeout_s=section.timeout_s,
            crew=crew,
        )
        self._pusher = make_pusher(cargo)
        self._base_pusher = None if before is None else make_pusher(before)
        self._needs_base = before is not None
        """Whether an engine has not got the model that the adapters belong to."""

    # ---- rollouts ----

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        return self.submit(prompts, sampling, seed=seed, progress=progress)()

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
        assert self._version >= 0, "load_weights comes before submit"
        assert not self._is_asleep, "load_weights wakes the engine, and comes before submit"
        pending = PendingRollouts(
            self._replicas,
            make_requests(prompts, seed),
            sampling,
            stop_token_ids=self._stop_token_ids,
            silence_s=self._section.timeout_s,
            finished=finished,
            decode=lambda i, answer: self._decode(prompts[i], answer),
            revive=self._revive,
            forget=self._pending.remove,
            progress=progress,
        )
        self._pending.append(pending)
        return pending

    def score(self, groups: Sequence[RolloutGroup], *, temperature: float) -> list[np.ndarray]:
        """See `RolloutEngine.score`. An engine that fails is not started again."""
        if temperature != 1:
            raise EngineError(f"vLLM scores given tokens at temperature 1, not at {temperature:g}")
        rows = [(list(g.prompt.token_ids), list(c.token_ids)) for g in groups for c in g.completions]
        step = len(self._replicas)
        try:
            calls = [replica.actor.score.remote(rows[replica.number :: step]) for replica in self._replicas]
            parts = self._replicas.results(calls, "score")
        except call_errors() as error:
            raise EngineError(f"vLLM does not score: {root_cause(error)[0]}") from error
        return [parts[i % step][i // step] for i in range(len(rows))]

    def _decode(self, prompt: Prompt, answer: dict[str, Any]) -> RolloutGroup:
        """Makes a group of an answer of `EngineActor.generate`.

        Raises:
            EngineError: it was aborted, or weights changed while it was sampled and that is not allowed.
        """
        first, changes = answer["version"], answer["changes"]
        if "abort" in answer["finish_reasons"]:
            raise EngineError(f"prompt {prompt.prompt_id} was aborted within the engine")
        if any(changes) and self._section.update_weights != "during":
            raise EngineError(f"the weights changed while prompt {prompt.prompt_id} was sampled")
        ends = np.cumsum(answer["lengths"])[:-1]
        ids = [part.tolist() for part in np.split(answer["token_ids"], ends)]
        logprobs = [part.tolist() for part in np.split(answer["logprobs"], ends)]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = tuple(
            _completion(tuple(i), tuple(lp), text, reason, [(0, first), *changed])
            for i, lp, text, reason, changed in zip(
                ids, logprobs, texts, answer["finish_reasons"], changes, strict=True
            )
        )
        return RolloutGroup(prompt, completions)

    # ---- weights ----

    def load_weights(self, params: Params, version: int) -> None:
        """See `RolloutEngine.load_weights`. Waits for rollouts under way, unless weights may change during them.

        Raises:
            WeightSyncError: the weights did not arrive as they were sent.
            EngineError: an engine cannot be started, or not once more.
        """
        if self._section.update_weights != "during" and self._base_pusher is None:
            for pending in self._pending:
                # The old weights may be gone, so engines that fail now are not revived before the push. Adapters
                # stay with the rollouts that have begun with them.
                pending.drain()
        self._params, self._version = params, version
        self._replicas.wait_until_ready()
        self._push()
        for pending in self._pending:
            pending.ask_again()

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. Does nothing without `rollout.sleep`."""
        if self._section.sleep and not self._is_asleep:
            self._replicas.wait_until_ready()
            limit = self._section.timeout_s
            try:
                self._replicas.results([r.actor.sleep.remote(limit) for r in self._replicas], "sleep")
            except call_errors() as error:  # the next push starts it again
                logger.warning("an engine did not go to sleep: %s", root_cause(error)[0])
            self._is_asleep = True

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._pusher.disconnect()
        self._replicas.close()

    def _push(self) -> None:
        """Wakes the engines and pushes the current weights. Engines that fail meanwhile are restarted."""
        while True:
            try:
                if self._is_asleep:
                    limit = self._section.timeout_s
                    self._replicas.results([r.actor.wake_up.remote(limit) for r in self._replicas], "wake_up")
                if self._base_pusher is not None and self._needs_base:
                    self._base_pusher.push(self._params, self._version)
                    self._base_pusher.disconnect()
                    self._needs_base = False
                self._pusher.push(self._params, self._version)
                self._is_asleep = False
                return
            except call_errors() as error:
                # If all are well and yet the push failed, nobody knows in what state their weights are.
                self._restart(self._replicas.sick() or range(len(self._replicas)), error)

    def _restart(self, numbers: Sequence[int], error: Exception) -> None:
        """Replaces engines by new ones, which have no weights yet.

        Raises:
            EngineError: one has been restarted too often, or does not start.
        """
        self._pusher.disconnect()
        self._needs_base = True
        self._replicas.restart(numbers, error)

    def _revive(self, number: int, error: Exception) -> None:
        """Restarts an engine and gives all of them the current weights, so that it can answer again."""
        self._restart([number], error)
        self._push()


def _completion(
    ids: tuple[int, ...],
    logprobs: tuple[float, ...],
    text: str,
    finish_reason: str,
    versions: Sequence[tuple[int, int]],
) -> Completion:
    """Args: versions: (number of a token, version of the weights from that one on), the first for token 0."""
    by_start = {
        start: version for start, version in versions if start < len(ids)
    }  # the last of each start counts
    first, *changes = sorted(by_start.items())
    return Completion(ids, logprobs, text, finish_reason, first[1], tuple(changes))
