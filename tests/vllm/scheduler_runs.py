"""Runs of schedulers, ours and vLLM's own, over made-up requests and tokens; imports vLLM, which not all have."""

import random
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT
from vllm.v1.request import Request, RequestStatus

from grpo_jax.rollout.vllm.scheduler import AsyncRunScheduler, RunScheduler

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from scheduler import BLOCK, make_scheduler, model_output

MAX_LEN, STOP = 300, 2
OURS = {"async": AsyncRunScheduler, "sync": RunScheduler}
THEIRS = {"async": AsyncScheduler, "sync": Scheduler}


def make_requests(count, is_rollout=True):
    """Groups of four with the same prompt; prompts and completions of all lengths around those of a block."""
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    requests = []
    for i in range(count):
        rng = random.Random(i // 4)
        prompt = [rng.randrange(10, 500) for _ in range(rng.randrange(1, 70))]
        params = SamplingParams(
            temperature=1.0,
            max_tokens=random.Random(i).choice([1, 2, 15, 16, 17, 70, 150, 290]),
            logprobs=0,
            ignore_eos=True,
            stop_token_ids=[STOP],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY if is_rollout else RequestOutputKind.DELTA,
        )
        requests.append(
            Request(
                request_id=f"{i}-{'rollout' if is_rollout else 'chat'}", prompt_token_ids=prompt,
                sampling_params=params, pooling_params=None, block_hasher=hasher,
            )
        )  # fmt: skip
    return requests


def made_up(request_id, step):
    """A token and its log-probability; one in 60 ends the completion."""
    rng = random.Random(f"{request_id} {step}")
    token = STOP if rng.random() < 1 / 60 else rng.randrange(10, 500)
    return token, float(np.float32(-rng.random()))


def sample(scheduler, scheduled, step):
    """What a model runner returns, with made-up tokens."""
    made = [made_up(request_id, step) for request_id in scheduled.num_scheduled_tokens]
    tokens, logprobs = zip(*made, strict=True)
    return model_output(scheduler, scheduled, np.array(tokens, np.int32), np.array(logprobs, np.float32))


def run(cls, folder, requests, *, num_blocks, events=None, depth=2, pauses=()):
    """Schedules and samples to the end, `depth` steps under way at once where that is asynchronous.

    Args:    events: step -> what is done to the scheduler before it.
             pauses: steps before which all that is under way is waited for, as an engine that pauses does.
    Returns: per step the scheduled tokens, the blocks of every request and how many of them are hashed, and the
             number of cached blocks; per request its tokens, log-probabilities and finish reason; how many outputs
             were handed over.
    """
    scheduler = make_scheduler(
        cls, folder, max_num_seqs=24, max_num_batched_tokens=64,  # prompts are read in parts
        max_model_len=MAX_LEN, num_blocks=num_blocks, pipeline_stages=depth if depth > 2 else 1,
    )  # fmt: skip
    for request in requests:
        scheduler.add_request(request)
    depth = depth if issubclass(cls, AsyncScheduler) else 1
    steps, under_way, received, num_outputs = [], [], {}, 0

    def update():
        nonlocal num_outputs
        for outputs in scheduler.update_from_output(*under_way.pop(0)).values():
            for output in outputs.outputs:
                num_outputs += 1
                tokens, logprobs, _ = received.setdefault(output.request_id, ([], [], None))
                tokens += output.new_token_ids
                if output.new_logprobs is not None:
                    logprobs += output.new_logprobs.logprobs[:, 0].tolist()
                received[output.request_id] = tokens, logprobs, output.finish_reason

    while scheduler.has_unfinished_requests() or under_way:
        while len(steps) in pauses and under_way:
            update()
        if act := (events or {}).get(len(steps)):
            act(scheduler)
        scheduled = scheduler.schedule()
        blocks = {
            r.request_id: scheduler.kv_cache_manager.get_block_ids(r.request_id) for r in scheduler.running
        }
        hashes = {r.request_id: len(r.block_hashes) for r in scheduler.running}
        num_cached = len(scheduler.kv_cache_manager.block_pool.cached_block_hash_to_block)
        steps.append((dict(scheduled.num_scheduled_tokens), blocks, hashes, num_cached))
        if scheduled.num_scheduled_tokens:
            under_way.append((scheduled, sample(scheduler, scheduled, len(steps))))
            if len(under_way) < depth:
                continue
        if under_way:
            update()
        assert len(steps) < 5000
    assert not getattr(scheduler, "_held", {})
    return steps, received, num_outputs


def scheduler_for(cls, folder):
    """With room for twenty requests at once."""
    return make_scheduler(
        cls, folder, max_num_seqs=20, max_num_batched_tokens=2048, max_model_len=MAX_LEN, num_blocks=1000
    )


def step_all(scheduler, *, num_steps=5000, received=None):
    """Schedules and samples, one step at a time, and returns the tokens that were handed over for each request."""
    received = {} if received is None else received
    while scheduler.has_requests() and num_steps:
        scheduled = scheduler.schedule()
        if scheduled.num_scheduled_tokens:
            # A request's next token is made up from how many it has.
            made = [
                made_up(request_id, scheduler.requests[request_id].num_tokens)
                for request_id in scheduled.num_scheduled_tokens
            ]
            tokens, logprobs = map(np.array, zip(*made, strict=True))
            output = model_output(scheduler, scheduled, tokens.astype(np.int32), logprobs.astype(np.float32))
            _note(scheduler.update_from_output(scheduled, output), received)
        else:
            _note(scheduler.update_from_output(scheduled, EMPTY_MODEL_RUNNER_OUTPUT), received)
        num_steps -= 1
    return received


def step_empty(scheduler, received):
    """A step of an engine that is paused."""
    scheduled = scheduler.schedule()
    assert not scheduled.num_scheduled_tokens
    _note(scheduler.update_from_output(scheduled, EMPTY_MODEL_RUNNER_OUTPUT), received)


def _note(by_client, received):
    for outputs in by_client.values():
        for output in outputs.outputs:
            received.setdefault(output.request_id, []).extend(output.new_token_ids)


def reset(scheduler):
    """What a push in the middle of a batch does: everything cached is forgotten, and computed anew."""
    scheduler.reset_prefix_cache(reset_running_requests=True)


def abort(scheduler):
    ids = [request.request_id for request in scheduler.running][:3]
    scheduler.finish_requests(ids, RequestStatus.FINISHED_ABORTED)


class Recording(AsyncRunScheduler):
    """Notes what is handed over."""

    outputs: ClassVar = []
    """Of each step, (request id, number of tokens, whether it is over)."""

    def update_from_output(self, *args):
        by_client = super().update_from_output(*args)
        Recording.outputs.append(
            [
                (output.request_id, len(output.new_token_ids), output.finish_reason is not None)
                for outputs in by_client.values()
                for output in outputs.outputs
            ]
        )
        return by_client
