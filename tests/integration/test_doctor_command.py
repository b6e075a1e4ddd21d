"""`python -m grpo_jax.doctor`: what it says of a configuration."""

import json

import integration_helpers as helpers

from grpo_jax import doctor
from grpo_jax.model.hf import inspect_folder
from grpo_jax.model.transformer import num_params

QWEN_7B = dict(
    model_type="qwen2", architectures=["Qwen2ForCausalLM"], hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1e6,
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
    num_key_value_heads=4, tie_word_embeddings=False,
)  # fmt: skip


def run(workdir, overrides):
    """What is printed, name -> value."""
    result = helpers.call(doctor.main, helpers.train_argv(workdir, overrides))
    assert result.code == 0, result.err
    assert not workdir.exists()
    pairs = (line.strip().partition("  ") for line in result.out.splitlines())
    return {name: value.strip() for name, _, value in pairs}


def test_what_a_run_would_hold(tmp_path, model_folder):
    n = num_params(inspect_folder(model_folder).config)
    common = {"model.path": model_folder, "algorithm.kl_coef": 0.1}
    rows = run(tmp_path / "run", common)
    assert rows["parameters"] == f"{n:,}" and rows["steps in all"] == "3"
    assert rows["a device holds between steps"] == "0.0 GB (parameters, Adam's moments, reference)"
    assert "the host holds" not in rows
    on_host = {"optim.offload": True, "algorithm.ref_offload": True, "model.dtype": "bfloat16"}
    rows = run(tmp_path / "run", common | on_host)
    assert rows["a device holds between steps"] == "0.0 GB (parameters)"
    assert rows["the host holds"] == "0.0 GB (master parameters, Adam's moments, reference)"


def test_every_key_is_printed_and_what_is_not_the_default_is_marked(tmp_path, model_folder):
    from grpo_jax.config import KEYS

    overrides = {"model.path": model_folder, "trainer.seed": 3, "algorithm.group_size": 4}
    overrides["optim.warmup_steps"] = 4
    result = helpers.call(doctor.main, helpers.train_argv(tmp_path / "run", overrides))
    assert result.code == 0, result.err
    parts = (line[4:].partition(" = ") for line in result.out.splitlines())
    lines = {name: value for name, _, value in parts if name in KEYS}
    assert list(lines) == list(KEYS)
    assert lines["data.train_files"] == "() (nothing reads it with arithmetic.num_train=13)"
    assert "\n  * trainer.seed = 3\n" in result.out and "\n    algorithm.group_size = 4\n" in result.out
    assert "\nNothing in this run reads random_model.vocab_size=300, " in result.out
    assert "\nWARNING: optim.warmup_steps=4 is beyond the 3 updates of this run" in result.out


def test_the_sizes_of_7b(tmp_path):
    """As shipped: 2 bytes a parameter on the device, 14 on the host, and all but the reference in a checkpoint."""
    from grpo_jax.config import load_config, parse_config
    from grpo_jax.learner.memory import abstract_mesh

    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B))
    values = load_config(helpers.ROOT / "configs" / "gsm8k.py")
    values.model.path = str(tmp_path)
    rows = dict(doctor._memory_rows(parse_config(values), abstract_mesh(1, 1, 1)))
    assert rows["parameters"] == "7,615,616,512"
    assert rows["a device holds between steps"].startswith("15.2 GB")
    assert rows["the host holds"].startswith("106.6 GB")
    assert rows["one checkpoint"] == "106.6 GB"  # parameters, masters and moments: 2 + 4 + 8 bytes
