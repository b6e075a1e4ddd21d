"""Starts training runs by forking: what takes a process seconds to import is there already.

    python kill_server.py

Reads one JSON object a line: {"argv", "log", "env"} starts a run and is answered by its process id, {"pid"} waits
for one and is answered by its exit code, negative for a signal. A run has a session of its own, its output in a
file, and from its first moment the handlers of signals that `python -m grpo_jax.train` has. Before the fork there
is no JAX back end, and so none of its threads.
"""

import atexit
import gc
import importlib
import json
import os
import signal
import sys

from grpo_jax.config import command_line

PRELOADED = (
    "grain",
    "grpo_jax.rewards.pool",
    "grpo_jax.rollout.local",
    "grpo_jax.train",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "tensorboardX.proto.event_pb2",
    "tensorboardX.record_writer",
    "tensorboardX.summary",
    "transformers",
)
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    atexit.register(command_line._ignore_signals)
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "pid" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["pid"], 0)[1])
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # none is lost before the run has its handlers
            answer = os.fork()
            if not answer:
                run(**request)
                return
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        print(answer, flush=True)


def run(argv: list[str], log: str, env: dict[str, str]) -> None:
    """In the child: trains. What it raises ends the process as it ends the command."""
    from grpo_jax import train

    os.setsid()
    for file, flags, descriptors in (
        (os.devnull, os.O_RDONLY, (0,)),
        (log, os.O_WRONLY | os.O_APPEND, (1, 2)),
    ):
        opened = os.open(file, flags | os.O_CREAT)
        for descriptor in descriptors:
            os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(env)
    for number in SIGNALS:
        signal.signal(number, command_line._interrupted)
    sys.argv = ["train", *argv]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    train.main()


if __name__ == "__main__":
    main()
