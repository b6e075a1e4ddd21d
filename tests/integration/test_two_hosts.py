"""One run on two hosts that are namespaces of this machine, with networks and names of their own. Needs root."""

import os
import signal
import sys
import time

import hosts_helpers as hosts
import integration_helpers as helpers
import pytest
from two_hosts import A, inner, two_hosts

pytestmark = pytest.mark.slow

SCRIPT = helpers.ROOT / "launch" / "ray_cluster.sh"
ENVIRONMENT = {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={hosts.DEVICES // 2}",
    "JAX_PLATFORMS": "cpu",
    "PYTHONPATH": str(helpers.ROOT),
    "PYTHONUNBUFFERED": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
RAY_PORT = 6391


def finish(process, timeout=300):
    """Its exit code and all that it printed, but for what JAX's collectives say of themselves."""
    code = process.wait(timeout)
    return code, hosts.plain(process.log.read_text()).rstrip()


def both(start, module, argv, port, address=A):
    """Starts one process of a run on each host."""
    variables = {"JAX_COORDINATOR_ADDRESS": f"{address}:{port}", "JAX_NUM_PROCESSES": "2"}
    command = [sys.executable, "-m", module, *argv]
    return [
        start(host, command, **ENVIRONMENT, **variables, JAX_PROCESS_ID=str(rank))
        for rank, host in enumerate("ab")
    ]


def test_two_hosts_train_as_one(tmp_path, reward_file):
    overrides = {
        "reward.function": f"{reward_file}:score",
        "algorithm.kl_coef": 0.1,
        "mesh.data": 2,
        "mesh.fsdp": 4,
        "trainer.num_steps": 2,
        "logging.save_rollouts": True,
    }
    argv = helpers.train_argv(tmp_path / "run", overrides)
    with two_hosts(tmp_path) as start:
        (code, out), (_, other) = map(finish, both(start, "grpo_jax.doctor", ["--hosts", *argv], 7001))
        assert code == 0 and "host-b" in out and out.endswith("All is well.") and not other, out + other
        (code, out), (_, other) = map(finish, both(start, "grpo_jax.train", argv, 7002))
        assert code == 0 and "Done: 2 steps." in out and not other, out + other
    helpers.train_ok(tmp_path / "alone", overrides)
    lines, expected = helpers.read_lines(tmp_path / "run"), helpers.read_lines(tmp_path / "alone")
    assert len(lines) == len(expected) == 2
    for line, other in zip(lines, expected, strict=True):
        assert helpers.without_clock(line) == pytest.approx(helpers.without_clock(other), rel=1e-4, abs=1e-5)
    for file in (tmp_path / "alone" / "rollouts").glob("*.jsonl"):
        assert (tmp_path / "run" / "rollouts" / file.name).read_text() == file.read_text()


def test_a_loopback_address_is_named_on_the_other_host(tmp_path):
    argv = helpers.train_argv(tmp_path / "run", {"trainer.join_timeout_s": 5})
    with two_hosts(tmp_path) as start:
        processes = both(start, "grpo_jax.doctor", ["--hosts", *argv], 7001, address="127.0.0.1")
        (code, out), (other_code, other) = map(finish, processes)
    assert code == other_code == 2
    assert "1 of 2 processes had joined after 5 s" in out and "host-a, a loopback address" in out
    assert out.count("\n") == 0, out
    assert "it is this very host's loopback address" in other


@pytest.fixture
def cluster(tmp_path):
    """start(flags): launch/ray_cluster.sh on host a, with trainers on both, and Ray on b. Returns the former."""
    token = {"TOKEN": str(tmp_path / "token"), "RAY_AUTH_MODE": "token"}
    token["RAY_AUTH_TOKEN_PATH"] = token["TOKEN"]
    path = {"PYTHON": sys.executable, "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={A}:{RAY_PORT}", "--block"]
    with two_hosts(tmp_path) as start:

        def begin(*flags, **env):
            env = ENVIRONMENT | token | path | env
            first = start("a", [SCRIPT, *flags], **env, ADDRESS=A, PORT=str(RAY_PORT), TRAINERS="2")
            until(lambda: "Ray listens on" in first.log.read_text(), first)
            start("b", [*ray, "--disable-usage-stats"], **env)
            return first

        yield begin


def until(is_there, process, timeout=180):
    end = time.monotonic() + timeout
    while not is_there():
        assert process.poll() is None and time.monotonic() < end, process.log.read_text()
        time.sleep(0.1)


def test_ray_starts_a_trainer_a_host_and_sigterm_lets_them_save(tmp_path, cluster, reward_file):
    reward_file.with_name("slow").touch()
    overrides = {
        "reward.function": f"{reward_file}:score",
        "mesh.fsdp": 8,
        "trainer.total_epochs": 100,
        "trainer.num_steps": 300,
    }
    argv = helpers.train_argv(tmp_path / "run", overrides)
    first = cluster(*argv)
    until(lambda: "Step 2/" in first.log.read_text(), first)
    inner(first).send_signal(signal.SIGTERM)
    code, out = finish(first)
    assert code == 130, out
    saved = [int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()]
    steps = len(helpers.read_lines(tmp_path / "run"))
    assert saved == [steps], (saved, steps)
    overrides["trainer.num_steps"] = steps + 1
    reward_file.with_name("slow").unlink()
    code, out = finish(cluster(*helpers.train_argv(tmp_path / "run", overrides)))
    assert code == 0 and f"Going on after step {steps} of {steps + 1}." in out, out


def test_the_exit_code_and_the_error_are_the_first_trainers(tmp_path, cluster):
    """Both refuse the mesh; one of them says so, once."""
    argv = helpers.train_argv(tmp_path / "run", {"mesh.fsdp": 3})
    code, out = finish(cluster(*argv))
    assert code == 2, out
    (line,) = [line for line in out.splitlines() if line.startswith("error:")]
    assert "mesh" in line
