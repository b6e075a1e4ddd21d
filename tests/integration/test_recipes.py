"""Every file in configs/: it loads, as it is and as its smoke test, and one step of it runs."""

import dataclasses
import runpy

import integration_helpers as helpers
import pytest

from grpo_jax.config import ConfigError
from grpo_jax.config.command_line import parse_command_line

FILES = sorted((helpers.ROOT / "configs").glob("*.py"))
TPU = helpers.ROOT / "configs" / "gsm8k_tpu.py"
"""The base's recipe, for other devices."""
LORA = TPU.with_name("gsm8k_lora.py")
"""Of another model."""
RECIPES = [file for file in FILES if file.stem.startswith("gsm8k_") and file not in (TPU, LORA)]

TINY = {  # size alone: whatever belongs to a recipe stays as its file has it
    "model.dtype": "float32",
    "model.remat": "none",
    "model.scan_layers": False,
    "arithmetic.num_train": 20,
    "arithmetic.num_val": 1,
    "arithmetic.num_sft": 1,
    "arithmetic.difficulty": 1,
    "sft.num_steps": 0,
    "data.train_batch_size": 4,
    "data.max_prompt_length": 80,
    "data.max_response_length": 8,
    "algorithm.group_size": 4,  # with one temperature: the sampler is compiled once for all
    "rollout.temperature": 1.0,
    "rollout.engine": "local",
    "actor.micro_batch_size_per_device": 64,
    "mesh.fsdp": 1,
    "eval.before_training": False,
    "eval.every_epochs": 0,
    "eval.every_steps": 0,
    "checkpoint.every_epochs": 0,
    "checkpoint.hf_every_epochs": 0,
    "trainer.total_epochs": 1,
    "trainer.num_steps": 1,
    "logging.loggers": "('console',)",
}


def test_the_recipes_are_there():
    names = {"gsm8k_dapo", "gsm8k_dr_grpo", "gsm8k_gspo", "gsm8k_reinforce_pp", "gsm8k_rloo"}
    assert {file.stem for file in RECIPES} == names


@pytest.mark.parametrize(
    "file",
    [pytest.param(f, id=f.stem, marks=[pytest.mark.slow] if f.stem != "quickstart" else []) for f in FILES],
)
def test_one_step(file, tmp_path, reward_file, model_folder):
    overrides = TINY | {"model.path": model_folder, "reward.function": f"{reward_file}:score"}
    if "dapo" in file.stem:
        overrides["reward.overlong_buffer"] = 4
    out = helpers.train_ok(tmp_path / "run", overrides, config=file)
    assert "  Step 1/5: " in out
    (line,) = helpers.read_lines(tmp_path / "run")
    assert line["actor/grad_norm"] > 0 and line["actor/skipped_updates"] == 0
    assert line["reward/score/mean"] > 0


def test_the_tpu_s_file_changes_where_things_live_and_nothing_that_is_learned():
    base, _ = parse_command_line("train", "", [f"--config={TPU.with_name('gsm8k.py')}"])
    tpu, _ = parse_command_line("train", "", [f"--config={TPU}"])
    assert (tpu.model.remat, tpu.rollout.engine, tpu.optim.offload) == ("full", "local", False)
    assert not tpu.algorithm.ref_offload and tpu.data == base.data
    assert dataclasses.replace(tpu.algorithm, ref_offload=base.algorithm.ref_offload) == base.algorithm
    assert dataclasses.replace(tpu.optim, offload=base.optim.offload) == base.optim
    smoke, _ = parse_command_line("train", "", [f"--config={TPU}:smoke"])
    assert smoke.model.path == "random" and smoke.model.remat == "none"


def test_lora_s_file_trains_adapters_with_nothing_on_the_host():
    lora, _ = parse_command_line("train", "", [f"--config={LORA}"])
    assert (lora.lora.rank, lora.lora.alpha, lora.lora.targets) == (32, 32.0, ("all-linear",))
    assert lora.model.path == "models/Qwen2.5-3B-Instruct" and lora.optim.learning_rate == 3e-6
    assert not lora.optim.offload and not lora.algorithm.ref_offload
    assert lora.completions_per_step == 5120 and lora.completions_per_update == 1280  # 256 prompts
    smoke, _ = parse_command_line("train", "", [f"--config={LORA}:smoke"])
    assert smoke.lora == lora.lora and smoke.model.path == "random"
    assert smoke.logging.experiment_name == "gsm8k-lora-smoke"
    with pytest.raises(ConfigError):
        parse_command_line("train", "", [f"--config={LORA}:7b"])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_the_smoke_variant_is_the_base_s(file):
    smoke, _ = parse_command_line("train", "", [f"--config={file}:smoke"])
    base, _ = parse_command_line("train", "", [f"--config={file.with_name('gsm8k.py')}:smoke"])
    assert smoke.model == base.model and smoke.data == base.data
    assert smoke.logging.experiment_name not in (base.logging.experiment_name, "gsm8k")
    full, _ = parse_command_line("train", "", [f"--config={file}"])
    assert full.model.path == "models/Qwen2.5-7B-Instruct"
    assert full.logging.experiment_name == smoke.logging.experiment_name.removesuffix("-smoke")


@pytest.mark.parametrize("file", [*RECIPES, LORA], ids=lambda file: file.stem)
def test_a_recipe_names_its_paper(file):
    doc = runpy.run_path(str(file))["__doc__"]
    assert "arXiv:" in doc.splitlines()[0]
    assert f"configs/{file.name}" in doc and "differs from configs/gsm8k.py" in doc
