"""What malloc keeps."""

import json
import os
import subprocess
import sys

FAULTS = """
import json, resource, sys
from grpo_jax.run.heap import keep_freed_memory

is_kept = keep_freed_memory()
import jax, jax.numpy as jnp

step = jax.jit(lambda x: [x + i for i in range(4)])
x = jnp.zeros(2**20)  # 4 MiB
jax.block_until_ready(step(x))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    jax.block_until_ready(step(x))
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([is_kept, faults]))
"""


def faults_of(**variables):
    """(whether memory is kept, page faults of 50 steps with 4,096 pages of results each)"""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", FAULTS]
    result = subprocess.run(command, env=own | variables, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


def test_memory_is_kept_on_cpus_unless_someone_has_set_malloc():
    is_kept, few = faults_of(JAX_PLATFORMS="cpu")
    assert is_kept and few < 50 * 4096 / 4  # the first steps take what is kept from then on
    is_kept, many = faults_of(JAX_PLATFORMS="cpu", MALLOC_MMAP_THRESHOLD_="131072")
    assert not is_kept and many > 50 * 4096 * 0.9
