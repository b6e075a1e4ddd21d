"""The smoke variant of configs/gsm8k.py, on the first problems of GSM8K."""

import shutil

import integration_helpers as helpers
import pytest

from grpo_jax.data import gsm8k


@pytest.mark.slow
def test_two_steps_on_real_problems(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "test"):
        sample = helpers.ROOT / "tests" / "data" / f"gsm8k_sample_{split}.jsonl"
        shutil.copy(sample, source / f"{split}.jsonl")
    result = helpers.call(gsm8k.main, [f"--local_dir={tmp_path / 'data'}", f"--source={source}"])
    assert result.code == 0, result.err

    overrides = {
        "data.train_files": (str(tmp_path / "data" / "train.parquet"),),
        "data.val_files": (str(tmp_path / "data" / "test.parquet"),),
        "mesh.fsdp": 1,
        "logging.save_rollouts": True,
    }
    workdir = tmp_path / "run"
    config = f"{helpers.ROOT / 'configs' / 'gsm8k.py'}:smoke"
    out = helpers.train_ok(workdir, overrides, config=config)
    assert "  Step 2/16: " in out  # 64 problems, 4 a step
    lines = helpers.read_lines(workdir)
    assert [line["step"] for line in lines] == [0, 1, 2]
    # One update a step and KL in the loss: the old log-probabilities are the update's own.
    assert all("timing_s/ref" in line and "kl/mean" in line for line in lines[1:])
    assert not any("timing_s/old_log_prob" in line for line in lines)
    records = helpers.read_jsonl(workdir / "rollouts" / "step-000001.jsonl")
    problems = {row["question"]: row["answer"] for row in helpers.read_jsonl(source / "train.jsonl")}
    assert len(records) == 16
    for record in records:
        question = next(question for question in problems if question in record["prompt"])
        assert 'output the final answer after "####"' in record["prompt"]
        assert record["ground_truth"] == problems[question].split("#### ")[1].replace(",", "")
    validation = helpers.read_jsonl(workdir / "validation" / "step-000002.jsonl")
    assert len(validation) == 16  # eval.num_prompts
    assert (workdir / "checkpoint-final" / "model.safetensors").exists()
