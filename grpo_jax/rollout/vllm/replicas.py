"""Life and death of the engines, one Ray actor each, and remote calls to them that end in time."""

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from grpo_jax.config import RolloutSection
from grpo_jax.rollout.base import EngineError, SamplingParams
from grpo_jax.rollout.vllm.check import VllmInstallation
from grpo_jax.rollout.vllm.cluster import Cluster, explain_start, root_cause
from grpo_jax.rollout.vllm.crew import Crew
from grpo_jax.rollout.vllm.processes import end
from grpo_jax.rollout.vllm.server import Request

logger = logging.getLogger(__name__)

POLL_S = 0.5  # between two looks at an engine that is starting
PROGRESS_S = 20.0  # between two lines that say that an engine is still starting
SCHEDULER_LINE = (
    "vLLM's own scheduler is used: %s. It takes two to three times as much Python for each token, which small "
    "models with hundreds of sequences notice (docs/rollouts.md, 'Less to do for each token')"
)
HEALTH_S = 30.0  # for vLLM's own process to answer; it may be within a step
ANSWER_S = 10.0  # for an actor to answer what needs no vLLM, and for an answer that is there to arrive


class TimedOut(RuntimeError):
    """An engine did not answer in time."""


def call_errors() -> tuple[type[Exception], ...]:
    """What a remote call raises: the engine or its process is broken or gone, or did not answer in time."""
    import ray

    return (ray.exceptions.RayError, TimedOut)


def is_refusal(error: Exception) -> bool:
    """True where a living engine raised the error: a new one would do so too."""
    import ray

    return isinstance(error, ray.exceptions.RayTaskError) and "EngineDead" not in str(error)


@dataclasses.dataclass
class Replica:
    """One engine. A restart fills in a new actor."""

    number: int
    actor: Any = None
    """Ray's handle of an `EngineActor`."""
    starting: Any = None
    """The call of `EngineActor.start`; None once it has returned."""
    pid: int = 0
    """Of the actor's process; 0 until it is ready."""
    processes: dict[int, int] = dataclasses.field(default_factory=dict)
    """See `processes.family`."""
    is_local: bool = True
    """On this process's host."""
    place: int = 0
    """The process of the run that it is beside."""
    num_restarts: int = 0


class AnswerStream(Iterator[tuple[int, dict[str, Any]]]):
    """What one engine answers to its requests, in the order in which they finish: see `EngineActor.generate`."""

    def __init__(self, replica: Replica, answers: Any):
        """Args: answers: Ray's generator of them."""
        self._replica, self._num_restarts = replica, replica.num_restarts
        self.answers = answers

    @property
    def number(self) -> int:
        """Of the engine."""
        return self._replica.number

    @property
    def is_stale(self) -> bool:
        """True once the engine was restarted: the new one knows nothing of the requests."""
        return self._num_restarts != self._replica.num_restarts

    def __next__(self) -> tuple[int, dict[str, Any]]:
        """Waits for the next answer. Raises one of `call_errors` where the engine fails."""
        import ray

        try:
            return ray.get(next(self.answers), timeout=ANSWER_S)
        except ray.exceptions.GetTimeoutError:
            raise TimedOut(f"an engine's answer did not arrive within {ANSWER_S:g} s") from None


def wait_for_answers(streams: Iterable[AnswerStream], timeout_s: float) -> list[AnswerStream]:
    """Returns the streams that have an answer, or have ended, as soon as there is one; [] after `timeout_s`."""
    import ray

    by_id = {id(stream.answers): stream for stream in streams}
    ready, _ = ray.wait([stream.answers for stream in by_id.values()], timeout=timeout_s)
    return [by_id[id(answers)] for answers in ready]


class Replicas:
    """The engines, in the order of their numbers. `close` them at the end."""

    def __init__(
        self,
        section: RolloutSection,
        options: dict[str, Any],
        *,
        num_replicas: int,
        installation: VllmInstallation,
        crew: Crew | None = None,
    ):
        """Launches the engines, which go on starting when this returns.

        Args:
            options: fields of vLLM's `AsyncEngineArgs`.
            installation: the vLLM of the engines.
            crew: all processes of the run; None: there are no others.
        """
        self._section, self._options, self._crew = section, options, crew
        self._version = installation.version.partition("+")[0]
        uses_gpus = not installation.is_cpu
        self._cluster = Cluster(section, num_replicas=num_replicas, uses_gpus=uses_gpus, crew=crew)
        self._replicas = [Replica(number, place=place) for number, place in enumerate(self._cluster.places)]
        text = "Starting %d vLLM engine(s), version %s, while the trainer loads"
        logger.info(text, num_replicas, installation.version)
        for replica in self._replicas:
            self._launch(replica)

    def __iter__(self) -> Iterator[Replica]:
        return iter(self._replicas)

    def __len__(self) -> int:
        return len(self._replicas)

    # ---- life and death ----

    def wait_until_ready(self) -> None:
        """Waits for engines that are still starting, and logs now and then that it does.

        Raises:
            EngineError: one cannot start, or is not ready within `rollout.start_timeout_s`.
        """
        for replica in self._starting():
            self._wait_for_start(replica)

    def restart(self, numbers: Iterable[int], error: Exception) -> None:
        """Kills engines that have failed with `error`, and waits for new ones. A start that fails is tried again.

        Raises:
            EngineError: one has failed more often than `rollout.max_restarts`, or Ray has died.
        """
        failed = dict.fromkeys(numbers, error)
        while failed:
            self._cluster.check()
            for number, cause in failed.items():
                self._relaunch(self._replicas[number], cause)
            failed = {}
            for replica in self._starting():
                try:
                    self._wait_for_start(replica)
                except EngineError as again:
                    failed[replica.number] = again

    def _relaunch(self, replica: Replica, error: Exception) -> None:
        replica.num_restarts += 1
        cause, log = root_cause(error, replica.pid)
        if replica.num_restarts > self._section.max_restarts:
            raise EngineError(
                f"engine {replica.number} failed {replica.num_restarts} time(s) (rollout.max_restarts="
                f"{self._section.max_restarts}), the last time with: {cause} (log: {log})"
            ) from error
        logger.warning("engine %d failed and is started again: %s (log: %s)", replica.number, cause, log)
        self.kill(replica.number)
        self._launch(replica)

    def kill(self, number: int) -> None:
        """Ends an engine, whether or not it still answers."""
        replica = self._replicas[number]
        self._cluster.kill(replica.actor)
        self._end(replica)

    def sick(self, timeout_s: float = HEALTH_S) -> list[int]:
        """Numbers of the engines of which vLLM's own process is gone, or does not answer in time."""
        calls = [replica.actor.check_health.remote(timeout_s) for replica in self._replicas]
        failures = self.failures(calls, timeout_s)
        return [replica.number for replica, failure in zip(self, failures, strict=True) if failure]

    def close(self) -> None:
        """Ends all engines, and Ray if it was started for them."""
        self._cluster.close([replica.actor for replica in self._replicas])
        for replica in self._replicas:
            self._end(replica)

    def _end(self, replica: Replica) -> None:
        """Ends what is left of an engine: vLLM's own processes outlive an actor that was killed."""
        if replica.place and self._crew is not None:
            processes = list(replica.processes.items())
            self._crew.ask("end_engine", rank=replica.place, processes=processes)
        elif replica.is_local:
            end(replica.processes)

    def _starting(self) -> list[Replica]:
        return [replica for replica in self._replicas if replica.starting is not None]

    def _launch(self, replica: Replica) -> None:
        replica.actor, replica.pid, replica.processes = self._cluster.make_actor(replica.number), 0, {}
        port = self._section.api_port if replica.number == 0 else 0
        replica.starting = replica.actor.start.remote(self._options, port)

    def _wait_for_start(self, replica: Replica) -> None:
        import ray

        try:
            self._watch_start(replica)
            about = ray.get(replica.starting, timeout=ANSWER_S)
        except ray.exceptions.RayError as error:
            raise EngineError(explain_start(error, self._pid_of(replica), self._version)) from error
        finally:
            replica.starting = None
        replica.is_local = about["node_id"] == self._cluster.node_id
        replica.pid = next(iter(about["processes"]))
        replica.processes = about["processes"]
        logger.info("engine %d is ready: vLLM %s on %s", replica.number, about["vllm"], about["device"])
        if about["why_not_our_scheduler"] and replica.number == 0:
            logger.warning(SCHEDULER_LINE, about["why_not_our_scheduler"])

    def _watch_start(self, replica: Replica) -> None:
        """Waits until the start has ended, and logs now and then that it has not."""
        import ray

        begin = last = time.monotonic()
        limit = self._section.start_timeout_s
        while not ray.wait([replica.starting], timeout=POLL_S)[0]:
            now = time.monotonic()
            if now - begin > limit:
                raise EngineError(
                    f"engine {replica.number} was not ready within {limit:g} s (rollout.start_timeout_s)"
                )
            if now - last > PROGRESS_S:
                last = now
                logger.info(
                    "  engine %d is still starting, %.0f s (one or two minutes are usual, more at first)",
                    replica.number, now - begin,
                )  # fmt: skip

    def _pid_of(self, replica: Replica) -> int:
        """The process id of an engine that may not have started; 0 if it does not answer."""
        import ray

        try:
            return ray.get(replica.actor.pid.remote(), timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return 0

    # ---- remote calls ----

    def ask(
        self, number: int, requests: list[Request], sampling: SamplingParams, stop_token_ids: tuple[int, ...]
    ) -> AnswerStream:
        """Sends requests to an engine and returns at once."""
        replica = self._replicas[number]
        generate = replica.actor.generate.options(num_returns="streaming")
        return AnswerStream(replica, generate.remote(requests, sampling, stop_token_ids))

    def results(self, calls: Sequence[Any], method: str) -> list[Any]:
        """Waits for calls of `method`, at most `rollout.timeout_s`. Raises one of `call_errors`."""
        import ray

        limit = self._section.timeout_s
        try:
            return ray.get(list(calls), timeout=limit)
        except ray.exceptions.GetTimeoutError:
            raise TimedOut(f"an engine did not answer {method} within {limit:g} s") from None

    def failures(self, calls: Sequence[Any], timeout_s: float) -> list[Exception | None]:
        """Waits for calls, and returns what each has raised; a `TimedOut` for one that has not ended in time."""
        import ray

        done = set(ray.wait(list(calls), num_returns=len(calls), timeout=timeout_s + ANSWER_S)[0])
        found: list[Exception | None] = []
        for call in calls:
            try:
                if call not in done:
                    raise TimedOut(f"an engine did not answer within {timeout_s:g} s")
                ray.get(call, timeout=ANSWER_S)
                found.append(None)
            except call_errors() as error:
                found.append(error)
        return found

    def silence(self, number: int) -> float:
        """Seconds since an engine finished a request of whatever batch; infinite where it has none or is mute."""
        import ray

        try:
            return ray.get(self._replicas[number].actor.silence.remote(), timeout=ANSWER_S)
        except ray.exceptions.RayError:
            return math.inf

    def make_check(self, failure: str, calls: Sequence[Any] = ()) -> Callable[[], None]:
        """Returns a function to be called while waiting for engines.

        It raises what one of `calls` has raised, and after `rollout.timeout_s` a `TimedOut` that says `failure`.
        """
        import ray

        limit = self._section.timeout_s
        end = time.monotonic() + limit

        def check() -> None:
            done = ray.wait(list(calls), num_returns=len(calls), timeout=0)[0] if calls else []
            ray.get(done, timeout=ANSWER_S)
            if time.monotonic() > end:
                raise TimedOut(f"an engine {failure} within {limit:g} s")

        return check
