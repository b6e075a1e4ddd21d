"""Worker processes for reward functions that may be slow, hang, raise, fork or take their process with them.

Each worker has one completion at a time, and `timeout_s` for it; one that takes longer, or dies, is replaced,
and only its own completion is lost. `worker.py` is the other end, `messages.py` what goes between, and `keeper.py`
ends what is left. No wait here is without a deadline, and neither reading nor writing blocks.
"""

import collections
import contextlib
import dataclasses
import itertools
import logging
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.rewards import keeper, messages
from grpo_jax.rewards.base import Reward, RewardError, RewardResult, arguments
from grpo_jax.types import Completion, Prompt, RolloutGroup

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # a user's file may import torch from a cold network disk
KILL_TIMEOUT_S = 10.0  # what SIGKILL does not end in that time hangs in the kernel, on a lost disk say

Job = tuple[str, Mapping[str, Any]]
"""(name of a function in the module, its keyword arguments)"""


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    marker: str
    """As in its environment, for `keeper.end_family`."""
    socket: socket.socket
    """Never blocks."""
    limit_s: float
    """For what it is doing: starting, or a job, with all that is said and heard meanwhile."""
    deadline: float
    """On the monotonic clock."""
    is_ready: bool = False
    job: int | None = None
    unsent: memoryview = dataclasses.field(default_factory=lambda: memoryview(b""))
    received: bytearray = dataclasses.field(default_factory=bytearray)

    @property
    def is_busy(self) -> bool:
        return not self.is_ready or self.job is not None

    def give(self, number: int, job: Job, limit_s: float) -> None:
        self.unsent = memoryview(messages.frame_of_job(number, *job))
        self.job, self.limit_s, self.deadline = number, limit_s, time.monotonic() + limit_s
        self.send()

    def send(self) -> None:
        """Sends as much as goes without waiting."""
        try:
            while self.unsent:
                self.unsent = self.unsent[self.socket.send(self.unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has just died, and reading from it will say so
            self.unsent = memoryview(b"")

    def receive(self) -> tuple[str, Any] | None:
        """Returns status and value of what it is doing, if they are all there.

        Raises:
            EOFError: it has died, or closed its end.
            ValueError: what it says is no answer.
        """
        try:
            part = self.socket.recv(messages.MAX_ANSWER_BYTES)
        except BlockingIOError:
            part = b""
        except OSError:
            raise EOFError from None
        else:
            if not part:
                raise EOFError
        self.received += part
        while (answer := messages.take_answer(self.received)) is not None:
            number, status, value = answer
            if number == self.job:  # any other is for a job that is over
                return status, value
        return None

    def has_spoken(self) -> bool:
        """True if there is something to read, the end of its process included."""
        try:
            self.socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def wait(self) -> None:
        """Waits for the end of the process, which has been killed."""
        self.socket.close()
        try:
            self.process.wait(KILL_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("reward worker %d is still there after SIGKILL", self.process.pid)


class WorkerPool:
    """Processes that have one module loaded, and call its functions.

    Raises:
        RewardError: the module cannot be loaded, or has no function `function`.
    """

    def __init__(self, module: str, function: str, *, num_workers: int, timeout_s: float):
        self._target, self._timeout_s = (module, function), timeout_s
        self._marker, self._numbers = secrets.token_hex(16), itertools.count()
        self._keeper = self._start_keeper()
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(self._start())
            while any(worker.is_busy for worker in self._workers):
                self._wait()
        except BaseException:
            self.close()
            raise

    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[int, str, Any]]:
        """Yields (number of the job, status, its value or what happened), as they finish.

        The status is "ok", "error", "dead" or "unreadable".

        Raises:
            RewardError: a replacement could not load the module any more.
        """
        if not self._workers:
            raise RewardError("the worker pool is closed")
        if self._keeper.poll() is not None:
            self._keeper = self._start_keeper()
        for worker in [worker for worker in self._workers if worker.job is not None]:
            self._replace(worker)  # its caller left early, and nobody waits for its answer
        waiting = collections.deque(enumerate(jobs))
        num_open = len(waiting)
        while num_open:
            for worker in [worker for worker in self._workers if not worker.is_busy][: len(waiting)]:
                if worker.has_spoken():  # nobody asked it: it has died since its last job
                    self._replace(worker)
                else:
                    worker.give(*waiting.popleft(), self._timeout_s)
            finished = self._wait()
            num_open -= len(finished)
            yield from finished

    def close(self) -> None:
        _end(self._workers, self._marker)
        self._workers = []
        self._keeper.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._keeper.wait(KILL_TIMEOUT_S)

    def _wait(self) -> list[tuple[int, str, Any]]:
        """Waits until a busy worker answers, dies or is late; returns the jobs that finished so."""
        busy = [worker for worker in self._workers if worker.is_busy]
        readable = _communicate(busy)
        finished = []
        for worker in busy:
            answer = _answer_of(worker, worker.socket in readable)
            if answer is None:
                continue
            (status, value), job, worker.job = answer, worker.job, None
            if job is not None:
                finished.append((job, status, value))
            elif status == "ok":
                worker.is_ready = True
            else:
                raise RewardError(f"cannot be loaded: {value}")
            if status == "dead":
                self._replace(worker)
        return finished

    def _replace(self, worker: _Worker) -> None:
        _end([worker], worker.marker)
        self._workers[self._workers.index(worker)] = self._start()

    def _start(self) -> _Worker:
        """Starts a process without waiting for it.

        Not `multiprocessing.Process`: that would import the main module again, jax with it, and fork is not
        for a process with threads. A session of its own keeps Ctrl-C away, and signals to the trainer's group.
        """
        marker = f"{self._marker}/{next(self._numbers)}/"
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            process = _python(
                "grpo_jax.rewards.worker",
                str(theirs.fileno()),
                *self._target,
                pass_fds=[theirs.fileno()],
                variables={keeper.VARIABLE: marker},
            )
        return _Worker(process, marker, ours, START_TIMEOUT_S, time.monotonic() + START_TIMEOUT_S)

    def _start_keeper(self) -> subprocess.Popen:
        """Starts the process that ends the workers, and what they started, should this one be killed."""
        return _python("grpo_jax.rewards.keeper", str(os.getpid()), self._marker)


def _python(
    module: str, *args: str, pass_fds: Sequence[int] = (), variables: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Starts a module of ours in a session of its own."""
    path = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen(
        [sys.executable, "-m", module, *args],
        stdin=subprocess.DEVNULL,
        pass_fds=pass_fds,
        start_new_session=True,
        env=os.environ | path | dict(variables or {}),
    )


def _communicate(workers: Sequence[_Worker]) -> set[socket.socket]:
    """Sends what goes, waits for something to read until the first deadline, and returns what can be read from."""
    with selectors.DefaultSelector() as selector:
        for worker in workers:
            writing = selectors.EVENT_WRITE if worker.unsent else 0
            selector.register(worker.socket, selectors.EVENT_READ | writing, worker)
        timeout = max(0.0, min(worker.deadline for worker in workers) - time.monotonic())
        events = selector.select(timeout)
        for key, event in events:
            if event & selectors.EVENT_WRITE:
                key.data.send()
        return {key.data.socket for key, event in events if event & selectors.EVENT_READ}


def _answer_of(worker: _Worker, is_readable: bool) -> tuple[str, Any] | None:
    """Returns status and value of what a worker does; None while it has time left and has not said all."""
    try:
        answer = worker.receive() if is_readable else None
    except EOFError:
        _end([worker], worker.marker)
        return "dead", f"ended its process (exit code {worker.process.returncode})"
    except ValueError:
        return "dead", "wrote into the answers of its process"
    if answer is None and time.monotonic() >= worker.deadline:
        return "dead", f"gave no answer within {worker.limit_s:g} s"
    return answer


def _end(workers: Sequence[_Worker], marker: str) -> None:
    """Ends the processes of workers, and what they may have started, and waits for that.

    Args: marker: with which their own begin.
    """
    there = [worker for worker in workers if worker.process.returncode is None]
    keeper.end_family(marker, [worker.process.pid for worker in there])
    for worker in there:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.wait()


class PoolReward(Reward):
    """Scores completions in a pool, which it owns.

    Args:
        name: of the function as the configuration has it, for messages.
        on_error: "stop" or "zero", as `reward.on_error`.
        function: name of the function in the pool's module that scores.
        explain: name of the one that explains, if there is one.
    """

    def __init__(self, pool: WorkerPool, name: str, *, on_error: str, function: str, explain: str | None):
        self._pool, self._name, self._on_error = pool, name, on_error
        self._function, self._explain = function, explain

    def score(self, groups: Sequence[RolloutGroup]) -> RewardResult:
        sources = [
            (group.prompt, index, completion)
            for group in groups
            for index, completion in enumerate(group.completions)
        ]
        jobs = [(self._function, arguments(prompt, completion)) for prompt, _, completion in sources]
        rewards = np.zeros(len(jobs), np.float32)
        errors: dict[int, str] = {}
        for number, status, value in self._pool.run(jobs):
            if status == "ok":
                rewards[number] = value
                continue
            prompt, index, _ = sources[number]
            line = f"prompt {prompt.prompt_id}, completion {index}: {self._name} {value}"
            if self._on_error == "stop" and status != "unreadable":
                raise RewardError(line)
            errors[number] = line
        return RewardResult.of_one(
            rewards.reshape(len(groups), -1), tuple(errors[number] for number in sorted(errors))
        )

    def explain(self, prompt: Prompt, completion: Completion, reward: float) -> str:
        if self._explain is None:
            return f"{self._name} gave it {reward:g}"
        kwargs = {"solution_str": completion.text, "ground_truth": prompt.ground_truth}
        ((_, _, value),) = self._pool.run([(self._explain, kwargs)])
        return value

    def close(self) -> None:
        self._pool.close()
