"""What `python -m grpo_jax.doctor` looks at: one check a line, ok or with the command that mends it."""

import dataclasses
import importlib.metadata
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import Config, ConfigError
from grpo_jax.rollout.base import one_line
from grpo_jax.rollout.remedies import OLDEST_DRIVER, find_remedy
from grpo_jax.storage.files import size_text

if TYPE_CHECKING:
    from grpo_jax.rewards.base import Reward
    from grpo_jax.types import Prompt

GIB = 1 << 30
PLUGINS = {12: "jax-cuda12-plugin", 13: "jax-cuda13-plugin"}
"""CUDA's major version -> the package that JAX reaches it by."""
ASK_S = 120.0
WORDS = {True: "ok ", False: "BAD", None: "?  "}
RUN_ERROR = re.compile(r"^error: (phase .*)", re.MULTILINE)
"""The last line of a run that has failed, on a terminal."""
LOGGED_ERROR = re.compile(r"ERROR (phase \S+) failed\n((?:(?!\d{4}-\d\d-\d\d ).*\n?)*)")
"""Phase and traceback, in train.log."""
STEP_LINE = re.compile(r"\bStep \d+/\d+: ")


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    is_ok: bool | None
    """None: that cannot be told."""
    found: str
    mend: str = ""
    """The command or the change that mends it; "" where it is ok."""


def check_of(error: ConfigError) -> Check:
    """A user's mistake as a check."""
    return Check(error.key, False, repr(error.value), error.rule)


class Report:
    """Checks and text, printed as they come, or all checks as one JSON object at the end."""

    def __init__(self, *, is_json: bool):
        self._is_json = is_json
        self.checks: list[Check] = []
        self.errors: list[ConfigError] = []
        """Of the configuration, where the other checks could go on."""
        self._values: dict[str, str] = {}

    def text(self, *lines: str) -> None:
        if not self._is_json:
            print(*lines, sep="\n")

    def add(self, check: Check) -> None:
        self.checks.append(check)
        mend = f"; mend it: {check.mend}" if check.mend else ""
        self.text(f"  {WORDS[check.is_ok]} {check.name} {check.found}{mend}")

    def fail(self, error: ConfigError) -> None:
        """Adds what is wrong with the configuration, for checks that go on."""
        self.errors.append(error)
        self.checks.append(check_of(error))
        self.text(f"  BAD {error}")

    def values(self, rows: Sequence[tuple[str, str]]) -> None:
        """Keeps (name, value) pairs, as of a table, for the JSON object alone."""
        self._values |= dict(rows)

    def problems(self) -> list[Check]:
        return [check for check in self.checks if check.is_ok is False]

    def finish(self) -> None:
        """Prints the JSON object, if it was asked for: {"ok", "checks": [fields of `Check`], "run": values}.

        "ok" is null where nothing is wrong, and of something it cannot be told.
        """
        if self._is_json:
            checks = [dataclasses.asdict(check) for check in self.checks]
            is_ok = False if self.problems() else all(check.is_ok for check in self.checks) or None
            print(json.dumps({"ok": is_ok, "checks": checks, "run": self._values}, indent=2))


def check_driver(platforms: Sequence[str]) -> list[Check]:
    """The NVIDIA driver and whether JAX uses its GPUs; nothing on a machine without them.

    Args: platforms: of JAX's devices, as ("cpu",).
    """
    from grpo_jax.weight_sync.cuda import supported_cuda

    has_gpus = any(Path("/dev").glob("nvidia[0-9]*"))
    if not has_gpus:
        return []
    checks = []
    query = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30)
        found, is_ok = (done.stdout or done.stderr).strip().partition("\n")[0], done.returncode == 0
    except (OSError, subprocess.TimeoutExpired) as error:
        found, is_ok = str(error), False
    checks.append(Check("NVIDIA driver", is_ok, found, "" if is_ok else "install or restart the driver"))
    is_meant = os.environ.get("JAX_PLATFORMS", "") not in ("cpu",)
    if is_meant and not {"gpu", "cuda"} & set(platforms):
        found = f"are here, and JAX sees {', '.join(platforms)} only"
        reason = _why_not_cuda()
        remedy = find_remedy(reason)
        mend = "pip install -e '.[gpu]'; its CUDA 13 needs a driver of version 580 or newer"
        mend = remedy.mend if remedy else mend
        checks.append(Check("GPUs", False, f"{found}: {reason}" if reason else found, mend))
        versions = {name: _version(name) for name in (*PLUGINS.values(), "jaxlib")}
        checks.append(check_plugins(versions, supported_cuda()))
    return checks


def check_plugins(versions: Mapping[str, str], driver: str) -> Check:
    """JAX's CUDA plugin, beside jaxlib and the driver.

    Args:
        versions: of `PLUGINS` and of jaxlib; "": not installed.
        driver: the newest CUDA that the driver supports, as "12.8"; "": there is no driver.
    """
    name = "JAX's CUDA"
    here = [major for major, plugin in PLUGINS.items() if versions[plugin]]
    found = ", ".join(f"{PLUGINS[major]} {versions[PLUGINS[major]]}" for major in here) or "no plugin"
    supported = int(driver.partition(".")[0]) if driver else 0
    wanted = max((major for major in PLUGINS if major <= supported), default=max(PLUGINS))
    install = f"pip install 'jax[cuda{wanted}]=={versions['jaxlib']}'"
    if not here:
        return Check(name, False, found, install)
    if len(here) > 1 or max(here) > max(supported, min(PLUGINS)):
        wrong = [PLUGINS[major] for major in here if major != wanted]
        others = " ".join(f"{plugin} {plugin.replace('plugin', 'pjrt')}" for plugin in wrong)
        found += f"; the driver supports CUDA {driver or 'none'}"
        newer = (
            f", or a driver of version {OLDEST_DRIVER[max(here)]} or newer" if max(here) > supported else ""
        )
        return Check(name, False, found, f"pip uninstall -y {others} && {install}{newer}")
    is_alike = versions[PLUGINS[here[0]]] == versions["jaxlib"]
    found += f", jaxlib {versions['jaxlib']}, the driver supports CUDA {driver or 'none'}"
    return Check(name, is_alike, found, "" if is_alike else install)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _why_not_cuda() -> str:
    """What JAX says, in another process, when it must use CUDA: its last line, and a warning of its plugins."""
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    environment = os.environ | {"JAX_PLATFORMS": "cuda"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, env=environment)
    except subprocess.TimeoutExpired:
        return f"it does not answer within {ASK_S:g} s"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    told = [line for line in lines if "JAX plugin" in line or "cuInit" in line or "DSO version" in line]
    return " ".join([*told[:1], *lines[-1:]])[:600] if done.returncode else ""


def check_coordinator() -> Check | None:
    """Whether the first process of several can listen where the others look for it; None: there is one only."""
    from grpo_jax.run.hosts import ADDRESS, COUNT, RANK

    address = os.environ.get(ADDRESS, "")
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or os.environ.get(RANK) != "0" or os.environ.get(COUNT, "1") == "1":
        return None
    try:
        where = host.strip("[]")
        family = socket.getaddrinfo(where, int(port), type=socket.SOCK_STREAM)[0][0]
        socket.create_server((where, int(port)), family=family).close()
    except (OSError, OverflowError) as error:
        mend = f"name an address of this host and a free port in {ADDRESS}, in all processes"
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]  # the address again
        return Check(ADDRESS, False, f"{address}: {reason}", mend)
    return Check(ADDRESS, True, f"{address} can be listened at")


def check_log(path: Path) -> Check:
    """What went wrong, by what pip, an engine or a run has written. Raises: OSError: it cannot be read."""
    text = path.read_text(errors="replace")
    if end := _end_of_run(text):
        remedy = find_remedy(end)
        mend = remedy.mend if remedy else "as the line says; docs/troubleshooting.md has each kind"
        return Check(str(path), False, f"is of a run that ended with: {one_line(end, 600)}", mend)
    if remedy := find_remedy(text):
        return Check(str(path), False, f"says that {remedy.what}", remedy.mend)
    what = "has nothing in it that is known here" if text.strip() else "is empty"
    return Check(str(path), None, f"{what}; see its last lines, and docs/troubleshooting.md")


def _end_of_run(text: str) -> str:
    """The error that a run has ended with, by its output or its train.log; "": none, or it has gone on since."""
    ends = [*RUN_ERROR.finditer(text), *LOGGED_ERROR.finditer(text)]
    if not ends:
        return ""
    last = max(ends, key=lambda end: end.start())
    if STEP_LINE.search(text, last.end()):
        return ""
    if last.re is RUN_ERROR:
        return last[1]
    causes = re.findall(r"^[A-Za-z_][\w.]*: .*", last[2], re.MULTILINE)
    return f"{last[1]}: {causes[-1]}" if causes else f"{last[1]} failed"


def check_clock(now: float | None = None) -> Check:
    """Whether it is later than the package's own files. Args: now: seconds since 1970; None: the clock's."""
    now = time.time() if now is None else now
    written = Path(__file__).stat().st_mtime
    is_ok = now > written - 3600
    found = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now))
    return Check("clock", is_ok, found, "" if is_ok else "set it: files of this package are of a later time")


def check_disk(config: Config, *, place: Path, checkpoint: int, weights: int, num_epochs: float) -> Check:
    """Whether the disk holds what the run will write: checkpoints, one of them beside those kept, and HF folders.

    Args:
        place: a folder on the disk of the workdir.
        checkpoint, weights: bytes of one checkpoint, and of the weights of one folder.
        num_epochs: of the whole run.
    """
    section = config.checkpoint
    num_kept = section.max_to_keep + 1 + (section.keep_best != "none")
    if section.keep_every_epochs:
        num_kept += math.floor(num_epochs / section.keep_every_epochs)
    num_folders = math.floor(num_epochs / section.hf_every_epochs) if section.hf_every_epochs else 0
    needed = num_kept * checkpoint + max(1, num_folders) * weights
    free = shutil.disk_usage(place).free
    found = f"{size_text(free)} free, {size_text(needed)} for {num_kept} checkpoints and HF folders"
    is_ok = needed < free
    mend = "another --workdir, a lower checkpoint.max_to_keep, or a higher checkpoint.hf_every_epochs"
    return Check("disk", is_ok, found, "" if is_ok else mend)


def reference_reward(prompt: "Prompt", reward: "Reward") -> str:
    """What the reward gives to the row's own solution, `extra_info.answer`, in words."""
    from grpo_jax.rewards.base import RewardError
    from grpo_jax.types import Completion, RolloutGroup

    solution: Any = prompt.extra_info.get("answer")
    if not isinstance(solution, str):
        return "the row has no extra_info.answer to try the reward with"
    completion = Completion((0,), (0.0,), solution, "stop", 0)
    try:
        result = reward.score([RolloutGroup(prompt, (completion,))])
    except RewardError as error:
        return f"the reward of its own solution fails: {error}"
    return f"its own solution gets reward {float(result.rewards[0, 0]):g}"
