"""vLLM's scheduler, sending the tokens of a rollout on in runs instead of one at a time.

vLLM's engine process hands every new token of every request to the process in front of it: 1,024 sequences make
1,024 small messages a step, and both processes work through them in Python while the GPU waits. Nobody reads a
rollout before it is finished, so its tokens are kept back and handed over in runs of `RUN` (and the rest at its
end). Requests that somebody may be reading, those of the OpenAI-compatible port, are passed on as they come.
"""

import dataclasses
from typing import Any

import numpy as np
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import LogprobsLists

RUN = 64


@dataclasses.dataclass
class _Held:
    """The tokens of one request that have not been handed over."""

    token_ids: list[int]
    logprobs: list[LogprobsLists]


class _RunScheduler:
    """To be mixed into a scheduler of vLLM, before it in the bases."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held: dict[str, _Held] = {}

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
        if output.new_logprobs is not None:
            held.logprobs.append(output.new_logprobs)
        if output.finish_reason is None and len(held.token_ids) < RUN:
            return None
        del self._held[output.request_id]
        output.new_token_ids = held.token_ids
        output.new_logprobs = _join(held.logprobs)
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


def _is_rollout(request: Any) -> bool:
    params = request.sampling_params
    is_final_only = params is not None and params.output_kind == RequestOutputKind.FINAL_ONLY
    return is_final_only and not params.detokenize  # text might hold a stop string, which the front looks for


def _join(parts: list[LogprobsLists]) -> LogprobsLists | None:
    if not parts:
        return None
    return LogprobsLists(
        np.concatenate([part.logprob_token_ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.sampled_token_ranks for part in parts]),
        None,
    )


class RunScheduler(_RunScheduler, Scheduler):
    """For platforms without asynchronous scheduling (CPU)."""


class AsyncRunScheduler(_RunScheduler, AsyncScheduler):
    """For GPUs: the next step is scheduled while this one runs."""
