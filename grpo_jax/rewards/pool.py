"""Worker processes for reward functions that may be slow, hang, raise or take their process with them.

Each worker has one completion at a time, and `timeout_s` for it; one that takes longer, or dies, is replaced,
and only its own completion is lost. `worker.py` is the other end.
"""

import collections
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from grpo_jax.rewards.base import Reward, RewardError, RewardResult, arguments
from grpo_jax.types import Completion, Prompt, RolloutGroup

START_TIMEOUT_S = 120.0  # a user's file may import torch from a cold network disk

Job = tuple[str, Mapping[str, Any]]
"""(name of a function in the module, its keyword arguments)"""


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    connection: Connection
    limit_s: float
    """For what it is doing: starting, or a job."""
    deadline: float
    """On the monotonic clock."""
    is_ready: bool = False
    job: int | None = None

    @property
    def is_busy(self) -> bool:
        return not self.is_ready or self.job is not None

    def give(self, number: int, job: Job, limit_s: float) -> None:
        self.job, self.limit_s, self.deadline = number, limit_s, time.monotonic() + limit_s
        with contextlib.suppress(OSError):  # it has just died, and reading from it will say so
            self.connection.send(job)

    def receive(self) -> tuple[str, Any]:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            self.kill()
            return "dead", f"ended its process (exit code {self.process.returncode})"

    def kill(self) -> None:
        """Ends the process, and what it may have started, and waits for that."""
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()


class WorkerPool:
    """Processes that have one module loaded, and call its functions.

    Raises:
        RewardError: the module cannot be loaded, or has no function `function`.
    """

    def __init__(self, module: str, function: str, *, num_workers: int, timeout_s: float):
        self._target, self._timeout_s = (module, function), timeout_s
        self._workers = [self._start() for _ in range(num_workers)]
        try:
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
        for worker in [worker for worker in self._workers if worker.job is not None]:
            self._replace(worker)  # its caller left early, and the answer would be taken for one of ours
        waiting = collections.deque(enumerate(jobs))
        num_open = len(waiting)
        while num_open:
            for worker in [worker for worker in self._workers if not worker.is_busy][: len(waiting)]:
                if worker.connection.poll():  # nobody asked it: it has died since its last job
                    self._replace(worker)
                else:
                    worker.give(*waiting.popleft(), self._timeout_s)
            finished = self._wait()
            num_open -= len(finished)
            yield from finished

    def close(self) -> None:
        for worker in self._workers:
            worker.kill()
        self._workers = []

    def _wait(self) -> list[tuple[int, str, Any]]:
        """Waits until a busy worker answers, dies or is late; returns the jobs that finished so."""
        busy = [worker for worker in self._workers if worker.is_busy]
        timeout = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        readable = wait([worker.connection for worker in busy], timeout)
        finished = []
        for worker in busy:
            if worker.connection in readable:
                status, value = worker.receive()
            elif time.monotonic() >= worker.deadline:
                status, value = "dead", f"gave no answer within {worker.limit_s:g} s"
            else:
                continue
            job, worker.job = worker.job, None
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
        worker.kill()
        self._workers[self._workers.index(worker)] = self._start()

    def _start(self) -> _Worker:
        """Starts a process without waiting for it.

        Not `multiprocessing.Process`: that would import the main module again, jax with it, and fork is not
        for a process with threads. A session of its own keeps Ctrl-C away and lets `kill` reach its children.
        """
        ours, theirs = Pipe()
        command = [sys.executable, "-m", "grpo_jax.rewards.worker", str(theirs.fileno()), *self._target]
        with theirs:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            )
        return _Worker(process, ours, START_TIMEOUT_S, time.monotonic() + START_TIMEOUT_S)


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
