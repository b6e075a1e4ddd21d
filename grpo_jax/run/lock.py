"""One run at a time in a workdir: a lock that the kernel frees when its process dies, however it dies."""

import contextlib
import datetime
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from grpo_jax.config import ConfigError

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(file: Path) -> Iterator[None]:
    """Holds the lock FILE, which says who holds it. The file stays, so that no two runs lock different ones.

    Raises: ConfigError: another process holds it.
    """
    with file.open("a+") as lock:
        _take(lock.fileno(), file, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(json.dumps(this_process()) + "\n")
        lock.flush()
        yield


def check_free(file: Path) -> None:
    """Raises: ConfigError: a process holds the lock FILE. Writes nothing."""
    with contextlib.suppress(FileNotFoundError, PermissionError), file.open() as lock:
        # Shared: the processes of one run look at the same time, and are not to take one another for a run.
        _take(lock.fileno(), file, fcntl.LOCK_SH)


def _take(descriptor: int, file: Path, kind: int) -> None:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        rule = f"is in use by {holder(file)}; wait for it, or choose another --workdir"
        raise ConfigError("--workdir", str(file.parent), rule) from None
    except OSError as error:  # a network file system without locks
        logger.warning("WARNING: %s cannot be locked (%s): see to it that no second run uses it", file, error)


def this_process() -> dict[str, object]:
    """What tells this process from others, as JSON."""
    command = " ".join([Path(sys.executable).name, *sys.orig_argv[1:]])
    since = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since, "command": command}


def holder(file: Path) -> str:
    """Who wrote a lock file with `this_process`, in words."""
    try:
        held = json.loads(file.read_text())
        command = " ".join(str(held["command"]).split())[:200]
        return f"process {held['pid']} on host {held['host']} since {held['since']} ({command})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process, which has not said who it is"
