"""Whole runs with LoRA: what they leave, go on from, and are refused."""

import json
import shutil

import hosts_helpers as hosts
import integration_helpers as helpers
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from grpo_jax import evaluate, export

LORA = {"lora.rank": 4, "lora.alpha": 8.0}
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def overrides(whole_run_overrides):
    """Six steps of two updates with a reference; parameters on the devices."""
    changes = {"optim.offload": False, "eval.before_training": False, "eval.every_steps": 6}
    return whole_run_overrides | changes | LORA


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, overrides):
    """A finished run that tests read and must not change: (workdir, what was printed)."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    return workdir, helpers.train_ok(workdir, overrides)


def adapters(folder):
    return load_file(folder / ADAPTER)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.tensor([[5, 9, 270, 31, 8]])).logits.numpy()


# ---- what a run leaves ----


def test_a_run_trains_adapters_and_nothing_else(lora_run):
    workdir, out = lora_run
    # rank 4 times the widths of q and o (32 + 32), k and v (32 + 16), gate, up and down (32 + 48)
    assert f"{4 * (2 * 64 + 2 * 48 + 3 * 80):,} of them, all that is trained" in out
    arrays, _ = helpers.read_checkpoint(workdir, 6)
    assert all("_lora_" in name for name in arrays if name.startswith("params"))
    assert f"{workdir}/checkpoint-epoch-2   (a PEFT folder)" in out
    first, second = adapters(workdir / "checkpoint-epoch-1"), adapters(workdir / "checkpoint-epoch-2")
    assert len(first) == 14 and any(np.any(first[name] != second[name]) for name in first)


def test_peft_loads_the_folder_and_export_merges_it(lora_run, tmp_path):
    workdir, _ = lora_run
    base = AutoModelForCausalLM.from_pretrained(workdir / "random-model", dtype=torch.float32)
    before = logits_of(base)
    adapted = logits_of(peft.PeftModel.from_pretrained(base, workdir / "checkpoint-epoch-2"))
    assert np.abs(adapted - before).max() > 1e-3
    argv = [f"--checkpoint={workdir}", f"--output={tmp_path / 'merged'}", "--merge"]
    assert helpers.call(export.main, argv).code == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    np.testing.assert_allclose(logits_of(merged), adapted, atol=2e-5)
    argv = [f"--checkpoint={workdir}", f"--output={tmp_path / 'adapter'}"]
    assert helpers.call(export.main, argv).code == 0
    assert helpers.tree_digest(tmp_path / "adapter") == helpers.tree_digest(workdir / "checkpoint-epoch-2")


def test_evaluate_with_the_adapter_gives_the_last_validation(lora_run, tmp_path):
    workdir, out = lora_run
    flags = f"--model={workdir / 'random-model'} --adapter={workdir / 'checkpoint-epoch-2'}"
    assert flags in out
    generations = tmp_path / "generations.jsonl"
    argv = [*flags.split(), f"--data={workdir / 'data' / 'val.parquet'}", f"--generations={generations}"]
    result = helpers.call(evaluate.main, [*argv, "--max_response_length=8"])
    assert result.code == 0, result.err
    texts = [record["completion"] for record in helpers.read_jsonl(generations)]
    expected = helpers.read_jsonl(workdir / "validation" / "step-000006.jsonl")
    assert texts == [record["completion"] for record in expected]


# ---- going on ----


def test_a_resumed_run_ends_in_the_same_bits(overrides, lora_run, tmp_path):
    whole = lora_run[0]
    helpers.train_ok(tmp_path / "run", overrides | {"trainer.num_steps": 3})
    out = helpers.train_ok(tmp_path / "run", overrides)
    assert "Going on after step 3 of 6." in out
    assert helpers.read_checkpoint(tmp_path / "run", 6) == helpers.read_checkpoint(whole, 6)
    kl = lambda path: [line["kl/mean"] for line in helpers.read_lines(path)]
    assert kl(tmp_path / "run") == kl(whole)
    # Of random models in two workdirs, only the path differs.
    weights = [path / "checkpoint-epoch-2" / ADAPTER for path in (tmp_path / "run", whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.slow
def test_so_does_one_with_its_state_on_the_host_and_a_moving_reference(overrides, tmp_path):
    changes = {"optim.offload": True, "model.dtype": "bfloat16", "algorithm.ref_refresh_every": 1}
    changes |= {"eval.every_steps": 0, "checkpoint.every_steps": 1, "checkpoint.max_to_keep": 9}
    helpers.train_ok(tmp_path / "run", overrides | changes | {"trainer.num_steps": 3})
    whole = helpers.read_checkpoint(tmp_path / "run", 3)
    for folder in (tmp_path / "run").glob("checkpoint*/3"):
        shutil.rmtree(folder)
    out = helpers.train_ok(tmp_path / "run", overrides | changes | {"trainer.num_steps": 3})
    assert "Going on after step 2 of 3." in out
    assert helpers.read_checkpoint(tmp_path / "run", 3) == whole


@pytest.mark.slow
def test_it_goes_on_on_another_mesh(overrides, tmp_path):
    """Four devices by width and two by heads; then one."""
    meshed = overrides | {"mesh.fsdp": 4, "mesh.tensor": 2, "trainer.num_steps": 2}
    helpers.train_ok(tmp_path / "run", meshed)
    forced = overrides | {"trainer.num_steps": 3, "checkpoint.resume": "force"}
    out = helpers.train_ok(tmp_path / "run", forced)
    assert "Going on after step 2 of 3." in out


@pytest.mark.slow
def test_another_run_goes_on_from_the_folder(overrides, lora_run, model_folder, tmp_path):
    """Its policy and its reference are what the first run has trained."""
    changes = {"model.path": model_folder, "trainer.num_steps": 1}
    helpers.train_ok(tmp_path / "first", overrides | changes)
    folder = tmp_path / "first" / "checkpoint-final"
    again = overrides | changes | {"lora.path": folder, "optim.learning_rate": 1e-12}
    helpers.train_ok(tmp_path / "second", again)
    [line] = helpers.read_lines(tmp_path / "second")
    assert line["kl/mean"] < 1e-9
    was, now = adapters(folder), adapters(tmp_path / "second" / "checkpoint-final")
    for name, matrix in was.items():
        np.testing.assert_allclose(now[name], matrix, atol=1e-9)
    assert any(matrix.any() for name, matrix in was.items() if "lora_B" in name)


@pytest.mark.slow
def test_two_processes_train_the_adapters_of_one(overrides, tmp_path):
    """Eight devices, in one process or four in each of two; a matrix of some 0.1 after two steps of 1e-2."""
    changes = {"mesh.data": 2, "mesh.fsdp": 4, "trainer.num_steps": 2, "eval.every_steps": 0}
    helpers.train_ok(tmp_path / "one", overrides | changes)
    hosts.train_ok(tmp_path / "two", overrides | changes, 2)
    one, two = (adapters(tmp_path / name / "checkpoint-final") for name in ("one", "two"))
    for name, matrix in one.items():
        np.testing.assert_allclose(two[name], matrix, atol=1e-4)


@pytest.mark.slow
def test_after_a_warm_start_the_base_is_the_warm_started_model(overrides, tmp_path):
    changes = {"sft.num_steps": 2, "arithmetic.direct_share": 1.0, "trainer.num_steps": 1}
    helpers.train_ok(tmp_path / "run", overrides | changes | {"actor.num_minibatches": 1})
    [line] = helpers.read_lines(tmp_path / "run")
    assert line["kl/mean"] == 0  # of the only update: zero means zero
    content = json.loads((tmp_path / "run" / "checkpoint-final" / "adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "run" / "sft-model")
    argv = [f"--checkpoint={tmp_path / 'run'}", f"--output={tmp_path / 'merged'}", "--merge"]
    assert helpers.call(export.main, argv).code == 0


@pytest.mark.slow
def test_other_ways_to_compute(overrides, tmp_path):
    changes = {"model.dtype": "float16", "algorithm.kl_in": "reward", "lora.targets": ("attention",)}
    changes |= {"model.remat": "dots", "model.scan_layers": True, "trainer.num_steps": 2}
    helpers.train_ok(tmp_path / "run", overrides | changes)
    lines = helpers.read_lines(tmp_path / "run")
    assert len(lines) == 2 and all(np.isfinite(line["actor/grad_norm"]) for line in lines)


def test_a_full_run_has_nothing_to_merge(whole_run, tmp_path):
    argv = [f"--checkpoint={whole_run[0]}", f"--output={tmp_path / 'out'}", "--merge"]
    result = helpers.call(export.main, argv)
    assert result.code == 2 and result.err.startswith("error: --merge=") and result.err.count("\n") == 1
