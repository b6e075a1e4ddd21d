"""What is said of a vLLM that cannot be used. No vLLM and no Ray take part."""

import logging
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest

from grpo_jax.config import ConfigError
from grpo_jax.rollout.vllm import check as vllm_check
from grpo_jax.rollout.vllm.check import TESTED, VllmInstallation, find_vllm

OURS = {"vllm": None, "is_cpu": False, "ray": "2.60.0", "python": "3.11.7"}


def refusal(section):
    """The error that `find_vllm` refuses a section with; one line, with key and value."""
    with pytest.raises(ConfigError) as caught:
        find_vllm(section)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{caught.value.key}=")
    return caught.value


@pytest.fixture
def other_python(monkeypatch):
    """Returns `other_python(...)`: an environment /opt/other that has been found to hold so much."""

    def make(**found):
        answers = {sys.executable: OURS, "/opt/other/bin/python": OURS | {"vllm": "0.32.0"} | found}
        monkeypatch.setattr(vllm_check, "_environment_of", answers.__getitem__)
        return "/opt/other/bin/python"

    return make


# Interpreters


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """The interpreter of a new environment with nothing in it."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=60)
    return str(folder / "bin" / "python")


def test_an_environment_without_vllm(rollout_section, bare_python, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    error = refusal(rollout_section(python=bare_python))
    assert (error.key, error.value) == ("rollout.python", bare_python)
    assert f"vLLM is not installed in the environment of {bare_python}" in error.rule
    assert "--config.rollout.engine=local" in error.rule


def test_the_trainers_own_environment_without_vllm(rollout_section, monkeypatch):
    monkeypatch.setattr(vllm_check, "_environment_of", {sys.executable: OURS}.__getitem__)
    error = refusal(rollout_section())
    assert (error.key, error.value) == ("rollout.engine", "vllm")
    assert "in this environment" in error.rule and "rollout.python" in error.rule


def test_an_interpreter_that_is_not_there(rollout_section, tmp_path):
    path = str(tmp_path / "bin" / "python")
    error = refusal(rollout_section(python=path))
    assert (error.key, error.value) == ("rollout.python", path)
    assert "no such file" in error.rule
    assert (
        "no such file" in refusal(rollout_section(python=str(tmp_path))).rule
    )  # the folder of an environment


def test_a_program_that_is_no_interpreter(rollout_section, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'first line' >&2\necho 'I am no snake' >&2\nexit 3\n")
    program.chmod(0o755)
    error = refusal(rollout_section(python=str(program)))
    assert (error.key, error.value) == ("rollout.python", str(program))
    assert error.rule == "does not run as a Python interpreter: I am no snake"


def test_a_program_that_fails_without_a_word(rollout_section):
    assert refusal(rollout_section(python="/bin/false")).rule.endswith("interpreter: no output")


def test_a_program_that_gives_no_answer(rollout_section, tmp_path, monkeypatch):
    """It may wait for ever, for what it started itself say, or for a line to read."""
    monkeypatch.setattr(vllm_check, "ANSWER_S", 1.0)
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\n/bin/sleep 50 &\necho $! > {tmp_path}/pid\nwait\n")
    program.chmod(0o755)
    start = time.monotonic()
    error = refusal(rollout_section(python=str(program)))
    assert time.monotonic() - start < 10
    assert (error.key, error.value) == ("rollout.python", str(program))
    assert error.rule == "does not answer as a Python interpreter within 1 s"
    pid = int((tmp_path / "pid").read_text())
    state = pathlib.Path(f"/proc/{pid}/stat")
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() - start < 20
        time.sleep(0.02)


def test_a_program_does_not_read_what_the_run_is_given(rollout_section, tmp_path):
    program = tmp_path / "program"
    program.write_text('#!/bin/sh\nread line && echo "$line" >&2\n')
    program.chmod(0o755)
    ours, theirs = os.pipe()
    os.write(theirs, b"a line for the trainer\n")
    stdin = os.dup(0)
    os.dup2(ours, 0)
    try:
        assert refusal(rollout_section(python=str(program))).rule.endswith("interpreter: no output")
    finally:
        os.dup2(stdin, 0)
        for fd in (ours, theirs, stdin):
            os.close(fd)


@pytest.mark.parametrize("mode", [0o644, 0o755], ids=["not executable", "no program"])
def test_a_file_that_is_no_program(rollout_section, tmp_path, mode):
    file = tmp_path / "python"
    file.write_text("home = /usr/bin\n")
    file.chmod(mode)
    assert "does not run as a Python interpreter" in refusal(rollout_section(python=str(file))).rule


@pytest.mark.parametrize("program", ["/bin/true", "/bin/echo"])
def test_a_program_that_does_something_else(rollout_section, program):
    assert "does not run as a Python interpreter" in refusal(rollout_section(python=program)).rule


def test_the_trainers_python_path_is_not_the_engines(rollout_section, bare_python, tmp_path, monkeypatch):
    """The engine's processes get PYTHONPATH with this package alone (`Cluster._runtime_env`)."""
    metadata = tmp_path / "vllm-0.32.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    vllm_check._environment_of.cache_clear()
    try:
        assert "vLLM is not installed in" in refusal(rollout_section(python=bare_python)).rule
    finally:
        vllm_check._environment_of.cache_clear()


def test_another_environment_of_the_same_python_is_another(rollout_section, bare_python):
    """Both environments' interpreters are links to the one that they were made with."""
    assert not vllm_check.python_is_ours(rollout_section(python=bare_python))


def test_the_trainers_own_interpreter_is_its_own(rollout_section):
    assert vllm_check.python_is_ours(rollout_section(python=""))
    assert vllm_check.python_is_ours(rollout_section(python=sys.executable))


# Versions


def test_versions_that_fit(rollout_section, other_python, caplog):
    for version in TESTED:
        found = find_vllm(rollout_section(python=other_python(vllm=version)))
        assert found == VllmInstallation(version, is_cpu=False)
    assert not caplog.records


@pytest.mark.parametrize("found", [{"vllm": f"{TESTED[0]}+cpu"}, {"vllm": TESTED[0], "is_cpu": True}])
def test_a_build_for_cpus_is_known_by_version_or_by_name(rollout_section, other_python, caplog, found):
    assert find_vllm(rollout_section(python=other_python(**found))) == VllmInstallation(
        found["vllm"], is_cpu=True
    )
    assert not caplog.records  # the tested version, whatever follows the +


@pytest.mark.parametrize("version", ["0.24.3", "0.9.2", "0.8.5.post1", "0.24.0rc1"])
def test_a_version_that_is_too_old(rollout_section, other_python, version):
    error = refusal(rollout_section(python=other_python(vllm=version)))
    assert error.key == "rollout.python"
    assert f"vLLM {version} is too old: at least 0.25 is needed" in error.rule


@pytest.mark.parametrize("version", ["0.25.0", "0.100.2", "1.0.0", "0.33.0rc2.dev5+g1234567"])
def test_a_version_that_nobody_tested_is_warned_of(rollout_section, other_python, caplog, version):
    with caplog.at_level(logging.WARNING):
        assert find_vllm(rollout_section(python=other_python(vllm=version))).version == version
    [record] = caplog.records
    assert f"vLLM {version} was not tested" in record.getMessage()
    assert all(tested in record.getMessage() for tested in TESTED)


@pytest.mark.parametrize(
    "found", [{"ray": "2.61.0"}, {"ray": None}, {"python": "3.12.7"}, {"python": "3.1.7"}], ids=str
)
def test_ray_needs_the_same_of_both_ends(rollout_section, other_python, found):
    error = refusal(rollout_section(python=other_python(**found)))
    theirs = OURS | found
    assert f"has Ray {theirs['ray']} and Python {theirs['python']}, the trainer Ray 2.60.0" in error.rule


def test_another_patch_release_of_python_will_do(rollout_section, other_python):
    find_vllm(rollout_section(python=other_python(python="3.11.13")))


# Port


def test_a_port_in_use(rollout_section, other_python):
    python = other_python()
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        error = refusal(rollout_section(python=python, api_port=port))
    assert (error.key, error.value) == ("rollout.api_port", port)
    assert "choose another port" in error.rule
    find_vllm(rollout_section(python=python, api_port=port))  # free again


# Cluster


def test_a_ray_cluster_that_does_not_answer_is_refused(rollout_section):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # bound, and not listening: connections are refused
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(ConfigError, match="no Ray cluster answers") as caught:
            vllm_check.check_ray_address(address)
    assert (caught.value.key, caught.value.value) == ("rollout.ray_address", address)
    vllm_check.check_ray_address("")
    vllm_check.check_ray_address("auto")
