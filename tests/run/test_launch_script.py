"""launch/ray_cluster.sh where Ray does not start: a program in Python's place that only sleeps. No Ray."""

import os
import subprocess
import time
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "launch" / "ray_cluster.sh"


def test_a_ray_that_does_not_start_is_waited_for_as_long_as_it_is_said_and_ended(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 300\n")
    python.chmod(0o755)
    (tmp_path / "token").write_text("0" * 64)
    environment = os.environ | {
        "PYTHON": str(python),
        "TOKEN": str(tmp_path / "token"),
        "START_TIMEOUT_S": "0",
    }
    begin = time.monotonic()
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True, timeout=60, env=environment)
    assert time.monotonic() - begin < 20
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: Ray was not there within 0 s (START_TIMEOUT_S)\n"
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()
