"""Functions of a user's own, and parts of a run, that stand still where a test says so.

    python hanging.py PLACE SECONDS FLAGS...

trains, and hangs in PLACE. A run that is told to end has SECONDS for it. Only the part that hangs has a short
limit, so that a slow machine does not look like a hang.
"""

import ctypes
import functools
import gc
import os
import sys
import time

import jax
import jax.numpy as jnp

from grpo_jax import train
from grpo_jax.algorithm.advantages import grpo_advantages
from grpo_jax.algorithm.policy_losses import clipped_surrogate
from grpo_jax.rollout.local import LocalEngine
from grpo_jax.run import checkpoint, hangs, run

PLACE = "GRPO_JAX_TEST_HANGS_IN"
RANK = os.environ.get("GRPO_JAX_TEST_HANGS_RANK", "0")
"""The process that hangs, where there are several."""
num_calls = 0


def is_here(place, limit_s=0.5):
    """Whether the run is to hang here; if so, phases have a short limit from now on."""
    if os.environ.get(PLACE) != place or os.environ.get("JAX_PROCESS_ID", RANK) != RANK:
        return False
    for watch in gc.get_objects():
        if isinstance(watch, hangs.HangWatch):
            watch._limit_s = limit_s
    return True


def stand_still(place):
    if is_here(place):
        time.sleep(600)


# What a user's file may hold


def estimator(rewards, lengths):
    if len(rewards) == 4:  # a batch of the run; the trial before it has 2 prompts
        stand_still("advantages")
        if is_here("holding the interpreter", limit_s=4):
            time.sleep(1.5)  # until the watch has looked
            ctypes.PyDLL(None).sleep(600)  # as a C library that does not let go of Python's lock
    return grpo_advantages(rewards, lengths)


def loss(tokens, algorithm):
    global num_calls
    num_calls += 1
    stand_still("trial" if num_calls == 1 else "compilation")
    jax.debug.callback(lambda _: stand_still("device"), jnp.float32(0))
    return clipped_surrogate(tokens, algorithm)


# Parts of the run


def hang_before(owner, name, place):
    old = getattr(owner, name)

    @functools.wraps(old)
    def new(*args, **kwargs):
        stand_still(place)
        return old(*args, **kwargs)

    setattr(owner, name, new)


def main():
    os.environ[PLACE], hangs.END_S = sys.argv[1], float(sys.argv[2])
    hangs.SOON_S = 0.1
    hang_before(run, "read_inputs", "inputs")
    hang_before(LocalEngine, "submit", "generation")
    hang_before(run, "evaluate", "validation")
    hang_before(checkpoint, "write_manifest", "background save")
    hang_before(run.MetricsWriter, "console", "console")
    hang_before(LocalEngine, "close", "close")
    sys.argv[1:3] = []
    train.main()


if __name__ == "__main__":
    main()
