"""A run that is killed in any way at any moment, and started again, ends in the bits of one that was not.

    pytest -s -m slow tests/integration/test_kills.py        100 kills, and a table of them

GRPO_JAX_TEST_KILL_SEED=N draws other moments.
"""

import os
import shutil
import subprocess
import time

import kill_harness as harness
import pytest
from kill_compare import compare

SEED = int(os.environ.get("GRPO_JAX_TEST_KILL_SEED", "0"))
REWARD_FILE = """
import time

def score(*, data_source, solution_str, ground_truth, extra_info):
    time.sleep(0.005)
    return float(sum(solution_str.encode()) % 3 == 0)
"""
"""Right for a third of all texts: a fifth of the groups has no spread, and dynamic sampling leaves some over."""

COMMON = {
    "reward.num_workers": 2,
    "trainer.total_epochs": 2,
    "checkpoint.every_steps": 1,
    "checkpoint.hf_every_epochs": 1,
    "logging.num_text_samples": 1,
    "logging.save_rollouts": True,
}
DYNAMIC = COMMON | {
    "algorithm.dynamic_sampling_rounds": 4,
    "algorithm.old_logprobs": "sampler",
    "algorithm.kl_coef": 0.1,
    "algorithm.ref_refresh_every": 2,
    "actor.num_minibatches": 2,
}
FROM_NOTHING = COMMON | {
    "sft.num_steps": 3,
    "data.max_response_length": 16,
    "checkpoint.every_steps": 2,
    "checkpoint.keep_best": "val/accuracy",
    "checkpoint.max_to_keep": 1,
    "eval.before_training": True,
    "eval.every_steps": 3,
}
OFFLOADED = COMMON | {"optim.offload": True, "algorithm.kl_coef": 0.1, "algorithm.ref_offload": True}

FIVES = (
    ("SIGKILL", "SIGKILL in a save", "SIGTERM to all processes", "a worker's SIGKILL", "SIGKILL"),
    ("SIGKILL in a save", "SIGINT", "a full disk in a save", "SIGTERM", "SIGKILL"),
)
TWENTY_FIVE = (
    *("SIGKILL", "SIGKILL in a save") * 6,
    *("SIGTERM", "SIGTERM in a save", "SIGINT", "a worker's SIGKILL", "a full disk in a save") * 2,
    *("SIGTERM to all processes", "a full disk", "SIGKILL"),
)


@pytest.fixture(scope="module")
def launcher():
    launcher = harness.Launcher()
    yield launcher
    launcher.close()


@pytest.fixture(scope="module")
def kill_reward(tmp_path_factory):
    path = tmp_path_factory.mktemp("kill_reward") / "my_reward.py"
    path.write_text(REWARD_FILE)
    return {"reward.function": f"{path}:score"}


@pytest.fixture(scope="module")
def dynamic(launcher, tmp_path_factory, kill_reward, model_folder):
    overrides = DYNAMIC | kill_reward | {"model.path": model_folder}
    return harness.make_case(launcher, "dynamic", overrides, tmp_path_factory.mktemp("dynamic"))


def finish(kills, capsys):
    with capsys.disabled():
        print(f"\n{harness.report(kills)}")
    assert not [kill for kill in kills if kill.fault], "\n\n".join(
        {f"{k.kind}: {k.fault}" for k in kills if k.fault}
    )


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_five_kills(launcher, dynamic, tmp_path, capsys, number):
    kills = harness.kill_and_compare([launcher.start], dynamic, FIVES[number], tmp_path, seed=SEED + number)
    assert len(kills) == 5
    finish(kills, capsys)


@pytest.mark.slow
def test_a_hundred_kills(launcher, dynamic, kill_reward, model_folder, tmp_path, capsys):
    model = kill_reward | {"model.path": model_folder}
    cases = [
        dynamic,
        harness.make_case(launcher, "from-nothing", FROM_NOTHING | kill_reward, tmp_path),
        harness.make_case(launcher, "offloaded", OFFLOADED | model, tmp_path),
    ]
    # Every fourth start is the real command's.
    starts = [launcher.start] * 3 + [harness.start_command]
    chains = [
        lambda case=case, number=number: harness.kill_and_compare(
            starts, case, TWENTY_FIVE, tmp_path, seed=SEED + 10 + number
        )
        for number, case in enumerate([*cases, dynamic])
    ]
    kills = harness.run_chains(chains)
    assert len(kills) == 100
    finish(kills, capsys)


def double_a_line(workdir):
    file = workdir / "metrics.jsonl"
    file.write_text(file.read_text() + file.read_text().splitlines()[-1] + "\n")


def drop_a_line(workdir):
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:2] + lines[3:]))


def change_a_metric(workdir):
    file = workdir / "metrics.jsonl"
    file.write_text(file.read_text().replace('"reward/mean": ', '"reward/mean": 1', 1))


def double_points(workdir):
    [file] = (workdir / "tensorboard").iterdir()
    shutil.copy(file, file.with_name(file.name + ".again"))


def change_an_array(workdir):
    shutil.rmtree(workdir / "checkpoints" / "6")
    shutil.copytree(workdir / "checkpoints" / "5", workdir / "checkpoints" / "6")


CHANGES = {
    double_a_line: "metrics.jsonl has the steps [1, 2, 3, 4, 5, 6, 6]",
    drop_a_line: "metrics.jsonl has the steps [1, 2, 4, 5, 6]",
    change_a_metric: "step 1: metrics ['reward/mean'] differ",
    double_points: "TensorBoard has a point twice",
    change_an_array: "the checkpoint of step 6 has other bits in [",
    lambda workdir: (workdir / "rollouts" / "step-000002.jsonl").unlink(): "['rollouts'] hold other bytes",
    lambda workdir: (workdir / "more").touch(): "files ['more'] are only in one",
}


def test_what_a_run_may_have_lost_is_seen(dynamic, tmp_path):
    assert compare(dynamic.reference, dynamic.results) == ""
    for number, (change, expected) in enumerate(CHANGES.items()):
        workdir = shutil.copytree(dynamic.reference, tmp_path / str(number))
        change(workdir)
        assert compare(workdir, dynamic.results).startswith(expected)


def test_what_a_run_has_left_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "GONE_S", 0.1)
    left = subprocess.Popen(["sleep", "60"], env={harness.VARIABLE: str(tmp_path)})
    try:
        end = time.monotonic() + 10
        while not harness.members(tmp_path) and time.monotonic() < end:
            time.sleep(0.01)  # Linux shows its environment a moment after it has begun
        assert harness.nothing_left(tmp_path) == f"processes are left: [{left.pid}]"
    finally:
        left.kill()
        left.wait()
    assert harness.nothing_left(tmp_path) == ""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "6.1a2b.tmp").mkdir()
    assert harness.nothing_left(tmp_path) == "temporary files are left: ['checkpoints/6.1a2b.tmp']"
