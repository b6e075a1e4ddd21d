"""The process that Ray of one run hangs on, on this host.

    python ray_head.py head OPTIONS         a new Ray; OPTIONS: of `ray.init`, as JSON
    python ray_head.py node OPTION ...      a part of another one; OPTION: of the command `ray start`

It is not of the trainer's process group, so what is sent to that group (`systemctl stop`, Slurm, Ctrl-C) reaches
the trainer alone, which needs its engines until it has saved. It prints Ray's address, or "joined", and ends, with
all of Ray here, when its standard input is closed (the trainer is gone, however it went) or a process of Ray's has
died.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

POLL_S = 0.5  # between two looks at Ray's processes


def main(kind: str, *arguments: str) -> None:
    # A signal for the trainer's terminal or session is none for its Ray.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    start: dict[str, Callable[..., Callable[[], list[str]]]] = {"head": start_head, "node": start_node}
    lost = start[kind](*arguments)
    while not select.select([0], [], [], POLL_S)[0] or os.read(0, 1):
        if names := lost():
            print("Ray has lost " + ", ".join(names), file=sys.stderr, flush=True)
            break
    # Not ray.shutdown(): it waits for processes that may be gone. All are in this process's group.
    os.killpg(0, signal.SIGKILL)


def start_head(options: str) -> Callable[[], list[str]]:
    """Returns the function that tells which of Ray's processes have died."""
    import ray

    context: Any = ray.init("local", log_to_driver=False, logging_level=logging.ERROR, **json.loads(options))
    print(context.address_info["address"], flush=True)
    node: Any = ray._private.worker._global_node
    return lambda: [name for name, _ in node.dead_processes()]


def start_node(*options: str) -> Callable[[], list[str]]:
    """As `start_head`. `ray start --block` ends when one of its processes does, or the head is gone."""
    command = [sys.executable, "-u", "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"]
    process = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", file=sys.stderr, flush=True)
        if "runtime started" in line:
            print("joined", flush=True)
            break
    else:
        os.killpg(0, signal.SIGKILL)  # what it said last is the reason
    return lambda: [] if process.poll() is None else ["the processes of this node"]


if __name__ == "__main__":
    main(*sys.argv[1:])
