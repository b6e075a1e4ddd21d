"""All that recipes carry from step to step goes through interruptions to the same bits.

Six steps in one go, and the same six in three pieces: dynamic sampling with groups left over, an adaptive
coefficient of the KL, a reference that is refreshed in the middle of the second piece, several rewards, and the
optimizer's state and the reference on the host.
"""

import integration_helpers as helpers
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from grpo_jax import export

pytestmark = pytest.mark.slow  # the kills of test_kills.py are of a run with most of this

# Spread for about half of the prompts, whatever an untrained model writes.
REWARD = """
def score(*, data_source, solution_str, ground_truth, extra_info):
    if sum(ground_truth.encode()) % 2:
        return 0.0
    return sum(solution_str.encode()) % 5 / 4

def flat(**_):
    return 0.0
"""
PIECES = (2, 4, 6)
TARGET, HORIZON = 0.01, 40.0


@pytest.fixture(scope="module")
def overrides(tmp_path_factory, model_folder):
    file = tmp_path_factory.mktemp("recipe_reward") / "half.py"
    file.write_text(REWARD)
    return {
        "model.path": model_folder,
        "reward.function": f"{file}:score",
        "reward.extra_functions": "('gsm8k_format',)",
        "reward.weights": "(1.0, 0.5)",
        "reward.overlong_buffer": 4,
        "algorithm.adv_estimator": "rloo",
        "algorithm.policy_loss": "gspo",
        "algorithm.loss_agg": "seq-mean-token-mean",
        "algorithm.dynamic_sampling_rounds": 8,
        "algorithm.rollout_is": "sequence",
        "algorithm.kl_coef": 0.1,
        "algorithm.kl_target": TARGET,
        "algorithm.kl_horizon": HORIZON,
        "algorithm.ref_refresh_every": 3,
        "algorithm.ref_offload": True,
        "optim.offload": True,
        "model.dtype": "bfloat16",  # the masters are float32, and no others
        "optim.learning_rate": 1e-3,
        "arithmetic.num_train": 26,  # six steps are an epoch
        "logging.save_rollouts": True,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, overrides):
    folder = tmp_path_factory.mktemp("recipe_resume")
    every = {"checkpoint.every_steps": 1, "checkpoint.max_to_keep": 6}
    helpers.train_ok(folder / "whole", overrides | every)
    for steps in PIECES:
        helpers.train_ok(folder / "pieces", overrides | {"trainer.num_steps": steps})
    return folder / "whole", folder / "pieces"


def test_the_pieces_end_in_the_same_bits(runs):
    whole, pieces = runs
    for step in PIECES[1:]:  # of which the last two are kept
        (ours, progress), (theirs, other_progress) = (helpers.read_checkpoint(run, step) for run in runs)
        assert ours == theirs
        assert progress == other_progress
    lines = [[helpers.without_clock(line) for line in helpers.read_lines(run)] for run in runs]
    assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5, 6]
    for step in range(1, 7):
        name = f"rollouts/step-{step:06d}.jsonl"
        assert (whole / name).read_text() == (pieces / name).read_text()


def test_the_interruptions_came_while_there_was_something_to_carry(runs):
    kept = [line["dynamic/num_kept"] for line in helpers.read_lines(runs[1])]
    assert any(kept[step - 1] for step in PIECES[:-1])
    coefficients = [line["kl/coef"] for line in helpers.read_lines(runs[1])]
    assert len(set(coefficients)) > 3


def test_numbers_of_groups_add_up(runs):
    lines = helpers.read_lines(runs[0])
    for before, line in zip([{"dynamic/num_kept": 0}, *lines], lines, strict=False):
        m = {
            name.removeprefix("dynamic/num_"): v for name, v in line.items() if name.startswith("dynamic/num")
        }
        assert m["carried"] == before["dynamic/num_kept"]
        assert m["sampled"] == 4 * m["rounds"] and m["rounds"] >= 1
        assert m["carried"] + m["sampled"] == 4 + (m["no_spread"] - m["filled"]) + m["kept"]
        assert line["training/policy_lag"] == (1 if m["carried"] else 0)
        assert line["frac_reward_zero_std"] * 4 <= m["filled"]
        records = helpers.read_jsonl(runs[0] / "rollouts" / f"step-{line['step']:06d}.jsonl")
        dropped = [record for record in records if record.get("is_dropped")]
        assert len(records) - len(dropped) == 16
        assert len(dropped) == 4 * (m["no_spread"] - m["filled"])
        assert line["reward/mean"] == pytest.approx(
            line["reward/score/mean"] + 0.5 * line["reward/gsm8k_format/mean"] + line["reward/overlong/mean"],
            abs=1e-6,
        )
    assert sum(line["dynamic/num_no_spread"] for line in lines) > 4


def test_the_coefficient_follows_its_rule(runs):
    lines = helpers.read_lines(runs[0])
    coef = 0.1
    for line in lines:
        assert line["kl/coef"] == pytest.approx(coef, rel=1e-9)
        coef *= 1 + min(max(line["kl/mean"] / TARGET - 1, -0.2), 0.2) * 16 / HORIZON


def test_after_its_refresh_the_reference_is_the_policy(runs):
    lines = helpers.read_lines(runs[0])
    assert [line["kl/is_refreshed"] for line in lines] == [0, 0, 1, 0, 0, 1]
    kl = [line["kl/mean"] for line in lines]
    for step in (0, 3):  # of policy and reference before the update: one and the same model
        assert kl[step] == 0
        assert kl[step + 2] > 1e-5


def test_dynamic_sampling_without_any_spread_stops_and_shows_two_groups(tmp_path, overrides):
    file = overrides["reward.function"].replace(":score", ":flat")
    changes = {"reward.function": file, "reward.extra_functions": "()", "reward.weights": "()"}
    result = helpers.run_train(
        tmp_path / "run", overrides | changes | {"algorithm.dynamic_sampling_rounds": 2}
    )
    assert result.code == 1
    assert "found no group with any spread of rewards: 8 groups in 2 rounds" in result.err
    assert result.err.count("ground truth:") == 2 and result.err.count("reward 0: ") == 4
    assert "there is no checkpoint yet" in result.err


def test_folders_and_exports_are_the_masters(runs, tmp_path):
    """The devices' parameters are bfloat16; the folder's dtype and the masters are float32."""
    result = helpers.call(export.main, [f"--checkpoint={runs[0]}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0, result.err
    assert helpers.tree_digest(tmp_path / "out") == helpers.tree_digest(runs[0] / "checkpoint-epoch-1")
    weights = load_file(tmp_path / "out" / "model.safetensors")["model.embed_tokens.weight"]
    assert weights.dtype == np.float32
    assert (weights != weights.astype(ml_dtypes.bfloat16).astype(np.float32)).mean() > 0.9
