"""Whatever a user gets wrong: one line that names key, value and rule, exit code 2, nothing written, no device.

All cases run in one process whose JAX platform does not exist, so that touching a device would show as a
different error; two are started again as processes of their own.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import integration_helpers as helpers
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HERE = Path(__file__).parent
DATA, MODELS = "inputs/data", "inputs/models"  # below ROOT, where the cases run


@dataclasses.dataclass(frozen=True)
class Case:
    """What is wrong, and what the line about it must contain: the key, the value, words of the rule."""

    name: str
    overrides: dict
    expected: tuple
    extra: tuple = ()  # arguments after the overrides
    config: str = str(helpers.CONFIG)


def config_case(name, key, value, *rule, shown=None, also=()):
    """One key with a wrong value, wrong by itself or with `also`; `shown`: as the message quotes it."""
    overrides = {key: value} | dict(also)
    return Case(name, overrides, (f"{key}={value!r}" if shown is None else f"{key}={shown}", *rule))


def file_case(name, config, *expected):
    return Case(name, {}, ("--config=", *expected), config=f"inputs/configs/{config}")


def data_case(name, file, *expected, key="data.train_files"):
    """Training data that cannot be used; the other split is in order."""
    files = {"data.train_files": "good", "data.val_files": "good", key: file}
    paths = {k: repr((f"{DATA}/{name}.parquet",)) for k, name in files.items()}
    return Case(name, {"arithmetic.num_train": 0, **paths}, (f"{key}='{DATA}/{file}.parquet'", *expected))


def model_case(name, *expected):
    """A model folder that cannot be used."""
    path = f"{MODELS}/{name}"
    return Case(f"model-{name}", {"model.path": path}, ("model.path=", path, *expected))


CASES = [
    # Keys
    Case("unknown-key", {}, ("algorithm.grop_size", "no such key", "did you mean algorithm.group_size?"),
         extra=("--config.algorithm.grop_size=4",)),
    Case("unknown-section", {}, ("algoritm.group_size", "no such key", "did you mean algorithm.group_size?"),
         extra=("--config.algoritm.group_size=4",)),
    Case("unknown-flag", {}, ("--workdr", "elsewhere", "did you mean --workdir?"),
         extra=("--workdr=elsewhere",)),
    Case("stray-argument", {}, ("stray", "neither a flag nor"), extra=("stray",)),
    Case("flag-without-value", {}, ("trainer.seed", "value"), extra=("--config.trainer.seed",)),
    # Types
    config_case("int-from-word", "data.train_batch_size", "four", "must be a whole number"),
    config_case("int-from-float", "data.train_batch_size", "1.5", "must be a whole number"),
    config_case("bool-from-word", "data.shuffle", "perhaps", "must be True or False"),
    config_case("float-from-word", "optim.learning_rate", "fast", "must be a number"),
    config_case("tuple-of-words-for-ints", "rollout.stop_token_ids", "('a',)", "int", shown="'a'"),
    config_case("not-a-number", "optim.learning_rate", "nan", "finite", shown="nan"),
    # Rules
    config_case("no-choice", "algorithm.loss_agg", "token_mean", "must be one of", "did you mean token-mean?"),
    config_case("group-of-one", "algorithm.group_size", 1, "at least 2"),
    config_case("negative-learning-rate", "optim.learning_rate", -1e-6, "greater than 0"),
    config_case("zero-learning-rate", "optim.learning_rate", 0.0, "greater than 0"),
    config_case("no-batch", "data.train_batch_size", 0, "at least 1"),
    config_case("minibatches-do-not-divide", "actor.num_minibatches", 3, "must divide the 16 completions",
                "data.train_batch_size=4", "algorithm.group_size=4"),
    config_case("heads-do-not-divide", "random_model.num_kv_heads", 3, "must divide num_heads=2"),
    config_case("width-does-not-divide", "random_model.hidden_size", 33, "num_heads=2"),
    config_case("vocabulary-below-the-bytes", "random_model.vocab_size", 259, "at least 260"),
    config_case("mesh-axis-of-none", "mesh.tensor", 0, "at least 1, or -1"),
    Case("two-open-mesh-axes", {"mesh.data": -1, "mesh.fsdp": -1}, ("mesh=", "'fsdp': -1", "only one axis")),
    config_case("greedy-samples", "eval.num_samples", 4, "eval.temperature"),
    config_case("penalty-without-reference", "algorithm.kl_in", "reward", "algorithm.kl_coef above 0"),
    config_case("unknown-estimator", "algorithm.adv_estimator", "grpo_nostd", "did you mean grpo_no_std?"),
    config_case("estimator-file-missing", "algorithm.adv_estimator", "absent.py:f", "no file absent.py"),
    config_case("estimator-function-missing", "algorithm.adv_estimator", "inputs/rewards/good.py:scor",
                "did you mean score?"),
    config_case("dual-clip-of-one", "algorithm.dual_clip", 1.0, "above 1, or 0"),
    config_case("clip-low-of-one", "algorithm.clip_low", 1.0, "below 1"),
    config_case("gspo-by-token", "algorithm.loss_agg", "token-mean", "seq-mean-token-mean",
                "algorithm.policy_loss=gspo", also={"algorithm.policy_loss": "gspo"}),
    config_case("gspo-with-token-weights", "algorithm.rollout_is", "token", "use sequence",
                also={"algorithm.policy_loss": "gspo", "algorithm.loss_agg": "seq-mean-token-mean"}),
    config_case("reinforce-twice", "algorithm.policy_loss", "policy_gradient", "one update a step",
                also={"actor.num_epochs": 2}),
    config_case("straight-through-in-the-reward", "algorithm.kl_estimator", "k3+", "a reward has none",
                also={"algorithm.kl_in": "reward", "algorithm.kl_coef": 0.1}),
    config_case("refresh-without-reference", "algorithm.ref_refresh_every", 2, "algorithm.kl_coef above 0"),
    config_case("dynamic-sampling-uncorrected", "algorithm.dynamic_sampling_rounds", 2,
                "algorithm.rollout_is=token or algorithm.old_logprobs=sampler"),
    config_case("one-weight-for-two", "reward.weights", "(1.0,)", "each of the 2 reward functions",
                also={"reward.extra_functions": "('gsm8k_format',)"}, shown="(1.0,)"),
    config_case("unknown-extra-reward", "reward.extra_functions", "('gsm8k_formt',)",
                "did you mean gsm8k_format?", shown="'gsm8k_formt'"),
    config_case("unknown-logger", "logging.loggers", "('console','wandb')", "console, tensorboard",
                shown="'wandb'"),
    config_case("negative-seed", "trainer.seed", -1, "at least 0"),
    # Keys that nothing reads
    config_case("files-beside-generated-problems", "data.train_files", "a.parquet",
                "nothing reads it with arithmetic.num_train=13", shown="('a.parquet',)"),
    config_case("vllm-key-with-the-local-engine", "rollout.max_num_seqs", 8, "nothing reads it",
                "rollout.engine=local"),
    config_case("random-sizes-of-a-folder", "random_model.num_layers", 1, "nothing reads it",
                f"model.path={MODELS}/good", also={"model.path": f"{MODELS}/good"}),
    config_case("warm-start-without-one", "sft.batch_size", 8, "nothing reads it with sft.num_steps=0"),
    config_case("kl-without-reference", "algorithm.kl_estimator", "k2", "nothing reads it",
                "algorithm.kl_coef=0.0"),
    config_case("gate-of-another-loss", "algorithm.sapo_tau_positive", 2.0, "algorithm.policy_loss=clip"),
    config_case("workers-for-no-function", "reward.num_workers", 2, "nothing reads it with reward.function=gsm8k"),
    # Config files
    Case("no-config", {}, ("--config=''", "must name a configuration file"), config=""),
    file_case("config-missing", "absent.py", "absent.py", "no such file"),
    file_case("config-syntax-error", "syntax.py", "syntax.py", "cannot be loaded", "SyntaxError"),
    file_case("config-raises", "raises.py", "raises.py", "cannot be loaded", "ZeroDivisionError"),
    file_case("config-without-function", "empty.py", "empty.py", "get_config"),
    file_case("config-returns-a-dict", "plain.py", "plain.py", "ConfigDict"),
    Case("config-extra-key", {}, ("algorithm.grop_size=4", "no such key", "did you mean algorithm.group_size?"),
         config="inputs/configs/extra_key.py"),
    Case("config-extra-section", {}, ("algoritm", "no such section", "did you mean algorithm?"),
         config="inputs/configs/extra_section.py"),
    Case("config-lacks-the-model", {}, ("model.path=''", "must be a Hugging Face folder"),
         config="inputs/configs/part.py"),
    Case("config-lacks-the-data", {"model.path": "random"}, ("data.train_files=()", "at least one Parquet file"),
         config="inputs/configs/part.py"),
    Case("config-section-is-a-value", {}, ("algorithm='grpo'", "must be a section"),
         config="inputs/configs/no_section.py"),
    Case("config-builds-on-nothing", {}, ("--config=", "cannot be loaded", "FileNotFoundError", "absent.py"),
         config="inputs/configs/derived.py"),
    file_case("config-unknown-variant", "gsm8k.py:smoky", "gsm8k.py:smoky", "'smoke'"),
    # Data
    data_case("data-missing", "absent", "no such file"),
    data_case("data-missing-validation", "absent", "no such file", key="data.val_files"),
    data_case("data-not-parquet", "text", "cannot be read as Parquet"),
    *(data_case(f"data-without-{c}", f"without_{c}", "no column", c)
      for c in ("data_source", "prompt", "reward_model")),
    data_case("data-without-ground-truth", "without_ground_truth", "ground_truth"),
    data_case("data-empty-prompt", "empty_prompt", "row 1", "prompt is empty"),
    data_case("data-empty-messages", "empty_messages", "row 1", "prompt is empty"),
    data_case("data-null-answer", "null_answer", "row 1", "ground_truth is empty"),
    data_case("data-no-rows", "no_rows", "no rows"),
    config_case("no-prompt-left", "data.max_prompt_length", 3, "none of the 13 prompts of data.train_files"),
    config_case("batch-above-prompts", "data.train_batch_size", 14, "number of training prompts, 13"),
    Case("too-many-problems", {"arithmetic.num_train": 10**6}, ("arithmetic.difficulty=1", "ask for fewer")),
    # Models
    model_case("absent", "no such folder", "hf download"),
    model_case("no-config", "config.json", "missing"),
    model_case("config-not-json", "config.json", "not JSON"),
    Case("model-unknown-architecture", {"model.path": f"{MODELS}/unknown"},
         ("model.path=", "MambaForCausalLM", "Qwen2ForCausalLM")),
    model_case("no-weights", "model.safetensors", "missing"),
    model_case("no-tokenizer", "no tokenizer", "tokenizer.json"),
    model_case("large-tokenizer", "tokens, more than the model's vocab_size 290"),
    model_case("truncated", "model.safetensors", "cut short"),
    model_case("lacks-a-tensor", "model.norm.weight is missing"),
    model_case("misshapen", "model.embed_tokens.weight has shape [300, 32]", "[301, 32]"),
    Case("model-beyond-its-positions", {"model.path": f"{MODELS}/short"},
         ("data.max_response_length=8", "makes 88 tokens with data.max_prompt_length=80",
          "max_position_embeddings=87", "model.allow_beyond_max_position=True")),
    config_case("random-model-beyond-its-positions", "data.max_response_length", 4017,
                "makes 4097 tokens", "max_position_embeddings=4096"),
    config_case("stop-id-beyond-the-vocabulary", "rollout.stop_token_ids", "(3,300)", "from 0 to 299",
                "vocab_size is 300", shown="300"),
    config_case("stop-id-below-zero", "rollout.stop_token_ids", "(-1,)", "from 0 to 299", shown="-1",
                also={"model.path": f"{MODELS}/good"}),
    # Rewards
    config_case("unknown-reward", "reward.function", "gsm8kk", "did you mean gsm8k?"),
    config_case("reward-file-missing", "reward.function", "inputs/rewards/absent.py:score", "no file"),
    config_case("reward-function-missing", "reward.function", "inputs/rewards/good.py:scor",
                "did you mean score?"),
    config_case("reward-syntax-error", "reward.function", "inputs/rewards/syntax.py:score", "SyntaxError"),
    config_case("reward-without-function", "reward.function", "inputs/rewards/good.py", "FILE.py:NAME"),
    # The folder
    Case("workdir-is-a-file", {}, ("--workdir='inputs/rewards/good.py'", "must be a folder"),
         extra=("--workdir=inputs/rewards/good.py",)),
    Case("workdir-below-a-file", {}, ("--workdir=", "inputs/rewards/good.py"),
         extra=("--workdir=inputs/rewards/good.py/run",)),
]  # fmt: skip

OTHERS = {  # name: (module, arguments, parts of the line)
    "sft-without-steps": (
        "grpo_jax.sft", helpers.train_argv("new"), ("sft.num_steps=0", "above 0"),
    ),
    "sft-without-answers": (
        "grpo_jax.sft",
        helpers.train_argv("new", {
            "sft.num_steps": 1, "arithmetic.num_train": 0,
            **{f"{key}_files": repr((f"{DATA}/good.parquet",)) for key in ("data.train", "data.val", "sft.train")},
        }),
        ("sft.train_files", "good/0", "extra_info.answer"),
    ),
    "evaluate-misspelt-flag": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--temprature=1"],
        ("--temprature", "did you mean --temperature?"),
    ),
    "evaluate-no-model": ("grpo_jax.evaluate", [f"--data={DATA}/good.parquet"], ("--model",)),
    "evaluate-wrong-type": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--num=few"],
        ("--num", "few"),
    ),
    "evaluate-greedy-samples": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--num_samples=4"],
        ("--num_samples=4", "--temperature above 0"),
    ),
    "evaluate-negative-temperature": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--temperature=-1"],
        ("--temperature=-1.0", "at least 0"),
    ),
    "evaluate-no-samples": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--num_samples=0"],
        ("--num_samples=0", "at least 1"),
    ),
    "evaluate-nowhere-to-write": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--json=no/such/out.json"],
        ("--json='no/such/out.json'", "folder"),
    ),
    "evaluate-unknown-engine": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--engine=lokal"],
        ("--engine", "lokal", "local"),
    ),
    "evaluate-data-missing": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/absent.parquet"],
        (f"--data='{DATA}/absent.parquet'", "no such file"),
    ),
    "evaluate-model-missing": (
        "grpo_jax.evaluate", [f"--model={MODELS}/absent", f"--data={DATA}/good.parquet"],
        (f"{MODELS}/absent", "no such folder"),
    ),
    "evaluate-beyond-the-positions": (
        "grpo_jax.evaluate",
        [f"--model={MODELS}/short", f"--data={DATA}/good.parquet", "--max_response_length=80"],
        ("--max_response_length=80", "with longest prompt=", "max_position_embeddings=87",
         "--allow_beyond_max_position"),
    ),
    "evaluate-large-tokenizer": (
        "grpo_jax.evaluate", [f"--model={MODELS}/large-tokenizer", f"--data={DATA}/good.parquet"],
        (f"{MODELS}/large-tokenizer", "vocab_size 290"),
    ),
    "evaluate-unknown-reward": (
        "grpo_jax.evaluate", [f"--model={MODELS}/good", f"--data={DATA}/good.parquet", "--reward=gsm8kk"],
        ("gsm8kk", "did you mean gsm8k?"),
    ),
    "export-no-checkpoint": (
        "grpo_jax.export", [f"--checkpoint={DATA}", "--output=new"], (f"--checkpoint='{DATA}'", "no checkpoint"),
    ),
    "export-no-folder": (
        "grpo_jax.export", ["--checkpoint=nowhere", "--output=new"], ("--checkpoint='nowhere'", "no checkpoint"),
    ),
    "export-output-exists": (
        "grpo_jax.export", [f"--checkpoint={DATA}", f"--output={MODELS}/good"],
        (f"--output='{MODELS}/good'", "exists"),
    ),
    "export-misspelt-flag": (
        "grpo_jax.export", ["--checkpont=x", "--output=new"], ("--checkpont", "did you mean --checkpoint?"),
    ),
}  # fmt: skip


def make_data(folder):
    folder.mkdir(parents=True)

    def row(**changes):
        prompt = [{"role": "user", "content": "What is 2 + 3?"}]
        good = {"data_source": "d", "prompt": prompt, "reward_model": {"style": "rule", "ground_truth": "5"}}
        return {key: value for key, value in (good | changes).items() if value is not None}

    def write(name, rows, schema=None):
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / f"{name}.parquet")

    write("good", [row()] * 6)
    for column in ("data_source", "prompt", "reward_model"):
        write(f"without_{column}", [row(**{column: None})] * 6)
    write("without_ground_truth", [row(reward_model={"style": "rule"})] * 6)
    write("empty_prompt", [row(prompt="What is 2 + 3?"), row(prompt=" \n")])
    write("empty_messages", [row(), row(prompt=[])])
    write("null_answer", [row(), row(reward_model={"style": "rule", "ground_truth": None})])
    write("no_rows", [], pa.Table.from_pylist([row()]).schema)
    (folder / "text.parquet").write_text("data_source,prompt,reward_model\n")


def make_models(folder, good):
    from safetensors.numpy import load_file, save_file

    def copy(name, **changes):
        shutil.copytree(good, folder / name)
        config = json.loads((good / "config.json").read_text()) | changes
        (folder / name / "config.json").write_text(json.dumps(config))
        return folder / name

    copy("good")
    (copy("no-config") / "config.json").unlink()
    (copy("config-not-json") / "config.json").write_text("{'vocab_size': 300}")
    copy("short", max_position_embeddings=87)
    copy("unknown", architectures=["MambaForCausalLM"])
    (copy("no-weights") / "model.safetensors").unlink()
    for file in copy("no-tokenizer").glob("tokenizer*"):
        file.unlink()
    weights = load_file(good / "model.safetensors")
    save_file(
        weights | {"model.embed_tokens.weight": weights["model.embed_tokens.weight"][:290]},
        copy("large-tokenizer", vocab_size=290) / "model.safetensors",
    )
    truncated = copy("truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-100])
    name = "model.norm.weight"
    save_file({k: v for k, v in weights.items() if k != name}, copy("lacks-a-tensor") / "model.safetensors")
    copy("misshapen", vocab_size=301)


def make_configs(folder):
    folder.mkdir(parents=True)
    shutil.copy(helpers.ROOT / "configs" / "gsm8k.py", folder / "gsm8k.py")
    (folder / "syntax.py").write_text("def get_config(:\n")
    (folder / "raises.py").write_text("def get_config():\n    return 1 / 0\n")
    (folder / "empty.py").write_text("")
    (folder / "plain.py").write_text("def get_config():\n    return {}\n")
    load = "import runpy\n\ndef get_config():\n"
    load += f"    config = runpy.run_path({str(helpers.CONFIG)!r})['get_config']()\n"
    load += "    with config.unlocked():\n        {}\n    return config\n"
    (folder / "extra_key.py").write_text(load.format("config.algorithm.grop_size = 4"))
    (folder / "extra_section.py").write_text(load.format("config.algoritm = {'group_size': 4}"))
    part = "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({})\n"
    (folder / "part.py").write_text(part.format("{'trainer': {'num_steps': 1}}"))
    (folder / "no_section.py").write_text(part.format("{'algorithm': 'grpo'}"))
    derived = (
        "from grpo_jax.config import load_config\n\ndef get_config():\n    return load_config('absent.py')\n"
    )
    (folder / "derived.py").write_text(derived)


def command(case):
    """Module and arguments of a case."""
    config = [f"--config={case.config}"] if case.config else []
    return "grpo_jax.train", [*config, "--workdir=new", *helpers.flags(case.overrides), *case.extra]


COMMANDS = {case.name: command(case) for case in CASES} | {
    name: (module, argv) for name, (module, argv, _) in OTHERS.items()
}
EXPECTED = {case.name: case.expected for case in CASES} | {
    name: parts for name, (*_, parts) in OTHERS.items()
}


@pytest.fixture(scope="module")
def root(tmp_path_factory, model_folder):
    """The folder that the cases run in; all paths above are relative to it."""
    root = tmp_path_factory.mktemp("bad_input")
    make_data(root / DATA)
    make_models(root / MODELS, model_folder)
    make_configs(root / "inputs/configs")
    rewards = root / "inputs/rewards"
    rewards.mkdir()
    (rewards / "good.py").write_text(helpers.REWARD_FILE)
    (rewards / "syntax.py").write_text("def score(:\n")
    return root


NO_DEVICE = {"JAX_PLATFORMS": "no_such_platform"}


@pytest.fixture(scope="module")
def results(root):
    finished = subprocess.run(
        [sys.executable, str(HERE / "bad_input_runner.py"), "."],
        input=json.dumps(COMMANDS),
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | NO_DEVICE,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_exit_code_2_and_nothing_written(name, results):
    result = results[name]
    err = result["err"]
    assert result["code"] == 2, err
    assert err.startswith("error: ") and err.endswith("\n") and err.count("\n") == 1, err
    for part in EXPECTED[name]:
        assert part in err
    assert result["unchanged"]


@pytest.mark.parametrize("name", ["model-truncated", "evaluate-misspelt-flag"])
def test_so_it_is_for_a_process(name, root):
    before = helpers.tree_digest(root)
    module, argv = COMMANDS[name]
    finished = subprocess.run(
        [sys.executable, "-m", module, *argv],
        capture_output=True,
        text=True,
        cwd=root,
        env=os.environ | NO_DEVICE,
    )
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and finished.stderr.count("\n") == 1, finished.stderr
    assert all(part in finished.stderr for part in EXPECTED[name])
    assert helpers.tree_digest(root) == before


def test_a_mesh_that_this_machine_has_no_devices_for(tmp_path):
    result = helpers.run_train(tmp_path / "run", {"mesh.data": 3, "mesh.fsdp": -1})
    assert result.code == 2
    assert result.err.count("\n") == 1 and "mesh=" in result.err and "8 device(s)" in result.err
    assert not (tmp_path / "run").exists()


def test_bfloat16_split_over_the_tensor_axis_of_cpus_is_refused(tmp_path):
    """XLA's compiler would end the process. Devices have to be looked at, hence not among the cases above."""
    split = {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 2}
    result = helpers.run_train(tmp_path / "run", split | {"model.dtype": "bfloat16"})
    assert result.code == 2
    assert result.err.startswith("error: model.dtype='bfloat16': needs mesh.tensor=1 on CPUs")
    assert result.err.count("\n") == 1 and not (tmp_path / "run").exists()
