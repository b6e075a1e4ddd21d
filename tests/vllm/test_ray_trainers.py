"""launch/ray_trainers.py in a cluster of three nodes with GPUs that Ray believes in; `timeit` is what is run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.vllm  # for its Ray

SCRIPT = Path(__file__).parents[2] / "launch" / "ray_trainers.py"
WHO = "rank = int(os.environ['JAX_PROCESS_ID'])\n"


@pytest.fixture(scope="module")
def address(ray_nodes):
    """Of the cluster, with three more nodes of two GPUs each."""
    cluster, _ = ray_nodes
    nodes = [cluster.add_node(num_cpus=1, num_gpus=2) for _ in range(3)]
    cluster.wait_for_nodes()
    yield cluster.address
    for node in nodes:
        cluster.remove_node(node)


def start(address, statement, **env):
    """Two trainers that execute a statement once; `rank` is known to it."""
    command = [sys.executable, SCRIPT, "run", address, "2", "timeit", "-n", "1", "-r", "1"]
    return subprocess.Popen(
        [*map(str, command), "-s", "import os, sys, time", WHO + statement],
        env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def free_gpus():
    import ray

    return ray.available_resources().get("GPU", 0)


def test_each_trainer_has_the_gpus_of_its_node_and_engines_get_the_others(address):
    names = ["CUDA_VISIBLE_DEVICES", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"]
    names += ["XLA_FLAGS", "OMP_NUM_THREADS"]
    statement = f"print(*[os.environ.get(n) for n in {names!r}], flush=True)\ntime.sleep(3)"
    process = start(address, statement, XLA_FLAGS="--of_the_script", OMP_NUM_THREADS="5")
    line = process.stdout.readline().split()
    assert free_gpus() == 2  # of six
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert sorted(line[0].split(",")) == ["0", "1"] and line[1:3] == ["2", "0"]
    host, _, port = line[3].rpartition(":")
    assert host == address.rpartition(":")[0] and 0 < int(port) < 65536
    assert line[4:] == ["--of_the_script", "5"]
    assert "--of_the_script" not in out  # the second one's
    end = time.monotonic() + 30
    while free_gpus() < 6:
        assert time.monotonic() < end
        time.sleep(0.2)


def test_the_exit_code_is_the_first_ones_and_another_is_told(address):
    statement = "print('tail', rank, flush=True)\nos._exit(3 + rank)"
    process = start(address, statement, GPUS="1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (3, "tail 0\n")
    first, second = err.splitlines()
    assert first.startswith("process 1 on ") and first.endswith(" ended with exit code 4")
    assert second == "  tail 1"


def test_a_worker_that_dies_is_named_and_nothing_is_started_again(address, tmp_path):
    """Its trainer gets SIGTERM by the kernel, the other one from here."""
    statement = (
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(130))\n"
        "print('first', flush=True)\n"
        "open(os.environ['GRPO_JAX_TEST_FILE'], 'a').write(f'{rank} {os.getppid()}\\n')\n"
        "time.sleep(100)"
    )
    file = tmp_path / "workers"
    process = start(address, statement, GRPO_JAX_TEST_FILE=str(file))
    end = time.monotonic() + 60
    while not file.exists() or len(file.read_text().splitlines()) < 2:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.1)
    workers = dict(tuple(map(int, line.split())) for line in file.read_text().splitlines())
    os.kill(workers[1], signal.SIGKILL)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130 and out.startswith("first\n"), err  # then Ray says it too
    assert "error: process 1 on " in err and " is gone: " in err and err.count("\n") == 1, err
    assert len(file.read_text().splitlines()) == 2


def test_too_few_hosts_are_said(address):
    script = SCRIPT.read_text().replace("START_S = 120.0", "START_S = 1.0")
    script = script.replace("Path(__file__)", f"Path({str(SCRIPT)!r})")
    done = subprocess.run(
        [sys.executable, "-c", script, "run", address, "4", "timeit"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2 and done.stderr == "error: TRAINERS=4: only 3 of 4 hosts have GPUs\n"
