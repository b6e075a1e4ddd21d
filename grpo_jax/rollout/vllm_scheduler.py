"""vLLM's scheduler with less to do for each token: a step of many short sequences is as long as its Python takes.

vLLM's engine process hands every new token of every request to the process in front of it: 1,024 sequences make
1,024 small messages a step, and both processes work through them in Python while the GPU waits. Nobody reads a
rollout before it is finished, so its tokens are kept back and handed over in runs of `RUN` (and the rest at its
end). Requests that somebody may be reading, those of the OpenAI-compatible port, are passed on as they come.

And for every token it goes through the whole accounting of cache blocks, twice, although only one token in
`block_size` needs a new block or fills one: `skip_idle_block_work` spares the others.
"""

import dataclasses
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.outputs import LogprobsLists

RUN = 64


@dataclasses.dataclass
class _Held:
    """The tokens of one request that have not been handed over."""

    token_ids: list[int]
    logprobs: list[np.ndarray]
    """[number of tokens, 1] each."""


class _RunScheduler:
    """To be mixed into a scheduler of vLLM, before it in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, _Held] = {}
        groups = self.kv_cache_config.kv_cache_groups  # type: ignore[attr-defined]
        if len(groups) == 1 and type(groups[0].kv_cache_spec) is FullAttentionSpec:
            skip_idle_block_work(self.kv_cache_manager, groups[0].kv_cache_spec.block_size)  # type: ignore[attr-defined]

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> dict[int, Any]:
        """vLLM's own, with the outputs of unfinished rollouts taken out and put together."""
        by_client = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        for client, outputs in list(by_client.items()):
            outputs.outputs = [o for o in map(self._hold, outputs.outputs) if o is not None]
            if not outputs.outputs and outputs.finished_requests is None and outputs.scheduler_stats is None:
                del by_client[client]
        return by_client

    def _hold(self, output: Any) -> Any:
        """Returns the output to hand over now, or None."""
        held = self._held.get(output.request_id)
        if held is None:
            request = self.requests.get(output.request_id)  # type: ignore[attr-defined]
            if output.finish_reason is not None or request is None or not _is_rollout(request):
                return output
            held = self._held[output.request_id] = _Held([], [])
        held.token_ids += output.new_token_ids
        if output.new_logprobs is not None:  # None: it ended without a further token
            held.logprobs.append(output.new_logprobs.logprobs)
        if output.finish_reason is None and len(held.token_ids) < RUN:
            return None
        del self._held[output.request_id]
        output.new_token_ids = held.token_ids
        output.new_logprobs = _join(held) if held.logprobs else None
        return output

    def finish_requests(self, request_ids: Any, finished_status: Any) -> Any:
        """Called when requests are aborted: what was kept back of them is dropped."""
        if request_ids is None:
            self._held.clear()
        else:
            request_ids = [request_ids] if isinstance(request_ids, str) else list(request_ids)
            for request_id in request_ids:
                self._held.pop(request_id, None)
        return super().finish_requests(request_ids, finished_status)  # type: ignore[misc]


def skip_idle_block_work(manager: Any, block_size: int) -> None:
    """Lets a `KVCacheManager` return at once where a single token neither needs a cache block nor fills one.

    Args: manager: of a model whose layers all attend to everything and share their blocks: one group of them.
    """
    allocate_slots, cache_blocks, nothing = (
        manager.allocate_slots,
        manager.cache_blocks,
        manager.empty_kv_cache_blocks,
    )

    def allocate_slots_if_needed(request: Any, num_new_tokens: int, *args: Any, **options: Any) -> Any:
        # The token before this one lies in the same block, so the block is there.
        is_inside = num_new_tokens == 1 and request.num_computed_tokens % block_size
        if is_inside and not args and options == {"num_lookahead_tokens": 0}:
            return nothing
        return allocate_slots(request, num_new_tokens, *args, **options)

    def cache_blocks_if_full(request: Any, num_computed_tokens: int) -> None:
        if num_computed_tokens % block_size == 0:  # a block passed over is cached together with the next one
            cache_blocks(request, num_computed_tokens)

    manager.allocate_slots, manager.cache_blocks = allocate_slots_if_needed, cache_blocks_if_full


def _is_rollout(request: Any) -> bool:
    """Read at its end only, and with the log-probabilities of the sampled tokens alone."""
    params = request.sampling_params
    return (
        params is not None
        and params.output_kind == RequestOutputKind.FINAL_ONLY
        and params.logprobs == 0
        and not params.detokenize  # text might hold a stop string, which the front looks for
    )


def _join(held: _Held) -> LogprobsLists:
    token_ids = np.array(held.token_ids, np.int32)
    ranks = np.zeros(len(token_ids), np.int32)  # nobody reads the ranks of rollouts
    return LogprobsLists(token_ids[:, None], np.concatenate(held.logprobs), ranks, None)


class RunScheduler(_RunScheduler, Scheduler):
    """For platforms without asynchronous scheduling (CPU)."""


class AsyncRunScheduler(_RunScheduler, AsyncScheduler):
    """For GPUs: the next step is scheduled while this one runs."""
