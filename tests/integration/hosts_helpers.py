"""Runs of several processes on this machine, each with a part of eight virtual devices."""

import contextlib
import os
import random
import re
import socket
import subprocess
import sys

import integration_helpers as helpers

DEVICES = 8


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def environment(rank, count, port, **env):
    flags = f"--xla_force_host_platform_device_count={DEVICES // count}"
    inherited = os.environ.get("XLA_FLAGS", "")
    kept = [flag for flag in inherited.split() if "device_count" not in flag]
    return os.environ | {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(rank),
        "XLA_FLAGS": " ".join([*kept, flags]),
        "PYTHONUNBUFFERED": "1",
        **env,
    }


@contextlib.contextmanager
def started(argv, count, program=("-m", "grpo_jax.train"), **env):
    """`count` processes of a run, the last one first; those that are left are killed at the end."""
    port, processes = free_port(), {}
    try:
        for rank in reversed(range(count)):
            processes[rank] = subprocess.Popen(
                [sys.executable, *map(str, program), *map(str, argv)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=helpers.ROOT,
                env=environment(rank, count, port, **env),
            )
        yield [processes[rank] for rank in range(count)]
    finally:
        for process in processes.values():
            process.kill()
            process.wait()


GLOO = re.compile(
    r"\[Gloo\] Rank \d*| is connected to \d*| peer ranks\. |Expected number of connected peer ranks is : \d*"
)


def plain(text):
    """Without what Gloo says, which several threads write in pieces, into one another and into our lines."""
    rest = [GLOO.sub("", line) for line in text.splitlines(keepends=True)]
    return "".join(line for line in rest if not re.fullmatch(r"[\d. :]*\n?", line))


def finish(processes, timeout=240):
    """Waits for all; returns their `Result`s, what JAX's CPU collectives print left out."""
    results = []
    for process in processes:
        out, err = process.communicate(timeout=timeout)
        results.append(helpers.Result(process.returncode, plain(out), plain(err)))
    return results


def train_ok(workdir, overrides, count, **env):
    """Trains in `count` processes, which must go well; returns their `Result`s."""
    with started(helpers.train_argv(workdir, overrides), count, **env) as processes:
        results = finish(processes)
    assert [result.code for result in results] == [0] * count, [
        r.err[-2000:] + r.out[-2000:] for r in results
    ]
    return results


def seeded(number):
    return random.Random(number)
