"""One run in several processes: the numbers of one process, one log, checkpoints that any number of them can read.

Each test starts processes with a part of eight virtual devices each, and compares with one process that has all.
"""

import dataclasses
import re
import shutil
import signal
import time

import hosts_helpers as hosts
import integration_helpers as helpers
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from grpo_jax import audit
from grpo_jax.config import Config, ConfigError, TrainerSection
from grpo_jax.run.hosts import joined

# As many parts as there are: two updates a step of a batch that does not divide by the devices, a KL in the reward
# with a reference that is refreshed, dynamic sampling, validation, checkpoints.
EVERYTHING = {
    "algorithm.kl_coef": 0.1,
    "algorithm.kl_in": "reward",
    "algorithm.ref_refresh_every": 2,
    "algorithm.dynamic_sampling_rounds": 3,
    "algorithm.rollout_is": "token",
    "algorithm.group_size": 3,
    "actor.num_minibatches": 2,
    "optim.learning_rate": 1e-3,
    "rollout.temperature": 1.2,
    "mesh.data": 2,
    "mesh.fsdp": 4,
    "trainer.total_epochs": 3,
    "trainer.num_steps": 5,
    "eval.every_steps": 2,
    "checkpoint.every_steps": 2,
    "checkpoint.max_to_keep": 9,
    "logging.save_rollouts": True,
}


@pytest.fixture(scope="module")
def overrides(reward_file):
    return EVERYTHING | {"reward.function": f"{reward_file}:score"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, overrides):
    """The workdir of the run that one process made."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert len(jax.devices()) == hosts.DEVICES
    helpers.train_ok(workdir, overrides)
    return workdir


@pytest.fixture(scope="module")
def together(tmp_path_factory, overrides):
    """The same run by two processes: (workdir, their results)."""
    workdir = tmp_path_factory.mktemp("together") / "run"
    return workdir, hosts.train_ok(workdir, overrides, 2)


def same_numbers(workdir, expected):
    lines, others = helpers.read_lines(workdir), helpers.read_lines(expected)
    assert [line["step"] for line in lines] == [line["step"] for line in others]
    for line, other in zip(lines, others, strict=True):
        line, other = helpers.without_clock(line), helpers.without_clock(other)
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], rel=1e-4, abs=1e-5), name
    for file in sorted((expected / "rollouts").glob("*.jsonl")):
        assert (workdir / "rollouts" / file.name).read_text() == file.read_text()
    for file in sorted((expected / "rollouts").glob("*.parquet")):
        tokens, others = (pq.read_table(folder / "rollouts" / file.name) for folder in (workdir, expected))
        assert tokens.column("token_ids") == others.column("token_ids")
        for name in ("trainer_logprobs", "logprobs", "token_advantages"):
            values, expected_values = (t.column(name).combine_chunks().values for t in (tokens, others))
            np.testing.assert_allclose(values, expected_values, rtol=1e-4, atol=1e-5, err_msg=name)


def same_model(workdir, expected):
    weights = load_file(workdir / "checkpoint-final" / "model.safetensors")
    for name, value in load_file(expected / "checkpoint-final" / "model.safetensors").items():
        np.testing.assert_allclose(weights[name], value, atol=1e-5, err_msg=name)


def test_two_processes_train_as_one(together, alone):
    same_numbers(together[0], alone)
    same_model(together[0], alone)


def test_the_first_one_speaks_and_the_others_write_a_log(together):
    workdir, (first, second) = together
    assert "Step 1/3" in first.out and "Done: 5 steps." in first.out
    own = [line for line in second.err.splitlines() if not line.startswith("[transformers]")]
    assert second.out == "" and own == []
    assert "warm" not in (workdir / "train-1.log").read_text()
    assert sorted(path.name for path in workdir.glob("train*.log")) == ["train-1.log", "train.log"]
    assert not (workdir / "hosts.json").exists()


def test_every_completion_is_accounted_for(together):
    result = helpers.call(audit.main, [together[0]])
    assert result.code == 0, result.out


@pytest.mark.slow
def test_one_process_goes_on_with_what_two_have_left(together, alone, overrides, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(together[0], workdir)
    out = helpers.train_ok(workdir, overrides | {"trainer.num_steps": 7})
    assert "Going on after step 5 of 7." in out
    reference = tmp_path / "alone"
    shutil.copytree(alone, reference)
    helpers.train_ok(reference, overrides | {"trainer.num_steps": 7})
    same_numbers(workdir, reference)


@pytest.mark.slow
def test_a_killed_process_ends_all_within_30_s_and_the_same_command_goes_on(alone, overrides, tmp_path):
    workdir = tmp_path / "run"
    with hosts.started(helpers.train_argv(workdir, overrides), 2) as processes:
        for line in processes[0].stdout:
            if line.startswith("Epoch 2/3"):
                break
        processes[1].kill()
        begin = time.monotonic()
        first, second = hosts.finish(processes)
    assert time.monotonic() - begin < 30
    assert (first.code, second.code) == (1, -signal.SIGKILL)
    (line,) = [line for line in first.err.splitlines() if line.startswith("error:")]
    assert re.match(r"error: phase \w+: process 1 on \S+ \(pid \d+\) has died", line)
    (first, _) = hosts.train_ok(workdir, overrides, 2)
    assert "Going on after step " in first.out
    same_numbers(workdir, alone)
    same_model(workdir, alone)


JOIN = """
import sys
from pathlib import Path
from grpo_jax.config.command_line import one_line_errors, parse_command_line
from grpo_jax.run.hosts import joined

with one_line_errors():
    with joined(*parse_command_line("join", "")) as hosts:
        print(hosts.from_first(lambda: "heard"), hosts.any_of(hosts.rank == 1), hosts.any_of(False))
"""


@pytest.fixture
def join_file(tmp_path):
    path = tmp_path / "join.py"
    path.write_text(JOIN)
    return path


def join(join_file, workdir, count=2, num_started=2, timeout_s=60.0, **env):
    argv = helpers.train_argv(workdir, {"trainer.join_timeout_s": timeout_s})
    with hosts.started(argv, count, program=[join_file], **env) as processes:
        for process in processes[num_started:]:
            process.kill()
        return hosts.finish(processes[:num_started])


def test_what_the_first_one_says_reaches_all_and_votes_are_counted(join_file, tmp_path):
    results = join(join_file, tmp_path / "run", count=3, num_started=3)
    assert [result.out for result in results] == ["heard True False\n"] * 3, results
    assert not (tmp_path / "run" / "hosts.json").exists()


def test_a_process_that_does_not_come_is_named(join_file, tmp_path):
    (first,) = join(join_file, tmp_path / "run", num_started=1, timeout_s=4.0)
    assert first.code == 2
    assert re.fullmatch(
        r"error: JAX_NUM_PROCESSES=2: 1 of 2 processes had joined after 4 s \(process 0 on \S+\); "
        r"missing: 1 \(JAX_PROCESS_ID\); trainer.join_timeout_s waits longer\n",
        first.err,
    )


def test_another_configuration_is_named_with_both_values_by_the_first_and_by_who_differs(join_file, tmp_path):
    join_file.write_text(
        "import os, sys\nsys.argv.append('--config.trainer.seed=' + os.environ['JAX_PROCESS_ID'])\n" + JOIN
    )
    first, second = join(join_file, tmp_path / "run")
    assert (first.code, second.code) == (2, 2)
    what = r"trainer\.seed is 0 in process 0 and 1 in process 1: process 1 on \S+ has another configuration"
    assert re.search(what + r" than process 0 on \S+\n$", first.err) and second.err == first.err


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (
            {"JAX_PROCESS_ID": ""},
            "JAX_PROCESS_ID='': must be set, as others of these are: JAX_NUM_PROCESSES, ",
        ),
        ({"JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2: must be below JAX_NUM_PROCESSES=2"),
        ({"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID='one': must be a whole number"),
        ({"JAX_COORDINATOR_ADDRESS": "here"}, "JAX_COORDINATOR_ADDRESS='here': must be HOST:PORT"),
        ({"JAX_COORDINATOR_ADDRESS": "203.0.113.9:7"}, "the first process cannot listen there"),
        ({"JAX_COORDINATOR_ADDRESS": "nowhere.invalid:7"}, "the first process cannot listen there"),
    ],
)
def test_variables_that_make_no_sense(monkeypatch, tmp_path, env, message):
    values = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:0"} | env
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=re.escape(message)), joined(Config(), tmp_path):
        pass


def test_a_workdir_that_is_not_shared_and_an_address_that_nobody_answers(monkeypatch, tmp_path):
    config = dataclasses.replace(Config(), trainer=TrainerSection(join_timeout_s=0.5))
    values = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    message = r"--workdir=.* saw no file hosts.json .* within 0.5 s"
    with pytest.raises(ConfigError, match=message), joined(config, tmp_path):
        pass
    (tmp_path / "hosts.json").write_text('{"secret": "00"}')
    message = r"127.0.0.1:9'?: cannot be reached from .*loopback address"
    with pytest.raises(ConfigError, match=message), joined(config, tmp_path):
        pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "changed"),
    [
        (4, {}),
        (2, {"mesh.data": 1, "mesh.fsdp": 2, "mesh.tensor": 4}),
        (2, {"optim.offload": True, "algorithm.ref_offload": True}),
        (2, {"sft.num_steps": 4, "data.max_response_length": 64, "checkpoint.hf_every_epochs": 1}),
    ],
)
def test_other_layouts_train_as_one_process(overrides, tmp_path, count, changed):
    overrides = overrides | changed
    helpers.train_ok(tmp_path / "alone", overrides)
    hosts.train_ok(tmp_path / "run", overrides, count)
    same_numbers(tmp_path / "run", tmp_path / "alone")
    same_model(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_two_times_the_same_bits(together, overrides, tmp_path):
    hosts.train_ok(tmp_path / "run", overrides, 2)
    name = "checkpoint-final/model.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (together[0] / name).read_bytes()
    assert helpers.read_checkpoint(tmp_path / "run", 5)[0] == helpers.read_checkpoint(together[0], 5)[0]


@pytest.mark.slow
def test_four_go_on_with_what_two_have_left_and_two_with_that_of_one(together, alone, overrides, tmp_path):
    longer = overrides | {"trainer.num_steps": 7}
    for name, source, count in (("four", together[0], 4), ("two", alone, 2), ("one", alone, 1)):
        shutil.copytree(source, tmp_path / name)
        if count == 1:
            helpers.train_ok(tmp_path / name, longer)
        else:
            hosts.train_ok(tmp_path / name, longer, count)
    same_numbers(tmp_path / "four", tmp_path / "one")
    same_numbers(tmp_path / "two", tmp_path / "one")
