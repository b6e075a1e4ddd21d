"""launch/ray_cluster.sh: its Ray, its secret and its signals. A small program stands in for the training."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.vllm  # for its Ray

SCRIPT = Path(__file__).parents[2] / "launch" / "ray_cluster.sh"

PYTHON = """#!/bin/sh
if [ "$2" = grpo_jax.train ]; then shift 2; exec {python} {trainer} "$@"; fi
exec {python} "$@"
"""
TRAINER = """
import pathlib, signal, sys, time
import ray

ray.init(sys.argv[1].partition("=")[2], log_to_driver=False)
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
pathlib.Path(sys.argv[-1]).write_text(" ".join(sys.argv[1:]))
while not stopped:
    time.sleep(0.1)
time.sleep(2)
print("saved", flush=True)
sys.exit(130)
"""


def run(tmp_path, *arguments, **environment):
    (tmp_path / "trainer.py").write_text(TRAINER)
    python = tmp_path / "python"
    python.write_text(PYTHON.format(python=sys.executable, trainer=tmp_path / "trainer.py"))
    python.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=clean | {"PYTHON": str(python), "TOKEN": str(tmp_path / "secret" / "token")} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def alive_nodes():
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def test_sigterm_lets_the_trainer_save_and_ends_this_ray_only(tmp_path, ray_nodes):
    before = alive_nodes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = run(tmp_path, str(tmp_path / "begun"), PORT=str(port))
    end = time.monotonic() + 120
    while not (tmp_path / "begun").exists() or not (tmp_path / "begun").read_text():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.1)
    arguments = (tmp_path / "begun").read_text().split()
    assert arguments[:2] == [
        f"--config.rollout.ray_address=127.0.0.1:{port}",
        "--config.rollout.placement=separate",
    ]
    token = tmp_path / "secret" / "token"
    assert token.stat().st_mode & 0o777 == 0o600 and len(token.read_text()) == 64
    ours = psutil.Process(process.pid).children(recursive=True)
    ips = {c.laddr.ip for p in ours for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {ip.removeprefix("::ffff:") for ip in ips} == {"127.0.0.1"}
    for member in [process.pid, *(p.pid for p in ours)]:
        if os.getpgid(member) == process.pid:
            os.kill(member, signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130 and out.splitlines()[-1] == "saved", out + err
    assert not psutil.wait_procs(ours, timeout=30)[1]
    assert alive_nodes() == before  # of the Ray of these tests


def test_several_hosts_need_an_address(tmp_path):
    process = run(tmp_path, HOSTS="2")
    _, err = process.communicate(timeout=20)
    assert process.returncode == 2
    assert err == "error: HOSTS=2 needs ADDRESS, this host's on the network that they share\n"
