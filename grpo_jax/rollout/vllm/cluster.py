"""Ray around the engines: a cluster with a place for each, and the causes of their failures in one line."""

import contextlib
import json
import logging
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError, RolloutSection
from grpo_jax.rollout.base import EngineError
from grpo_jax.rollout.remedies import RECOMMENDED, find_remedy
from grpo_jax.rollout.vllm.check import python_is_ours
from grpo_jax.rollout.vllm.crew import Crew
from grpo_jax.rollout.vllm.devices import engine_gpus
from grpo_jax.rollout.vllm.local_ray import END_S, TOKEN, LocalRay
from grpo_jax.weight_sync.wire import WeightSyncError, call_in_thread, deadline_check

logger = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[3]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the model's folder has all files
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; without it vLLM takes nearly all memory on a CPU
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # without it vLLM pins itself to a core that the trainer uses
}
"""Environment variables of the engines. What the trainer's environment sets wins."""

NOTICE_S = 3.0
"""Until Ray's head has noticed the death of another of its processes."""

LESS_MEMORY = "lower rollout.gpu_memory_utilization"
MORE_MEMORY = "raise rollout.gpu_memory_utilization, or shorten data.max_*_length"
OTHER_ENGINE = "this GPU is not supported by the installed vLLM; choose rollout.engine=local"
START_REMEDIES = (
    ("less than desired GPU memory utilization", LESS_MEMORY + ", or stop what else uses the GPU"),
    ("No available memory for the cache blocks", MORE_MEMORY),
    ("larger than the available KV cache memory", MORE_MEMORY),
    ("out of memory", LESS_MEMORY + ", rollout.max_num_seqs or XLA_PYTHON_CLIENT_MEM_FRACTION"),
    ("no kernel image is available", OTHER_ENGINE),
    ("compute capability", OTHER_ENGINE),
    ("address already in use", "choose another rollout.api_port"),
    ("unexpected keyword argument", "a name in rollout.engine_args is not one of vLLM's engine arguments"),
    ("multiple values for keyword argument", "rollout.engine_args names an argument that grpo_jax sets itself"),
    ("No module named", "install what is missing in the engine's environment (rollout.python)"),
)  # fmt: skip
"""(part of vLLM's message when it cannot start, what to do about it)"""

EXCEPTION = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception)\b: .*")
REFERS_ELSEWHERE = re.compile(
    r"\b(trace|cause|log)\b.* above|\(above\)|EngineDeadError|^ray\.|Ray(Task|Actor)Error"
)
"""Messages that do not name the cause themselves."""


class Cluster:
    """Ray, and a place in it for each engine."""

    def __init__(
        self, section: RolloutSection, *, num_replicas: int, uses_gpus: bool, crew: Crew | None = None
    ):
        """Starts Ray or joins a cluster that runs, and reserves the places.

        Args: crew: all processes of the run; None: there are no others.
        Raises:
            ConfigError: the cluster `rollout.ray_address` cannot be reached.
            EngineError: Ray does not start, or has not enough CPUs or GPUs.
        """
        self._section, self._num_replicas, self._is_ours = section, num_replicas, False
        self._crew = crew if crew is not None and crew.is_spread else None
        self.places = [0] * num_replicas if self._crew is None else self._crew.places(num_replicas)
        """The process of the run that each engine is beside."""
        self._ray: LocalRay | None = None
        self._links: tempfile.TemporaryDirectory | None = None
        self._gpus = section.tensor_parallel_size if uses_gpus else 0
        self._connect()
        import ray

        self.node_id = ray.get_runtime_context().get_node_id()
        self._group = self._reserve()

    def _connect(self) -> None:
        if "ray" in sys.modules and sys.modules["ray"].is_initialized():
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Otherwise Ray hides the GPUs from actors that ask for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        address = self._section.ray_address
        if not address:
            self._ray = self._start()
            if self._crew is not None:
                self._gather_nodes(self._crew, self._ray)
        import ray

        where = self._ray.address if self._ray else address
        try:
            with _own_signals():
                ray.init(where, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            if self._ray:
                self._ray.close()
                raise EngineError(f"Ray was started, but cannot be joined: {_first_line(error)}") from error
            rule = (
                f"this cluster cannot be reached ({_first_line(error)}); one with a token wants "
                "RAY_AUTH_MODE=token and the token here too; rollout.ray_address='' starts a new one"
            )
            raise ConfigError("rollout.ray_address", address, rule) from error
        self._is_ours = True

    def _start(self) -> LocalRay:
        # Otherwise Ray ends an engine once 95 % of the host's memory is taken. The trainer's offloaded state may
        # take that much.
        os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
        own = self._resources(0)
        options = {"num_cpus": own["CPU"], "resources": own["others"], "include_dashboard": False}
        if self._gpus:
            options["num_gpus"] = own["GPU"]
        gpus = engine_gpus(self._section) if self._gpus else ""
        host = self._crew.channel.address if self._crew is not None else ""
        return LocalRay(options, gpus=gpus, timeout_s=self._section.start_timeout_s, host=host)

    @property
    def own_ray(self) -> LocalRay | None:
        """The Ray that was started here; None: a cluster was joined."""
        return self._ray

    def _resources(self, process: int) -> dict[str, Any]:
        """What Ray may hand out beside a process of the run, whose own use of its GPUs Ray does not count."""
        count = self.places.count(process)
        cpus = max(os.cpu_count() or 1, count)
        return {"CPU": cpus, "GPU": self._gpus * count, "others": {place_of(process): count} if count else {}}

    def _gather_nodes(self, crew: Crew, head: LocalRay) -> None:
        """Has the hosts of the other processes that have engines join."""
        options = {}
        for process in sorted(set(self.places) - {0}):
            own = self._resources(process)
            options[str(process)] = [
                f"--num-cpus={own['CPU']}",
                f"--num-gpus={own['GPU']}",
                f"--resources={json.dumps(own['others'])}",
            ]
        if not options:
            return
        about: dict[str, Any] = {"token": os.environ[TOKEN], "folder": str(head.folder)}
        try:
            crew.ask("join_ray", address=head.address, options=options, **about)
        except WeightSyncError as error:
            head.close()
            raise EngineError(f"a host has not joined Ray: {error}") from error

    def check(self) -> None:
        """To be called when an engine has failed. Raises: EngineError: Ray itself has died."""
        if self._ray is not None:
            self._ray.check(NOTICE_S)
        if self._crew is not None:
            try:
                self._crew.ask("check_ray", timeout_s=NOTICE_S)
            except WeightSyncError as error:
                raise EngineError(str(error)) from error

    def _reserve(self) -> Any:
        """Returns a placement group with a bundle for each replica."""
        import ray
        from ray.util.placement_group import placement_group

        bundle = {"CPU": 1.0} | ({"GPU": float(self._gpus)} if self._gpus else {})
        at = lambda process: {place_of(process): 1.0} if self._ray is not None else {}
        group = placement_group([bundle | at(process) for process in self.places], strategy="PACK")
        if not group.wait(30):
            have = ray.cluster_resources()
            raise EngineError(
                f"Ray has no place for {self._num_replicas} engine(s) of {bundle} each: the cluster has "
                f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; lower rollout.num_replicas or "
                "rollout.tensor_parallel_size, or end other jobs of this cluster"
            )
        return group

    def make_actor(self, number: int) -> Any:
        """Creates the actor of replica `number`. Its process starts in the background."""
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from grpo_jax.rollout.vllm.server import EngineActor

        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number)
        options = {
            "num_cpus": 1,
            "num_gpus": self._gpus,
            "scheduling_strategy": strategy,
            "runtime_env": self._runtime_env(),
            "max_concurrency": 1000,
        }
        return ray.remote(EngineActor).options(**options).remote()

    def _runtime_env(self) -> dict[str, Any]:
        variables = {name: os.environ.get(name, value) for name, value in ENVIRONMENT.items()}
        if python_is_ours(self._section):
            old = os.environ.get("PYTHONPATH")
            variables["PYTHONPATH"] = os.pathsep.join([str(PACKAGE_ROOT), *([old] if old else [])])
            return {"env_vars": variables}
        # The engine's environment gets this package and nothing else of the trainer's.
        if self._links is None:
            self._links = tempfile.TemporaryDirectory(prefix="grpo_jax-")
            (Path(self._links.name) / "grpo_jax").symlink_to(PACKAGE_ROOT / "grpo_jax")
        variables["PYTHONPATH"] = self._links.name
        return {"env_vars": variables, "py_executable": str(Path(self._section.python).absolute())}

    def kill(self, actor: Any) -> None:
        """Ends an actor and its processes, whether or not they still answer."""
        import ray

        with contextlib.suppress(Exception):
            ray.get(actor.stop.remote(), timeout=10)
        with contextlib.suppress(Exception):
            ray.kill(actor)

    def close(self, actors: list[Any]) -> None:
        """Ends the actors, and Ray if this object has started it."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        # Of one that has died, all calls would wait until their time is up.
        is_alive = self._ray is None or self._ray.is_alive
        if is_alive:
            for actor in actors:
                self.kill(actor)
            _in_time("Ray's word that the places are free", lambda: remove_placement_group(self._group))
        if self._is_ours:
            _in_time("Ray's end", ray.shutdown)
        if self._ray is not None:
            self._ray.close()
        if self._links is not None:
            self._links.cleanup()


def place_of(process: int) -> str:
    """Ray's name for a place beside a process of the run."""
    return f"process_{process}"


def _in_time(what: str, call: Callable[[], Any]) -> None:
    """Calls, and goes on after `END_S` or an error: for ends, which nothing is to hold up."""
    try:
        call_in_thread(call, deadline_check(END_S, f"{what} has not come"))
    except WeightSyncError as error:  # of the deadline
        logger.warning("%s, and is waited for no longer.", error)
    except Exception as error:
        logger.debug("%s failed: %s", what, error)


@contextlib.contextmanager
def _own_signals() -> Any:
    """Keeps the handler of SIGTERM, which Ray would replace, and hides JAX's warning of a fork.

    Ray's handler dumps stacks. The warning is about children that go on as Python; Ray's start other programs.
    """
    old = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, old)


def explain_start(error: Exception, pid: int, vllm: str = RECOMMENDED) -> str:
    """Says in one line why vLLM did not start, and what to do.

    Args:
        pid: of the engine's process; 0 if it is not known.
        vllm: the version of the engine.
    """
    cause, log = root_cause(error, pid)
    for part, remedy in START_REMEDIES:
        if part.lower() in f"{error} {cause}".lower():
            return f"vLLM did not start: {cause}; {remedy} (log: {log})"
    if known := find_remedy(cause, vllm=vllm):
        mend = f"{known.what}: in the engine's environment, {known.mend}"
        return f"vLLM did not start: {cause}; {mend} (log: {log})"
    return f"vLLM did not start: {cause} (log: {log})"


def root_cause(error: Exception, pid: int = 0) -> tuple[str, str]:
    """Returns (what went wrong with an engine, in one line; where its log is).

    vLLM's own processes write the cause to their log and then fail with "see above", so the log is searched too.

    Args:
        pid: of the engine's process; 0 if it is not known.
    """
    said, log = str(error).splitlines(), "that of the Ray worker, on its host"
    reason = next((line.strip() for line in reversed(said) if line.strip()), type(error).__name__)
    for _ in range(5):
        sources = [(text.read_text(errors="replace").splitlines()[-5000:], str(text)) for text in _logs(pid)]
        log = sources[-1][1] if sources else log
        found = [
            (match.group(), where)
            for lines, where in [(said, log), *sources]
            for line in lines
            if (match := EXCEPTION.search(line))
        ]
        causes = [(text, where) for text, where in found if not REFERS_ELSEWHERE.search(text)]
        if causes or not sources:
            break
        time.sleep(0.5)  # what a process wrote as it ended may not be in its log yet
    reason, log = [(reason, log), *found[:1], *causes[-1:]][-1]
    return reason.removeprefix("grpo_jax.rollout.base.EngineError: ")[:400], log


def _logs(pid: int) -> list[Path]:
    """The files with what process `pid` and its children printed."""
    return sorted(_session_logs().glob(f"worker-*-{pid}.*")) if pid else []


def _session_logs() -> Path:
    """The logs of the session that this process has joined, as far as they are on this host."""
    worker = sys.modules.get("ray._private.worker")
    node = getattr(worker, "_global_node", None)
    return Path(node.get_logs_dir_path() if node else "/tmp/ray/session_latest/logs")


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
