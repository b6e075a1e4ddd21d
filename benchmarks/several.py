"""Runs a command as several processes of one run on this host, each with its share of the GPUs.

    python benchmarks/several.py 2 python -m grpo_jax.train --config=configs/gsm8k.py ...

What the first one prints is printed, its exit code is this one's, and signals go to all.
"""

import os
import signal
import socket
import subprocess
import sys
from typing import Any


def main() -> None:
    count, command = int(sys.argv[1]), sys.argv[2:]
    gpus = visible_gpus()
    share = len(gpus) // count
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    processes = []
    for rank in range(count):
        environment = os.environ | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(rank),
        }
        if share:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[rank * share : (rank + 1) * share])
        output = None if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=output))

    def pass_on(number: int, _: Any) -> None:
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, pass_on)
    codes = [process.wait() for process in processes]
    sys.exit(codes[0])


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them; [] without any."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [str(i) for i in range(len(listed.stdout.splitlines()))]


if __name__ == "__main__":
    main()
