"""Ray of one run: who may talk to it, what it outlives, and what ends it."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.vllm  # for its Ray

ROOT = Path(__file__).parents[2]

TRAINER = """
import json, os, sys, time
from grpo_jax.rollout.vllm.local_ray import OURS, LocalRay
from grpo_jax.rollout.base import EngineError

local = LocalRay({"num_cpus": 2, "include_dashboard": False}, gpus=sys.argv[1], timeout_s=60)
import ray
ray.init(local.address, log_to_driver=False, logging_level=40)

@ray.remote(num_cpus=0)
def engine():
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")

pid, gpus = ray.get(engine.remote(), timeout=60)
print(json.dumps({"address": local.address, "folder": str(local.folder), "head": local._process.pid, "gpus": gpus,
                  "token": os.environ["RAY_AUTH_TOKEN"]}), flush=True)
for line in sys.stdin:
    if line == "check\\n":
        try:
            local.check(5)
            print("alive", flush=True)
        except EngineError as error:
            print(error, flush=True)
    elif line == "close\\n":
        ray.shutdown()
        local.close()
        print("closed", flush=True)
"""


@contextlib.contextmanager
def trainer(gpus=""):
    """A process in a group of its own that has started Ray; (process, what it tells)."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER, gpus],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


def say(process, word):
    process.stdin.write(word + "\n")
    process.stdin.flush()
    for line in process.stdout:  # Ray has something to say too
        if line.startswith(("alive", "closed", "Ray's processes")):
            return line.strip()
    raise AssertionError("it has died")


def of_ray(head):
    """All processes that hang on Ray's head, itself among them."""
    try:
        parent = psutil.Process(head)
        return [parent, *parent.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def left_after(processes, seconds=15):
    return psutil.wait_procs(processes, timeout=seconds)[1]


def test_two_at_once_listen_on_loopback_only_and_keep_strangers_out():
    with trainer(gpus="5,6") as (one, about), trainer() as (_, other):
        assert about["address"] != other["address"] and about["folder"] != other["folder"]
        assert about["token"] != other["token"] and len(about["token"]) == 64
        listening = [
            (process.name(), connection.laddr.ip)
            for process in [psutil.Process(one.pid), *of_ray(about["head"]), *of_ray(other["head"])]
            for connection in process.net_connections("inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert len(listening) > 5  # GCS, raylets, agents, workers
        assert {ip.removeprefix("::ffff:") for _, ip in listening} == {"127.0.0.1"}, listening
        assert Path(about["folder"]).stat().st_mode & 0o777 == 0o700
        assert not any(about["token"] in " ".join(p.cmdline()) for p in of_ray(about["head"]))
        stranger = "import ray, sys; ray.init(sys.argv[1], log_to_driver=False)"
        for token, expected in (("0" * 64, 1), (about["token"], 0)):
            environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
            environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
            command = [sys.executable, "-c", stranger, about["address"]]
            done = subprocess.run(command, env=environment, capture_output=True, timeout=90)
            assert done.returncode == expected, done.stderr[-300:]


def test_a_signal_for_the_trainers_group_leaves_ray_alone():
    """What `systemctl stop`, Slurm and Ctrl-C send; the trainer itself would catch it."""
    with trainer() as (process, about):
        processes = of_ray(about["head"])
        assert len(processes) > 3
        for number in (signal.SIGTERM, signal.SIGINT):
            for member in psutil.pids():
                with contextlib.suppress(ProcessLookupError):
                    if member != process.pid and os.getpgid(member) == os.getpgid(process.pid):
                        os.kill(member, number)
        time.sleep(1)
        assert say(process, "check") == "alive" and all(p.is_running() for p in processes)
        assert say(process, "close") == "closed"
        assert not left_after(processes) and not Path(about["folder"]).exists()


@pytest.mark.parametrize("victim", ["raylet", "gcs_server", "head"])
def test_the_death_of_rays_processes_is_noticed(victim):
    """And it ends neither the trainer nor leaves anything behind."""
    with trainer() as (process, about):
        processes = of_ray(about["head"])
        (first,) = [
            p for p in processes if p.name() == victim or (victim == "head" and p.pid == about["head"])
        ]
        first.kill()
        said = say(process, "check")
        assert said.startswith("Ray's processes have ended:")
        if victim != "head":
            assert re.search(rf"Ray has lost {victim} \(log: .*head-\d+\.log\)", said)
        assert say(process, "close") == "closed"  # still there to save
        assert not left_after(processes)


def test_ray_ends_with_a_trainer_that_is_killed():
    with trainer() as (process, about):
        processes = of_ray(about["head"])
        process.kill()
        assert not left_after(processes)


def test_a_ray_that_does_not_start_says_why(monkeypatch):
    from grpo_jax.rollout.base import EngineError
    from grpo_jax.rollout.vllm import local_ray

    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", *local_ray.OURS):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(EngineError, match=r"Ray ended while it started: .*no_such_option.*head-\d+\.log"):
        local_ray.LocalRay({"no_such_option": 1}, gpus="", timeout_s=60)
    with pytest.raises(EngineError, match=r"Ray was not there within 0\.1 s"):
        local_ray.LocalRay({"num_cpus": 1}, gpus="", timeout_s=0.1)
