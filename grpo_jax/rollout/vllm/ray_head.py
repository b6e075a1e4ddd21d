"""The process that Ray of one run hangs on: `python ray_head.py OPTIONS`, with `ray.init`'s options as JSON.

It is not of the trainer's process group, so what is sent to that group (`systemctl stop`, Slurm, Ctrl-C) reaches
the trainer alone, which needs its engines until it has saved. It prints Ray's address, and ends, with all of Ray,
when its standard input is closed (the trainer is gone, however it went) or a process of Ray's has died.
"""

import json
import logging
import os
import select
import signal
import sys
from typing import Any

POLL_S = 0.5  # between two looks at Ray's processes


def main(options: str) -> None:
    import ray

    # A signal for the trainer's terminal or session is none for its Ray.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    context: Any = ray.init("local", log_to_driver=False, logging_level=logging.ERROR, **json.loads(options))
    print(context.address_info["address"], flush=True)
    while not select.select([0], [], [], POLL_S)[0] or os.read(0, 1):
        node: Any = ray._private.worker._global_node
        dead = node.dead_processes()
        if dead:
            print("Ray has lost " + ", ".join(name for name, _ in dead), file=sys.stderr, flush=True)
            break
    # Not ray.shutdown(): it waits for processes that may be gone. All are in this process's group.
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
