"""`python -m grpo_jax.doctor --hosts`: what it says of two processes, and of what keeps them from training."""

import socket

import hosts_helpers as hosts
import integration_helpers as helpers

DOCTOR = ("-m", "grpo_jax.doctor", "--hosts")


def run(workdir, overrides=(), count=2, each=()):
    """`Result`s of the processes. each: variables that one process has of its own."""
    with hosts.started(helpers.train_argv(workdir, overrides), count, DOCTOR, **dict(each)) as processes:
        return hosts.finish(processes)


def test_two_that_can_train_together(tmp_path):
    workdir = tmp_path / "run"
    first, second = run(workdir, {"mesh.data": 2, "mesh.fsdp": 4})
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert second.out == second.err == first.err == ""
    lines = first.out.splitlines()
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}
    assert rows["versions"].startswith("equal: grpo_jax ") and ", jax 0." in rows["versions"]
    assert "127.0.0.1 on" in rows["address"] and "a loopback address" in rows["address"]
    assert rows["mesh"] == "data 2, fsdp 4, tensor 1" and lines[-1] == "All is well."
    for rank in ("0", "1"):
        assert rows[rank].split()[0] == socket.gethostname()
        assert rows[rank].endswith("4 x cpu                      shared, writable")
    offset = float(rows["1"].split()[2])
    assert abs(offset) < 200  # ms: one machine has one clock
    assert not workdir.exists()


def test_what_differs_is_named(tmp_path):
    """One process has fewer devices and a clock of an hour ago; the model's folder is on neither."""
    late = tmp_path / "sitecustomize.py"
    late.write_text(
        "import os, time\n"
        "if os.environ.get('JAX_PROCESS_ID') == '1':\n"
        "    now = time.time\n"
        "    time.time = lambda: now() - 3600\n"
        "    os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=3'\n"
    )
    results = run(
        tmp_path / "run", {"model.path": "nowhere"}, each={"PYTHONPATH": f"{tmp_path}:{helpers.ROOT}"}
    )
    assert [result.code for result in results] == [2, 2]
    assert results[1].err == results[1].out == ""
    (line,) = results[0].err.splitlines()
    host = socket.gethostname()
    assert line.startswith(f"error: hosts=2: process 0 on {host}: has no nowhere; ")
    assert f"process 1 on {host}: has 3 x cpu, process 0 has 4 x cpu: all need the same devices" in line
    assert "its clock is -3600.0 s off: set it (NTP)" in line


def test_a_loopback_address_is_named_where_one_does_not_come(tmp_path):
    overrides = {"trainer.join_timeout_s": 3}
    argv = helpers.train_argv(tmp_path / "run", overrides)
    environment = hosts.environment(0, 2, hosts.free_port())
    environment = {name: value for name, value in environment.items() if "JAX" in name or "XLA" in name}
    process = helpers.start("grpo_jax.doctor", ["--hosts", *argv], **environment)
    (result,) = hosts.finish([process])
    assert result.code == 2 and result.out == ""
    assert "1 of 2 processes had joined after 3 s" in result.err and result.err.count("\n") == 1
    assert (
        f"127.0.0.1 on {socket.gethostname()}, a loopback address, which other hosts cannot reach"
        in result.err
    )


def test_without_the_variables_there_is_nothing_to_check(tmp_path):
    result = helpers.run_module("grpo_jax.doctor", ["--hosts", *helpers.train_argv(tmp_path / "run")])
    assert result.code == 2
    assert result.err.startswith("error: JAX_COORDINATOR_ADDRESS='': must be set")
