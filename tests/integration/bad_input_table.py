"""The table of bad inputs, one row each: what is damaged, the command, and the words that the one line must have.

The files that rows name are made by `bad_input_files.py` below the folder that the commands run in. Here are the
rows of `grpo_jax.train`, which the other commands share most checks with; theirs are in `bad_input_commands.py`.
"""

import dataclasses

import integration_helpers as helpers

DATA, MODELS = "inputs/data", "inputs/models"


@dataclasses.dataclass(frozen=True)
class Case:
    """A command that must be refused."""

    name: str
    """Says what is wrong."""
    module: str
    argv: list
    expected: tuple
    """What the line must contain: the key, the value, words of the rule."""
    needs_device: bool = False
    """It is noticed when devices have been looked at; for all others there is none."""
    writes: bool = False
    """It is noticed when the workdir is there, as a checkpoint in it is."""


def train(name, overrides, expected, *, extra=(), config=str(helpers.CONFIG), workdir="new", **facts):
    """A row of `grpo_jax.train`. Args: extra: arguments after the overrides."""
    files = [f"--config={config}"] if config else []
    argv = [*files, f"--workdir={workdir}", *helpers.flags(overrides), *extra]
    return Case(name, "grpo_jax.train", argv, expected, **facts)


def config_case(name, key, value, *rule, shown=None, also=()):
    """One key with a wrong value, wrong by itself or with `also`; `shown`: as the message quotes it."""
    overrides = {key: value} | dict(also)
    return train(name, overrides, (f"{key}={value!r}" if shown is None else f"{key}={shown}", *rule))


def file_case(name, config, *expected):
    return train(name, {}, ("--config=", *expected), config=f"inputs/configs/{config}")


def data_case(name, file, *expected, key="data.train_files"):
    """Training data that cannot be used; the other split is in order."""
    files = {"data.train_files": "good", "data.val_files": "good", key: file}
    paths = {k: repr((f"{DATA}/{name}.parquet",)) for k, name in files.items()}
    return train(name, {"arithmetic.num_train": 0, **paths}, (f"{key}='{DATA}/{file}.parquet'", *expected))


def model_case(name, *expected):
    """A model folder that cannot be used."""
    path = f"{MODELS}/{name}"
    return train(f"model-{name}", {"model.path": path}, ("model.path=", path, *expected))


def lora_case(name, key, value, *expected, shown=None, **section):
    """A key of adapters of rank 2 on q and v, as the folders of `bad_input_files.make_adapters` hold them."""
    lora = {"lora.rank": 2, "lora.alpha": 4.0, "lora.targets": "('q_proj','v_proj')"}
    also = lora | {"model.path": f"{MODELS}/good"} | {f"lora.{k}": v for k, v in section.items()}
    return config_case(f"lora-{name}", key, value, *expected, shown=shown, also=also | {key: value})


def adapter_case(name, *expected, **section):
    """A PEFT folder that cannot be used."""
    return lora_case(f"adapter-{name}", "lora.path", f"inputs/adapters/{name}", *expected, **section)


def reward_case(name, function, *expected):
    return config_case(name, "reward.function", f"inputs/rewards/{function}", *expected)


TRAIN = [
    # Keys
    train("unknown-key", {}, ("algorithm.grop_size", "no such key", "did you mean algorithm.group_size?"),
         extra=("--config.algorithm.grop_size=4",)),
    train("unknown-section", {}, ("algoritm.group_size", "no such key", "did you mean algorithm.group_size?"),
         extra=("--config.algoritm.group_size=4",)),
    train("unknown-flag", {}, ("--workdr", "elsewhere", "did you mean --workdir?"),
         extra=("--workdr=elsewhere",)),
    train("stray-argument", {}, ("stray", "neither a flag nor"), extra=("stray",)),
    train("flag-without-value", {}, ("trainer.seed", "value"), extra=("--config.trainer.seed",)),
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
    train("two-open-mesh-axes", {"mesh.data": -1, "mesh.fsdp": -1}, ("mesh=", "'fsdp': -1", "only one axis")),
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
    config_case("unknown-logger", "logging.loggers", "('console','swanlab')", "console, tensorboard",
                shown="'swanlab'"),
    config_case("negative-seed", "trainer.seed", -1, "at least 0"),
    # Adapters
    lora_case("rank-below-0", "lora.rank", -1, "at least 0"),
    lora_case("rank-beyond-the-width", "lora.rank", 33, "hidden_size=32"),
    lora_case("push-to-the-local-engine", "lora.push", "adapter", "is for rollout.engine=vllm"),
    *(
        config_case(f"lora-push-{name}", "lora.push", "adapter", rule,
                    also={"lora.rank": 2, "rollout.engine": "vllm", "lora.push": "adapter"} | also)
        for name, rule, also in (
            ("to-engines-that-sleep", "needs rollout.sleep=False", {"rollout.sleep": True}),
            ("with-a-server", "needs rollout.api_port=0", {"rollout.api_port": 8000}),
            ("of-a-rank-beyond-vllms", "ranks up to 512", {"lora.rank": 513}),
        )
    ),
    lora_case("no-targets", "lora.targets", "()", "at least one", shown="()"),
    lora_case("unknown-target", "lora.targets", "('q_poj',)", "matches no layer", "q_proj", shown="'q_poj'"),
    lora_case("tied-embedding", "lora.targets", "('embed_tokens',)", "get no adapter", shown="'embed_tokens'"),
    config_case("lora-rank-0-with-targets", "lora.targets", "('mlp',)", "nothing reads it with lora.rank=0",
                shown="('mlp',)"),
    config_case("lora-rank-0-with-a-folder", "lora.path", "x", "needs lora.rank above 0"),
    adapter_case("absent", "no such folder"),
    adapter_case("wider", "is of another model", "v_proj.lora_B.weight has shape [24, 2], not [16, 2]"),
    adapter_case("of-another-base", f"another base than {MODELS}/good"),
    adapter_case("dora", "use_dora=True"),
    adapter_case("with-a-model", "holds a model beside adapter_config.json"),
    lora_case("rank-of-another", "lora.rank", "4", "must be 2, as in the adapter_config.json",
              path="inputs/adapters/good"),
    lora_case("config-cut", "lora.path", "inputs/adapters/config-cut", "is not JSON",
              shown="'inputs/adapters/config-cut/adapter_config.json'"),
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
    train("no-config", {}, ("--config=''", "must name a configuration file"), config=""),
    file_case("config-missing", "absent.py", "absent.py", "no such file"),
    file_case("config-syntax-error", "syntax.py", "syntax.py", "cannot be loaded", "SyntaxError"),
    file_case("config-raises", "raises.py", "raises.py", "cannot be loaded", "ZeroDivisionError"),
    file_case("config-without-function", "empty.py", "empty.py", "get_config"),
    file_case("config-returns-a-dict", "plain.py", "plain.py", "ConfigDict"),
    train("config-extra-key", {}, ("algorithm.grop_size=4", "no such key", "did you mean algorithm.group_size?"),
         config="inputs/configs/extra_key.py"),
    train("config-extra-section", {}, ("algoritm", "no such section", "did you mean algorithm?"),
         config="inputs/configs/extra_section.py"),
    train("config-lacks-the-model", {}, ("model.path=''", "must be a Hugging Face folder"),
         config="inputs/configs/part.py"),
    train("config-lacks-the-data", {"model.path": "random"}, ("data.train_files=()", "at least one Parquet file"),
         config="inputs/configs/part.py"),
    train("config-section-is-a-value", {}, ("algorithm='grpo'", "must be a section"),
         config="inputs/configs/no_section.py"),
    train("config-builds-on-nothing", {}, ("--config=", "cannot be loaded", "FileNotFoundError", "absent.py"),
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
    train("too-many-problems", {"arithmetic.num_train": 10**6}, ("arithmetic.difficulty=1", "ask for fewer")),
    # Models
    model_case("absent", "no such folder", "hf download"),
    model_case("no-config", "config.json", "missing"),
    model_case("config-not-json", "config.json", "not JSON"),
    train("model-unknown-architecture", {"model.path": f"{MODELS}/unknown"},
         ("model.path=", "MambaForCausalLM", "Qwen2ForCausalLM")),
    model_case("no-weights", "model.safetensors", "missing"),
    model_case("no-tokenizer", "no tokenizer", "tokenizer.json"),
    model_case("large-tokenizer", "tokens, more than the model's vocab_size 290"),
    model_case("truncated", "model.safetensors", "cut short"),
    model_case("lacks-a-tensor", "model.norm.weight is missing"),
    model_case("misshapen", "model.embed_tokens.weight has shape [300, 32]", "[301, 32]"),
    train("model-beyond-its-positions", {"model.path": f"{MODELS}/short"},
         ("data.max_response_length=8", "makes 88 tokens with data.max_prompt_length=80",
          "max_position_embeddings=87", "model.allow_beyond_max_position=True")),
    train("dynamic-rope-beyond-its-window",
          {"model.path": f"{MODELS}/dynamic", "model.allow_beyond_max_position": True},
          ("data.max_response_length=8", "max_position_embeddings=87", "RoPE scaling ends there")),
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
    train("workdir-is-a-file", {}, ("--workdir='inputs/rewards/good.py'", "must be a folder"),
         extra=("--workdir=inputs/rewards/good.py",)),
    train("workdir-below-a-file", {}, ("--workdir=", "inputs/rewards/good.py"),
         extra=("--workdir=inputs/rewards/good.py/run",)),
    # Values that no run could be made of
    config_case("number-beyond-int32", "algorithm.group_size", 2**31, "must be below 2**31"),
    config_case("number-of-too-many-digits", "data.train_batch_size", "1" + "0" * 400, "must be below 2**31",
                shown="1000"),
    config_case("number-beyond-float32", "optim.learning_rate", 1e39, "float32 can hold", shown="1e+39"),
    config_case("whole-number-beyond-float", "optim.learning_rate", "9" * 400, "finite number", shown="inf"),
    config_case("weight-that-is-no-number", "reward.weights", "(float('nan'),)", "must be of type float",
                shown='"(float'),
    config_case("endless-weight", "reward.weights", "(1e999,)", "finite", shown="inf"),
    config_case("endless-timeout", "trainer.phase_timeout_s", 1e12, "from 0 to 1000000", shown="1000000000000.0"),
    config_case("positions-beyond-float32", "data.max_response_length", 2**24, "must be below 2**24"),
    config_case("parentheses-without-end", "rollout.stop_token_ids", "(" * 500, "of type int", shown="'((("),
    config_case("control-characters", "model.path", "a\x1b[31mb", "without control characters"),
    config_case("line-break-in-a-name", "logging.experiment_name", "a\nb", "without control characters"),
    config_case("name-of-no-file", "model.path", "x" * 300, "at most 255 bytes", shown="'xxx"),
    config_case("path-of-no-file", "model.path", "x/" * 3000, "at most 4095 bytes", shown="'x/x"),
    # Paths that lead out of outputs/ or a model's folder
    config_case("experiment-outside", "logging.experiment_name", "../../elsewhere", "below outputs", "no .."),
    config_case("project-outside", "logging.project_name", "/elsewhere", "below outputs"),
    train("model-index-outside", {"model.path": f"{MODELS}/index-outside"},
          (f"{MODELS}/index-outside/model.safetensors.index.json", "file of this folder")),
    # Contradictions
    config_case("old-weights-uncorrected", "rollout.max_lag", 1, "algorithm.rollout_is=token",
                also={"rollout.engine": "vllm"}),
    config_case("ahead-with-the-local-engine", "rollout.max_lag", 1, "must be 0 with rollout.engine=local",
                also={"algorithm.rollout_is": "token"}),
    config_case("weights-during-nothing", "rollout.update_weights", "during", "rollout.max_lag above 0",
                also={"rollout.engine": "vllm"}),
    config_case("sleep-on-other-gpus", "rollout.sleep", True, "rollout.placement=colocated",
                also={"rollout.engine": "vllm", "rollout.placement": "separate"}),
    config_case("nccl-on-one-gpu", "rollout.weight_sync", "nccl", "rollout.placement=separate",
                also={"rollout.engine": "vllm"}),
    config_case("weighed-twice", "algorithm.rollout_is", "token", "must be none",
                also={"algorithm.old_logprobs": "sampler"}),
    config_case("float16-parameters", "model.param_dtype", "bfloat16", "must be float32 with model.dtype=float16",
                also={"model.dtype": "float16"}),
    config_case("coarse-moments", "optim.moments_dtype", "bfloat16", "optim.beta2 of 0.99 or less"),
    config_case("buffer-beyond-the-limit", "reward.overlong_buffer", 9, "data.max_response_length=8"),
    config_case("target-without-reference", "algorithm.kl_target", 0.1, "algorithm.kl_coef above 0"),
    config_case("no-validation-problems", "arithmetic.num_val", 0, "above 0 where arithmetic.num_train is"),
    # The engine, on a machine without GPUs and without vLLM
    config_case("vllm-not-installed", "rollout.engine", "vllm", "vLLM is not installed", "rollout.engine=local"),
    config_case("no-interpreter", "rollout.python", "inputs/absent", "there is no such file",
                also={"rollout.engine": "vllm"}),
    config_case("interpreter-is-a-folder", "rollout.python", "inputs", "there is no such file",
                also={"rollout.engine": "vllm"}),
    config_case("engine-argument-without-value", "rollout.engine_args", "('max_num_seqs',)", "NAME=VALUE",
                shown="'max_num_seqs'", also={"rollout.engine": "vllm"}),
    config_case("engine-argument-of-ours", "rollout.engine_args", "('load_format=dummy',)",
                "set by grpo_jax itself", shown="'load_format=dummy'", also={"rollout.engine": "vllm"}),
    config_case("port-beyond-the-last", "rollout.api_port", 65536, "below 65536", also={"rollout.engine": "vllm"}),
    train("platform-that-jax-has-not", {}, ("JAX_PLATFORMS='no_such_platform'", "no such devices")),
    # More configuration files
    file_case("config-is-a-folder", "", "is a folder"),
    file_case("config-not-text", "binary.py", "binary.py", "cannot be loaded"),
    file_case("config-ends-python", "exits.py", "exits.py", "cannot be loaded", "SystemExit"),
    file_case("config-wants-more", "two_arguments.py", "cannot be loaded", "TypeError", "two_arguments.py"),
    file_case("config-without-end", "endless.py", "cannot be loaded", "RecursionError"),
    file_case("config-key-is-a-number", "number_key.py", "number_key.py", "has a key 3, which is no text"),
    file_case("config-keys-of-two-kinds", "mixed_keys.py", "mixed_keys.py", "has a key that is no text"),
    train("config-value-of-no-type", {}, ("data.train_files=", "must be a tuple of str"),
          config="inputs/configs/set_value.py"),
    train("config-numpy-number", {}, ("optim.learning_rate=", "must be of type float, is float32"),
          config="inputs/configs/numpy_value.py"),
    train("config-huge-whole-number", {}, ("optim.learning_rate=1000", "float32 can hold"),
          config="inputs/configs/huge_value.py"),
    # More data
    data_case("data-empty-file", "empty_file", "cannot be read as Parquet"),
    data_case("data-truncated", "truncated", "cannot be read as Parquet"),
    data_case("data-zeroed", "zeroed", "cannot be read as Parquet"),
    data_case("data-is-a-folder", "folder", "no such file"),
    data_case("data-no-columns", "no_columns", "no column"),
    data_case("data-prompt-is-a-number", "number_prompt", "row 0", "string or a list of chat messages"),
    data_case("data-role-is-null", "null_role", "row 1", "role must be a string, is None"),
    data_case("data-source-is-null", "null_source", "row 1", "data_source must be a string, is None"),
    data_case("data-answer-is-a-list", "list_answer", "row 0", "must be a string or a number"),
    data_case("data-answer-is-nan", "nan_answer", "row 0", "must be finite, is nan"),
    data_case("data-extra-is-a-number", "number_extra", "row 0", "extra_info must be a struct, is 5"),
    data_case("data-not-utf8", "not_utf8", "cannot be read", "utf-8"),
    train("data-gigantic-prompts", {"arithmetic.num_train": 0, **{k: repr((f"{DATA}/gigantic.parquet",))
          for k in ("data.train_files", "data.val_files")}},
          ("data.max_prompt_length=80", "leaves none of the 2 prompts of data.train_files")),
    train("data-refused-by-the-template", {"model.path": f"{MODELS}/template-refuses",
          "arithmetic.num_train": 13}, ("train", "the chat template refuses its messages", "no users here")),
    # More models
    model_case("with-an-adapter", "holds an adapter", "lora.path"),
    model_case("config-empty", "config.json", "not JSON"),
    model_case("config-a-list", "config.json", "not a JSON object"),
    model_case("config-a-folder", "config.json", "cannot be read"),
    model_case("config-nested", "config.json", "not JSON"),
    train("model-sizes-are-text", {"model.path": f"{MODELS}/text-size"},
          ("model.path=", "vocab_size='300'", "whole number")),
    train("model-no-heads", {"model.path": f"{MODELS}/no-heads"},
          ("model.path=", "num_attention_heads=0", "at least 1")),
    train("model-layers-without-end", {"model.path": f"{MODELS}/endless"},
          (f"{MODELS}/endless", "model.layers.1.", "is missing")),
    train("model-heads-do-not-divide", {"model.path": f"{MODELS}/odd-heads"},
          ("num_key_value_heads=3", "must divide num_attention_heads=2")),
    train("model-rope-is-text", {"model.path": f"{MODELS}/rope-text"}, ("rope_parameters='yarn'", "an object")),
    train("model-rope-unknown", {"model.path": f"{MODELS}/rope-unknown"}, ("rope_type=ntk", "longrope or llama3")),
    train("model-yarn-without-a-window", {"model.path": f"{MODELS}/yarn-without-a-window"},
          ("model.path='config.json'", "lacks original_max_position_embeddings")),
    train("model-switches-that-are-not-implemented", {"model.path": f"{MODELS}/switches"},
          ("hidden_act=relu, mlp_bias=True", "only hidden_act=silu, mlp_bias=False is implemented")),
    train("model-architectures-are-a-number", {"model.path": f"{MODELS}/architectures"},
          ("model.path=5", "Qwen2ForCausalLM")),
    model_case("index-missing-shard", "model-00002-of-00002.safetensors", "missing"),
    model_case("index-of-long-names", "cannot be read", "name too long"),
    model_case("index-of-nothing", "model.safetensors.index.json", "weight_map"),
    model_case("eos-is-text", "eos_token_id=['x']", "whole numbers"),
    model_case("weights-empty", "model.safetensors", "cut short at 0 bytes"),
    model_case("weights-a-pointer", "model.safetensors", "not a safetensors file"),
    model_case("weights-of-integers", "dtype I32", "F32"),
    model_case("tokenizer-damaged", "tokenizer cannot be loaded"),
    model_case("tokenizer-empty", "tokenizer cannot be loaded"),
    model_case("no-template", "no chat template"),
    # More rewards
    reward_case("reward-raises-on-import", "raises.py:score", "ZeroDivisionError", "raises.py:1"),
    reward_case("reward-exits-on-import", "exits.py:score", "SystemExit"),
    reward_case("reward-takes-no-arguments", "nothing.py:score", "called with data_source", "unexpected keyword"),
    reward_case("reward-wants-more", "more.py:score", "called with data_source", "missing", "'tokenizer'"),
    reward_case("reward-is-a-number", "number.py:score", "is not a function"),
    config_case("reward-of-no-module", "reward.function", "grpo_jax.nowhere", "FILE.py:NAME"),
    train("reward-twice", {"reward.extra_functions": "('gsm8k',)"},
          ("reward.extra_functions='gsm8k'", "another part of the reward")),
    # More workdirs
    train("workdir-has-a-file-for-a-folder", {}, ("--workdir=", "checkpoints in it must be a folder"),
          workdir="inputs/workdirs/file-for-folder"),
    train("workdir-has-a-folder-for-a-file", {}, ("--workdir=", "config.json in it must be a file"),
          workdir="inputs/workdirs/folder-for-file"),
    train("workdir-of-another-run", {"trainer.seed": 1}, ("trainer.seed=1", "has 0", "resume=force"),
          workdir="inputs/workdirs/begun"),
    train("workdir-config-cut", {}, ("--workdir=", "config.json that cannot be read", "resume=force"),
          workdir="inputs/workdirs/config-cut"),
    train("workdir-of-another-version", {}, ("--workdir=", "config.json that cannot be read", "algorithm.old_key"),
          workdir="inputs/workdirs/other-version"),
    train("workdir-beginning-of-no-form", {}, ("--workdir=", "beginning.json that cannot be read"),
          workdir="inputs/workdirs/beginning"),
    train("workdir-of-no-name", {}, ("--workdir=", "at most 255 bytes"), workdir="x" * 300),
    train("workdir-with-a-null-byte", {}, ("--workdir='a\\x00b'", "control characters"), workdir="a\0b"),
    train("other-arrays-though-forced", {"checkpoint.resume": "force", "optim.moments_dtype": "bfloat16",
          "optim.beta2": 0.99}, ("optim.moments_dtype='bfloat16'", "hold other arrays"),
          workdir="inputs/workdirs/begun"),
]  # fmt: skip

ON_DEVICES = [
    train("mesh-of-too-many", {"mesh.data": 3, "mesh.fsdp": -1}, ("mesh=", "8 device(s)"), needs_device=True),
    train("bfloat16-over-the-tensor-axis",  # XLA's compiler would end the process
          {"mesh.data": 4, "mesh.fsdp": 1, "mesh.tensor": 2, "model.dtype": "bfloat16"},
          ("model.dtype='bfloat16'", "needs mesh.tensor=1 on CPUs"), needs_device=True),
    train("kernel-of-other-devices", {"model.attention": "cudnn"},
          ("model.attention='cudnn'", "needs an NVIDIA GPU"), needs_device=True),
    train("workdir-that-cannot-be", {}, ("--workdir='/proc/nowhere'", "cannot be"), workdir="/proc/nowhere",
          needs_device=True),
    train("estimator-of-another-shape", {"algorithm.adv_estimator": "inputs/rewards/good.py:score"},
          ("algorithm.adv_estimator=", "fails", "TypeError"), needs_device=True),
    train("model-not-finite", {"model.path": f"{MODELS}/not-finite"},
          ("model.path=", f"{MODELS}/not-finite", "final_norm/scale", "not finite"), workdir="not-finite",
          needs_device=True, writes=True),
    train("checkpoint-cut", {}, ("no checkpoint is whole", "params/d/array has 5 bytes instead of"),
          workdir="inputs/workdirs/cut", needs_device=True, writes=True),
    train("checkpoint-without-progress", {}, ("no checkpoint is whole", "progress/metadata is missing"),
          workdir="inputs/workdirs/no-progress", needs_device=True, writes=True),
    train("checkpoint-of-a-broken-manifest", {}, ("no checkpoint is whole", "manifest.json cannot be read"),
          workdir="inputs/workdirs/broken-manifest", needs_device=True, writes=True),
    train("checkpoint-of-no-arrays", {}, ("checkpoint=", "does not hold the arrays"),
          workdir="inputs/workdirs/begun", needs_device=True, writes=True),
]  # fmt: skip
