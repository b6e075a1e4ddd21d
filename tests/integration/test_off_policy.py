"""What the ratio is taken against, and the correction of the sampler: on the local engine, which agrees."""

import integration_helpers as helpers
import numpy as np
import pytest
from safetensors.numpy import load_file

SETTINGS = {
    "trainer": {},
    "sampler": {"algorithm.old_logprobs": "sampler"},
    "token": {"algorithm.rollout_is": "token"},
}


@pytest.fixture(scope="module")
def overrides(reward_file, model_folder):
    return {
        "model.path": model_folder,
        "reward.function": f"{reward_file}:score",
        "optim.learning_rate": 1e-3,  # Adam's update has its size, whatever the gradient's: rounding counts
        "trainer.num_steps": 2,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory, overrides):
    """Workdirs of three runs of two steps with one update each."""
    folder = tmp_path_factory.mktemp("off_policy")
    for name, changes in SETTINGS.items():
        helpers.train_ok(folder / name, overrides | changes)
    return {name: folder / name for name in SETTINGS}


def weights(folder):
    return load_file(folder / "model.safetensors")


def final_model(workdir):
    (path,) = (file for file in workdir.rglob("model.safetensors") if file.parent.name != "model")
    return weights(path.parent)


@pytest.mark.parametrize("name", [pytest.param("sampler", marks=pytest.mark.slow), "token"])
def test_where_sampler_and_trainer_agree_all_settings_train_the_same_model(runs, name, model_folder):
    before, expected, got = weights(model_folder), final_model(runs["trainer"]), final_model(runs[name])
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(got[key], value, atol=1e-5, rtol=0, err_msg=key)
    assert max(np.abs(expected[key] - before[key]).max() for key in expected) > 1e-3  # it was trained


def test_metrics_of_the_correction(runs):
    for line in helpers.read_lines(runs["token"]):
        assert line["rollout_corr/is_weight_mean"] == pytest.approx(1, abs=1e-4)
        assert 1 - 1e-4 <= line["rollout_corr/is_weight_max"] <= 1 + 1e-4
        assert line["rollout_corr/is_clipped_frac"] == 0
    for name in ("trainer", "sampler"):
        assert not any(
            key.startswith("rollout_corr/") for line in helpers.read_lines(runs[name]) for key in line
        )


def test_metrics_have_the_same_names_whatever_the_ratio_is_against(runs):
    old, new = (helpers.read_lines(runs[name]) for name in ("trainer", "sampler"))
    assert [set(line) for line in new] == [set(line) for line in old]
    for line in new:
        assert line["actor/ppo_kl"] == pytest.approx(0, abs=1e-5)
        assert line["training/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)


def test_several_updates_against_the_sampler_need_no_score_pass(tmp_path, overrides):
    """And the penalty in the reward takes the sampler's too; the mismatch stays that of the first update."""
    changes = SETTINGS["sampler"] | {
        "actor.num_epochs": 2,
        "algorithm.kl_in": "reward",
        "algorithm.kl_coef": 0.1,
        "optim.learning_rate": 1e-2,
    }
    helpers.train_ok(tmp_path / "run", overrides | changes)
    lines = helpers.read_lines(tmp_path / "run")
    assert len(lines) == 2
    for line in lines:
        assert "timing_s/old_log_prob" not in line and "timing_s/ref" in line
        assert abs(line["actor/ppo_kl"]) > 1e-3  # the second update finds the policy moved
        assert line["training/rollout_probs_diff_max"] < 1e-4
        assert line["training/token_mult_prob_error"] == pytest.approx(1, abs=1e-4)
