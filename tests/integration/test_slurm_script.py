"""launch/slurm.sh: what it starts. Two small programs stand in for Slurm's `srun` and `scontrol`."""

import os
import subprocess
import sys

import hosts_helpers as hosts
import integration_helpers as helpers
import psutil
import pytest

SCRIPT = helpers.ROOT / "launch" / "slurm.sh"
SRUN = f"""#!{sys.executable}
# Starts as many tasks as --ntasks says, and ends with their highest exit code, as Slurm's does.
import os, subprocess, sys
end = next(i for i, word in enumerate(sys.argv) if i and not word.startswith("-"))
tasks = next((int(w.partition("=")[2]) for w in sys.argv[:end] if w.startswith("--ntasks=")), 1)
start = lambda rank: subprocess.Popen(sys.argv[end:], env=os.environ | {{"SLURM_PROCID": str(rank)}})
sys.exit(max(process.wait() for process in [start(rank) for rank in range(tasks)]))
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node[1-2]" ] && printf '127.0.0.1\\n127.0.0.2\\n'
"""


def prepare(tmp_path, **variables):
    """The environment of a job, with the two programs on its path."""
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    devices = f"--xla_force_host_platform_device_count={hosts.DEVICES // 2}"
    variables = {"PYTHON": sys.executable, "XLA_FLAGS": devices} | variables
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return clean | {"PATH": path} | variables


def run(tmp_path, *arguments, **variables):
    return subprocess.run(
        ["bash", str(SCRIPT), *map(str, arguments)],
        env=prepare(tmp_path, **variables), cwd=helpers.ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip


JOB = {"SLURM_SUBMIT_DIR": str(helpers.ROOT), "SLURM_CPUS_ON_NODE": "2", "SLURM_JOB_ID": "1234567"}
TWO = JOB | {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}


@pytest.mark.slow
def test_two_nodes_train_and_the_signal_before_the_time_limit_lets_them_save(tmp_path):
    """Slurm sends it to all processes of the step, the hub among them."""
    overrides = {"mesh.fsdp": 8, "trainer.total_epochs": 10**4, "trainer.num_steps": 10**4}
    command = ["bash", str(SCRIPT), *helpers.train_argv(tmp_path / "run", overrides)]
    environment = prepare(tmp_path, **TWO, PORT=str(hosts.free_port()), PYTHONUNBUFFERED="1")
    job = subprocess.Popen(
        command,
        env=environment,
        cwd=helpers.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in job.stdout:
        if "Step 2/" in line:
            break
    srun = psutil.Process(job.pid)  # the script has become it
    members = srun.children(recursive=True)
    assert any("grpo_jax.run.hub" in member.cmdline() for member in members)
    for member in members:
        member.terminate()
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 130 and "everything is saved" in out, out
    (saved,) = (tmp_path / "run" / "checkpoints").glob("[0-9]*")
    assert int(saved.name) == len(helpers.read_lines(tmp_path / "run"))
    assert (tmp_path / "run" / "train-1.log").exists()


def test_the_port_is_of_the_job_and_a_dry_run_starts_nothing(tmp_path):
    done = run(tmp_path, "--dry_run", "--config=a b.py", **TWO)
    assert done.returncode == 0, done.stderr
    step = "srun --cpus-per-task=2 --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=0 bash -c"
    address, count, command = done.stdout.splitlines()
    assert address == f"export JAX_COORDINATOR_ADDRESS=127.0.0.1:{10000 + 1234567 % 20000}"
    assert count == "export JAX_NUM_PROCESSES=2"
    assert command.startswith(step) and command.endswith("-m grpo_jax.train --config=a\\ b.py")


def test_one_node_needs_no_variables(tmp_path):
    done = run(tmp_path, "--dry_run", "--config=c.py", **JOB, COMMAND="doctor")
    assert done.stdout == f"srun --cpus-per-task=2 {sys.executable} -m grpo_jax.doctor --config=c.py\n"


def test_wrong_settings_are_one_line(tmp_path):
    assert "SLURM_SUBMIT_DIR: submit this script with sbatch" in run(tmp_path).stderr
    done = run(tmp_path, **TWO, PORT="70000")
    assert (done.returncode, done.stderr) == (2, "error: PORT=70000: must be a port, below 65536\n")
    done = run(tmp_path, **TWO | {"SLURM_JOB_NODELIST": "other"})
    assert (done.returncode, done.stderr) == (
        1,
        "error: scontrol names no node of SLURM_JOB_NODELIST=other\n",
    )
