"""One asynchronous vLLM engine in a Ray actor.

It runs in the engine's environment, which needs vLLM, Ray and numpy, but not JAX. Token ids go in and token ids
come out; the trainer decodes them.
"""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator
from typing import Any

import numpy as np

from grpo_jax.rollout.base import EngineError, SamplingParams
from grpo_jax.rollout.vllm.scheduler_choice import choose_scheduler
from grpo_jax.weight_sync.wire import Mailbox, deadline_check

Request = tuple[int, list[int], int]
"""(number of the prompt, its token ids, seed)"""

EXTENSION = "grpo_jax.rollout.vllm.worker.WorkerExtension"


class EngineActor:
    """One vLLM engine. All methods are asynchronous, so that a push may happen while rollouts run."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._version = -1
        self._ids = itertools.count()
        self._in_flight = 0
        self._mailbox: Mailbox | None = None
        self._server: asyncio.Task | None = None

    async def start(self, options: dict[str, Any], api_port: int) -> dict[str, Any]:
        """Starts vLLM. The weights are random until the first push.

        Args:
            options: fields of vLLM's `AsyncEngineArgs`.
            api_port: of the OpenAI-compatible server; 0: none.

        Raises:
            EngineError: vLLM's message, on one line. Its own exceptions cannot all be sent to the trainer.
        """
        try:
            return await self._start(options, api_port)
        except Exception as error:
            # pydantic's messages end with a dump of its input.
            said = " ".join(str(error).split()).partition(" [type=")[0]
            raise EngineError(f"{type(error).__name__}: {said}") from None

    async def _start(self, options: dict[str, Any], api_port: int) -> dict[str, Any]:
        import vllm
        from vllm import AsyncEngineArgs, envs
        from vllm.config import WeightTransferConfig
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        # Otherwise the kernels for sampling are compiled at every start: PyTorch deletes the folder they are in.
        os.environ.setdefault("TRITON_CACHE_DIR", os.path.join(envs.VLLM_CACHE_ROOT, "triton"))
        is_asynchronous = options.get("async_scheduling") is not False and not current_platform.is_cpu()
        scheduler, why_not_ours = choose_scheduler(options, vllm.__version__, is_asynchronous=is_asynchronous)
        if current_platform.is_cpu():
            # A seeded sample whose prompt is read in parts crashes vLLM: "CPU Generator does not use offset".
            options = {"enable_chunked_prefill": False, **options}
        arguments = AsyncEngineArgs(
            load_format="dummy",
            generation_config="vllm",  # sampling comes from the trainer alone
            logprobs_mode="processed_logprobs",  # those of the distribution that is sampled from
            disable_log_stats=True,
            skip_tokenizer_init=not api_port,
            scheduler_cls=scheduler,
            worker_extension_cls=EXTENSION,
            weight_transfer_config=WeightTransferConfig(backend="grpo_jax"),
            **options,
        )
        self._llm = AsyncLLM.from_engine_args(arguments)
        await self._check_head(options, vllm.__version__)
        if api_port:
            from grpo_jax.rollout.vllm.api import serve

            ready = asyncio.Event()
            self._server = asyncio.create_task(serve(self._llm, options["model"], api_port, ready))
            waiting = asyncio.create_task(ready.wait())
            await asyncio.wait({self._server, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if self._server.done():
                self._server.result()  # raises the error that kept it from starting
        return {
            "vllm": vllm.__version__,
            "device": current_platform.get_device_name(),
            "why_not_our_scheduler": why_not_ours,
        }

    async def _check_head(self, options: dict[str, Any], version: str) -> None:
        """Raises: EngineError: a head in float32 is asked for, and this vLLM would ignore that."""
        overrides = options.get("hf_overrides")
        if not isinstance(overrides, dict) or overrides.get("head_dtype") != "float32":
            return
        held = set(await self._llm.collective_rpc("grpo_jax_head_dtype"))
        if held != {"float32"}:
            raise EngineError(f"vLLM {version} does not compute the head of this model in float32")

    async def connect(self, transport: str, link: dict[str, Any] | None, layout: dict[str, Any]) -> None:
        """Opens the workers' end of the transport of the weights.

        Args:
            transport: "ipc", "nccl" or "host".
            link: of `Sender.links`; None: the trainer is on another host, and `relay` will bring the buckets.
            layout: `Layout.to_dict`.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        if link is None:
            from grpo_jax.weight_sync.host import NUM_SLOTS
            from grpo_jax.weight_sync.wire import Layout

            if self._mailbox is not None:
                self._mailbox.close()
            workers = self._llm.vllm_config.parallel_config.world_size
            self._mailbox = Mailbox.create(workers, NUM_SLOTS, Layout.from_dict(layout).bucket_bytes)
            link = {"mailbox": self._mailbox.address, "first_reader": 0}
        info = {"transport": transport, "link": link, "layout": layout}
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        if self._mailbox is not None:
            self._mailbox.unlink()

    async def relay(self, number: int, bucket: np.ndarray, timeout_s: float) -> None:
        """Puts a bucket from another host into the mailbox of this host."""
        mailbox = self._mailbox
        assert mailbox is not None, "connect without a link comes before relay"

        def put() -> None:
            mailbox.wait_writable(number, deadline_check(timeout_s, "the workers did not take the weights"))
            np.copyto(mailbox.slot(number)[: len(bucket)], bucket)
            mailbox.publish(number)

        await asyncio.to_thread(put)

    async def prepare_relay(self) -> None:
        """Sets the counters of the mailbox to zero, before the trainer sends."""
        if self._mailbox is not None:
            self._mailbox.reset()

    async def push(self, version: int, timeout_s: float) -> list[list[list[int]]]:
        """Takes the weights that the trainer sends meanwhile, and drops what was cached with the old ones.

        Running rollouts are frozen. They go on with the new weights, and their keys and values are computed again.

        Args:
            version: of the weights; completions that begin from now on are stamped with it.
            timeout_s: what the push may take.

        Returns:
            The checksums of each worker, in the order of buckets and pieces.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        request = WeightTransferUpdateRequest(update_info={"timeout_s": timeout_s})
        is_busy = self._in_flight > 0 or self._server is not None
        if is_busy:
            await llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
        # vLLM's process runs these one after the other. Sent together, none waits for the answer of another.
        *_, checksums = await asyncio.gather(
            llm.start_weight_update(),
            llm.update_weights(request),
            llm.finish_weight_update(),
            llm.collective_rpc("grpo_jax_checksums"),
        )
        self._version = version
        if is_busy:
            await llm.engine_core.resume_scheduler_async()
        else:
            await self._reset_prefix_cache()
        return checksums

    async def _reset_prefix_cache(self) -> None:
        for _ in range(100):
            if await self._llm.reset_prefix_cache():
                return
            await asyncio.sleep(0.01)  # the last requests' blocks are not free yet
        raise RuntimeError("vLLM's prefix cache could not be reset: requests are still running")

    async def generate(
        self, requests: list[Request], sampling: SamplingParams, stop_token_ids: tuple[int, ...]
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Yields (number of the prompt, its group) as groups finish. See `_group`."""
        tasks = [asyncio.create_task(self._group(*r, sampling, stop_token_ids)) for r in requests]
        for task in asyncio.as_completed(tasks):
            yield await task

    async def _group(
        self,
        number: int,
        token_ids: list[int],
        seed: int,
        sampling: SamplingParams,
        stop_token_ids: tuple[int, ...],
    ) -> tuple[int, dict[str, Any]]:
        """Completes one prompt.

        Returns:
            (number of the prompt, its group): "token_ids" and "logprobs" of all completions one after the other,
            their "lengths" and "finish_reasons", and the "versions" of the weights at the start and at the end.
        """
        version = self._version
        self._in_flight += 1
        try:
            prompt = {"prompt_token_ids": token_ids}
            params = vllm_sampling(sampling, seed, stop_token_ids)
            async for output in self._llm.generate(prompt, params, f"rollout-{next(self._ids)}"):
                result = output
        finally:
            self._in_flight -= 1
        outputs = sorted(result.outputs, key=lambda o: o.index)
        logprobs = [_sampled_logprobs(o.logprobs) for o in outputs]
        return number, {
            "lengths": [len(o.token_ids) for o in outputs],
            "token_ids": np.concatenate([np.asarray(o.token_ids, np.int32) for o in outputs]),
            "logprobs": np.concatenate([np.asarray(values, np.float32) for values in logprobs]),
            "finish_reasons": [o.finish_reason for o in outputs],
            "versions": (version, self._version),
        }

    async def score(self, rows: list[tuple[list[int], list[int]]]) -> list[np.ndarray]:
        """The log-probabilities of completions. Args: rows: (token ids of a prompt, those of its completion)."""
        return await asyncio.gather(*(self._score(*row) for row in rows))

    async def _score(self, prompt: list[int], completion: list[int]) -> np.ndarray:
        """One float32 a token, of the distribution at temperature 1: vLLM scores prompts before any sampling."""
        import vllm
        from vllm.sampling_params import RequestOutputKind

        params = vllm.SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,  # the given token's alone
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        self._in_flight += 1
        try:
            whole = {"prompt_token_ids": prompt + completion}
            async for output in self._llm.generate(whole, params, f"score-{next(self._ids)}"):
                result = output
        finally:
            self._in_flight -= 1
        entries = zip(result.prompt_logprobs[len(prompt) :], completion, strict=True)
        return np.array([entry[token].logprob for entry, token in entries], np.float32)

    async def sleep(self) -> None:
        """Frees the memory of weights and cache. The engine must be given new weights before it samples again."""
        await self._llm.sleep(level=2)

    async def wake_up(self) -> None:
        """Takes the memory again that `sleep` has freed."""
        await self._llm.wake_up()

    async def memory_peak(self) -> int:
        """Largest number of bytes since the last call by which a worker's PyTorch held more than it does now."""
        return max(await self._llm.collective_rpc("grpo_jax_memory"))

    async def pid(self) -> int:
        return os.getpid()

    async def node_id(self) -> str:
        import ray

        return ray.get_runtime_context().get_node_id()

    async def stop(self) -> None:
        """Ends vLLM's processes."""
        if self._server is not None:
            self._server.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._server
        if self._mailbox is not None:
            self._mailbox.close()
        if self._llm is not None:
            self._llm.shutdown()


def vllm_sampling(sampling: SamplingParams, seed: int, stop_token_ids: tuple[int, ...]) -> Any:
    """Returns `vllm.SamplingParams`. vLLM gives sample g of a prompt the seed `seed` + g."""
    import vllm
    from vllm.sampling_params import RequestOutputKind

    return vllm.SamplingParams(
        n=sampling.num_samples,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        seed=seed,
        stop_token_ids=list(stop_token_ids),
        logprobs=0,  # the sampled token's alone
        flat_logprobs=True,
        ignore_eos=True,  # `stop_token_ids` has it
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _sampled_logprobs(flat: Any) -> list[float]:
    """The log-probability of the sampled token, which comes first at each position."""
    return [flat.logprobs[start] for start in flat.start_indices]
