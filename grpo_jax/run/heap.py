"""What malloc does with the memory of arrays on a CPU."""

import ctypes
import os

ACCELERATORS = ("/dev/nvidiactl", "/dev/accel0", "/dev/vfio/0")
"""Files of the drivers of NVIDIA GPUs and TPUs."""
MALLOPT = {
    "M_ARENA_MAX": (-8, 1),
    "M_MMAP_MAX": (-4, 0),
    "M_TRIM_THRESHOLD": (-1, 2**31 - 1),
    "M_TOP_PAD": (-2, 2**26),
}
"""Options of glibc's mallopt(3), and values: one heap, that grows by 64 MiB and keeps 2 GiB of what is free."""


def keep_freed_memory() -> bool:
    """Has malloc keep what is freed, for what comes next, where there are CPUs alone. Returns whether it does.

    XLA allocates the arrays of each program anew. As shipped, glibc gives them back to Linux, which zeroes pages
    for the next ones: a third of the CPU time of the quickstart's updates. Who sets malloc by its variables
    keeps that. Called before any thread is started: a thread that has a heap of its own stays there.
    """
    is_set = "GLIBC_TUNABLES" in os.environ or any(name.startswith("MALLOC_") for name in os.environ)
    if is_set or (os.environ.get("JAX_PLATFORMS") != "cpu" and any(map(os.path.exists, ACCELERATORS))):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    return mallopt is not None and all(mallopt(number, value) for number, value in MALLOPT.values())
