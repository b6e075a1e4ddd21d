"""The processes of one run: one a host, each with the same program on its part of one mesh.

All of them call the functions of `Hosts` in the same order. What one learns alone (an engine's answers, rewards,
the clock, a signal, what lies in the workdir) goes through `from_first` or `any_of` before it decides anything.
These go by a channel of the hosts, never by the devices. A run on one host is the case of one process.

The environment says who is who, as JAX's own variables do: JAX_COORDINATOR_ADDRESS (HOST:PORT, the first process's
host and a free port of it), JAX_NUM_PROCESSES, JAX_PROCESS_ID. Nothing else is asked for: the secret that keeps
strangers out lies in the workdir, which all share.
"""

import atexit
import contextlib
import importlib.metadata
import json
import math
import os
import platform
import queue
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any, TypeVar

import jax

from grpo_jax.config import Config, ConfigError
from grpo_jax.run.hangs import NOTICE_S, HangWatch, PeerLost, PhaseTimedOut, is_waiting, place_of, say
from grpo_jax.run.hub import BEAT_S, BYTES, HANDSHAKE_S, SILENT_S, Message, open_connection, receive
from grpo_jax.run.metrics import Timers
from grpo_jax.storage.files import write_whole

T = TypeVar("T")

ADDRESS, COUNT, RANK = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CHECKED = (
    "grpo_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
)
"""Packages of which all hosts need the same version."""
LOOK_S = 0.2
VERDICT_S = 5.0
"""Within which the hub says why another process has gone."""
FIRST_LEAVES_S = 60.0
"""Within which the first process closes what it has, after a failure that all know of."""
AGREE_S = 20.0
"""Within which all processes say that they can save what a failure has left."""
SAID, FAILED = b"=", b"!"
"""What stands before what the first process says, and before why it could not."""


class FirstFailed(Exception):
    """What the first process was to say has failed there; its text is the reason."""


class Hosts:
    """This process among those of the run."""

    def __init__(self, rank: int = 0, count: int = 1, link: "_Link | None" = None):
        self.rank, self.count, self._link = rank, count, link
        self._failure: BaseException | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process talks to engines, rewards and people, and writes what is not an array."""
        return self.rank == 0

    @property
    def speaks(self) -> bool:
        """Whether people hear of the run from this process: the first one, or if that is gone, the next."""
        return self.is_first or (self._link is not None and self._link.is_speaker)

    @property
    def address(self) -> str:
        """This host's, by which the others reach it; "" for a process alone."""
        return "" if self._link is None else self._link.address

    @property
    def is_called(self) -> bool:
        """Whether the first process has said something that this one has not taken yet."""
        return self._link is not None and self._link.has_more

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process: a value that JSON can hold. The others do not call it.

        Raises: FirstFailed: in the others, where `make` raises.
        """
        if self._link is None:
            return make()
        if not self.is_first:
            return json.loads(self._link.take())
        value = self._make(make, self._link)
        self._link.give(json.dumps(value).encode())
        return value

    def bytes_from_first(self, make: Callable[[], bytes]) -> bytes:
        """As `from_first`, for what is bytes already."""
        if self._link is None:
            return make()
        return self._link.give(self._make(make, self._link)) if self.is_first else self._link.take()

    def _make(self, make: Callable[[], T], link: "_Link") -> T:
        try:
            return make()
        except Exception as error:
            link.give(f"{type(error).__name__}: {error}".encode(), FAILED)
            self._failure = error
            raise

    def fail_together(self, error: BaseException) -> bool:
        """Whether all processes are at the same place with a failure, and can still do something together.

        They are where what the first one was to say has failed.
        """
        if self._link is None:
            return True
        if error is not self._failure and not isinstance(error, FirstFailed):
            return False
        try:
            self._link.gather(True, AGREE_S)
        except TimeoutError:
            return False
        return True

    def from_all(self, value: T) -> list[T]:
        """What each process says, in their order: values that JSON can hold."""
        return [value] if self._link is None else self._link.gather(value)

    def any_of(self, vote: bool) -> bool:
        """Whether any process says so."""
        return any(self.from_all(bool(vote)))

    def wait_for_all(self) -> None:
        """Returns when all processes have called it."""
        self.any_of(False)

    @contextlib.contextmanager
    def watched(self, timers: Timers, watch: HangWatch) -> Iterator[None]:
        """Tells the others in which phase this process is, and ends it when they cannot go on."""
        if self._link is None:
            yield
            return
        watch.is_heard, watch.suffix = lambda: self.speaks, f"-process-{self.rank}"
        self._link.watch(timers, watch)
        try:
            yield
        finally:
            self._link.unwatch()

    def reason_behind(self, error: BaseException) -> BaseException:
        """What is to be said of an error: it may come from another process that has gone."""
        if self._link is None or isinstance(error, PhaseTimedOut | ConfigError | KeyboardInterrupt):
            return error
        return self._link.wait_for_end(VERDICT_S) or error


ALONE = Hosts()
"""The only process of its run."""


# ---- joining ----


@contextlib.contextmanager
def joined(config: Config, workdir: Path) -> Iterator[Hosts]:
    """Joins the other processes of the run, where the environment names them, before any device is touched.

    Where this process fails, the others are told why, and the first one tells people.

    Raises: ConfigError: the variables make no sense, or not all processes have come, or they do not fit together.
    """
    count, rank, address = _read_environment()
    if count == 1:
        yield Hosts()
        return
    with contextlib.ExitStack() as stack:
        if rank == 0:
            stack.callback((workdir / "hosts.json").unlink, missing_ok=True)
        link = _join(config, workdir, count, rank, address)
        hosts = Hosts(rank, count, link)
        leaving = _Leaving()
        try:
            yield hosts
            hosts.wait_for_all()
        except BaseException as error:
            leaving.code, text = _code_and_text(error)
            if isinstance(error.__cause__ or error, FirstFailed):
                link.wait_for_end(FIRST_LEAVES_S)  # it says why
            link.fail(text, leaving.code)
            if isinstance(error, PhaseTimedOut) and hosts.speaks:
                say(f"error: phase {error.phase}: {error}")
            if isinstance(error, PhaseTimedOut) or not hosts.is_first:
                raise SystemExit(leaving.code) from error
            raise
        leaving.is_in_order = True
        jax.distributed.shutdown()
        link.close()


def _read_environment() -> tuple[int, int, str]:
    """(number of processes, this one's, address). Raises: ConfigError: a variable is missing or wrong."""
    given = {name: os.environ.get(name, "") for name in (COUNT, RANK, ADDRESS)}
    if not any(given.values()):
        return 1, 0, ""
    for name, value in given.items():
        if not value:
            raise ConfigError(name, value, "must be set, as others of these are: " + ", ".join(given))
    for name in (COUNT, RANK):
        if not given[name].isdecimal():
            raise ConfigError(name, given[name], "must be a whole number")
    count, rank = int(given[COUNT]), int(given[RANK])
    if not rank < count:
        raise ConfigError(RANK, rank, f"must be below {COUNT}={count}: the first process is 0")
    host, _, port = given[ADDRESS].rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(ADDRESS, given[ADDRESS], "must be HOST:PORT, of the first process's host")
    return count, rank, given[ADDRESS]


def _join(config: Config, workdir: Path, count: int, rank: int, address: str) -> "_Link":
    timeout_s = config.trainer.join_timeout_s
    end = time.monotonic() + timeout_s
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if rank == 0:
        _start_hub(workdir, host, int(port), count, timeout_s)
    connection = _connect(workdir, host, int(port), end, timeout_s)
    hello = {
        "rank": rank,
        "count": count,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": {"python": platform.python_version()} | {n: version_of(n) for n in CHECKED},
        "config": config.to_dict(),
    }
    try:
        connection.send_bytes(json.dumps(hello).encode())
        answer = receive(connection, timeout_s + HANDSHAKE_S)
    except (OSError, EOFError):
        rule = "the first process, or the hub beside it, has gone while others were awaited"
        raise ConfigError(ADDRESS, address, rule) from None
    if answer["kind"] == "refused":
        if rank in answer["tellers"]:  # the first, and who differs: somebody may have started it by hand
            raise ConfigError(COUNT, count, answer["text"])
        raise SystemExit(2)
    link = _Link(connection, rank)
    jax.distributed.initialize(
        answer["jax_address"],
        count,
        rank,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s),
        heartbeat_timeout_seconds=10**7,  # the hub notices sooner, and says who
        coordinator_bind_address="127.0.0.1:0",  # the service in use is the hub's
    )
    return link


def _start_hub(workdir: Path, host: str, port: int, count: int, timeout_s: float) -> None:
    """Starts the hub, and lets the other processes know its secret.

    Raises: ConfigError: it cannot listen there.
    """
    secret = secrets.token_hex(32)
    command = [sys.executable, "-m", "grpo_jax.run.hub"]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    hub = subprocess.Popen(command, start_new_session=True, **pipes)
    settings = {"host": host, "port": port, "secret": secret, "count": count, "timeout_s": timeout_s}
    assert hub.stdin is not None and hub.stdout is not None
    with hub.stdin, hub.stdout:
        hub.stdin.write(json.dumps(settings) + "\n")
        hub.stdin.flush()
        answer = json.loads(hub.stdout.readline() or '{"error": "it does not start"}')
    if "error" in answer:
        rule = f"the first process cannot listen there, on {socket.gethostname()} ({answer['error']})"
        raise ConfigError(ADDRESS, f"{host}:{port}", rule)
    workdir.mkdir(parents=True, exist_ok=True)
    old = os.umask(0o077)
    try:
        write_whole(workdir / "hosts.json", json.dumps({"secret": secret}))
    finally:
        os.umask(old)


def _connect(workdir: Path, host: str, port: int, end: float, timeout_s: float) -> Connection:
    """Raises: ConfigError: the workdir is not shared, or nothing answers."""
    reason = ""
    while time.monotonic() < end:
        try:
            secret = bytes.fromhex(json.loads((workdir / "hosts.json").read_text())["secret"])
            connection = open_connection(socket.create_connection((host, port), HANDSHAKE_S))
            answer_challenge(connection, secret)
            deliver_challenge(connection, secret)
            return connection
        except FileNotFoundError:
            reason = ""
        except (OSError, EOFError, AuthenticationError, ValueError, KeyError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        time.sleep(LOOK_S)
    here = socket.gethostname()
    if not reason:
        rule = f"{here} saw no file hosts.json of the first process there within {timeout_s:g} s "
        rule += (
            "(trainer.join_timeout_s): all hosts must see one and the same folder, and the first be started"
        )
        raise ConfigError("--workdir", str(workdir), rule)
    rule = f"cannot be reached from {here} ({reason})"
    with contextlib.suppress(OSError):
        if socket.gethostbyname(host).startswith("127."):
            rule += "; it is this very host's loopback address: name the first host's on the network"
    raise ConfigError(ADDRESS, f"{host}:{port}", rule)


def version_of(package: str) -> str:
    """As it is installed; "none" if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _code_and_text(error: BaseException) -> tuple[int, str]:
    """Exit code and reason of a process that ends with an error."""
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        cause = error.__cause__
        return code, f"ended with exit code {code}" if cause is None else f"{type(cause).__name__}: {cause}"
    if isinstance(error, ConfigError):
        return 2, str(error)
    if isinstance(error, PhaseTimedOut):
        return error.code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "was interrupted"
    return 1, f"{type(error).__name__}: {error}"


class _Leaving:
    """Ends the process at Python's end, unless all have left in order: JAX would wait there for the others."""

    def __init__(self) -> None:
        self.code, self.is_in_order = 1, False
        atexit.register(self._leave)  # later than JAX's own, and so called before it

    def _leave(self) -> None:
        if not self.is_in_order:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.code)


# ---- the channel ----


class _Link:
    """The connection to the hub. A thread reads it, another one sends the beats."""

    def __init__(self, connection: Connection, rank: int):
        self._connection, self._rank, self._lock = connection, rank, threading.Lock()
        self.is_speaker = False
        self._given: queue.Queue[Message] = queue.Queue()
        self._gathered: queue.Queue[Message] = queue.Queue()
        self._num_given = self._num_gathered = 0
        self._timers: Timers | None = None
        self._watch: HangWatch | None = None
        self._end: PeerLost | None = None
        self._has_end, self._is_closed = threading.Event(), threading.Event()
        for target in (self._read, self._beat):
            threading.Thread(target=target, daemon=True, name=f"hosts{target.__name__}").start()

    @property
    def address(self) -> str:
        with socket.socket(fileno=os.dup(self._connection.fileno())) as connection:
            return connection.getsockname()[0]

    @property
    def has_more(self) -> bool:
        return not self._given.empty()

    def give(self, data: bytes, kind: bytes = SAID) -> bytes:
        self._send_bytes(self._next_head() + kind + data)
        return data

    def take(self) -> bytes:
        head, data = self._next_head(), self._wait(self._given)["data"]
        assert data.startswith(head), "the processes ask for different things"
        kind, data = data[len(head) : len(head) + 1], data[len(head) + 1 :]
        if kind == FAILED:
            raise FirstFailed(data.decode())
        return data

    def _next_head(self) -> bytes:
        """What stands before the data that is given next: the same in all processes."""
        self._num_given += 1
        return BYTES + self._num_given.to_bytes(8, "big")

    def gather(self, value: T, timeout_s: float = math.inf) -> list[T]:
        """Raises: TimeoutError: not all have said something within the time."""
        self._num_gathered += 1
        self._send({"kind": "one of all", "number": self._num_gathered, "value": value})
        return self._wait(self._gathered, timeout_s)["values"]

    def fail(self, text: str, code: int) -> None:
        """Tells the others that this process ends, and why."""
        self._send({"kind": "failed", "phase": self._phase(), "text": text, "code": code})
        self.close()

    def close(self) -> None:
        self._is_closed.set()
        self._send({"kind": "bye"})

    def watch(self, timers: Timers, watch: HangWatch) -> None:
        self._timers, self._watch = timers, watch
        watch.ask = self._tell_overdue
        if self._end is not None:
            watch.end(self._end)

    def unwatch(self) -> None:
        self._watch = None

    def wait_for_end(self, timeout_s: float) -> PeerLost | None:
        """Why the run has to end; None: nothing was heard of that within the time."""
        self._has_end.wait(timeout_s)
        return self._end

    def _tell_overdue(self, text: str) -> None:
        self._send({"kind": "overdue", "text": text})

    def _wait(self, messages: "queue.Queue[Message]", timeout_s: float = math.inf) -> Message:
        """The next message. Raises: TimeoutError: it has not come within the time."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            with contextlib.suppress(queue.Empty):
                return messages.get(timeout=LOOK_S)
            if self._end is not None and self._watch is None:
                raise self._end
        raise TimeoutError

    def _send(self, message: Message) -> None:
        self._send_bytes(json.dumps(message).encode())

    def _send_bytes(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):  # the reader notices
            self._connection.send_bytes(data)

    def _read(self) -> None:
        kinds = {"bytes": self._given, "all": self._gathered}
        while not self._is_closed.is_set():
            try:
                message = receive(self._connection, SILENT_S)
            except (TimeoutError, EOFError, OSError):
                message = self._lost_hub()
            if message["kind"] in kinds:
                kinds[message["kind"]].put(message)
            elif message["kind"] == "end" and not self._is_closed.is_set():
                self._end = PeerLost(message["phase"], message["text"], message["code"])
                self.is_speaker = message["speaker"] == self._rank
                self._has_end.set()
                if self._watch is not None:
                    self._watch.end(self._end, writes_stacks=message["writes_stacks"])
                elif not self._is_closed.wait(NOTICE_S):  # the main thread may be within JAX's own start
                    if self.is_speaker:
                        say(f"error: phase {self._end.phase}: {self._end}")
                    os._exit(self._end.code)
                return

    def _lost_hub(self) -> Message:
        text = "the first process's host is gone, or the hub on it"
        end: Message = {"kind": "end", "phase": self._phase(), "text": text, "code": 1}
        return end | {"writes_stacks": False, "speaker": self._rank}

    def _phase(self) -> str:
        return self._timers.phase if self._timers else "start"

    def _beat(self) -> None:
        main = threading.main_thread().ident
        assert main is not None
        while not self._is_closed.wait(BEAT_S):
            entered = self._timers.entered if self._timers else 0
            beat: Message = {"kind": "beat", "phase": self._phase(), "entered": entered}
            self._send(beat | {"place": place_of(main), "waits": is_waiting(main)})
