"""Every completion once, whatever dies: what has come back is kept, and runs that were killed are audited."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "integration"))
import integration_helpers as commands
import vllm_helpers as helpers
from test_train import VLLM

from grpo_jax import audit
from grpo_jax.rollout import SamplingParams
from grpo_jax.rollout.vllm.processes import family

pytestmark = pytest.mark.vllm

SAMPLED = SamplingParams(num_samples=3, temperature=1.0, max_tokens=12)


def ids(group):
    return [completion.token_ids for completion in group.completions]


def test_what_has_come_back_is_not_sampled_again(models):
    mesh = helpers.mesh_of()
    _, params = helpers.load(models["llama3"], mesh)
    engine = helpers.engine_for(models["llama3"], mesh)
    try:
        engine.load_weights(params, version=1)
        batch = helpers.prompts([20, 30, 40, 50], seed=3)
        pending = engine.submit(batch, SAMPLED, seed=5)
        end = time.monotonic() + 60
        while len(back := pending.finished()) < 4 and time.monotonic() < end:
            time.sleep(0.05)
        assert sorted(back) == [0, 1, 2, 3]
        whole = pending()
        assert [ids(group) for group in whole] == [ids(back[i]) for i in range(4)]
        # Other weights would sample others: those that are there stay as they were, with their version.
        engine.load_weights(helpers.perturbed(params, seed=1), version=2)
        rest = engine.submit(batch, SAMPLED, seed=5, finished={1: whole[1], 3: whole[3]})
        assert {1, 3} <= rest.finished().keys()
        groups = rest()
        assert [ids(groups[i]) for i in (1, 3)] == [ids(whole[i]) for i in (1, 3)]
        assert [{c.policy_version for c in group.completions} for group in groups] == [{2}, {1}, {2}, {1}]
        assert ids(groups[0]) != ids(whole[0])
        assert [group.prompt.prompt_id for group in groups] == [prompt.prompt_id for prompt in batch]
    finally:
        engine.close()


# Twenty kills of a whole run, of all that may be under way: batches ahead, weights that change during generation,
# groups without spread, groups left over.

KILLS, SEED = (
    int(os.environ.get(f"GRPO_JAX_TEST_{name}", n)) for name, n in (("KILLS", 20), ("KILL_SEED", 0))
)
NUM_STEPS = 10 + 12 * KILLS
COARSE = """import zlib
def score(*, solution_str, **kwargs):
    return float(zlib.crc32(solution_str.encode()) % 3 == 0)  # no model learns it and loses its spread
"""
ASYNCHRONOUS = VLLM | {
    "model.dtype": "bfloat16" if helpers.IS_GPU else "float32",
    "arithmetic.num_train": 200,
    "data.train_batch_size": 4,
    "data.max_response_length": 48,
    "rollout.max_lag": 2,
    "rollout.update_weights": "during",
    "rollout.max_restarts": KILLS,
    "rollout.probe_every": 0,
    "algorithm.rollout_is": "token",
    "algorithm.dynamic_sampling_rounds": 8,
    "checkpoint.every_steps": 1,
    "optim.learning_rate": 1e-4,  # the model must not lose its spread
    "trainer.num_steps": NUM_STEPS,
    "trainer.total_epochs": 9,
    "logging.save_rollouts": True,
}


def start(workdir, overrides, mark):
    command = [sys.executable, "-m", "grpo_jax.train", *commands.train_argv(workdir, overrides)]
    log = open(workdir.with_suffix(".txt"), "a")  # noqa: SIM115
    return subprocess.Popen(
        command, stdout=log, stderr=log, cwd=commands.ROOT, env=os.environ | {"GRPO_JAX_TEST_MARK": mark}
    )


def actors(mark):
    """The processes of the run's engine actors."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_ours = mark.encode() in (folder / "environ").read_bytes()
            if is_ours and b"EngineActor" in helpers.command_line(int(folder.name)):
                found.append(int(folder.name))
    return found


def cores(mark):
    """vLLM's own processes below them."""
    below = [pid for actor in actors(mark) for pid in family(actor)]
    return [pid for pid in below if b"EngineCore" in helpers.command_line(pid)]


def wait_for_one(find, mark):
    """A process, which may be starting again after the kill before."""
    end = time.monotonic() + 300
    while not (found := find(mark)):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found[0]


def last_step(workdir):
    lines = commands.read_lines(workdir) if (workdir / "metrics.jsonl").exists() else []
    return lines[-1]["step"] if lines else 0


def wait_for_step(process, workdir, step):
    end = time.monotonic() + 300
    while last_step(workdir) < step:
        assert process.poll() is None and time.monotonic() < end, workdir.with_suffix(".txt").read_text()[
            -3000:
        ]
        time.sleep(0.1)


@pytest.mark.slow
def test_kills_of_an_asynchronous_run_lose_and_double_nothing(tmp_path):
    (tmp_path / "coarse.py").write_text(COARSE)
    overrides = ASYNCHRONOUS | {"reward.function": f"{tmp_path}/coarse.py:score"}
    workdir, mark, rng = tmp_path / "run", uuid.uuid4().hex, random.Random(SEED)
    finders = {"actor": actors, "core": cores}
    process, kills = start(workdir, overrides, mark), {"trainer": 0, "actor": 0, "core": 0}
    for number in range(KILLS):
        wait_for_step(process, workdir, last_step(workdir) + 1)  # it goes on after each
        time.sleep(rng.uniform(0, 2))
        who = list(kills)[(number + SEED) % 3]
        os.kill(process.pid if who == "trainer" else wait_for_one(finders[who], mark), signal.SIGKILL)
        kills[who] += 1
        if who == "trainer":
            process.wait()
            process = start(workdir, overrides, mark)
    assert process.wait(timeout=900) == 0, workdir.with_suffix(".txt").read_text()[-3000:]
    print("kills", kills)
    assert sum(kills.values()) == KILLS
    assert [line["step"] for line in commands.read_lines(workdir)] == list(range(1, NUM_STEPS + 1))
    result = commands.call(audit.main, [workdir])
    print(result.out)
    assert result.code == 0, result.out
    lines = (workdir / "ledger" / "steps.jsonl").read_text().splitlines()
    entries = [json.loads(line.partition("\t")[0]) for line in lines]
    # Weights changed during completions, and groups were left out and left over.
    assert any(entry["trained"]["changes"] for entry in entries)
    assert any(entry["no_spread"] for entry in entries) and any(entry["kept"] for entry in entries)
