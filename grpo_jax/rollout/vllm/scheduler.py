"""vLLM's scheduler with less Python for each token.

vLLM handles every new token of every request in Python: does it need a cache block, does it fill one, does it
end the request, what is sent to the front-end process, which handles it again. With 512 sequences of a small
model that takes longer than the GPU needs for the step. But nobody reads a rollout before it is finished, and
most of its tokens are idle: they do not end it. So

- an idle token is only noted (`_take_idle`), and a block's hash is computed with the block's last token. vLLM's
  own code gets the other tokens, and all tokens of other requests;
- no cache block is looked for while the last one has room (`skip_idle_allocation`);
- tokens are handed to the front-end process in runs of `RUN`, and the rest at the end.

Sequences whose prompts have one length reach the end of a block in the same step or two. Such a step would take
several times as long as others, so little is done in it, and runs end at different steps.

Before the engine pauses, as it does for new weights, all tokens are handed over.

Requests of the OpenAI-compatible port, which somebody may be reading, are passed on token by token.
"""

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists
from vllm.v1.request import Request

RUN = 64


def changes() -> list[str]:
    """Returns the methods of vLLM, of those this file relies on, that take other arguments than it thinks."""
    expected: list[tuple[Callable, tuple[str, ...], tuple[str, ...]]] = [
        (KVCacheManager.allocate_slots, ("request", "num_new_tokens"), ("num_lookahead_tokens",)),
        (KVCacheManager.cache_blocks, ("request", "num_computed_tokens"), ()),
        (Request.update_block_hashes, (), ()),
        (Scheduler.update_from_output, ("scheduler_output", "model_runner_output"), ()),
        (AsyncScheduler.update_from_output, ("scheduler_output", "model_runner_output"), ()),
        (Scheduler.finish_requests, ("request_ids", "finished_status"), ()),
    ]
    return [method.__qualname__ for method, first, named in expected if not _takes(method, first, named)]


def _takes(method: Callable, first: tuple[str, ...], named: tuple[str, ...]) -> bool:
    """Whether a method wants the arguments `first`, knows `named`, and can do without any other."""
    _, *parameters = inspect.signature(method).parameters.values()
    wanted = tuple(p.name for p in parameters if p.default is p.empty)
    return wanted == first and {*named} <= {p.name for p in parameters}


@dataclasses.dataclass(slots=True)
class _Held:
    """A rollout, and its tokens that have not been handed over."""

    request: Any
    stops: frozenset[int | None]
    """Tokens that end it."""
    number: int
    """Of the requests so far: its runs end where this and its length together are a multiple of `RUN`."""
    token_ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    num_idle: int = 0
    """How many of the next tokens are idle, if none of `stops` is among them and the request is not preempted."""
    num_preemptions: int = 0
    """The request's, when `num_idle` was counted."""


class _RunScheduler:
    """To be mixed into a scheduler of vLLM, before it in the bases."""

    is_asynchronous: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, _Held] = {}
        self._numbers = itertools.count()
        groups = self.kv_cache_config.kv_cache_groups  # type: ignore[attr-defined]
        self._block_size = 0
        """Tokens of a cache block. 0: no token counts as idle, since blocks may be cached at other moments: layers
        keep different parts of the cache, or more than two steps are under way at once."""
        is_simple = len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec
        if is_simple and not self.use_pp:  # type: ignore[attr-defined]
            self._block_size = groups[0].kv_cache_spec.block_size
            skip_idle_allocation(self.kv_cache_manager, self._block_size)  # type: ignore[attr-defined]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """As vLLM's own, but idle tokens are only noted, and outputs of unfinished rollouts are put together."""
        scheduler_output, runs = self._take_idle(scheduler_output, model_runner_output)
        by_client = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for outputs in by_client.values():
            outputs.outputs = [o for o in map(self._hold, outputs.outputs) if o is not None]
        if self._is_paused():
            runs = [held for held in self._held.values() if held.token_ids]
        for held in runs:
            if held.request.client_index not in by_client:
                by_client[held.request.client_index] = EngineCoreOutputs()
            output = EngineCoreOutput(held.request.request_id, [])
            by_client[held.request.client_index].outputs.append(_hand_over(held, output))
        for client, outputs in list(by_client.items()):
            if not outputs.outputs and outputs.finished_requests is None and outputs.scheduler_stats is None:
                del by_client[client]
        return by_client

    def has_requests(self) -> bool:
        """As vLLM's own, but a pause is over only when all tokens have been handed over.

        vLLM 0.32 takes a token for one of the weights that the engine has when it is handed over, and weights
        change in a pause.
        """
        owes = self._is_paused() and any(held.token_ids for held in self._held.values())
        return owes or super().has_requests()  # type: ignore[misc]

    def _is_paused(self) -> bool:
        return getattr(getattr(self, "pause_state", None), "name", "") == "PAUSED_ALL"

    def _take_idle(self, scheduler_output: Any, model_runner_output: Any) -> tuple[Any, list[_Held]]:
        """Notes the idle tokens of a step.

        Returns:
            (`scheduler_output` with the requests that have other tokens, the rollouts whose run ends)
        """
        sampled, logprobs = model_runner_output.sampled_token_ids, model_runner_output.logprobs
        is_plain = logprobs is not None and logprobs.cu_num_generated_tokens is None
        if not sampled or not is_plain:
            return scheduler_output, []
        index, values = model_runner_output.req_id_to_index, logprobs.logprobs[:, 0].tolist()
        others, runs = {}, []
        for request_id, num_tokens in scheduler_output.num_scheduled_tokens.items():
            held = self._held.get(request_id) if num_tokens == 1 else None
            if held is not None and held.num_idle and held.request.num_preemptions == held.num_preemptions:
                place = index[request_id]
                if len(sampled[place]) == 1 and sampled[place][0] not in held.stops:
                    if self._take(held, sampled[place][0], values[place]):
                        runs.append(held)
                    continue
            others[request_id] = num_tokens
        return dataclasses.replace(scheduler_output, num_scheduled_tokens=others), runs

    def _take(self, held: _Held, token: int, logprob: float) -> bool:
        """Does what vLLM's own code does with an idle token. Returns whether a run ends with it."""
        held.num_idle -= 1
        held.token_ids.append(token)
        held.logprobs.append(logprob)
        request = held.request
        request._output_token_ids.append(token)
        request._all_token_ids.append(token)
        if self.is_asynchronous:
            request.num_output_placeholders -= 1
        if hasattr(request, "num_in_flight_tokens"):  # newer than vLLM 0.25
            request.num_in_flight_tokens -= 1
        place = len(request._all_token_ids) % self._block_size
        if place == 0:
            request.update_block_hashes()
        elif place == 1 and self.is_asynchronous and not request.num_output_placeholders:
            # The block before is cached when the next token is scheduled. Here no token has been since.
            self.kv_cache_manager.cache_blocks(request, request.num_computed_tokens)  # type: ignore[attr-defined]
        return (len(request._output_token_ids) + held.number) % RUN == 0

    def _hold(self, output: Any) -> Any:
        """Returns the output to hand over now, or None."""
        held = self._held.get(output.request_id)
        if held is None:
            request = self.requests.get(output.request_id)  # type: ignore[attr-defined]
            if output.finish_reason is not None or request is None or not _is_rollout(request):
                return output
            params = request.sampling_params
            stops = frozenset({*(params.stop_token_ids or ()), params.eos_token_id})
            held = self._held[output.request_id] = _Held(request, stops, next(self._numbers))
        held.token_ids += output.new_token_ids
        held.logprobs += output.new_logprobs.logprobs[:, 0].tolist()
        if output.finish_reason is not None:
            del self._held[output.request_id]
        else:
            held.num_idle, held.num_preemptions = self._count_idle(held.request), held.request.num_preemptions
            if len(held.token_ids) < RUN:
                return None
        return _hand_over(held, output)

    def _count_idle(self, request: Any) -> int:
        """How many of a request's next tokens are idle if none stops it: all but the last that it may have."""
        if not self._block_size:
            return 0
        until_end = min(
            request.max_tokens - request.num_output_tokens,
            self.max_model_len - request.num_tokens,  # type: ignore[attr-defined]
        )
        return max(0, until_end - 1)

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """As vLLM's own, for requests that are aborted. Their tokens that were not handed over are dropped."""
        if request_ids is None:
            self._held.clear()
        else:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            for request_id in request_ids:
                self._held.pop(request_id, None)
        return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]


def skip_idle_allocation(manager: Any, block_size: int) -> None:
    """Makes a `KVCacheManager` return at once where the next token lies within a block that the request has.

    Where the token fills the block and is known already, the block may be cached, and vLLM's own code does it.
    """
    allocate_slots, nothing = manager.allocate_slots, manager.empty_kv_cache_blocks

    def allocate_slots_if_needed(request: Any, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        place, num_known = request.num_computed_tokens % block_size, request.num_tokens
        is_within = place > 0 and (place < block_size - 1 or num_known <= request.num_computed_tokens)
        if num_new_tokens == 1 and is_within and not args and options == {"num_lookahead_tokens": 0}:
            return nothing
        return allocate_slots(request, num_new_tokens, *args, **options)

    manager.allocate_slots = allocate_slots_if_needed


def _is_rollout(request: Any) -> bool:
    """True for a request that is read at its end only, with no more than the sampled tokens' log-probabilities."""
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and params.logprobs == 0
        and params.prompt_logprobs is None
        and params.repetition_detection is None
        and request.structured_output_request is None
        and not request.resumable
        and not request.has_encoder_inputs
        and not params.detokenize  # text might hold a stop string, which the front-end process looks for
    )


def _hand_over(held: _Held, output: Any) -> Any:
    """Puts the tokens that were not handed over yet into an output."""
    ranks = np.zeros(len(held.token_ids), np.int32)  # nobody reads the ranks of rollouts
    tokens, logprobs = np.array(held.token_ids, np.int32), np.array(held.logprobs, np.float32)
    output.new_token_ids = held.token_ids
    output.new_logprobs = LogprobsLists(tokens[:, None], logprobs[:, None], ranks, None)
    held.token_ids, held.logprobs = [], []
    return output


class RunScheduler(_RunScheduler, Scheduler):
    """For platforms without asynchronous scheduling (CPU)."""

    is_asynchronous = False


class AsyncRunScheduler(_RunScheduler, AsyncScheduler):
    """For GPUs: the next step is scheduled while this one runs."""

    is_asynchronous = True
