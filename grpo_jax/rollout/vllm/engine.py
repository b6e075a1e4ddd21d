"""Rollouts from vLLM engines in Ray actors: the trainer's side.

Prompts are dealt out to the replicas, groups come back as they finish, weights are pushed through the transport
that fits (`weight_sync`), and an engine that dies or falls silent is started anew, with the present weights, and
asked again what it still owed.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.config import ConfigError, RolloutSection
from grpo_jax.model.hf import ModelFolder
from grpo_jax.rollout.base import EngineError, SamplingParams
from grpo_jax.rollout.vllm import cluster as ray_cluster
from grpo_jax.rollout.vllm.check import installed_vllm
from grpo_jax.rollout.vllm.requests import WAIT_S, PendingRollouts
from grpo_jax.run.probe import compare_checksums
from grpo_jax.types import Completion, Params, Prompt, RolloutGroup
from grpo_jax.weight_sync import choose_transport, make_sender
from grpo_jax.weight_sync.buckets import make_push_plan, pack_buckets
from grpo_jax.weight_sync.wire import piece_checksums

logger = logging.getLogger(__name__)

PROGRESS_S = 20.0  # between two lines that say that an engine is still starting
MIN_BATCHED_TOKENS = 8192
"""Tokens that vLLM reads in a step at most, unless a single sequence may be longer: its own 2,048 are few."""
OWN_GRAPHS = {
    "cudagraph_capture_sizes", "max_cudagraph_capture_size", "compilation_config", "speculative_config"
}  # fmt: skip
"""Engine arguments that say, or make vLLM say, what CUDA graphs to capture."""


@dataclasses.dataclass
class _Replica:
    """One engine. A restart fills in a new actor."""

    number: int
    actor: Any = None
    started: Any = None
    """Reference to what `EngineActor.start` returns; None once it has."""
    pid: int = 0
    restarts: int = 0
    is_local: bool = True
    """On the trainer's host."""
    lives: int = 0
    """How many actors it has had."""


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
    ):
        self._section, self._mesh, self._tokenizer = section, mesh, tokenizer
        self._stop_token_ids = stop_token_ids
        self._transport, count = plan_engines(section, mesh)
        self._plan = make_push_plan(folder.config, folder.config.dtype, section.bucket_mb * 2**20)
        self._options = engine_options(section, folder, max_model_len)
        self._params: Params = None
        self._version = -1
        self._sender: Any = None
        self._asleep = False
        self._pending: list[PendingRollouts] = []
        installation = installed_vllm(section)
        self._cluster = ray_cluster.Cluster(section, num_replicas=count, uses_gpus=not installation.is_cpu)
        self._replicas = [_Replica(number) for number in range(count)]
        logger.info(
            "Starting %d vLLM engine(s), version %s, while the trainer loads",
            len(self._replicas),
            installation.version,
        )
        for replica in self._replicas:
            self._launch(replica)

    # ---- rollouts ----

    def generate(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`."""
        return self.submit(prompts, sampling, seed=seed, progress=progress)()

    def submit(
        self, prompts: Sequence[Prompt], sampling: SamplingParams, *, seed: int, progress: str = ""
    ) -> Callable[[], list[RolloutGroup]]:
        """See `RolloutEngine.submit`."""
        assert self._version >= 0, "load_weights comes before submit"
        assert not self._asleep, "load_weights wakes the engine, and comes before submit"
        pending = PendingRollouts(self, prompts, sampling, seed, progress)
        self._pending.append(pending)
        return pending.result

    def ask(self, replica: int, requests: list[Any], sampling: SamplingParams) -> Any:
        """Sends requests to a replica; a Ray generator of its answers."""
        actor = self._replicas[replica].actor
        generate = actor.generate.options(num_returns="streaming")
        return generate.remote(requests, sampling, self._stop_token_ids)

    def lives(self, replica: int) -> int:
        """How many actors the replica has had: answers of an earlier one are not to be waited for."""
        return self._replicas[replica].lives

    def bury(self, replica: int) -> None:
        """Makes sure that an engine that failed is dead; the next push starts it anew."""
        self._cluster.kill(self._replicas[replica].actor)

    def to_group(self, prompt: Prompt, answer: dict[str, Any]) -> RolloutGroup:
        """Decodes an answer of `EngineActor.generate`.

        Raises: EngineError: it was aborted, or weights changed while it was sampled and that is not allowed.
        """
        first, last = answer["versions"]
        if "abort" in answer["finish_reasons"]:
            raise EngineError(f"prompt {prompt.prompt_id} was aborted within the engine")
        if first != last and self._section.update_weights != "during":
            raise EngineError(
                f"prompt {prompt.prompt_id} was sampled with weights of versions {first} to {last}"
            )
        ends = np.cumsum(answer["lengths"])[:-1]
        ids = [part.tolist() for part in np.split(answer["token_ids"], ends)]
        logprobs = [part.tolist() for part in np.split(answer["logprobs"], ends)]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        completions = tuple(
            Completion(tuple(i), tuple(lp), text, reason, first)
            for i, lp, text, reason in zip(ids, logprobs, texts, answer["finish_reasons"], strict=True)
        )
        return RolloutGroup(prompt, completions)

    # ---- weights ----

    def load_weights(self, params: Params, version: int) -> None:
        """See `RolloutEngine.load_weights`. Waits for rollouts under way, unless weights may change during them.

        Raises:
            WeightSyncError: the weights did not arrive as they were sent.
            EngineError: an engine cannot be started (again).
        """
        if self._section.update_weights != "during":
            for pending in self._pending:
                # The old weights may be gone: engines that die now are revived with the new ones.
                pending.collect(revive=False)
        self._params, self._version = params, version
        self._ensure_started()
        self._push_until_taken()
        for pending in self._pending:
            pending.ask_again()

    def _push_until_taken(self) -> None:
        """Wakes the engines and pushes; engines that are dead, or die, are started anew."""
        while True:
            try:
                if self._asleep:
                    self._get([r.actor.wake_up.remote() for r in self._replicas], "wake_up")
                self._push()
                self._asleep = False
                return
            except ray_cluster.dead_errors() as error:
                self._restart_dead(error)

    def _push(self) -> None:
        """Sends the present weights to every replica and compares checksums."""
        sender, timeout_s = self._open_sender(), self._section.timeout_s
        self._get([r.actor.prepare_relay.remote() for r in self._replicas if not r.is_local], "prepare_relay")
        sender.reset()
        calls = [r.actor.push.remote(self._version, timeout_s) for r in self._replicas]
        blocks: list[jax.Array] = []

        def flats() -> Any:
            for _, flat, sums in pack_buckets(self._params, self._plan, self._mesh):
                sums.copy_to_host_async()
                blocks.append(sums)
                yield flat
                del flat  # before the next one is made

        sender.send(flats(), self._watch(calls, "did not take the weights"))
        layout = self._plan.layout
        sent = [
            piece_checksums(np.asarray(sums), pieces)
            for sums, pieces in zip(blocks, layout.buckets, strict=True)
        ]
        received = self._get(calls, "push")
        for workers in received:
            for checksums in workers:
                compare_checksums(layout, sent, checksums)

    def _watch(self, calls: Sequence[Any], failure: str) -> Callable[[], None]:
        """A check for waits that depend on remote calls: raises what one of them raised, and when time is over."""
        import ray

        end = time.monotonic() + self._section.timeout_s

        def check() -> None:
            done, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
            ray.get(done)
            if time.monotonic() > end:
                raise ray_cluster.TimedOut(f"an engine {failure} within {self._section.timeout_s:g} s")

        return check

    def _open_sender(self) -> Any:
        """The trainer's end of the transport; opened anew when an engine was replaced."""
        import ray

        if self._sender is not None:
            return self._sender
        section, layout, transport = self._section, self._plan.layout, self._transport
        workers = section.tensor_parallel_size
        local = [r for r in self._replicas if r.is_local]
        relays = [
            lambda number, bucket, actor=r.actor: actor.relay.remote(number, bucket, section.timeout_s)
            for r in self._replicas
            if not r.is_local
        ]
        sender = make_sender(transport, layout, self._mesh, num_local=len(local) * workers,
                             num_workers=len(self._replicas) * workers, relays=relays)  # fmt: skip
        self._sender = sender  # from here on a failure closes it
        readers = iter(range(0, len(self._replicas) * workers, workers))
        calls = []
        for replica in self._replicas:
            is_relayed = transport == "host" and not replica.is_local
            link = None if is_relayed else sender.link(next(readers))
            calls.append(replica.actor.connect.remote(transport, link, layout.to_dict()))
        if transport == "nccl":
            sender.connect(self._watch(calls, "did not join the trainer's group"))
        try:
            self._get(calls, "connect")
        except ray.exceptions.RayTaskError as error:
            if ray_cluster.is_dead(error):
                raise
            # It would fail the same way each time.
            raise EngineError(
                f"engine cannot take the weights: {ray_cluster.root_cause(error, 0)[0]}"
            ) from error
        sender.connected()
        logger.info(
            "weights go to the engine(s) by %s, %d buckets of at most %d MiB",
            transport, len(layout.buckets), -(-layout.bucket_bytes // 2**20),
        )  # fmt: skip
        return sender

    # ---- life and death ----

    def _launch(self, replica: _Replica) -> None:
        replica.lives += 1
        replica.actor = self._cluster.make_actor(replica.number)
        port = self._section.api_port if replica.number == 0 else 0
        replica.started = replica.actor.start.remote(self._options, port)

    def _ensure_started(self) -> None:
        """Waits for engines that are still starting, and says so now and then."""
        import ray

        for replica in [r for r in self._replicas if r.started is not None]:
            begin = last = time.monotonic()
            while not ray.wait([replica.started], timeout=WAIT_S)[0]:
                now = time.monotonic()
                if now - begin > self._section.start_timeout_s:
                    limit = self._section.start_timeout_s
                    raise EngineError(
                        f"engine {replica.number} was not ready within {limit:g} s (rollout.start_timeout_s)"
                    )
                if now - last > PROGRESS_S:
                    last = now
                    logger.info(
                        "  engine %d is still starting, %.0f s (one or two minutes are usual, more at first)",
                        replica.number, now - begin,
                    )  # fmt: skip
            try:
                about = ray.get(replica.started)
            except Exception as error:
                raise EngineError(ray_cluster.explain_start(error, self._pid_of(replica))) from error
            replica.started, replica.pid = None, self._pid_of(replica)
            replica.is_local = ray.get(replica.actor.node_id.remote()) == self._cluster.node_id
            logger.info("engine %d is ready: vLLM %s on %s", replica.number, about["vllm"], about["device"])

    def _pid_of(self, replica: _Replica) -> int:
        """Of an engine that may not have started; 0 if it cannot be asked."""
        import ray

        try:
            return ray.get(replica.actor.pid.remote(), timeout=10)
        except ray.exceptions.RayError:
            return 0

    def restart(self, numbers: Sequence[int], error: Exception) -> None:
        """Starts replicas anew and gives all of them the present weights.

        Raises: EngineError: one of them has been restarted too often.
        """
        for number in numbers:
            replica = self._replicas[number]
            replica.restarts += 1
            cause, log = ray_cluster.root_cause(error, replica.pid)
            if replica.restarts > self._section.max_restarts:
                raise EngineError(
                    f"engine {number} failed {replica.restarts} time(s) (rollout.max_restarts="
                    f"{self._section.max_restarts}), the last time with: {cause} (log: {log})"
                ) from error
            logger.warning("engine %d failed and is started again: %s (log: %s)", number, cause, log)
            self._cluster.kill(replica.actor)
            self._launch(replica)
        self._close_sender()
        self._ensure_started()

    def revive(self, numbers: Sequence[int], error: Exception) -> None:
        """`restart`, and a push, so that the replicas can answer again."""
        self.restart(numbers, error)
        self._push_until_taken()

    def _restart_dead(self, error: Exception) -> None:
        numbers = [r.number for r in self._replicas if not self._cluster.is_alive(r.actor)]
        # All live, and yet a push failed: nobody knows in what state their weights are.
        self.restart(numbers or [r.number for r in self._replicas], error)

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`; only where `rollout.sleep` asks for it."""
        if self._section.sleep and not self._asleep:
            self._ensure_started()
            try:
                self._get([r.actor.sleep.remote() for r in self._replicas], "sleep")
            except ray_cluster.dead_errors() as error:  # the next push will start it anew
                logger.warning("an engine did not go to sleep: %s", ray_cluster.root_cause(error, 0)[0])
            self._asleep = True

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._close_sender()
        self._cluster.close([r.actor for r in self._replicas])

    def _close_sender(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None

    def _get(self, calls: Sequence[Any], what: str) -> list[Any]:
        import ray

        try:
            return ray.get(list(calls), timeout=self._section.timeout_s) if calls else []
        except ray.exceptions.GetTimeoutError:
            limit = self._section.timeout_s
            raise ray_cluster.TimedOut(f"an engine did not answer {what} within {limit:g} s") from None

    def forget(self, pending: PendingRollouts) -> None:
        self._pending.remove(pending)

    def pids(self) -> list[int]:
        """Process ids of the engines, on their hosts."""
        return [replica.pid for replica in self._replicas]

    @property
    def num_engines(self) -> int:
        return len(self._replicas)

    @property
    def timeout_s(self) -> float:
        return self._section.timeout_s


def plan_engines(section: RolloutSection, mesh: Mesh) -> tuple[str, int]:
    """Transport and number of the engines on the devices that there are.

    Raises: ConfigError: see `choose_transport` and `num_replicas`.
    """
    trainer, engine_on_gpu = jax.default_backend(), not installed_vllm(section).is_cpu
    transport = choose_transport(section, trainer=trainer, engine_on_gpu=engine_on_gpu)
    return transport, num_replicas(section, mesh, share_gpus=engine_on_gpu and trainer == "gpu")


def num_replicas(section: RolloutSection, mesh: Mesh, *, share_gpus: bool) -> int:
    """`rollout.num_replicas`, or as many engines as the trainer's GPUs hold.

    Args:   share_gpus: trainer and engine both run on GPUs.
    Raises: ConfigError: the trainer's GPUs, which the engines are to share, are fewer.
    """
    if section.placement == "separate" or not share_gpus:
        return max(1, section.num_replicas)
    gpus, size = mesh.devices.size, section.tensor_parallel_size
    wanted = max(1, section.num_replicas) * size
    if wanted > gpus and not section.ray_address:
        key = "rollout.num_replicas" if section.num_replicas else "rollout.tensor_parallel_size"
        value = section.num_replicas or size
        raise ConfigError(
            key, value, f"asks for {wanted} GPUs (tensor_parallel_size={size}); the trainer has {gpus}"
        )
    return section.num_replicas or max(1, gpus // size)


def graph_sizes(max_num_seqs: int) -> list[int]:
    """Numbers of tokens to capture CUDA graphs for; the sequences of a step are padded to one of them.

    vLLM's own end at 512: more sequences than that are launched kernel by kernel, which takes twice as long a
    token. Below, its own are twice as many; fewer start sooner, at the price of up to a quarter of padding in
    small steps, which wait for the weights to be read anyway, and an eighth in large ones.
    """
    last = max(max_num_seqs, min(2 * max_num_seqs, 512))  # beyond max_num_seqs: steps that read prompts too
    steps = [*range(8, 64, 8), *range(64, 128, 16), *range(128, 512, 32), *range(512, last, 64)]
    return sorted({*(size for size in (1, 2, 4, *steps) if size < last), max_num_seqs, last})


def engine_options(section: RolloutSection, folder: ModelFolder, max_model_len: int) -> dict[str, Any]:
    """Fields of vLLM's `AsyncEngineArgs` that follow from the configuration; `rollout.engine_args` come last."""
    import ast

    options: dict[str, Any] = {
        "model": str(folder.path.absolute()),
        "dtype": str(np.dtype(folder.config.dtype)),
        "max_model_len": max_model_len,
        "max_num_seqs": section.max_num_seqs,
        "tensor_parallel_size": section.tensor_parallel_size,
        "gpu_memory_utilization": section.gpu_memory_utilization,
        "enforce_eager": section.enforce_eager,
        "enable_sleep_mode": section.sleep,
        "enable_prefix_caching": True,
        "seed": 0,
    }
    if section.tensor_parallel_size > 1:
        # Workers beside the actor, and not actors of their own.
        options["distributed_executor_backend"] = "mp"
    for argument in section.engine_args:
        name, _, value = argument.partition("=")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            options[name] = value  # a bare word
    most = options["max_num_seqs"]
    options.setdefault("max_num_batched_tokens", max(MIN_BATCHED_TOKENS, max_model_len, most))
    if not options["enforce_eager"] and not OWN_GRAPHS & options.keys():
        options["cudagraph_capture_sizes"] = graph_sizes(most)
    return options
