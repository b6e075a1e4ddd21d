"""`python -m grpo_jax.mismatch`, and where training and `doctor` point to it."""

import json

import integration_helpers as helpers
import pytest

from grpo_jax import doctor, mismatch
from grpo_jax.run import alarms


def run(workdir, overrides, *argv):
    return helpers.call(mismatch.main, [*helpers.train_argv(workdir, overrides), *argv])


@pytest.mark.slow
def test_the_table_the_budget_and_the_file(tmp_path, model_folder):
    overrides = {"model.path": model_folder, "model.dtype": "bfloat16"}
    result = run(tmp_path / "run", overrides, "--num=3", f"--json={tmp_path / 'out.json'}")
    assert result.code == 0, result.err
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # no workdir
    content = json.loads((tmp_path / "out.json").read_text())
    rows = {row["key"]: row for row in content["rows"]}
    assert 3 <= content["num_tokens"] <= 3 * 8  # three prompts, at most 8 tokens each
    assert rows["trainer"]["name"] == "trainer (bfloat16, plain attention)"
    assert rows["float32"]["float32"]["max_prob"] == rows["engine sampled"]["engine"]["max_prob"] == 0
    assert rows["trainer"]["float32"]["nats"] > rows["float16"]["float32"]["nats"] > 0
    assert rows["trainer gradients"] == rows["trainer"] | {
        "key": "trainer gradients",
        "name": "trainer for gradients, run again",
    }
    assert content["whole"] == rows["trainer"]["engine"]
    assert sum(step["share"] for step in content["budget"]) == pytest.approx(1)
    assert f"{content['num_tokens']} tokens; mean |d log p|" in result.out
    assert "Where it comes from" in result.out and "What would lower it most" in result.out


@pytest.mark.slow
def test_training_and_doctor_point_to_it_where_the_difference_is_large(tmp_path, model_folder, monkeypatch):
    """With bounds so low that rounding in bfloat16 is beyond them."""
    monkeypatch.setattr(alarms, "HEALTHY_PROB", 1e-9)
    overrides = {"model.path": model_folder, "model.dtype": "bfloat16", "algorithm.kl_coef": 0.1}
    out = helpers.train_ok(tmp_path / "run", overrides)
    warnings = [line for line in out.splitlines() if line.startswith("WARNING")]
    [warning] = [line for line in warnings if "python -m grpo_jax.mismatch" in line]  # once, in three steps
    first = helpers.read_lines(tmp_path / "run")[0]
    assert f"training/rollout_probs_diff_mean={first['training/rollout_probs_diff_mean']:.2g}" in warning
    assert not [line for line in warnings if "first update" in line]
    assert first["kl/mean"] == first["actor/ppo_kl"] == 0
    result = helpers.call(doctor.main, helpers.train_argv(tmp_path / "run", overrides))
    assert result.code == 0 and result.out.count("python -m grpo_jax.mismatch") == 1
    result = helpers.call(doctor.main, helpers.train_argv(tmp_path / "fresh", overrides))
    assert result.code == 0 and "python -m grpo_jax.mismatch" not in result.out
