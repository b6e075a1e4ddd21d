"""Ray for one run: its own session, behind a secret of its own.

On one host it listens on the loopback interface alone. A run of several processes that has engines on all of their
devices has a node for each process (`RayNode`), on the network by which the processes reach each other.
"""

import contextlib
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from grpo_jax.rollout.base import EngineError

HEAD = Path(__file__).with_name("ray_head.py")
END_S = 20.0  # to end by itself; then it is killed

OURS = {
    # Otherwise Ray's C++ ends the trainer a minute after Ray's death, while it may still be saving.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
    # A push that has failed in one engine is waited for in no other.
    "RAY_IGNORE_UNHANDLED_ERRORS": "1",
}
"""Environment variables of the trainer, which Ray reads when it is imported and when it is joined."""
SCOPE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Ray on Linux listens on all interfaces, unless it takes itself for one of another system ("0")."""
TOKEN = "RAY_AUTH_TOKEN"


class LocalRay:
    """Starts Ray. `close` it at the end; it ends with the trainer too, however that dies.

    Raises:
        EngineError: it cannot be started, or not within `timeout_s`.
    """

    def __init__(self, options: dict[str, Any], *, gpus: str, timeout_s: float, host: str = ""):
        """Args:
        options: of `ray.init`.
        gpus: that Ray may hand out, as CUDA_VISIBLE_DEVICES has them; "": as the trainer's.
        host: this one's address for nodes that join; "": none do.
        """
        os.environ.update(OURS | {SCOPE: "1" if host else "0"})
        # The kernel shows them to this user alone, as it does the environment of all processes.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault(TOKEN, secrets.token_hex(32))
        # Short: the paths of Ray's sockets may have 107 bytes. Ray opens the folder it is given to everyone, which
        # this one around it is not.
        folder = Path(tempfile.mkdtemp(prefix="grpo_jax-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        self._has_folder = True
        options = options | {"_temp_dir": str(folder / "ray")} | ({"_node_ip_address": host} if host else {})
        self.address = self._run(["head", json.dumps(options)], folder, {}, gpus=gpus, timeout_s=timeout_s)

    def _run(
        self, arguments: list[str], folder: Path, variables: dict[str, str], *, gpus: str, timeout_s: float
    ) -> str:
        """Starts the process that Ray hangs on. Returns what it prints once Ray is there."""
        self.folder = folder
        environment = os.environ | variables | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        command = [sys.executable, "-P", str(HEAD), *arguments]
        self._log = folder / f"{arguments[0]}-{os.getpid()}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return self._read_line(timeout_s)

    def _read_line(self, timeout_s: float) -> str:
        assert self._process.stdout is not None
        text, end = b"", time.monotonic() + timeout_s
        while not text.endswith(b"\n"):
            left = end - time.monotonic()
            ready = select.select([self._process.stdout], [], [], max(0.0, left))[0]
            part = os.read(self._process.stdout.fileno(), 1024) if ready else b""
            if not part:
                what = "ended while it started" if ready else f"was not there within {timeout_s:g} s"
                said = self._last_words()
                self.close(is_well=False)
                raise EngineError(f"Ray {what}: {said}")
            text += part
        return text.decode().strip()

    @property
    def pid(self) -> int:
        """Of the process that Ray hangs on."""
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def check(self, wait_s: float = 0.0) -> None:
        """Raises: EngineError: Ray has died. Args: wait_s: for it to do so, where something else has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(wait_s)
            raise EngineError(f"Ray's processes have ended: {self._last_words()}")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
            if lines:
                return f"{lines[-1].strip()[:300]} (log: {self._log})"
        return f"it says nothing (log: {self._log})"

    def close(self, *, is_well: bool = True) -> None:
        """Ends Ray. Its folder, with the logs, stays where something has failed."""
        is_well = is_well and self.is_alive
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # it hangs in the kernel, on a lost disk say
            self._process.wait(END_S)
        self._process.stdout.close()
        if is_well and self._has_folder and sys.exc_info()[0] is None:
            shutil.rmtree(self.folder, ignore_errors=True)


class RayNode(LocalRay):
    """Ray on this host as a part of another process's `LocalRay`, which has a `host`. Ends as that does."""

    def __init__(
        self, options: list[str], *, address: str, token: str, folder: Path, gpus: str, timeout_s: float
    ):
        """Args:
        options: of the command `ray start`.
        address, token, folder: those of the other one; the folder may lie on another host.
        gpus: as `LocalRay`'s.
        """
        is_new = not folder.exists()  # it may be this very host's
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._has_folder = is_new
        variables = {"RAY_AUTH_MODE": "token", TOKEN: token, SCOPE: "1"}
        self.address = address
        self._run(
            ["node", f"--address={address}", *options], folder, variables, gpus=gpus, timeout_s=timeout_s
        )
