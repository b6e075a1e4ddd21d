"""What vLLM's scheduler takes for a step of sampling, ours beside vLLM's own: milliseconds of Python, no model.

    python benchmarks/scheduler.py --sequences=512 --prompt_tokens=128 --new=512

Both schedulers are real and get the same made-up tokens, two steps under way at once, as on a GPU. A step is
`schedule` and `update_from_output`; steps that read prompts or end sequences are left out. All prompts have one
length, so that sequences come to the end of a cache block in the same one or two steps of 16, the slowest ones.
Wants vLLM's environment, and no GPU.
"""

import gc
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import engine_common
import numpy as np

EDGE = 20
"""Steps at the start and at the end that are left out."""
BLOCK = 16
MAX_BATCHED_TOKENS = 8192


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--sequences", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new", type=int, default=512, help="tokens a completion")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    for name in ("sequences", "samples", "prompt_tokens", "new", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.sequences > MAX_BATCHED_TOKENS:
        parser.error(f"--sequences must be at most {MAX_BATCHED_TOKENS}, the tokens of a step")
    common.print_environment()
    print(f"vllm      {common.version('vllm')}")
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    from grpo_jax.rollout.vllm.scheduler import AsyncRunScheduler

    kinds = {"ours": AsyncRunScheduler, "vLLM's own": AsyncScheduler}
    steps: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.write_shape(Path(temporary) / "model", "tiny")
        for _ in range(args.rounds):  # in turn: other load of the machine meets both
            for name, cls in kinds.items():
                steps[name] += run(scheduler_for(cls, folder, args), make_requests(args))
    if not all(steps.values()):
        parser.error("all sequences ran together in too few steps: raise --new")
    means = {name: statistics.fmean(seconds) for name, seconds in steps.items()}
    for name, seconds in steps.items():
        slowest = np.percentile(seconds, 99)
        print(
            f"  {name:<12} {1e3 * means[name]:6.2f} ms a step, median {1e3 * statistics.median(seconds):6.2f}, "
            f"99 % of them within {1e3 * slowest:6.2f}; {means[name] / means['ours']:5.2f} of ours"
        )


def scheduler_for(cls: Any, folder: Path, args: Any) -> Any:
    """With room for all sequences."""
    longest = args.prompt_tokens + args.new
    return make_scheduler(
        cls, folder, max_num_seqs=args.sequences, max_num_batched_tokens=MAX_BATCHED_TOKENS,
        max_model_len=longest, num_blocks=args.sequences * (longest // BLOCK + 2),
    )  # fmt: skip


def make_scheduler(
    cls: Any,
    folder: Path,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int,
    num_blocks: int,
    pipeline_stages: int = 1,
) -> Any:
    """A scheduler as vLLM's engine makes it, with prefix caching and one group of full attention.

    Args: folder: with a config.json; no weights are read.
    """
    import torch
    from vllm.config import (
        CacheConfig,
        DeviceConfig,
        ModelConfig,
        ParallelConfig,
        SchedulerConfig,
        VllmConfig,
    )
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    parallel = ParallelConfig()
    parallel.pipeline_parallel_size = pipeline_stages  # no processes are started here
    config = VllmConfig(
        parallel_config=parallel,
        model_config=ModelConfig(
            model=str(folder), dtype="float32", skip_tokenizer_init=True, max_model_len=max_model_len
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            max_model_len=max_model_len,
            enable_chunked_prefill=True,
            is_encoder_decoder=False,
            async_scheduling=issubclass(cls, AsyncScheduler),
        ),
        cache_config=CacheConfig(block_size=BLOCK, enable_prefix_caching=True),
        device_config=DeviceConfig("cpu"),
    )
    config.cache_config.num_gpu_blocks = num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=32, dtype=torch.float32)
    return cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=False,
    )


def make_requests(args: Any) -> list[Any]:
    """As `vllm_server.vllm_sampling` asks for them."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    params = SamplingParams(
        max_tokens=args.new, logprobs=0, ignore_eos=True, stop_token_ids=[2], detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )  # fmt: skip
    requests = []
    for i in range(args.sequences):
        rng = random.Random(i // args.samples)
        prompt = [rng.randrange(10, 500) for _ in range(args.prompt_tokens)]
        requests.append(
            Request(
                request_id=str(i), prompt_token_ids=prompt, sampling_params=params, pooling_params=None,
                block_hasher=hasher,
            )
        )  # fmt: skip
    return requests


def run(scheduler: Any, requests: list[Any]) -> list[float]:
    """Seconds of the steps in which every sequence got one token."""
    for request in requests:
        scheduler.add_request(request)
    rng = np.random.default_rng(0)
    under_way: list[Any] = []
    seconds = []
    gc.collect()
    gc.freeze()  # as vLLM's engine process does once it has started
    while scheduler.has_unfinished_requests() or under_way:
        start = time.perf_counter()
        scheduled = scheduler.schedule()
        in_schedule = time.perf_counter() - start
        if scheduled.num_scheduled_tokens:
            count = len(scheduled.num_scheduled_tokens)
            tokens = rng.integers(10, 500, count).astype(np.int32)  # none of them a stop
            logprobs = -rng.random(count).astype(np.float32)
            under_way.append((scheduled, model_output(scheduler, scheduled, tokens, logprobs)))
            if len(under_way) < 2:
                continue
        start = time.perf_counter()
        scheduler.update_from_output(*under_way.pop(0))
        in_update = time.perf_counter() - start
        num_tokens = scheduled.num_scheduled_tokens.values()
        if len(num_tokens) == len(requests) and max(num_tokens) == 1:
            seconds.append(in_schedule + in_update)
    gc.unfreeze()
    return seconds[EDGE:-EDGE]


def model_output(scheduler: Any, scheduled: Any, tokens: Any, logprobs: Any) -> Any:
    """What a model runner returns: a token of each request whose prompt has been read.

    Args: tokens, logprobs: [requests that are scheduled] int32 and float32, in their order.
    """
    from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

    ids = list(scheduled.num_scheduled_tokens)
    is_read = [not scheduler.requests[request_id].is_prefill_chunk for request_id in ids]
    sampled = [[token] if read else [] for token, read in zip(tokens.tolist(), is_read, strict=True)]
    ranks = np.zeros(len(ids), np.int32)
    return ModelRunnerOutput(
        req_ids=ids, req_id_to_index={request_id: i for i, request_id in enumerate(ids)},
        sampled_token_ids=sampled, logprobs=LogprobsLists(tokens[:, None], logprobs[:, None], ranks, None),
        prompt_logprobs_dict={}, pooler_output=[],
    )  # fmt: skip


if __name__ == "__main__":
    main()
