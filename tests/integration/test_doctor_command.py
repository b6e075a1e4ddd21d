"""`python -m grpo_jax.doctor`: what it says of a configuration."""

import json
import re
import socket
import sys

import integration_helpers as helpers
import pytest

from grpo_jax import doctor
from grpo_jax.config import CheckpointSection, Config
from grpo_jax.config.command_line import config_parser, read_command_line
from grpo_jax.model.hf import inspect_folder
from grpo_jax.model.transformer import num_params
from grpo_jax.run.checks import check_clock, check_coordinator, check_disk, check_log, check_plugins

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
    # 4 bytes of each parameter, 8 of its moments, and 4 of the reference, in float32
    held = rows["a device holds between steps"]
    assert held == f"{16 * n / 1e6:.1f} MB (parameters, Adam's moments, reference)"
    assert "the host holds" not in rows
    on_host = {"optim.offload": True, "algorithm.ref_offload": True, "model.dtype": "bfloat16"}
    rows = run(tmp_path / "run", common | on_host)
    assert rows["a device holds between steps"] == f"{2 * n / 1e6:.1f} MB (parameters)"
    on_host = f"{14 * n / 1e6:.1f} MB (master parameters, Adam's moments, reference)"
    assert rows["the host holds"] == on_host


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


def test_packages_without_a_range_and_no_engine_to_try_leave_nothing_empty(monkeypatch):
    monkeypatch.setattr(doctor.importlib.metadata, "requires", lambda _: ["numpy"])
    result = helpers.call(doctor.main, [])
    assert f"  ok  numpy {doctor.importlib.metadata.version('numpy')}\n" in result.out
    assert not re.search(r"^Engine\n(?!  )", result.out, re.MULTILINE)


def test_an_engine_that_is_missing_and_the_workdir_of_another_run_leave_the_other_checks(
    tmp_path, model_folder, monkeypatch
):
    monkeypatch.setenv("PYTHONNOUSERSITE", "1")
    python = tmp_path / "python"  # an interpreter that has no vLLM
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    overrides = {"model.path": model_folder, "rollout.engine": "vllm", "rollout.python": python}
    argv = helpers.train_argv(tmp_path / "run", overrides)
    config, *_ = read_command_line(config_parser("doctor", ""), argv)
    held = config.to_dict()
    held["algorithm"]["group_size"] += 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(json.dumps(held))
    result = helpers.call(doctor.main, argv)
    assert result.code == 2 and result.err.startswith("error: algorithm.group_size=")
    assert result.err.count("\n") == 1
    wrong = [line for line in result.out.splitlines() if line.startswith("  BAD ")]
    assert len(wrong) == 2 and wrong[0].startswith("  BAD algorithm.group_size=")
    assert "BAD rollout" in wrong[1] and "vLLM" in wrong[1]
    for later in (
        "\n  ok  data train/0",
        "\n  completions per step ",
        "\n  one checkpoint ",
        "\n  ok  disk ",
    ):
        assert result.out.index(later) > result.out.index(wrong[1])
    report = json.loads(helpers.call(doctor.main, [*argv, "--json"]).out)
    bad = [check["name"] for check in report["checks"] if not check["is_ok"]]
    assert bad[0] == "algorithm.group_size" and len(bad) == 2 and "steps in all" in report["run"]


def test_the_free_disk_is_said_once(tmp_path, model_folder):
    argv = helpers.train_argv(tmp_path / "run", {"model.path": model_folder})
    assert helpers.call(doctor.main, argv).out.count(" free") == 1


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
    assert small.is_ok and "6.0 MB for 3 checkpoints" in small.found  # and 3 HF folders
    large = check_disk(config, checkpoint=10**15, weights=10**14, **sizes)
    assert not large.is_ok and "3300000.0 GB for 3 checkpoints" in large.found  # 3 of each
    assert "checkpoint.max_to_keep" in large.mend
    assert check_clock().is_ok
    assert not check_clock(now=0.0).is_ok


def test_a_log_is_read_and_what_mends_it_is_said(tmp_path):
    log = tmp_path / "pip.log"
    log.write_text("Collecting vllm\n  AssertionError: CUDA_HOME is not set\n")
    result = helpers.call(doctor.main, [f"--log={log}"])
    assert result.code == 2 and "pip builds vLLM from its source" in result.out
    mend = "pip install -U pip && pip install --only-binary=:all: 'vllm==0.25.1'"
    assert result.out.endswith(f"; mend it: {mend}\n")
    assert result.err.startswith(f"error: --log='{log}': ") and result.err.endswith(f"{mend}\n")
    (check,) = json.loads(helpers.call(doctor.main, [f"--log={log}", "--json"]).out)["checks"]
    assert not check["is_ok"] and check["mend"] == mend
    argv = [f"--log={log}", "--config=configs/gsm8k.py"]
    assert "goes with --json alone" in helpers.call(doctor.main, argv).err
    assert "--log LOG" in helpers.call(doctor.main, ["--help"]).out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"Successfully installed vllm-0.25.1\n", "has nothing in it that is known here"),
        (b" \n", "is empty"),
        (bytes(range(128, 256)), "has nothing in it that is known here"),
    ],
)
def test_a_log_that_says_nothing_known_is_not_called_ok(tmp_path, content, says):
    log = tmp_path / "some.log"
    log.write_bytes(content)
    result = helpers.call(doctor.main, [f"--log={log}"])
    assert (result.code, result.err) == (0, "")
    assert result.out == f"  ?   {log} {says}; see its last lines, and docs/troubleshooting.md\n"
    assert json.loads(helpers.call(doctor.main, [f"--log={log}", "--json"]).out)["ok"] is None


FAILED_RUN = """2026-11-27 20:00:00,000 INFO   Step 1/4: reward=0.1 [1.0s]
2026-11-27 20:00:01,000 ERROR phase reward failed
Traceback (most recent call last):
  File "pool.py", line 9, in score
    raise RewardError(text)
grpo_jax.rewards.base.RewardError: prompt train/21, completion 1: ZeroDivisionError
"""


def test_the_log_of_a_run_that_has_failed_says_its_last_error(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(FAILED_RUN)
    found = check_log(log)
    end = "phase reward: grpo_jax.rewards.base.RewardError: prompt train/21, completion 1: ZeroDivisionError"
    assert found.is_ok is False and found.found == f"is of a run that ended with: {end}"
    log.write_text(FAILED_RUN + "2026-11-27 20:10:00,000 INFO   Step 2/4: reward=0.2 [1.0s]\n")
    assert check_log(log).is_ok is None  # it has gone on since
    log.write_text("Epoch 1/1:\nerror: phase gen: engine 0 failed 3 time(s); there is no checkpoint yet\n")
    assert check_log(log).found.endswith("phase gen: engine 0 failed 3 time(s); there is no checkpoint yet")


def test_jaxs_plugin_beside_jaxlib_and_the_driver():
    def check(driver, **versions):
        found = {"jax-cuda12-plugin": "", "jax-cuda13-plugin": "", "jaxlib": "0.10.2"}
        return check_plugins(
            found | {f"jax-{name}-plugin": version for name, version in versions.items()}, driver
        )

    assert check("13.0", cuda13="0.10.2").is_ok and check("12.8", cuda12="0.10.2").is_ok
    assert check("13.0", cuda12="0.10.2").is_ok  # a newer driver runs an older CUDA
    assert check("13.0").mend == "pip install 'jax[cuda13]==0.10.2'"
    assert check("12.4").mend == "pip install 'jax[cuda12]==0.10.2'"
    other = check("13.0", cuda13="0.10.1")
    assert not other.is_ok and other.mend == "pip install 'jax[cuda13]==0.10.2'"
    uninstall = "pip uninstall -y jax-cuda13-plugin jax-cuda13-pjrt && pip install 'jax[cuda12]==0.10.2'"
    old = check("12.8", cuda13="0.10.2")
    assert not old.is_ok and old.mend == f"{uninstall}, or a driver of version 580 or newer"
    both = check("13.0", cuda12="0.10.2", cuda13="0.10.2")
    assert not both.is_ok and both.mend.startswith("pip uninstall -y jax-cuda12-plugin jax-cuda12-pjrt && ")


def test_the_first_of_several_processes_needs_its_port(monkeypatch):
    assert check_coordinator() is None
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"127.0.0.1:{port}")
        monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
        monkeypatch.setenv("JAX_PROCESS_ID", "1")
        assert check_coordinator() is None  # the first one listens
        monkeypatch.setenv("JAX_PROCESS_ID", "0")
        refused = check_coordinator()
        assert not refused.is_ok and refused.found == f"127.0.0.1:{port}: Address already in use"
        assert "JAX_COORDINATOR_ADDRESS" in refused.mend
    assert check_coordinator().is_ok
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", f"192.0.2.77:{port}")  # of no machine
    assert check_coordinator().found.startswith(f"192.0.2.77:{port}: Cannot assign")
