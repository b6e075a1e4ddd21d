"""From a checkpoint to a Hugging Face folder that transformers loads, and that says what our engine says."""

import io
import logging
import shutil

import integration_helpers as helpers
import jax
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_jax import export
from grpo_jax.config import MeshSection
from grpo_jax.model.hf import inspect_folder, load_params
from grpo_jax.model.sharding import make_mesh
from grpo_jax.rollout import SamplingParams, make_engine
from grpo_jax.types import Prompt


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/6"])
def test_it_equals_the_folder_that_training_wrote(where, tmp_path, whole_run):
    workdir, _ = whole_run
    before = helpers.tree_digest(workdir)
    result = helpers.call(export.main, [f"--checkpoint={workdir / where}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0, result.err
    assert "step 6" in result.out and str(tmp_path / "out") in result.out
    assert helpers.tree_digest(tmp_path / "out") == helpers.tree_digest(workdir / "checkpoint-epoch-2")
    assert helpers.tree_digest(workdir) == before


def test_an_earlier_checkpoint_can_be_chosen(tmp_path, whole_run):
    workdir, _ = whole_run
    checkpoint = workdir / "checkpoints" / "4"
    result = helpers.call(export.main, [f"--checkpoint={checkpoint}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0 and "step 4" in result.out
    weights = helpers.read_tensors(tmp_path / "out")
    assert weights.keys() == helpers.read_tensors(workdir / "checkpoint-epoch-2").keys()
    for epoch in (1, 2):  # after steps 3 and 6
        assert weights != helpers.read_tensors(workdir / f"checkpoint-epoch-{epoch}")


def test_a_warning_is_one_line(tmp_path, whole_run, capsys):
    """Libraries that it imports give the root logger a handler, which would say all once more, in its own form."""
    workdir = shutil.copytree(whole_run[0], tmp_path / "run")
    (workdir / "checkpoints" / "6" / "manifest.json").write_text("{")
    root, handler = logging.getLogger(), logging.StreamHandler(io.StringIO())
    logger = logging.getLogger("grpo_jax")
    handlers, level = list(logger.handlers), logger.level
    root.addHandler(handler)
    for own in handlers:
        logger.removeHandler(own)
    logger.propagate = True
    try:
        result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
    finally:
        root.removeHandler(handler)
        logger.setLevel(level)
    assert result.code == 0 and "step 4" in result.out
    assert handler.stream.getvalue() == ""
    assert result.out.startswith("WARNING: the checkpoint of step 6 is damaged")


def test_it_works_when_the_original_model_is_gone(tmp_path, model_folder, whole_run_overrides):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    workdir = tmp_path / "run"
    helpers.train_ok(workdir, whole_run_overrides | {"model.path": model, "trainer.num_steps": 1})
    shutil.rmtree(model)
    result = helpers.call(export.main, [f"--checkpoint={workdir}", f"--output={tmp_path / 'out'}"])
    assert result.code == 0, result.err
    assert helpers.tree_digest(tmp_path / "out") == helpers.tree_digest(workdir / "checkpoint-final")
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    AutoTokenizer.from_pretrained(tmp_path / "out")


def test_transformers_generates_the_same_greedy_tokens(whole_run, rollout_section):
    folder = whole_run[0] / "checkpoint-epoch-2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch_model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = helpers.read_jsonl(whole_run[0] / "validation" / "step-000006.jsonl")
    prompts = [
        Prompt(r["prompt_id"], tuple(tokenizer(r["prompt"])["input_ids"]), r["prompt"], "", "", {})
        for r in rows
    ]
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    inspected = inspect_folder(folder)
    section = rollout_section(engine="local", batch_size=64)
    engine = make_engine(section, folder=inspected, mesh=mesh, tokenizer=tokenizer, max_model_len=100)
    engine.load_weights(load_params(inspected, inspected.config, mesh), version=0)
    groups = engine.generate(prompts, SamplingParams(1, 0.0, 8), seed=0)
    # In training the validation after the last step was greedy, by this engine, with these weights.
    assert [group.completions[0].text for group in groups] == [r["completion"] for r in rows]
    for prompt, group in zip(prompts, groups, strict=True):
        with torch.no_grad():
            ids = torch_model.generate(
                torch.tensor([prompt.token_ids]), max_new_tokens=8, do_sample=False,
                attention_mask=torch.ones(1, len(prompt.token_ids), dtype=torch.long),
            )  # fmt: skip
        assert tuple(ids[0, len(prompt.token_ids) :].tolist()) == group.completions[0].token_ids
