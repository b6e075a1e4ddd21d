"""Kills training runs at seeded random moments, starts the same command again until it ends, and compares.

A `Case` is a configuration with a finished run that nobody interrupted. `kill_and_compare` kills runs of it in
every way of a list, each in a process of its own, and returns what became of each kill.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import integration_helpers as helpers
import numpy as np
from kill_compare import Results, compare, read_results

from grpo_jax.run.retention import damage_of, saved_steps

SERVER = Path(__file__).with_name("kill_server.py")
VARIABLE = "GRPO_JAX_TEST_RUN"
"""Of the environment of all processes of a run; its value is the workdir."""
END_S = 120.0
"""A run that takes longer to end hangs."""
GONE_S = 10.0
"""In which a run's workers are gone after it."""
SAVE_S = 0.12
"""About what a save of these runs takes: kills within one come so long after its beginning, at most."""
LOOK_S = 0.001
ENVIRONMENT = {
    "XLA_FLAGS": "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters",  # as conftest.py; one device
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
"""Of the runs: compiling is most of what an uninterrupted one does."""


class Launcher:
    """Starts runs by the server, and knows how they ended. Several threads may use it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        command = [sys.executable, str(SERVER)]
        self._server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=helpers.ROOT,
            env=os.environ | ENVIRONMENT,
        )  # fmt: skip

    def start(self, argv: Sequence[str], workdir: Path) -> "Started":
        log = new_log(workdir)
        pid = self._ask({"argv": list(map(str, argv)), "log": str(log), "env": {VARIABLE: str(workdir)}})
        return Started(pid, workdir, log, code=lambda: self._ask({"pid": pid}))

    def close(self) -> None:
        self._server.communicate(timeout=END_S)

    def _ask(self, request: dict[str, Any]) -> int:
        with self._lock:
            assert self._server.stdin is not None and self._server.stdout is not None
            print(json.dumps(request), file=self._server.stdin, flush=True)
            return int(self._server.stdout.readline())


def start_command(argv: Sequence[str], workdir: Path) -> "Started":
    """Starts `python -m grpo_jax.train` as a user does, imports included."""
    log = new_log(workdir)
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "grpo_jax.train", *map(str, argv)],
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=helpers.ROOT, start_new_session=True,
            env=os.environ | ENVIRONMENT | {VARIABLE: str(workdir)},
        )  # fmt: skip
    return Started(process.pid, workdir, log, code=process.wait)


def new_log(workdir: Path) -> Path:
    """A file beside the workdir that no other start has; what is left of killed runs may still write to theirs."""
    return workdir.with_name(f"{workdir.name}-{len(list(workdir.parent.glob(workdir.name + '-*.log')))}.log")


@dataclasses.dataclass
class Started:
    """A run that has been started: the process `pid`, which leads its group."""

    pid: int
    workdir: Path
    log: Path
    code: Callable[[], int]
    """Waits for the end of the process."""

    def __post_init__(self) -> None:
        self.began = time.time()
        self._descriptor = os.pidfd_open(self.pid)
        self._poll = select.poll()
        self._poll.register(self._descriptor, select.POLLIN)

    def has_ended(self, within_s: float = 0.0) -> bool:
        """True as soon as the process has ended; False if it has not within the time."""
        return bool(self._poll.poll(within_s * 1000))

    def wait(self) -> int:
        """Returns the exit code. Raises: TimeoutError: the run hangs; it is then ended."""
        is_late = not self.has_ended(END_S)
        if is_late:
            for pid in {self.pid, *members(self.workdir)}:
                send(pid, signal.SIGKILL)
        code = self.code()
        os.close(self._descriptor)
        if is_late:
            raise TimeoutError(f"has not ended {END_S:g} s after the kill")
        return code

    def output(self) -> str:
        """What this start has printed, and its reward workers."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def members(workdir: Path) -> list[int]:
    """The processes of a run that it has started itself: reward workers, and what looks after them."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if f"{VARIABLE}={workdir}\0".encode() in Path(f"/proc/{name}/environ").read_bytes():
                found.append(int(name))
    return found


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def send_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


# ---- when ----


def anywhere(run: Started, case: "Case", rng: np.random.Generator) -> None:
    """Waits until a moment of what a run has before it: of all, or, half of the times, from its first step on."""
    if rng.random() < 0.5:
        while "steps in all" not in run.output() and not run.has_ended(5 * LOOK_S):
            pass
    begun = time.time() - run.began
    run.has_ended(rng.uniform(0, max(0.0, case.life_s(last_step(run.workdir)) - begun)))


def in_a_save(run: Started, case: "Case", rng: np.random.Generator) -> None:
    """Waits until one of the saves that are left is under way."""
    num_left = max(1, (case.num_steps - last_step(run.workdir)) // case.steps_a_save)
    number, seen = int(rng.integers(1, num_left + 1)), set[str]()
    while len(seen) < number and not run.has_ended():
        time.sleep(LOOK_S)
        seen |= set(unfinished(run.workdir))
    run.has_ended(rng.uniform(0, SAVE_S))


def last_step(workdir: Path) -> int:
    return max(saved_steps(workdir / "checkpoints"), default=0)


def unfinished(workdir: Path) -> list[str]:
    """Names of checkpoints that are being written or removed."""
    try:
        return [name for name in os.listdir(workdir / "checkpoints") if ".tmp" in name]
    except FileNotFoundError:
        return []


# ---- how ----


def kill(run: Started, rng: np.random.Generator) -> None:
    send(run.pid, signal.SIGKILL)


def interrupt(run: Started, rng: np.random.Generator) -> None:
    send_group(run.pid, signal.SIGINT)  # as a terminal does


def terminate(run: Started, rng: np.random.Generator) -> None:
    send(run.pid, signal.SIGTERM)


def terminate_all(run: Started, rng: np.random.Generator) -> None:
    """As systemd and Slurm do: the group, and every other process of the run."""
    for pid in members(run.workdir):
        send(pid, signal.SIGTERM)
    send_group(run.pid, signal.SIGTERM)


def kill_a_worker(run: Started, rng: np.random.Generator) -> None:
    """As the kernel does where memory is short."""
    while not run.has_ended(LOOK_S):
        workers = []
        for pid in members(run.workdir):
            with contextlib.suppress(OSError):
                if b"grpo_jax.rewards.worker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    workers.append(pid)
        if workers:
            send(int(rng.choice(workers)), signal.SIGKILL)
            return


def fill_the_disk(run: Started, rng: np.random.Generator) -> None:
    """No file of the run grows beyond a size any more: none at all, or that of metrics or of arrays."""
    limit = 0 if rng.random() < 0.2 else int(10 ** rng.uniform(3.7, 5))
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (limit, limit))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A way to die, the moment for it, and the exit codes that it may have."""

    strike: Callable[[Started, np.random.Generator], None]
    moment: Callable[[Started, "Case", np.random.Generator], None]
    codes: frozenset[int]


STOPPED = frozenset({0, 130})  # 0: it had done all
FAILED = frozenset(
    {0, 1, 2, 120}
)  # 0: it went on. 2: at its start. 120: Python could not write its last output
KINDS = {
    "SIGKILL": Kind(kill, anywhere, frozenset({-signal.SIGKILL})),
    "SIGKILL in a save": Kind(kill, in_a_save, frozenset({-signal.SIGKILL})),
    "SIGTERM": Kind(terminate, anywhere, STOPPED),
    "SIGTERM in a save": Kind(terminate, in_a_save, STOPPED),
    "SIGTERM to all processes": Kind(terminate_all, anywhere, STOPPED),
    "SIGINT": Kind(interrupt, anywhere, STOPPED),
    "a worker's SIGKILL": Kind(kill_a_worker, anywhere, FAILED),
    "a full disk": Kind(fill_the_disk, anywhere, FAILED),
    "a full disk in a save": Kind(fill_the_disk, in_a_save, FAILED),
}


# ---- a case ----


@dataclasses.dataclass
class Case:
    """A configuration whose runs are killed, and its run that was not."""

    name: str
    overrides: dict[str, Any]
    num_steps: int
    reference: Path
    first_step_s: float
    """From a run's start to the end of its first step."""
    step_s: float

    @property
    def steps_a_save(self) -> int:
        return int(self.overrides["checkpoint.every_steps"])

    def life_s(self, step: int) -> float:
        """How long a run lives that goes on after `step`."""
        return self.first_step_s + self.step_s * (self.num_steps - step)

    def learn_from(self, run: Started, step: int) -> None:
        """Takes note of how long a run has taken to its first step, which was to be that after `step`."""
        for line in whole_lines(run.workdir / "metrics.jsonl"):
            if line["step"] == step + 1 and line["time"] > run.began:
                self.first_step_s = min(self.first_step_s, line["time"] - run.began)

    @functools.cached_property
    def results(self) -> Results:
        return read_results(self.reference)


def make_case(launcher: Launcher, name: str, overrides: dict[str, Any], folder: Path) -> Case:
    """Runs the configuration."""
    workdir = folder / f"{name}-reference"
    run = launcher.start(helpers.train_argv(workdir, overrides), workdir)
    code = run.wait()
    assert code == 0, run.output()
    times = [line["time"] for line in helpers.read_lines(workdir) if line["step"] > 0]
    step_s = (times[-1] - times[0]) / (len(times) - 1)
    return Case(name, overrides, len(times), workdir, times[0] - run.began, step_s)


@dataclasses.dataclass
class Kill:
    """One kill, and what came of it."""

    kind: str
    case: str
    phase: str
    """"starting", "steps" or "saving", or "finished" where the run went on to its end."""
    fault: str = ""
    """What was wrong after it, or at the end of its run; "" for a kill that was survived."""


def kill_and_compare(
    launchers: Sequence[Callable[[Sequence[str], Path], Started]],
    case: Case,
    kinds: Sequence[str],
    folder: Path,
    seed: int,
) -> list[Kill]:
    """Kills runs of a case once in each of the ways, in their order; a run that ends has the next one follow it.

    Args: launchers: start runs; they take turns.
    """
    rng, waiting, kills, number = np.random.default_rng(seed), collections.deque(kinds), [], 0
    while waiting:
        workdir, of_run, code, fault = folder / f"{case.name}-{seed}-{number}", [], None, ""
        number += 1
        while code != 0 and not fault:
            start = launchers[(len(kills) + len(of_run)) % len(launchers)]
            run = start(helpers.train_argv(workdir, case.overrides), workdir)
            killed, code, fault = one_death(run, case, waiting, rng)
            if killed is not None:
                of_run.append(dataclasses.replace(killed, fault=fault))
                fault = ""  # the same command is to go on all the same
        fault = fault or compare(workdir, case.results) or nothing_left(workdir)
        kills += [dataclasses.replace(kill, fault=kill.fault or fault) for kill in of_run]
        if not of_run and fault:
            kills.append(Kill("none", case.name, "finished", fault))
    return kills


def one_death(
    run: Started, case: Case, waiting: "collections.deque[str]", rng: np.random.Generator
) -> tuple[Kill | None, int, str]:
    """Kills a run in the first way of `waiting`, and takes that off; a run that ends before was not killed.

    Returns: the kill, if there was one, the exit code, and what was wrong, or "".
    """
    name, before = waiting[0] if waiting else "", last_step(run.workdir)
    if name:
        KINDS[name].moment(run, case, rng)
    is_killed = bool(name) and not run.has_ended()
    if is_killed:
        waiting.popleft()
        KINDS[name].strike(run, rng)
    codes = KINDS[name].codes if is_killed else {0}
    try:
        code = run.wait()
    except TimeoutError as error:
        code, fault = 1, str(error)
    else:
        has_traceback = code in STOPPED and "Traceback" in run.output()
        fault = "a traceback" if has_traceback else "" if code in codes else f"exit code {code}"
    fault = f"{fault} after {name or 'no kill'}: {run.output()[-4000:]}" if fault else ""
    case.learn_from(run, before)
    killed = Kill(name, case.name, phase_of(run, code)) if is_killed else None
    return killed, code, fault or state_fault(run.workdir, before)


def phase_of(run: Started, code: int) -> str:
    if code == 0:
        return "finished"
    if unfinished(run.workdir) or "phase save_checkpoint" in run.output():
        return "saving"
    return "steps" if "steps in all" in run.output() else "starting"


def state_fault(workdir: Path, step_before: int) -> str:
    """What is wrong with a run that has just died, if anything: checkpoints that are not whole, or ahead."""
    steps = saved_steps(workdir / "checkpoints")
    for step in steps:
        if damage := damage_of(workdir / "checkpoints" / str(step)):
            return f"the checkpoint of step {step} is not whole: {damage}"
    if max(steps, default=0) < step_before:
        return f"the checkpoint of step {step_before} is gone, and {steps} are left"
    lines = {line["step"] for line in whole_lines(workdir / "metrics.jsonl")}
    if missing := set(range(1, max(steps, default=0) + 1)) - lines:
        return f"metrics.jsonl lacks steps {sorted(missing)}, and there is a checkpoint of step {steps[-1]}"
    return ""


def whole_lines(file: Path) -> list[dict[str, Any]]:
    lines = []
    for text in file.read_text(errors="replace").splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):
            lines.append(json.loads(text))
    return lines


def nothing_left(workdir: Path) -> str:
    """What a run has left behind that nobody needs; "" for nothing."""
    if left := [str(path.relative_to(workdir)) for path in workdir.rglob("*") if ".tmp" in path.name]:
        return f"temporary files are left: {left}"
    end = time.monotonic() + GONE_S
    while left := members(workdir):
        if time.monotonic() > end:
            return f"processes are left: {left}"
        time.sleep(0.05)
    return ""


# ---- many at once ----


def run_chains(chains: Sequence[Callable[[], list[Kill]]]) -> list[Kill]:
    """All kills of several chains, two of which run at a time."""
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        return [kill for future in [threads.submit(chain) for chain in chains] for kill in future.result()]


def report(kills: Sequence[Kill]) -> str:
    """A table: of each kind, how many were tried and survived, and when they came."""
    phases = ("starting", "steps", "saving", "finished")
    lines = [f"{'kind':<26}{'tried':>7}{'survived':>10}" + "".join(f"{phase:>10}" for phase in phases)]
    kinds = [*dict.fromkeys(kill.kind for kill in kills)]
    for kind in [*kinds, "all"]:
        chosen = [kill for kill in kills if kind in (kill.kind, "all")]
        survived = sum(not kill.fault for kill in chosen)
        numbers = "".join(f"{sum(kill.phase == phase for kill in chosen):>10}" for phase in phases)
        lines.append(f"{kind:<26}{len(chosen):>7}{survived:>10}{numbers}")
    return "\n".join(lines)
