"""One asynchronous vLLM engine in a Ray actor.

It runs in the engine's environment, which needs vLLM, Ray and numpy, but not JAX. Token ids go in and token ids
come out; the trainer decodes them.
"""

import asyncio
import contextlib
import itertools
import math
import os
import time
from collections.abc import AsyncIterator, Awaitable, Iterator
from typing import Any

import numpy as np

from grpo_jax.rollout.base import EngineError, SamplingParams
from grpo_jax.rollout.vllm.adapters import Adapters, adapter_number, adapter_request
from grpo_jax.rollout.vllm.processes import family
from grpo_jax.rollout.vllm.scheduler_choice import choose_scheduler
from grpo_jax.weight_sync.wire import Mailbox, deadline_check

Request = tuple[int, list[int], int]
"""(number of the prompt, its token ids, seed)"""

Changes = dict[int, list[tuple[int, int]]]
"""Number of a completion -> (number of a token, version of the weights from that one on)."""

WATCH_S = 0.5  # between two looks whether vLLM's own process lives, while it is waited for
EXTENSION = "grpo_jax.rollout.vllm.worker.WorkerExtension"


class EngineActor:
    """One vLLM engine. All methods are asynchronous, so that a push may happen while rollouts run."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._version = -1
        self._ids = itertools.count()
        self._in_flight: dict[str, Changes] = {}
        """vLLM's name of each request, and the changes of weights that it has seen."""
        self._heard = 0.0
        self._pushing = asyncio.Lock()
        self._is_whole = asyncio.Event()
        """Set unless a push is under way, or the last one has failed and left weights of two versions."""
        self._is_whole.set()
        self._num_failed_pushes = 0
        self._mailbox: Mailbox | None = None
        self._adapter: Any = None
        """vLLM's request of the adapter for what is sampled from now on; None: there are none."""
        self._adapters: Adapters | None = None
        """How the weights that change are made into vLLM's adapters; None: they are the model's own."""
        self._server: asyncio.Task | None = None

    async def start(self, options: dict[str, Any], api_port: int) -> dict[str, Any]:
        """Starts vLLM. The weights are random until the first push.

        Args:
            options: fields of vLLM's `AsyncEngineArgs`.
            api_port: of the OpenAI-compatible server; 0: none.

        Returns:
            "vllm", its version; "device"; "node_id", Ray's; "processes", see `processes.family`;
            "why_not_our_scheduler", "" where it is ours.

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
        import ray
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
            "node_id": ray.get_runtime_context().get_node_id(),
            "processes": family(os.getpid()),
        }

    async def _check_head(self, options: dict[str, Any], version: str) -> None:
        """Raises: EngineError: a head in float32 is asked for, and this vLLM would ignore that."""
        overrides = options.get("hf_overrides")
        if not isinstance(overrides, dict) or overrides.get("head_dtype") != "float32":
            return
        held = set(await self._llm.collective_rpc("grpo_jax_head_dtype"))
        if held != {"float32"}:
            raise EngineError(f"vLLM {version} does not compute the head of this model in float32")

    # ---- weights ----

    async def connect(
        self,
        transport: str,
        link: dict[str, Any] | None,
        layout: dict[str, Any],
        timeout_s: float,
        adapters: Adapters | None = None,
    ) -> None:
        """Opens the workers' end of the transport of the weights.

        Args:
            transport: "ipc", "nccl" or "host".
            link: of `Sender.links`; None: the trainer is on another host, and `relay` will bring the buckets.
            layout: `Layout.to_dict`.
            adapters: what the tensors are; None: those of the model.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        self._adapters = adapters

        if link is None:
            from grpo_jax.weight_sync.host import NUM_SLOTS
            from grpo_jax.weight_sync.wire import Layout

            if self._mailbox is not None:
                self._mailbox.close()
            workers = self._llm.vllm_config.parallel_config.world_size
            self._mailbox = Mailbox.create(workers, NUM_SLOTS, Layout.from_dict(layout).bucket_bytes)
            link = {"mailbox": self._mailbox.address, "first_reader": 0}
        info = {"transport": transport, "link": link, "layout": layout, "is_adapter": adapters is not None}
        opening = self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=info))
        await self._ended(timeout_s, "open its end of the transport of the weights", opening)
        if self._mailbox is not None:
            self._mailbox.unlink()

    async def disconnect(self, timeout_s: float) -> None:
        """Closes the workers' end of the transport: what the trainer shares with them, it may then free."""
        if self._mailbox is not None:
            self._mailbox.give_up()
        async with self._alone(timeout_s):
            closing = self._llm.collective_rpc("grpo_jax_disconnect")
            await self._ended(timeout_s, "close its end of the transport of the weights", closing)
        if self._mailbox is not None:
            self._mailbox.close()
            self._mailbox = None

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

    async def push_adapter(self, version: int, timeout_s: float) -> list[list[list[int]]]:
        """Takes an adapter that the trainer sends meanwhile. Running rollouts keep the one that they began with.

        Args, returns: as `push`.
        """
        async with self._alone(timeout_s):
            about = self._adapters
            assert about is not None
            taking = self._llm.collective_rpc(
                "grpo_jax_take_adapter",
                args=(adapter_number(version), about.rank, about.alpha, about.num_kept, timeout_s),
            )
            [checksums] = await self._ended(timeout_s, "take the adapter", taking)
            self._version, self._adapter = version, adapter_request(adapter_number(version))
            self._heard = time.monotonic()
        return checksums

    async def push_base(self, version: int, timeout_s: float) -> list[list[list[int]]]:
        """Takes the model that adapters belong to. Running rollouts are frozen, and go on with their adapters.

        Args, returns: as `push`; no version is that of the model alone.
        """
        async with self._alone(timeout_s):
            is_busy = bool(self._in_flight)
            try:
                return await self._take_weights(timeout_s, is_busy)
            finally:
                if is_busy:
                    await self._go_on(timeout_s)

    async def push(self, version: int, timeout_s: float) -> list[list[list[int]]]:
        """Takes the weights that the trainer sends meanwhile, and drops what was cached with the old ones.

        Running rollouts are frozen. They go on with the new weights, and their keys and values are computed again.
        They go on after a push that fails, too, but with weights of two versions: see `_complete`.

        Args:
            version: of the weights; completions that begin from now on are stamped with it.
            timeout_s: what the push may take.

        Returns:
            The checksums of each worker, in the order of buckets and pieces.
        """
        async with self._alone(timeout_s):
            is_busy = bool(self._in_flight) or self._server is not None
            self._is_whole.clear()
            try:
                checksums = await self._take_weights(timeout_s, is_busy)
                if self._in_flight:
                    noting = self._note_change(version)
                    await self._ended(timeout_s, "hand over what it has sampled", noting)
            except BaseException:
                self._num_failed_pushes += 1
                raise
            else:
                self._version = version
            finally:
                if is_busy:
                    await self._go_on(timeout_s)
            self._heard = time.monotonic()
            self._is_whole.set()
        return checksums

    async def _go_on(self, timeout_s: float) -> None:
        """Has vLLM go on with what `_take_weights` has paused."""
        resuming = self._llm.engine_core.resume_scheduler_async()
        await self._ended(timeout_s, "go on after a push", resuming)

    @contextlib.asynccontextmanager
    async def _alone(self, timeout_s: float) -> AsyncIterator[None]:
        """Lets an earlier push end: what comes after one that has failed must not get in its way."""
        await self._ended(timeout_s, "end a push", self._pushing.acquire())
        try:
            yield
        finally:
            self._pushing.release()

    async def _take_weights(self, timeout_s: float, is_busy: bool) -> list[list[list[int]]]:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self._llm
        request = WeightTransferUpdateRequest(update_info={"timeout_s": timeout_s})
        if is_busy:
            pausing = llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=True)
            await self._ended(timeout_s, "pause for the weights", pausing)
        # vLLM's process runs these one after the other. Sent together, none waits for the answer of another.
        *_, checksums = await self._ended(
            timeout_s,
            "take the weights",
            llm.start_weight_update(),
            llm.update_weights(request),
            llm.finish_weight_update(),
            llm.collective_rpc("grpo_jax_checksums"),
        )
        if not is_busy:
            await self._ended(timeout_s, "empty its prefix cache", self._reset_prefix_cache())
        return checksums

    async def _reset_prefix_cache(self) -> None:
        for _ in range(100):
            if await self._llm.reset_prefix_cache():
                return
            await asyncio.sleep(0.01)  # the last requests' blocks are not free yet
        raise RuntimeError("vLLM's prefix cache could not be reset: requests are still running")

    # ---- rollouts ----

    async def generate(
        self, requests: list[Request], sampling: SamplingParams, stop_token_ids: tuple[int, ...]
    ) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """Yields (number of the prompt, its group) as groups finish. See `_group`."""
        tasks = [asyncio.create_task(self._group(*r, sampling, stop_token_ids)) for r in requests]
        try:
            for task in asyncio.as_completed(tasks):
                yield await task
        finally:
            for task in tasks:
                task.cancel()  # after an error nobody takes the other answers

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
            their "lengths" and "finish_reasons", the "version" of the weights at the start, and the "changes" of
            each completion: (number of a token, version of the weights from that one on).
        """
        params = vllm_sampling(sampling, seed, stop_token_ids)
        version, changes, result = await self._complete(token_ids, params)
        outputs = sorted(result.outputs, key=lambda o: o.index)
        logprobs = [_sampled_logprobs(o.logprobs) for o in outputs]
        return number, {
            "lengths": [len(o.token_ids) for o in outputs],
            "token_ids": np.concatenate([np.asarray(o.token_ids, np.int32) for o in outputs]),
            "logprobs": np.concatenate([np.asarray(values, np.float32) for values in logprobs]),
            "finish_reasons": [o.finish_reason for o in outputs],
            "version": version,
            "changes": [changes.get(o.index, []) for o in outputs],
        }

    async def _complete(self, token_ids: list[int], params: Any) -> tuple[int, Changes, Any]:
        """Returns (version of the weights at the start, their changes, vLLM's last output).

        What a failed push has left to sample from weights of two versions is sampled again, from whole ones.
        """
        while True:
            await self._is_whole.wait()
            version, failed = self._version, self._num_failed_pushes
            name = f"rollout-{next(self._ids)}"
            with self._under_way(name) as changes:
                prompt = {"prompt_token_ids": token_ids}
                async for output in self._llm.generate(prompt, params, name, lora_request=self._adapter):
                    result = output
            if failed == self._num_failed_pushes:
                return version, changes, result

    @contextlib.contextmanager
    def _under_way(self, name: str) -> Iterator[Changes]:
        """Counts a request, gathers the changes of weights that it sees, and notes when vLLM was last heard of."""
        if not self._in_flight:
            self._heard = time.monotonic()
        self._in_flight[name] = {}
        try:
            yield self._in_flight[name]
        finally:
            del self._in_flight[name]
            self._heard = time.monotonic()

    async def _note_change(self, version: int) -> None:
        """Notes for each completion under way which of its tokens the coming weights will sample first.

        While the engine is paused, after it has handed over all that it had sampled.
        """
        core, processor = self._llm.engine_core, self._llm.output_processor
        while not core.outputs_queue.empty():
            await asyncio.sleep(0)
        for _ in range(
            len(processor.request_states) + 1
        ):  # vLLM's task takes what it got in slices, one a turn
            await asyncio.sleep(0)
        for state in processor.request_states.values():
            if (changes := self._in_flight.get(state.external_req_id)) is not None:
                first = state.detokenizer.num_output_tokens()
                changes.setdefault(state.request_index, []).append((first, version))

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
        *_, result = await self._complete(prompt + completion, params)
        entries = zip(result.prompt_logprobs[len(prompt) :], completion, strict=True)
        return np.array([entry[token].logprob for entry, token in entries], np.float32)

    # ---- life ----

    async def silence(self) -> float:
        """Seconds since vLLM finished a request, of whatever batch; infinite where it has none."""
        return time.monotonic() - self._heard if self._in_flight else math.inf

    async def check_health(self, timeout_s: float) -> None:
        """Asks vLLM's own process for an answer. Raises: an error where that is gone, or gives none in time."""
        await self._llm.check_health()
        await self._ended(timeout_s, "answer at all", self._llm.is_sleeping())

    async def sleep(self, timeout_s: float) -> None:
        """Frees the memory of weights and cache. The engine must be given new weights before it samples again."""
        await self._ended(timeout_s, "go to sleep", self._llm.sleep(level=2))

    async def wake_up(self, timeout_s: float) -> None:
        """Takes the memory again that `sleep` has freed."""
        await self._ended(timeout_s, "wake up", self._llm.wake_up())

    async def _ended(self, timeout_s: float, what: str, *calls: Awaitable[Any]) -> list[Any]:
        """Waits for calls of vLLM, which itself waits for ever for an answer of a process that has died.

        Raises:
            EngineError: vLLM did not do `what` in time.
            EngineDeadError: vLLM's, where its own process is gone.
        """
        results = asyncio.gather(*calls)
        end = time.monotonic() + timeout_s
        while not (await asyncio.wait([results], timeout=WATCH_S))[0]:
            if self._llm.errored:
                results.cancel()
                raise self._llm.dead_error
            if time.monotonic() > end:
                results.cancel()
                raise EngineError(f"vLLM did not {what} within {timeout_s:g} s")
        return results.result()

    async def memory_peak(self) -> int:
        """Largest number of bytes since the last call by which a worker's PyTorch held more than it does now."""
        return max(await self._llm.collective_rpc("grpo_jax_memory"))

    async def pid(self) -> int:
        return os.getpid()

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
