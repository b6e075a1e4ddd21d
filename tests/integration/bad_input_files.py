"""Makes the files that the rows of `bad_input_table.py` name: each is in order but for one thing."""

import json
import shutil

import integration_helpers as helpers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file, save_file

from grpo_jax.config import parse_config
from grpo_jax.config.command_line import load_config
from grpo_jax.storage.manifest import write_manifest


def make_all(folder, model):
    """Fills FOLDER. Args: model: a Hugging Face folder in order."""
    make_data(folder / "data")
    make_models(folder / "models", model)
    make_adapters(folder / "adapters", folder / "models")
    make_configs(folder / "configs")
    make_rewards(folder / "rewards")
    make_workdirs(folder / "workdirs", model)
    make_sources(folder / "sources")


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
    (folder / "empty_file.parquet").write_bytes(b"")
    whole = (folder / "good.parquet").read_bytes()
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "zeroed.parquet").write_bytes(whole[:4] + bytes(len(whole) - 8) + whole[-4:])
    (folder / "folder.parquet").mkdir()
    pq.write_table(pa.table({}), folder / "no_columns.parquet")
    write("number_prompt", [row(prompt=5)])
    write("null_role", [row(), row(prompt=[{"role": None, "content": "a"}])])
    write("null_source", [row(), {"prompt": row()["prompt"], "reward_model": row()["reward_model"]}])
    write("list_answer", [row(reward_model={"ground_truth": ["5"]})])
    write("nan_answer", [row(reward_model={"ground_truth": float("nan")})])
    write("number_extra", [row(extra_info=5)])
    write("gigantic", [row(prompt="What is 2 + 3? " * 20_000)] * 2)
    broken = pa.array([b"\xff"] * 2, pa.binary()).view(pa.string())
    table = pa.Table.from_pylist([row()] * 2)
    pq.write_table(table.set_column(0, "data_source", broken), folder / "not_utf8.parquet")


def make_models(folder, good):
    def copy(name, *, exist=False, **changes):
        if exist:
            return folder / name
        shutil.copytree(good, folder / name)
        config = json.loads((good / "config.json").read_text()) | changes
        (folder / name / "config.json").write_text(json.dumps(config))
        return folder / name

    copy("good")
    (copy("no-config") / "config.json").unlink()
    (copy("config-not-json") / "config.json").write_text("{'vocab_size': 300}")
    copy("short", max_position_embeddings=87)
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    copy("dynamic", max_position_embeddings=87, rope_parameters=dynamic)
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
    make_configs_of_models(copy)
    make_weights(copy, weights)
    make_tokenizers(copy)


def make_adapters(folder, models):
    """PEFT folders of rank 2 on q and v of the model of one layer, width 32, with one head of 16 for values."""

    def make(name, *, width=16, **changes):
        (folder / name).mkdir(parents=True)
        content = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}
        (folder / name / "adapter_config.json").write_text(json.dumps(content | changes))
        tensors = {}
        for module, outputs in (("q_proj", 32), ("v_proj", width)):
            begin = f"base_model.model.model.layers.0.self_attn.{module}"
            tensors[f"{begin}.lora_A.weight"] = np.ones((2, 32), np.float32)
            tensors[f"{begin}.lora_B.weight"] = np.zeros((outputs, 2), np.float32)
        save_file(tensors, folder / name / "adapter_model.safetensors")
        return folder / name

    make("good")
    make("wider", width=24)
    make("dora", use_dora=True)
    write_manifest(make("of-another-base"), {"base_fingerprint": "0"})
    (make("config-cut") / "adapter_config.json").write_text("{")
    (make("with-a-model") / "config.json").write_text("{}")
    shutil.copytree(models / "good", models / "with-an-adapter")
    shutil.copy(folder / "good" / "adapter_config.json", models / "with-an-adapter")


def make_configs_of_models(copy):
    contents = {"config-empty": "", "config-a-list": "[]", "config-nested": "[" * 100_000}
    for name, content in contents.items():
        (copy(name) / "config.json").write_text(content)
    (copy("config-a-folder") / "config.json").unlink()
    (copy("config-a-folder", exist=True) / "config.json").mkdir()
    copy("text-size", vocab_size="300")
    copy("no-heads", num_attention_heads=0)
    copy("endless", num_hidden_layers=2**31 - 1)
    copy("odd-heads", num_key_value_heads=3)
    copy("rope-text", rope_parameters="yarn")
    copy("rope-unknown", rope_parameters={"rope_type": "ntk"})
    copy("yarn-without-a-window", rope_parameters={"rope_type": "yarn", "factor": 4.0})
    copy("switches", mlp_bias=True, hidden_act="relu")
    copy("architectures", architectures=5)
    copy("eos-is-text", eos_token_id=["x"])
    (copy("eos-is-text", exist=True) / "generation_config.json").unlink(missing_ok=True)
    for name, shards in {
        "index-missing-shard": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"},
        "index-outside": {"a": "../good/model.safetensors"},
        "index-of-long-names": {"a": "a" * 300},
        "index-of-nothing": None,
    }.items():
        content = {} if shards is None else {"weight_map": shards}
        (copy(name) / "model.safetensors.index.json").write_text(json.dumps(content))


def make_weights(copy, weights):
    (copy("weights-empty") / "model.safetensors").write_bytes(b"")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (copy("weights-a-pointer") / "model.safetensors").write_text(pointer)
    whole = {name: np.zeros(value.shape, np.int32) for name, value in weights.items()}
    save_file(whole, copy("weights-of-integers") / "model.safetensors")
    broken = weights["model.norm.weight"].copy()
    broken[3] = np.nan
    (folder := copy("not-finite")).joinpath("manifest.json").unlink(missing_ok=True)
    save_file(weights | {"model.norm.weight": broken}, folder / "model.safetensors")
    (folder := copy("checksum")).joinpath("manifest.json").unlink(missing_ok=True)
    write_manifest(folder, {})
    other = weights | {"model.norm.weight": np.full_like(broken, 2)}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})  # of the same size


def make_tokenizers(copy):
    file = copy("tokenizer-damaged") / "tokenizer.json"
    file.write_text(file.read_text()[:500])
    (copy("tokenizer-empty") / "tokenizer.json").write_text("")
    refuses = "{{ raise_exception('no users here') }}"
    for name, template in {"no-template": None, "template-refuses": refuses}.items():
        folder = copy(name)
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        content = json.loads((folder / "tokenizer_config.json").read_text())
        content.pop("chat_template", None)
        (folder / "tokenizer_config.json").write_text(json.dumps(content))
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)


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
    (folder / "binary.py").write_bytes(b"\x80\0\xff")
    (folder / "exits.py").write_text("raise SystemExit(0)\n")
    (folder / "two_arguments.py").write_text("def get_config(a, b):\n    return a\n")
    (folder / "endless.py").write_text("def get_config():\n    return get_config()\n")
    (folder / "number_key.py").write_text(part.format("{'trainer': {3: 1}}"))
    (folder / "mixed_keys.py").write_text(part.format("{'trainer': {3: 1, 'seed': 0}}"))
    (folder / "set_value.py").write_text(part.format("{'data': {'train_files': {'a'}}}"))
    (folder / "huge_value.py").write_text(part.format("{'optim': {'learning_rate': 10**400}}"))
    (folder / "numpy_value.py").write_text(
        "import numpy\n" + part.format("{'optim': {'learning_rate': numpy.float32(1e-6)}}")
    )


def make_rewards(folder):
    folder.mkdir()
    takes = "def score({}):\n    return 0.0\n".format
    contents = {
        "good": helpers.REWARD_FILE,
        "syntax": "def score(:\n",
        "raises": "1 / 0\n",
        "exits": "raise SystemExit(3)\n",
        "nothing": takes(""),
        "more": takes("data_source, solution_str, ground_truth, extra_info, tokenizer"),
        "number": "score = 3\n",
    }
    for name, content in contents.items():
        (folder / f"{name}.py").write_text(content)


def make_workdirs(folder, model):
    """Runs' folders after four steps, whose checkpoints have the files of Orbax's and hold no arrays."""
    config = load_config(helpers.CONFIG)
    held = parse_config(config.to_dict()).to_dict()

    def begun(name):
        step = folder / name / "checkpoints" / "4"
        for file in ("params/d/array", "params/_METADATA", "optimizer/d/array", "progress/metadata"):
            (step / file).parent.mkdir(parents=True, exist_ok=True)
            (step / file).write_text(json.dumps({"global_step": 4, "has_manifest": True}))
        (folder / name / "config.json").write_text(json.dumps(held))
        shutil.copytree(model, folder / name / "model_files")
        write_manifest(step, {"epoch": None, "metrics": {}})
        return folder / name, step

    begun("begun")
    begun("cut")[1].joinpath("params/d/array").write_text("short")
    begun("no-progress")[1].joinpath("progress/metadata").unlink()
    begun("broken-manifest")[1].joinpath("manifest.json").write_text("{")
    begun("no-config")[0].joinpath("config.json").unlink()
    begun("config-cut")[0].joinpath("config.json").write_text('{"model": ')
    other = held | {"algorithm": held["algorithm"] | {"old_key": 1}}
    begun("other-version")[0].joinpath("config.json").write_text(json.dumps(other))
    begun("beginning")[0].joinpath("beginning.json").write_text("[]")
    begun("no-model-files")[0].joinpath("model_files/config.json").unlink()
    begun("model-config-cut")[0].joinpath("model_files/config.json").write_text("{")
    (folder / "tuned" / "sft-model").mkdir(parents=True)
    (folder / "file-for-folder").mkdir()
    (folder / "file-for-folder" / "checkpoints").write_text("")
    (folder / "folder-for-file" / "config.json").mkdir(parents=True)


def make_sources(folder):
    """GSM8K's original files."""
    good = {"question": "Ann has 2 + 3. How many?", "answer": "2+3=<<2+3=5>>5, 5-1=<<5-1=4>>4 #### 4"}
    line = json.dumps(good) + "\n"
    trains = {
        "good": line,
        "no-test": line,
        "cut": line + line[:20],
        "nested": "[" * 100_000,
        "surrogate": json.dumps(good | {"question": "\ud800"}),
        "no-answer": json.dumps({"question": "a"}),
        "no-number": json.dumps(good | {"answer": "four"}),
        "empty": "\n",
    }
    for name, train in trains.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "train.jsonl").write_text(train)
        if name != "no-test":
            (folder / name / "test.jsonl").write_text(line)
    (folder / "parquet" / "main").mkdir(parents=True)
    for split in ("train", "test"):
        (folder / "parquet" / "main" / f"{split}-00000-of-00001.parquet").write_bytes(b"PAR1")
