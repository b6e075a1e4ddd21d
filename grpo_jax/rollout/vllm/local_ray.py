"""Ray for one run on this host: its own session, on the loopback interface, behind a secret of its own."""

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
    # Ray on Linux listens on all interfaces, unless it takes itself for one of another system.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Otherwise Ray's C++ ends the trainer a minute after Ray's death, while it may still be saving.
    "RAY_gcs_rpc_server_reconnect_timeout_s": "86400",
}
"""Environment variables of the trainer, which Ray reads when it is imported and when it is joined."""


class LocalRay:
    """Starts Ray. `close` it at the end; it ends with the trainer too, however that dies.

    Raises:
        EngineError: it cannot be started, or not within `timeout_s`.
    """

    def __init__(self, options: dict[str, Any], *, gpus: str, timeout_s: float):
        """Args:
        options: of `ray.init`.
        gpus: that Ray may hand out, as CUDA_VISIBLE_DEVICES has them; "": as the trainer's.
        """
        os.environ.update(OURS)
        # The kernel shows them to this user alone, as it does the environment of all processes.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Short: the paths of Ray's sockets may have 107 bytes. Ray opens the folder it is given to everyone, which
        # this one around it is not.
        self.folder = Path(tempfile.mkdtemp(prefix="grpo_jax-ray-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": gpus} if gpus else {})
        command = [
            sys.executable,
            "-P",
            str(HEAD),
            json.dumps(options | {"_temp_dir": str(self.folder / "ray")}),
        ]
        self._log = self.folder / "head.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.address = self._read_address(timeout_s)

    def _read_address(self, timeout_s: float) -> str:
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
        if is_well and sys.exc_info()[0] is None:
            shutil.rmtree(self.folder, ignore_errors=True)
