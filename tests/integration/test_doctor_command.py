"""`python -m grpo_jax.doctor`: what it says of a configuration."""

import json

import integration_helpers as helpers

from grpo_jax import doctor
from grpo_jax.config import CheckpointSection, Config
from grpo_jax.model.hf import inspect_folder
from grpo_jax.model.transformer import num_params
from grpo_jax.run.checks import check_clock, check_disk

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
    rows, checkpoint, weights = doctor._memory_rows(parse_config(values), abstract_mesh(1, 1, 1))
    rows = dict(rows)
    assert rows["parameters"] == "7,615,616,512"
    assert rows["a device holds between steps"].startswith("15.2 GB")
    assert rows["the host holds"].startswith("106.6 GB")
    assert rows["one checkpoint"] == "106.6 GB"  # parameters, masters and moments: 2 + 4 + 8 bytes
    assert (checkpoint, weights) == (14 * 7_615_616_512, 2 * 7_615_616_512)


def test_json_has_each_check_and_what_the_run_would_hold(tmp_path, model_folder):
    argv = helpers.train_argv(tmp_path / "run", {"model.path": model_folder})
    result = helpers.call(doctor.main, [*argv, "--json", "--sample"])
    assert result.code == 0, result.err
    report = json.loads(result.out)
    checks = {check["name"]: check for check in report["checks"]}
    assert report["ok"] and all(check["is_ok"] and not check["mend"] for check in report["checks"])
    assert {"jax", "clock", "cpu:0", "data", "disk", "sample"} < set(checks)
    assert checks["data"]["found"] == "train/0: its own solution gets reward 1"
    assert report["run"]["steps in all"] == "3" and not (tmp_path / "run").exists()
    assert json.loads(helpers.call(doctor.main, ["--json"]).out)["ok"]


def test_json_of_what_is_wrong_names_it_and_the_code_is_2(tmp_path):
    argv = helpers.train_argv(tmp_path / "run", {"model.path": tmp_path / "absent"})
    result = helpers.call(doctor.main, [*argv, "--json"])
    assert result.code == 2 and result.err.startswith("error: model.path=")
    report = json.loads(result.out)
    assert not report["ok"]
    (wrong,) = [check for check in report["checks"] if not check["is_ok"]]
    assert wrong["name"] == "model.path" and wrong["mend"].startswith("there is no such folder")


def test_a_package_that_is_too_old_is_named_with_its_cure(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["numpy>=999", "no-such-package>=1"])
    result = helpers.call(doctor.main, [])
    assert result.code == 2
    assert "mend it: pip install -U 'numpy>=999'" in result.out
    assert (
        "BAD no-such-package missing (needs >=1); mend it: pip install -U 'no-such-package>=1'" in result.out
    )
    assert "pip install -U 'numpy>=999'" in result.err and result.err.count("\n") == 1


def test_a_disk_that_is_too_small_and_a_clock_that_is_behind(tmp_path):
    config = Config(checkpoint=CheckpointSection(max_to_keep=2, hf_every_epochs=1))
    sizes = {"place": tmp_path, "num_epochs": 3.0}
    small = check_disk(config, checkpoint=10**6, weights=10**6, **sizes)
    assert small.is_ok and "0.0 GB for 3 checkpoints" in small.found
    large = check_disk(config, checkpoint=10**15, weights=10**14, **sizes)
    assert not large.is_ok and "3300000.0 GB for 3 checkpoints" in large.found  # 3 of each
    assert "checkpoint.max_to_keep" in large.mend
    assert check_clock().is_ok
    assert not check_clock(now=0.0).is_ok
