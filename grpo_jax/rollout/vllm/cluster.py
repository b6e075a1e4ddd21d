"""Ray around the engines: a cluster to run them in, their actors, and what their failures mean."""

import contextlib
import functools
import logging
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from grpo_jax.config import ConfigError, RolloutSection
from grpo_jax.rollout.base import EngineError
from grpo_jax.rollout.vllm.check import python_is_ours

logger = logging.getLogger(__name__)

PACKAGE_ROOT = Path(__file__).resolve().parents[3]

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # everything is in the model's folder
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; on a CPU vLLM would take nearly all memory
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would pin itself to a core that the trainer uses
}
"""Set for the engines unless the trainer's environment sets them."""

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
"""(part of what vLLM says when it cannot start, what to do about it)"""

EXCEPTION = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception)\b: .*")
UNTELLING = re.compile(r"\b(trace|cause|log)\b.* above|\(above\)|EngineDeadError|^ray\.|Ray(Task|Actor)Error")


class TimedOut(RuntimeError):
    """An engine did not answer in time."""


def dead_errors() -> tuple[type[Exception], ...]:
    """What a call to an engine raises when the engine, or its process, is gone or broken."""
    import ray

    return (ray.exceptions.RayError, TimedOut)


def is_dead(error: Exception) -> bool:
    """True where an error says that vLLM's own process is gone, and not that a call of it was wrong."""
    return "EngineDead" in str(error)


class Cluster:
    """Ray, and a place in it for each replica."""

    def __init__(self, section: RolloutSection, *, num_replicas: int, uses_gpus: bool):
        self._section, self._num_replicas, self._is_ours = section, num_replicas, False
        self._links: tempfile.TemporaryDirectory | None = None
        self._gpus = section.tensor_parallel_size if uses_gpus else 0
        self._connect()
        import ray

        self.node_id = ray.get_runtime_context().get_node_id()
        self._group = self._reserve()

    def _connect(self) -> None:
        import ray

        if ray.is_initialized():
            return
        address = self._section.ray_address
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray would hide the GPUs from the trainer's children that ask for none.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {}
        if not address:
            # Ray would end an engine once 95 % of the host's memory is taken, as by the trainer's offloaded state.
            os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
            # The trainer's process takes no part in Ray's accounts: all GPUs are the engines'.
            options = {"num_cpus": max(os.cpu_count() or 1, self._num_replicas), "include_dashboard": False}
            if self._gpus:
                options["num_gpus"] = self._gpus * self._num_replicas
        try:
            with _visible_gpus(self._section if self._gpus and not address else None), _own_signals():
                ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            rule = (
                f"Ray could not be started or reached ({_first_line(error)}); `ray stop` ends a cluster that was "
                "left over, and rollout.ray_address='' starts a new one"
            )
            raise ConfigError("rollout.ray_address", address, rule) from error
        self._is_ours = True

    def _reserve(self) -> Any:
        """A placement group with a bundle for each replica."""
        import ray
        from ray.util.placement_group import placement_group

        bundle = {"CPU": 1.0} | ({"GPU": float(self._gpus)} if self._gpus else {})
        group = placement_group([bundle] * self._num_replicas, strategy="PACK")
        if not group.wait(30):
            have = ray.cluster_resources()
            raise EngineError(
                f"Ray has no place for {self._num_replicas} engine(s) of {bundle} each: the cluster has "
                f"{have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; lower rollout.num_replicas or "
                "rollout.tensor_parallel_size, or end other jobs of this cluster"
            )
        return group

    def make_actor(self, number: int) -> Any:
        """Creates the actor of a replica; its process starts in the background."""
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
        # The engine's environment gets this package and nothing else of ours.
        if self._links is None:
            self._links = tempfile.TemporaryDirectory(prefix="grpo_jax-")
            (Path(self._links.name) / "grpo_jax").symlink_to(PACKAGE_ROOT / "grpo_jax")
        variables["PYTHONPATH"] = self._links.name
        return {"env_vars": variables, "py_executable": str(Path(self._section.python).absolute())}

    def is_alive(self, actor: Any) -> bool:
        """False once the actor's process is gone."""
        import ray

        try:
            ray.get(actor.node_id.remote(), timeout=10)
        except ray.exceptions.RayError:
            return False
        return True

    def kill(self, actor: Any) -> None:
        """Ends an actor and its processes, however they are."""
        import ray

        with contextlib.suppress(Exception):
            ray.get(actor.stop.remote(), timeout=10)
        with contextlib.suppress(Exception):
            ray.kill(actor)

    def close(self, actors: list[Any]) -> None:
        """Ends the actors, and Ray where it was started here."""
        import ray
        from ray.util.placement_group import remove_placement_group

        if not ray.is_initialized():
            return
        for actor in actors:
            self.kill(actor)
        with contextlib.suppress(Exception):
            remove_placement_group(self._group)
        if self._is_ours:
            ray.shutdown()
        if self._links is not None:
            self._links.cleanup()


@contextlib.contextmanager
def _own_signals() -> Any:
    """Keeps SIGTERM as it was: Ray would take it over, and dump stacks. And hides JAX's warning of its fork.

    The warning is about children that go on as Python; Ray's start other programs at once.
    """
    old = signal.getsignal(signal.SIGTERM)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"os\.fork\(\) was called", category=RuntimeWarning)
            yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def _visible_gpus(section: RolloutSection | None) -> Any:
    """While Ray's processes start: the GPUs that are the engines' (`split_gpus`), and not those of the trainer."""
    is_split = section is not None and section.placement == "separate"
    devices = ",".join(split_gpus(section)[1]) if is_split and section is not None else ""
    old = os.environ.get("CUDA_VISIBLE_DEVICES")
    if devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    try:
        yield
    finally:
        if devices:
            if old is None:
                del os.environ["CUDA_VISIBLE_DEVICES"]
            else:
                os.environ["CUDA_VISIBLE_DEVICES"] = old


@functools.cache
def split_gpus(section: RolloutSection) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """For `rollout.placement`=separate on one host: the GPUs of the trainer, and those of the engines.

    Remembers its first answer: afterwards CUDA_VISIBLE_DEVICES names the trainer's alone.

    Raises: ConfigError: none would be left for the trainer.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [name for name in visible.split(",") if name]
    else:
        devices = [str(i) for i in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    replicas = max(1, section.num_replicas)
    wanted = replicas * section.tensor_parallel_size
    if devices and wanted >= len(devices):
        rule = (
            f"{wanted} GPU(s) for engines (num_replicas={replicas} x tensor_parallel_size="
            f"{section.tensor_parallel_size}) leave none of {len(devices)} for the trainer; choose colocated"
        )
        raise ConfigError("rollout.placement", "separate", rule)
    return tuple(devices[: len(devices) - wanted]), tuple(devices[len(devices) - wanted :])


def explain_start(error: Exception, pid: int) -> str:
    """One line: why vLLM did not start, and what to do."""
    cause, log = root_cause(error, pid)
    for part, remedy in START_REMEDIES:
        if part.lower() in f"{error} {cause}".lower():
            return f"vLLM did not start: {cause}; {remedy} (log: {log})"
    return f"vLLM did not start: {cause} (log: {log})"


def root_cause(error: Exception, pid: int) -> tuple[str, str]:
    """What went wrong with the engine of process `pid`, in one line, and where its log is.

    vLLM's own processes write the reason down and then fail with "see above": it is looked up there.
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
        telling = [(text, where) for text, where in found if not UNTELLING.search(text)]
        if telling or not sources:
            break
        time.sleep(0.5)  # what a process wrote as it ended may not be in its log yet
    reason, log = [(reason, log), *found[:1], *telling[-1:]][-1]
    return reason.removeprefix("grpo_jax.rollout.base.EngineError: ")[:400], log


def _logs(pid: int) -> list[Path]:
    """The files into which Ray sends what process `pid`, and those that it started, print."""
    return sorted(Path("/tmp/ray/session_latest/logs").glob(f"worker-*-{pid}.*")) if pid else []


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:300]
