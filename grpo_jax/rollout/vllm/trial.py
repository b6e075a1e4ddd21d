"""Tries vLLM and Ray as a run would use them, but for the model: for `grpo_jax.doctor`."""

import contextlib
import dataclasses
import importlib.metadata
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

from grpo_jax.config import ConfigError, RolloutSection
from grpo_jax.rollout.base import EngineError, Finding, one_line
from grpo_jax.rollout.remedies import find_remedy
from grpo_jax.rollout.vllm import processes
from grpo_jax.rollout.vllm.check import ANSWER_S, environment_for, find_vllm, output_of, python_is_ours
from grpo_jax.rollout.vllm.cluster import ENVIRONMENT, Cluster, root_cause
from grpo_jax.rollout.vllm.packages import PRINT_PACKAGES, Packages, check_packages, read_packages
from grpo_jax.weight_sync.cuda import supported_cuda

IMPORT_S = 300.0
"""For vLLM to be imported, from a cold disk."""
RAY_S = 120.0
"""For Ray to start, and for a process of an engine."""
NUM_PORTS = 32
"""Of loopback, at once: Ray's processes and vLLM's take about so many, whichever are free."""

IMPORT = """
import vllm
from vllm.platforms import current_platform
getattr(current_platform, "import_kernels", lambda: None)()
from vllm import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM
print("imported on", current_platform.device_type or "nothing: Failed to infer device type")
"""
FAILED_KERNELS = re.compile(r"Failed to import from vllm\._\w+: (.*)|Failed to infer device type")
"""vLLM goes on without its compiled part, and fails later."""
ERROR = re.compile(r"\b[A-Za-z_.]*(?:Error|Exception)\b.*")


def try_installation(section: RolloutSection) -> Iterator[Finding]:
    """See `rollout.try_installation`. Starts a Ray, and ends it; an engine is not started."""
    installation = find_vllm(section)
    python = section.python or sys.executable
    is_ours = python_is_ours(section)
    pip = "pip" if is_ours else f"{python} -m pip"
    yield Finding("vLLM", True, f"{installation.version} in the environment of {python}")
    packages = read_packages(_printed(python, PRINT_PACKAGES))
    own = importlib.metadata.requires("grpo_jax") or [] if is_ours else ()
    yield from check_packages(packages, pip=pip, ours=own, driver=supported_cuda())
    yield try_import(python, packages, pip)
    yield try_ports()
    yield try_ray(section, uses_gpus=not installation.is_cpu)


def _printed(python: str, code: str) -> str:
    try:
        return output_of([python, "-c", code], environment_for(python), timeout_s=ANSWER_S).stdout
    except subprocess.TimeoutExpired:
        return ""


def try_import(python: str, packages: Packages, pip: str, code: str = IMPORT) -> Finding:
    """Imports vLLM and its compiled part, in a process of its own.

    Args: code: that does so, and prints "imported" at its end.
    """
    begin = time.monotonic()
    name = "vLLM's import"
    try:
        done = output_of([python, "-c", code], ENVIRONMENT | environment_for(python), timeout_s=IMPORT_S)
    except subprocess.TimeoutExpired:
        return Finding(name, False, f"takes longer than {IMPORT_S:g} s", "is its disk slow, or lost?")
    said = f"{done.stdout}\n{done.stderr}"
    failed = FAILED_KERNELS.search(said)
    if done.returncode == 0 and not failed:
        where = done.stdout.strip().rpartition(" ")[2]
        return Finding(name, True, f"{time.monotonic() - begin:.0f} s, for {where}")
    errors = [failed.group()] if failed and done.returncode == 0 else ERROR.findall(said)
    last = errors[-1] if errors else (said.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    versions = {"vllm": packages.vllm, "ray": packages.versions.get("ray", "")}
    remedy = find_remedy(last, pip=pip, **versions) or find_remedy(said, pip=pip, **versions)
    if remedy is None:
        return Finding(name, False, one_line(last), f"{python} -c 'import vllm' shows all of it")
    return Finding(name, False, f"{one_line(last)}: {remedy.what}", remedy.mend)


def try_ports() -> Finding:
    """Whether as many ports of loopback can be had as a run takes. Those of the configuration: `find_vllm`."""
    try:
        with contextlib.ExitStack() as held:
            for _ in range(NUM_PORTS):
                held.enter_context(socket.create_server(("127.0.0.1", 0)))
    except OSError as error:
        mend = "bring the interface lo up (ip link set lo up), or widen net.ipv4.ip_local_port_range"
        return Finding("ports", False, f"127.0.0.1 gives no port ({error.strerror or error})", mend)
    return Finding("ports", True, f"{NUM_PORTS} of 127.0.0.1 can be had at once")


def try_ray(section: RolloutSection, *, uses_gpus: bool) -> Finding:
    """Starts Ray as a run does, or joins the configuration's cluster; reserves the engines' places, starts the
    process of one of them, and ends it all.
    """
    limit_s = min(section.start_timeout_s, RAY_S)
    brief = dataclasses.replace(section, start_timeout_s=limit_s)
    num_places, begin = max(1, section.num_replicas), time.monotonic()
    mend = "see docs/troubleshooting.md, vLLM does not start; the log that is named says more"
    try:
        cluster = Cluster(brief, num_replicas=num_places, uses_gpus=uses_gpus)
        own = cluster.own_ray
        left = processes.family(own.pid) if own is not None else {}
        try:
            _start_process(cluster, limit_s)
        finally:
            left |= processes.family(own.pid) if own is not None else {}
            cluster.close([])
    except (EngineError, ConfigError, OSError) as error:  # OSError: of RAY_TMPDIR
        remedy = find_remedy(str(error))
        return Finding("Ray", False, one_line(str(error), 600), remedy.mend if remedy else mend)
    seconds = f"{time.monotonic() - begin:.0f} s"
    if own is None:
        return Finding(
            "Ray", True, f"of {section.ray_address}: {num_places} place(s) had and given back, {seconds}"
        )
    limit = time.monotonic() + processes.GONE_S
    while not processes.are_gone(left) and time.monotonic() < limit:
        time.sleep(0.1)
    if not processes.are_gone(left) or own.folder.exists():
        mend = f"end its processes ({', '.join(map(str, left))}), and remove {own.folder}"
        return Finding("Ray", False, "has left something behind", mend)
    return Finding("Ray", True, f"started, {num_places} place(s) reserved, a process run, ended; {seconds}")


def _start_process(cluster: Cluster, limit_s: float) -> None:
    """Raises: EngineError: the process of an engine does not come up."""
    import ray

    actor = cluster.make_actor(0)
    try:
        ray.get(actor.pid.remote(), timeout=limit_s)
    except ray.exceptions.RayError as error:
        cause, log = root_cause(error)
        raise EngineError(f"the process of an engine does not start: {cause} (log: {log})") from error
    finally:
        cluster.kill(actor)
