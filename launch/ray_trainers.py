"""Starts one trainer process on each of several nodes of a Ray cluster, and ends as the first of them does.

    python launch/ray_trainers.py run ADDRESS TRAINERS MODULE [FLAG ...]      ADDRESS: of the cluster, or `auto`
    python launch/ray_trainers.py flags ADDRESS MODULE [FLAG ...]

`run`: each process is the child of an actor, which has all GPUs of its node (or GPUS of them) in Ray's accounts,
so that engines get others. The nodes are those with the resource `trainer` (`ray start --resources`); if there are
none, those with GPUs; else all: this host first, then by address. Nothing is restarted. What the first process
prints is printed here, its exit code is this one's, and SIGTERM and Ctrl-C go to all. Variables of the environment
whose names begin as `PASSED` are set for all; others are those that Ray was started with there.

`flags`: reads the command line as the trainer would, and prints the flags that name the cluster to it, if its
engines are vLLM's.
"""

import contextlib
import ipaddress
import os
import queue
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PASSED = ("JAX_", "XLA_", "TF_CPP_", "NCCL_", "LIBTPU_", "GLOO_", "OMP_", "HF_", "VLLM_", "GRPO_JAX_")
START_S = 120.0
"""For hosts to join, and then for Ray to start the actors: nothing else may have their GPUs."""
GRACE_S = 60.0
"""For the others to end by themselves when one has ended: they notice within 30 s."""
PIPES_S = 10.0
"""For the pipes of a process that has ended to be closed: what it has started may hold them for ever."""
GATHER_S = 0.02
LINES = 5
DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG: a process gets a signal when the thread that started it ends."""


class Failure(Exception):
    """What is said in one line, with an exit code."""

    def __init__(self, text: str, code: int = 1):
        super().__init__(text)
        self.code = code


# ---- where ----


def choose(nodes: list[dict], count: int, here: str) -> list[dict]:
    """The nodes of the trainers, the first process's first.

    Args: nodes: of `ray.nodes()`; here: id of this host's. Raises: Failure: too few, or they are unlike.
    """
    alive = [node for node in nodes if node["Alive"]]
    of = lambda node, name: node["Resources"].get(name, 0)
    marked, with_gpus = ([node for node in alive if of(node, name)] for name in ("trainer", "GPU"))
    found = marked or with_gpus or alive
    if len(found) < count:
        kind = "the resource trainer" if marked else "GPUs" if with_gpus else "Ray"
        raise Failure(f"TRAINERS={count}: only {len(found)} of {len(alive)} hosts have {kind}", 2)
    by_address = lambda node: (
        node["NodeID"] != here,
        ipaddress.ip_address(node["NodeManagerAddress"]).packed,
    )
    chosen = sorted(found, key=by_address)[:count]
    gpus = {node["NodeManagerHostname"]: int(of(node, "GPU")) for node in chosen}
    if len(set(gpus.values())) > 1 and not os.environ.get("GPUS"):
        have = ", ".join(f"{host} {number}" for host, number in gpus.items())
        raise Failure(f"the trainers' hosts have unlike numbers of GPUs ({have}); GPUS=N takes N of each", 2)
    return chosen


# ---- on a node ----


class Trainer:
    """One process of the run. An actor, whose methods run side by side."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._is_stopped, self._lock = False, threading.Lock()

    def free_port(self) -> int:
        with socket.create_server(("", 0)) as probe:
            return probe.getsockname()[1]

    def run(
        self, folder: str, command: list[str], variables: dict[str, str]
    ) -> Iterator[tuple[str, bytes | int]]:
        """Runs Python with `command` to its end: ("out" or "err", what it prints), and ("code", its exit code)."""
        # What Ray sets for its own workers. A thread that lives as long as the process starts it: see below.
        own = ("RAY_JOB", "RAY_RAYLET", "RAY_WORKER", "RAY_CLIENT", "OMP_NUM_THREADS")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
        environment |= {"PYTHONUNBUFFERED": "1"} | variables
        # Where Ray's worker dies, by whatever, the trainer is told to save and end.
        tied = f"import ctypes, os, sys; ctypes.CDLL(None).prctl({DEATH_SIGNAL}, {int(signal.SIGTERM)}); "
        tied += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
        with self._lock:
            if self._is_stopped:
                yield "code", 130
                return
            self._process = subprocess.Popen(
                [sys.executable, "-c", tied, *command],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        yield from _output(self._process)
        code = self._process.wait()
        yield "code", code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            self._is_stopped = True
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)


def _output(process: subprocess.Popen) -> Iterator[tuple[str, bytes]]:
    """What it prints, as it comes."""
    parts: queue.Queue = queue.Queue()

    def read(name: str, pipe) -> None:
        # Each part is an object of Ray's; Python writes a line in pieces.
        data = b"?"
        while data:
            select.select([pipe], [], [])
            time.sleep(GATHER_S)
            data = os.read(pipe.fileno(), 1 << 16)
            if data:
                parts.put((name, data))
        parts.put(None)

    for name, pipe in (("out", process.stdout), ("err", process.stderr)):
        threading.Thread(target=read, args=(name, pipe), daemon=True).start()
    num_open, ended = 2, float("inf")
    while num_open and time.monotonic() < ended + PIPES_S:
        try:
            part = parts.get(timeout=1)
        except queue.Empty:
            if process.poll() is not None:
                ended = min(ended, time.monotonic())
            continue
        if part is None:
            num_open -= 1
        else:
            yield part


# ---- here ----


class Watched:
    """A trainer as seen from here: follows what it prints, in a thread, until it has ended."""

    def __init__(self, rank: int, node: dict, actor):
        self.rank, self.actor = rank, actor
        self.name = f"process {rank} on {node['NodeManagerHostname']} ({node['NodeManagerAddress']})"
        self.code: int | None = None
        self.failure = ""
        self.tail: deque[bytes] = deque(maxlen=LINES)

    def start(self, *arguments) -> None:
        self._thread = threading.Thread(target=self._follow, args=arguments, daemon=True)
        self._thread.start()

    def is_running(self) -> bool:
        return self._thread.is_alive()

    def _follow(self, *arguments) -> None:
        import ray

        try:
            for part in self.actor.run.options(num_returns="streaming").remote(*arguments):
                name, content = ray.get(part)
                if name == "code":
                    self.code = content
                elif self.rank == 0:
                    stream = sys.stdout if name == "out" else sys.stderr
                    stream.buffer.write(content)
                    stream.buffer.flush()
                else:
                    self.tail.extend(content.splitlines()[-LINES:])
        except Exception as error:  # the actor is gone, or what it should run is not there
            cause = getattr(error, "cause", None) or error
            self.failure = next(iter(str(cause).strip().splitlines()), type(error).__name__)

    def send(self, number: int) -> None:
        with contextlib.suppress(Exception):
            self.actor.signal.remote(int(number))


def run(address: str, count: int, command: list[str]) -> int:
    """Starts the trainers and waits for them. Returns: the exit code."""
    import ray

    ray.init(address, log_to_driver=False, logging_level="ERROR")
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda got, _: signals.append(got))
    nodes = _find_nodes(count)
    trainers = [Watched(rank, node, _make_actor(node)) for rank, node in enumerate(nodes)]
    try:
        port = ray.get(trainers[0].actor.free_port.remote(), timeout=START_S)
        ray.get([trainer.actor.free_port.remote() for trainer in trainers[1:]], timeout=START_S)
    except ray.exceptions.RayError as error:
        what = str(error).strip().splitlines()[0]
        raise Failure(
            f"Ray does not start the trainers, whose hosts may be taken by others ({what})"
        ) from None
    ip = nodes[0]["NodeManagerAddress"]
    variables = {name: value for name, value in os.environ.items() if name.startswith(PASSED)}
    variables |= {"JAX_COORDINATOR_ADDRESS": f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"}
    for trainer in trainers:
        own = {"JAX_NUM_PROCESSES": str(count), "JAX_PROCESS_ID": str(trainer.rank)}
        trainer.start(str(ROOT), ["-m", *command], variables | own)
    _wait(trainers, signals)
    return _verdict(trainers)


def _find_nodes(count: int) -> list[dict]:
    """As `choose`; gives hosts some time to join."""
    import ray

    here, end = ray.get_runtime_context().get_node_id(), time.monotonic() + START_S
    while True:
        try:
            return choose(ray.nodes(), count, here)
        except Failure:
            if time.monotonic() > end:
                raise
            time.sleep(1)


def _make_actor(node: dict):
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    gpus = int(os.environ.get("GPUS") or node["Resources"].get("GPU", 0))
    options = {
        "num_cpus": 0,
        "num_gpus": gpus,
        "resources": {"trainer": 1} if node["Resources"].get("trainer") else {},
        "max_restarts": 0,
        "max_concurrency": 3,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=False),
    }
    return ray.remote(Trainer).options(**options).remote()


def _wait(trainers: list[Watched], signals: list[int]) -> None:
    """Returns when all have ended. Hands one signal on; ends those that are left when others have ended."""
    is_told, end = False, 0.0
    while running := [trainer for trainer in trainers if trainer.is_running()]:
        time.sleep(0.1)
        # What could not be started leaves the others waiting for it.
        is_wanted = bool(signals) or any(trainer.failure for trainer in trainers)
        if is_wanted and not is_told:
            is_told = True
            for trainer in running:
                trainer.send(signal.SIGTERM)
        if len(running) < len(trainers):
            end = end or time.monotonic() + GRACE_S
            if time.monotonic() > end:
                for trainer in running:
                    trainer.send(signal.SIGKILL)
                end += GRACE_S


def _verdict(trainers: list[Watched]) -> int:
    """Says what the first process has not said. Returns: the exit code."""
    first = trainers[0]
    for trainer in trainers:
        if trainer.failure:
            print(f"error: {trainer.name} is gone: {trainer.failure}", file=sys.stderr)
        elif trainer.code != first.code and trainer.code:
            print(f"{trainer.name} ended with exit code {trainer.code}", file=sys.stderr)
            for line in trainer.tail:
                print(f"  {line.decode(errors='replace')}", file=sys.stderr)
    if any(trainer.failure for trainer in trainers):
        return first.code or 1
    return first.code or max(trainer.code or 0 for trainer in trainers)


def print_flags(address: str, module: str, flags: list[str]) -> None:
    """Raises: SystemExit: the command line is wrong, which a line says."""
    from grpo_jax.config.command_line import config_parser, one_line_errors, read_command_line

    with one_line_errors():
        parser = config_parser(module, None)
        if module == "grpo_jax.doctor":
            parser.add_argument("--hosts", action="store_true")
        config, _, _ = read_command_line(parser, flags)
        if config.rollout.engine == "vllm":
            print(f"--config.rollout.ray_address={address}", "--config.rollout.placement=separate", sep="\n")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    try:
        match sys.argv[1:]:
            case ["run", address, count, *command] if count.isdecimal() and command:
                return run(address, int(count), command)
            case ["flags", address, module, *flags]:
                print_flags(address, module, flags)
                return 0
        raise Failure("usage: ray_trainers.py run ADDRESS TRAINERS MODULE [FLAG ...]", 2)
    except Failure as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code


if __name__ == "__main__":
    sys.exit(main())
