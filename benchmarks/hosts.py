"""The channel of a run with several processes: what a step's completions and rewards cost on their way to all.

    python benchmarks/hosts.py [--processes=4] [--completions=1024] [--tokens=512]

Processes of this machine join as those of a run do. The first one hands out completions and rewards as it does in
training, and the time ends when all have them as objects. Beside it stands a limit: as many bytes of the numbers
alone, sent once through a plain TCP connection to each of the others.
"""

import dataclasses
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

RANK, SETTINGS = "JAX_PROCESS_ID", "GRPO_JAX_BENCHMARK"


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--completions", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if RANK in os.environ:
        one_of_them(args)
        return
    common.print_environment()
    with socket.create_server(("127.0.0.1", 0)) as probe, tempfile.TemporaryDirectory() as folder:
        port = probe.getsockname()[1]
        probe.close()
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(args.processes),
            "JAX_PLATFORMS": "cpu",
            SETTINGS: folder,
        }
        runs = [
            subprocess.Popen([sys.executable, *sys.argv], env=environment | {RANK: str(rank)})
            for rank in range(args.processes)
        ]
        codes = [run.wait() for run in runs]
    if any(codes):
        sys.exit(f"error: exit codes {codes}")


def one_of_them(args: Any) -> None:
    from grpo_jax.rollout.shared import SharedEngine, SharedReward
    from grpo_jax.run.hosts import joined

    config = common.shipped("quickstart")
    with joined(config, Path(os.environ[SETTINGS])) as hosts:
        groups = make_groups(args) if hosts.is_first else []
        prompts = [None] * (args.completions // 8)
        engine = SharedEngine(hosts, lambda tell: Canned(groups), lambda: None)
        reward = SharedReward(hosts, Zeros)
        taken = []
        for _ in range(args.repeats + 1):
            hosts.wait_for_all()
            begin = time.perf_counter()
            got = engine.generate(prompts, None, seed=0)
            reward.score(got)
            engine.sleep()
            hosts.wait_for_all()
            taken.append(time.perf_counter() - begin)
        hosts.wait_for_all()
        if hosts.is_first:
            limit = statistics.median(plain_seconds(args) for _ in range(args.repeats))
            median, worst = statistics.median(taken[1:]), max(taken[1:])
            print(f"{args.processes} processes, {args.completions} completions of {args.tokens} tokens")
            print(
                f"channel   {1e3 * median:.0f} ms a step (median of {args.repeats}, {1e3 * worst:.0f} at most)"
            )
            print(f"limit     {1e3 * limit:.0f} ms for the numbers' bytes through plain TCP")


@dataclasses.dataclass
class Canned:
    """An engine that has its answers already."""

    groups: list[Any]

    def submit(self, *_: Any, **__: Any) -> Any:
        return lambda: self.groups

    def sleep(self) -> None:
        """Nothing."""


class Zeros:
    """A reward that takes no time."""

    def score(self, groups: list[Any]) -> Any:
        from grpo_jax.types import RewardResult

        return RewardResult.of_one(np.zeros((len(groups), len(groups[0].completions)), np.float32), ())


def make_groups(args: Any) -> list[Any]:
    from grpo_jax.types import Completion, RolloutGroup

    rng = np.random.default_rng(0)

    def completion() -> Any:
        ids = tuple(rng.integers(0, 150_000, args.tokens).tolist())
        logprobs = tuple((-rng.random(args.tokens)).tolist())
        return Completion(ids, logprobs, "word " * (args.tokens // 2), "stop", 0)

    prompt: Any = None
    return [RolloutGroup(prompt, tuple(completion() for _ in range(8))) for _ in range(args.completions // 8)]


def plain_seconds(args: Any) -> float:
    """Seconds in which the ids (int32) and log-probabilities (float64) go to all others, one after the other."""
    size = args.completions * args.tokens * 12
    total = 0.0
    for _ in range(args.processes - 1):
        with socket.create_server(("127.0.0.1", 0)) as server:
            begin = time.perf_counter()
            sender = threading.Thread(target=send, args=(server.getsockname(), size))
            sender.start()
            taken, _ = server.accept()
            left = size
            while left:
                left -= len(taken.recv(min(left, 1 << 20)))
            sender.join()
            taken.close()
            total += time.perf_counter() - begin
    return total


def send(address: Any, size: int) -> None:
    with socket.create_connection(address) as connection:
        connection.sendall(bytes(size))


if __name__ == "__main__":
    main()
