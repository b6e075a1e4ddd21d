"""What the loop can be asked to do: custom rewards, the variants of the loss, other data, other meshes."""

import re

import integration_helpers as helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from grpo_jax.run import run

P, G = 4, 4


def rollouts(workdir, step):
    return helpers.read_jsonl(workdir / "rollouts" / f"step-{step:06d}.jsonl")


# Custom rewards that fail

FAILS_ONCE = """
calls = 0

def score(*, data_source, solution_str, ground_truth, extra_info):
    global calls
    calls += 1
    if calls == 16 + 6:
        raise ValueError("bad luck")
    return sum(solution_str.encode()) % 5 / 4
"""


def test_a_failing_reward_stops_the_run_and_names_everything(tmp_path, whole_run, whole_run_overrides):
    file = tmp_path / "fails.py"
    file.write_text(FAILS_ONCE)
    changes = {"reward.function": f"{file}:score", "eval.before_training": False, "eval.every_steps": 0}
    overrides = whole_run_overrides | changes | {"checkpoint.every_steps": 1}
    result = helpers.run_train(tmp_path / "run", overrides)
    assert result.code == 1
    # The 6th completion of the second step: the second of its second prompt.
    prompt_id = rollouts(whole_run[0], 2)[G]["prompt_id"]
    assert result.err.startswith("error: phase reward: ") and result.err.count("\n") == 1
    assert f"prompt {prompt_id}, completion 1: " in result.err
    assert "ValueError: bad luck (fails.py:8)" in result.err
    assert "the last good checkpoint is that of step 1" in result.err
    assert [line["step"] for line in helpers.read_lines(tmp_path / "run")] == [1]
    # Mended, it goes on, and ends where a run without the mishap ends.
    file.write_text(helpers.REWARD_FILE)
    out = helpers.train_ok(tmp_path / "run", overrides)
    assert "Going on after step 1 of 6." in out
    assert helpers.read_checkpoint(tmp_path / "run", 6) == helpers.read_checkpoint(whole_run[0], 6)


def test_a_reward_that_fails_in_the_first_step_leaves_no_checkpoint(tmp_path, whole_run_overrides):
    file = tmp_path / "fails.py"
    file.write_text("def score(**kwargs):\n    return float('nan')\n")
    changes = {"reward.function": f"{file}:score", "eval.before_training": False}
    result = helpers.run_train(tmp_path / "run", whole_run_overrides | changes)
    assert result.code == 1
    assert "phase reward: prompt train/" in result.err and "returned nan" in result.err
    assert "there is no checkpoint yet" in result.err


def test_failing_rewards_can_be_counted_as_zero(tmp_path, whole_run_overrides):
    file = tmp_path / "fails.py"
    file.write_text(
        "def score(*, solution_str, **kwargs):\n"
        "    if len(solution_str) % 3 == 0:\n        raise ValueError('odd text')\n    return 0.5\n"
    )
    changes = {"reward.function": f"{file}:score", "reward.on_error": "zero", "trainer.num_steps": 2}
    out = helpers.train_ok(tmp_path / "run", whole_run_overrides | changes | {"eval.before_training": False})
    lines = helpers.read_lines(tmp_path / "run")
    for step in (1, 2):
        records = rollouts(tmp_path / "run", step)
        failed = [r for r in records if len(r["completion"]) % 3 == 0]
        assert [r["reward"] for r in records] == [0.0 if r in failed else 0.5 for r in records]
        assert 0 < len(failed) < 16
        assert lines[step - 1]["reward/num_errors"] == len(failed)
        assert lines[step - 1]["reward/mean"] == pytest.approx(0.5 * (1 - len(failed) / 16))
    errors = re.findall(
        r"^reward error, counted as 0: prompt (train/\d+), completion \d: .*ValueError", out, re.M
    )
    assert len(errors) >= sum(line["reward/num_errors"] for line in lines)


# Variants of the loss


def loss_by_hand(records, *, scale_by_std, norm):
    """-sum_b A_b len_b / norm: what the surrogate is where the policy has not moved (ratio 1, KL 0)."""
    total = 0.0
    for start in range(0, len(records), G):
        group = records[start : start + G]
        rewards = [helpers.score(r["completion"]) for r in group]
        mean = sum(rewards) / G
        std = (sum((r - mean) ** 2 for r in rewards) / (G - 1)) ** 0.5
        for reward, record in zip(rewards, group, strict=True):
            advantage = (reward - mean) / (std + 1e-6) if scale_by_std else reward - mean
            total -= advantage * record["num_tokens"]
    return total / norm


def test_plain_grpo_with_one_update_and_no_reference(tmp_path, reward_file):
    overrides = {"reward.function": f"{reward_file}:score", "logging.save_rollouts": True}
    out = helpers.train_ok(tmp_path / "run", overrides | {"trainer.num_steps": 2})
    lines = helpers.read_lines(tmp_path / "run")
    for line in lines:  # each step's one update is on-policy
        records = rollouts(tmp_path / "run", line["step"])
        tokens = sum(r["num_tokens"] for r in records)
        expected = loss_by_hand(records, scale_by_std=True, norm=tokens)
        assert line["actor/loss"] == pytest.approx(expected, abs=1e-5)
        assert line["actor/ppo_kl"] == line["actor/pg_clipfrac"] == 0
        assert not {"timing_s/ref", "timing_s/old_log_prob", "kl/mean", "val/accuracy"} & set(line)
    assert re.search(r"^  Step 1/3: reward_mean=\S+, actor_loss=\S+ \[\d+\.\ds\]$", out, re.M)
    assert (
        int.from_bytes(helpers.read_checkpoint(tmp_path / "run", 2)[0]["optimizer['step']"][2], "little") == 2
    )


def test_rollouts_are_saved_only_when_asked_for(tmp_path, reward_file):
    overrides = {"reward.function": f"{reward_file}:score", "logging.loggers": ("tensorboard",)}
    out = helpers.train_ok(tmp_path / "run", overrides | {"trainer.num_steps": 1})
    assert not (tmp_path / "run" / "rollouts").exists()
    assert "Step 1/3" not in out  # no console
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_kl_in_the_reward_and_dr_grpo(tmp_path, reward_file):
    overrides = {
        "reward.function": f"{reward_file}:score",
        "algorithm.kl_in": "reward",
        "algorithm.kl_coef": 0.5,
        "algorithm.adv_estimator": "grpo_no_std",
        "algorithm.loss_agg": "seq-mean-token-sum-norm",
        "logging.save_rollouts": True,
        "trainer.num_steps": 2,
    }
    helpers.train_ok(tmp_path / "run", overrides)
    first, second = helpers.read_lines(tmp_path / "run")
    # The policy is still its reference: no penalty. 16 completions, divided by 8 tokens each.
    expected = loss_by_hand(rollouts(tmp_path / "run", 1), scale_by_std=False, norm=16 * 8)
    assert first["actor/loss"] == pytest.approx(expected, abs=1e-5)
    assert first["kl/mean"] == pytest.approx(0, abs=1e-6)
    assert second["kl/mean"] > 1e-4
    # Now there is one, and it is in the advantages; reward/mean stays what the function gave.
    records = rollouts(tmp_path / "run", 2)
    assert abs(second["actor/loss"] - loss_by_hand(records, scale_by_std=False, norm=16 * 8)) > 1e-5
    assert second["reward/mean"] == pytest.approx(sum(helpers.score(r["completion"]) for r in records) / 16)
    for line in (first, second):
        assert {"timing_s/ref", "timing_s/old_log_prob"} <= set(line)


# Other data, several updates, micro-batches by tokens


@pytest.fixture(scope="module")
def plain_files(tmp_path_factory):
    """Two files of plain-string prompts with numbers for answers, and their texts by prompt id."""
    folder, texts = tmp_path_factory.mktemp("plain"), {}
    for name, count in (("one", 3), ("two", 4)):
        rows = [
            {
                "data_source": "sums",
                "prompt": f"What is {i} + {len(name)}?",
                "reward_model": {"ground_truth": float(i + len(name))},
            }
            for i in range(count)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        texts |= {f"{name}/{i}": (row["prompt"], str(i + len(name))) for i, row in enumerate(rows)}
    return tuple(str(folder / f"{name}.parquet") for name in ("one", "two")), texts


@pytest.mark.slow
def test_plain_prompts_several_files_and_four_updates_a_step(
    tmp_path, reward_file, plain_files, model_folder
):
    files, texts = plain_files
    overrides = {
        "model.path": model_folder,
        "reward.function": f"{reward_file}:score",
        "arithmetic.num_train": 0,
        "data.train_files": files,
        "data.val_files": files[:1],
        "actor.num_minibatches": 2,
        "actor.num_epochs": 2,
        "logging.save_rollouts": True,
        "trainer.num_steps": 1,
    }
    out = helpers.train_ok(tmp_path / "tokens", overrides | {"actor.micro_batch_tokens_per_device": 100})
    helpers.train_ok(tmp_path / "whole", overrides)
    assert "data.train_files: 7 prompts" in out and "data.val_files: 3 prompts" in out
    assert "4 (mini-batches: 2, passes: 2)" in out
    records = rollouts(tmp_path / "tokens", 1)
    for record in records:
        assert (record["prompt"], record["ground_truth"]) == texts[record["prompt_id"]]
    assert len({r["prompt_id"] for r in records}) == 4

    lines = [helpers.read_lines(tmp_path / name)[0] for name in ("tokens", "whole")]
    assert all("timing_s/old_log_prob" in line and "timing_s/ref" not in line for line in lines)
    # 2 mini-batches, twice: the second pass finds the policy moved.
    step = helpers.read_checkpoint(tmp_path / "tokens", 1)[0]["optimizer['step']"][2]
    assert int.from_bytes(step, "little") == 4
    assert lines[0]["actor/ppo_kl"] != 0
    # Micro-batches (rows of 32 tokens, 3 at once) are one batch, to rounding.
    micro, one = (helpers.without_clock(line) for line in lines)
    assert micro == pytest.approx(one, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_mesh_of_eight_devices_gives_the_metrics_of_one(tmp_path, whole_run, whole_run_overrides):
    mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
    out = helpers.train_ok(tmp_path / "run", whole_run_overrides | mesh | {"trainer.num_steps": 1})
    assert re.search(r"^  devices +8 x cpu$", out, re.M)
    assert "on each of 4 data shards" in out
    assert rollouts(tmp_path / "run", 1) == rollouts(whole_run[0], 1)
    # "final" validation aside, which the short run adds to its last step
    lines = [helpers.without_clock(helpers.read_lines(d)[1]) for d in (tmp_path / "run", whole_run[0])]
    common = {k: v for k, v in lines[1].items() if not k.startswith("training/rollout_probs")}
    assert {k: lines[0][k] for k in common} == pytest.approx(common, rel=1e-4, abs=1e-6)
    # perf/throughput is per device
    line = helpers.read_lines(tmp_path / "run")[1]
    tokens = 16 * line["response_length/mean"] + 16 * line["prompt_length/mean"]
    assert line["perf/throughput"] == pytest.approx(tokens / line["timing_s/step"] / 8)


@pytest.mark.slow
def test_expected_seconds_stand_beside_measured_ones_where_the_card_is_known(
    tmp_path, whole_run_overrides, whole_run, monkeypatch
):
    """This CPU says that it is an H200; the local engine's phases are not predicted."""
    assert "expected of" not in whole_run[1]
    monkeypatch.setattr(run, "find_card", lambda kind: "h200")
    changes = {"model.dtype": "bfloat16", "trainer.num_steps": 4, "eval.before_training": False}
    out = helpers.train_ok(tmp_path / "run", whole_run_overrides | changes)
    first, second = (
        match.start() for match in re.finditer("Seconds of a step, expected of 1 x h200 / ", out)
    )
    assert out.index("Epoch 1/2:") < out.index("Step 3/3") < first < out.index("Step 1/3", first) < second
    assert out.index("Done: 4 steps.") < second
    table = out[first:].splitlines()[1:4]
    assert [line.split()[0] for line in table] == ["old_log_prob", "ref", "update_actor"]
    measured = helpers.read_lines(tmp_path / "run")[2]
    assert [line.split()[3] for line in table] == [
        f"{measured['timing_s/' + line.split()[0]]:.3g}" for line in table
    ]
