"""The table of bad inputs goes on: rows of the commands beside `grpo_jax.train`."""

import integration_helpers as helpers
from bad_input_table import DATA, MODELS, ON_DEVICES, TRAIN, Case

GOOD = [f"--model={MODELS}/good", f"--data={DATA}/good.parquet"]
WORKDIRS = "inputs/workdirs"


def evaluate(name, argv, *expected, **facts):
    return Case(f"evaluate-{name}", "grpo_jax.evaluate", argv, expected, **facts)


def export(name, argv, *expected, **facts):
    return Case(f"export-{name}", "grpo_jax.export", argv, expected, **facts)


def sft(name, overrides, *expected, workdir="new", **facts):
    argv = helpers.train_argv(workdir, {"sft.num_steps": 1} | overrides)
    return Case(f"sft-{name}", "grpo_jax.sft", argv, expected, **facts)


def doctor(name, overrides, *expected, workdir="new", extra=(), **facts):
    argv = [*helpers.train_argv(workdir, overrides), *extra]
    return Case(f"doctor-{name}", "grpo_jax.doctor", argv, expected, **facts)


def plan(name, overrides, *expected, device="h100", extra=()):
    argv = [*helpers.train_argv("new", overrides), f"--device={device}", *extra]
    return Case(f"plan-{name}", "grpo_jax.plan", argv, expected)


def mismatch(name, overrides, *expected, workdir="new", extra=()):
    argv = [*helpers.train_argv(workdir, {"model.path": f"{MODELS}/good"} | overrides), *extra]
    return Case(f"mismatch-{name}", "grpo_jax.mismatch", argv, expected)


def gsm8k(name, argv, *expected):
    return Case(f"gsm8k-{name}", "grpo_jax.data.gsm8k", argv, expected)


def arithmetic(name, argv, *expected):
    return Case(f"arithmetic-{name}", "grpo_jax.data.arithmetic", argv, expected)


def jsonl(name, argv, *expected):
    return Case(f"jsonl-{name}", "grpo_jax.data.jsonl", argv, expected)


def fetch(name, argv, *expected):
    return Case(f"fetch-{name}", "grpo_jax.fetch", argv, expected)


def source(name):
    """Flags of GSM8K from a folder of `bad_input_files.make_sources`."""
    return ["--local_dir=new", f"--source=inputs/sources/{name}"]


FILES = {
    key: repr((f"{DATA}/good.parquet",)) for key in ("data.train_files", "data.val_files", "sft.train_files")
}

OTHERS = [
    # evaluate
    evaluate("misspelt-flag", [*GOOD, "--temprature=1"], "--temprature", "did you mean --temperature?"),
    evaluate("no-model", GOOD[1:], "--model"),
    evaluate("template-args", [*GOOD, "--chat_template_args", "enable=1"],
             "--chat_template_args='enable=1'", "reads no enable"),
    evaluate("wrong-type", [*GOOD, "--num=few"], "--num", "few"),
    evaluate("greedy-samples", [*GOOD, "--num_samples=4"], "--num_samples=4", "--temperature above 0"),
    evaluate("negative-temperature", [*GOOD, "--temperature=-1"], "--temperature=-1.0", "at least 0"),
    evaluate("endless-temperature", [*GOOD, "--temperature=inf"], "--temperature=inf", "finite"),
    evaluate("no-samples", [*GOOD, "--num_samples=0"], "--num_samples=0", "at least 1"),
    evaluate("response-beyond-float32", [*GOOD, "--max_response_length=16777216"], "below 2**24"),
    evaluate("batch-beyond-int32", [*GOOD, "--batch_size=9999999999"], "--batch_size=9999999999", "below 2**31"),
    evaluate("seed-beyond-int32", [*GOOD, "--seed=4294967296"], "--seed=4294967296", "below 2**31"),
    evaluate("more-than-a-gpu", [*GOOD, "--gpu_memory_utilization=7"], "--gpu_memory_utilization=7.0", "below 1"),
    evaluate("on-no-gpus", [*GOOD, "--tensor_parallel_size=0"], "--tensor_parallel_size=0", "at least 1"),
    evaluate("nowhere-to-write", [*GOOD, "--json=no/such/out.json"], "--json='no/such/out.json'", "folder"),
    evaluate("json-is-a-folder", [*GOOD, "--json=inputs"], "--json='inputs'", "is a folder"),
    evaluate("json-of-no-name", [*GOOD, f"--json={'x' * 300}"], "--json=", "at most 255 bytes"),
    evaluate("unknown-engine", [*GOOD, "--engine=lokal"], "--engine", "lokal", "local"),
    evaluate("vllm-not-installed", [*GOOD, "--engine=vllm"], "--engine='vllm'", "not installed",
             "interpreter in --python", "with --engine=local"),
    evaluate("data-missing", [GOOD[0], f"--data={DATA}/absent.parquet"], f"--data='{DATA}/absent.parquet'",
             "no such file"),
    evaluate("data-not-utf8", [GOOD[0], f"--data={DATA}/not_utf8.parquet"], "--data=", "cannot be read"),
    evaluate("model-missing", [f"--model={MODELS}/absent", GOOD[1]], f"{MODELS}/absent", "no such folder"),
    evaluate("adapter-missing", [*GOOD, "--adapter=nowhere"], "--adapter='nowhere", "is missing"),
    evaluate("adapter-of-another-base", [*GOOD, "--adapter=inputs/adapters/of-another-base"],
             "--adapter='inputs/adapters/of-another-base'", "another base"),
    evaluate("model-config-empty", [f"--model={MODELS}/config-empty", GOOD[1]], "--model=", "is not JSON"),
    evaluate("beyond-the-positions", [f"--model={MODELS}/short", GOOD[1], "--max_response_length=80"],
             "--max_response_length=80", "with longest prompt=", "max_position_embeddings=87",
             "--allow_beyond_max_position"),
    evaluate("dynamic-rope-beyond-its-window",
             [f"--model={MODELS}/dynamic", GOOD[1], "--max_response_length=80", "--allow_beyond_max_position"],
             "--max_response_length=80", "max_position_embeddings=87", "RoPE scaling ends there"),
    evaluate("large-tokenizer", [f"--model={MODELS}/large-tokenizer", GOOD[1]], f"{MODELS}/large-tokenizer",
             "vocab_size 290"),
    evaluate("weights-changed", [f"--model={MODELS}/checksum", GOOD[1]], "--model=",
             "other bytes than were written"),
    evaluate("unknown-reward", [*GOOD, "--reward=gsm8kk"], "gsm8kk", "did you mean gsm8k?"),
    evaluate("reward-of-other-arguments", [*GOOD, "--reward=inputs/rewards/nothing.py:score"], "--reward=",
             "called with data_source"),
    evaluate("platform-that-jax-has-not", GOOD, "JAX_PLATFORMS='no_such_platform'", "no such devices"),
    # export
    export("no-checkpoint", [f"--checkpoint={DATA}", "--output=new"], f"--checkpoint='{DATA}'", "no checkpoint"),
    export("no-folder", ["--checkpoint=nowhere", "--output=new"], "--checkpoint='nowhere'", "no checkpoint"),
    export("of-a-file", ["--checkpoint=inputs/rewards/good.py", "--output=new"], "--checkpoint=", "no checkpoint"),
    export("output-exists", [f"--checkpoint={DATA}", f"--output={MODELS}/good"], f"--output='{MODELS}/good'",
           "exists"),
    export("output-below-a-file", [f"--checkpoint={DATA}", "--output=inputs/rewards/good.py/out"],
           "--output='inputs/rewards/good.py/out'", "is a file"),
    export("output-of-no-name", [f"--checkpoint={DATA}", f"--output={'x' * 300}"], "--output=", "255 bytes"),
    export("output-empty", [f"--checkpoint={DATA}", "--output="], "--output='': must name a folder"),
    export("checkpoint-empty", ["--checkpoint=", "--output=new"], "--checkpoint='': must name a folder"),
    export("misspelt-flag", ["--checkpont=x", "--output=new"], "--checkpont", "did you mean --checkpoint?"),
    export("no-output", [f"--checkpoint={DATA}"], "--output"),
    export("checkpoint-cut", [f"--checkpoint={WORKDIRS}/cut", "--output=new"], "no checkpoint is whole",
           "params/d/array has 5 bytes"),
    export("damaged-step", [f"--checkpoint={WORKDIRS}/cut/checkpoints/4", "--output=new"],
           f"--checkpoint='{WORKDIRS}/cut/checkpoints/4'", "is damaged", "name another step"),
    export("config-missing", [f"--checkpoint={WORKDIRS}/no-config", "--output=new"], "config.json", "is missing"),
    export("no-model-files", [f"--checkpoint={WORKDIRS}/no-model-files", "--output=new"],
           "--checkpoint=", "model_files/config.json", "is missing"),
    export("model-config-cut", [f"--checkpoint={WORKDIRS}/model-config-cut", "--output=new"],
           "--checkpoint=", "model_files/config.json", "is not JSON"),
    # sft
    sft("without-steps", {"sft.num_steps": 0}, "sft.num_steps=0", "above 0"),
    sft("without-answers", {"arithmetic.num_train": 0, **FILES}, "sft.train_files", "good/0", "extra_info.answer"),
    sft("without-examples", {"arithmetic.num_sft": 0}, "arithmetic.num_sft=0", "above 0 where sft.num_steps is"),
    sft("done-already", {}, "--workdir=", "already holds sft-model", workdir=f"{WORKDIRS}/tuned"),
    sft("workdir-is-a-file", {}, "--workdir='inputs/rewards/good.py'", "must be a folder",
        workdir="inputs/rewards/good.py"),
    sft("answers-too-long", {"data.max_response_length": 1}, "sft.train_files", "none of the 40 examples"),
    sft("platform-that-jax-has-not", {"data.max_response_length": 40},
        "JAX_PLATFORMS='no_such_platform'", "no such devices"),
    sft("unknown-key", {"sft.num_step": 1}, "sft.num_step", "did you mean sft.num_steps?"),
    # doctor
    doctor("misspelt-flag", {}, "--confg", "did you mean --config?", extra=["--confg=x"]),
    Case("doctor-log-missing", "grpo_jax.doctor", ["--log=inputs/absent.log"], ("absent.log", "No such file")),
    Case("doctor-log-and-more", "grpo_jax.doctor", ["--log=a", "--config=b"], ("--log", "goes with --json alone")),
    doctor("unknown-key", {"model.pth": "x"}, "model.pth", "did you mean model.path?"),
    doctor("config-missing", {}, "--config=", "no such file", extra=["--config=inputs/absent.py"]),
    doctor("platform-that-jax-has-not", {}, "JAX_PLATFORMS='no_such_platform'", "no such devices"),
    # plan
    plan("unknown-device", {}, "--device='h10'", "did you mean h100?", device="h10"),
    plan("device-of-no-size", {}, "--device='nan'", "number of GB", device="nan"),
    plan("no-devices", {}, "--num_devices='0'", "at least 1", extra=["--num_devices=0"]),
    plan("devices-that-are-no-number", {}, "--num_devices='²'", "number of devices", extra=["--num_devices=²"]),
    plan("devices-that-do-not-fit", {"mesh.data": 3}, "--num_devices=4", "multiple of the mesh's 3",
         extra=["--num_devices=4"]),
    plan("beyond-the-positions", {"data.max_response_length": 4017}, "data.max_response_length=4017",
         "max_position_embeddings=4096"),
    plan("vllm-on-a-tpu", {"rollout.engine": "vllm"}, "rollout.engine='vllm'", "needs NVIDIA GPUs", "tpu",
         device="tpu-v5e"),
    plan("slice-of-another-size", {}, "--num_devices='8'", "must be a multiple of 16, the chips of a v5e-16",
         device="v5e-16", extra=["--num_devices=8"]),
    plan("compiling-for-an-unknown-gpu", {}, "--compile='True'", "for TPU slices", device="l40s",
         extra=["--compile"]),
    plan("compiling-for-a-part-of-a-slice", {}, "--compile='True'", "tpu-v5e with 4, 8, 16", device="tpu-v5e",
         extra=["--compile", "--num_devices=6"]),
    plan("model-config-empty", {"model.path": f"{MODELS}/config-empty"}, "model.path=", "is not JSON"),
    plan("kernel-of-other-devices", {"model.attention": "splash"}, "model.attention='splash'", "needs a TPU"),
    plan("of-a-platform-that-jax-has-not", {}, "JAX_PLATFORMS='no_such_platform'", "no such devices", device=""),
    # mismatch
    mismatch("no-prompts", {}, "--num=0", "at least 1", extra=["--num=0"]),
    mismatch("wrong-type", {}, "--num", "few", extra=["--num=few"]),
    mismatch("misspelt-flag", {}, "--nm", "did you mean --num?", extra=["--nm=3"]),
    mismatch("nowhere-to-write", {}, "--json='absent/out.json'", "folder does not exist",
             extra=["--json=absent/out.json"]),
    mismatch("json-is-a-folder", {}, "--json='inputs'", "is a folder", extra=["--json=inputs"]),
    mismatch("random-model", {"model.path": "random"}, "model.path='random'", "makes a model of its own first"),
    mismatch("warm-start", {"sft.num_steps": 3}, "sft.num_steps=3", "makes a model of its own first"),
    mismatch("head-of-the-local-engine", {}, "rollout.engine='local'", "no setting for its output head",
             extra=["--engine_head_float32"]),
    mismatch("workdir-is-a-file", {}, "--workdir='inputs/rewards/good.py'", "cannot be read",
             workdir="inputs/rewards/good.py"),
    # data.gsm8k
    jsonl("no-folder", ["--source=inputs/sources/good/train.jsonl"], "--local_dir"),
    jsonl("no-validation", ["--source=inputs/sources/good/train.jsonl", "--local_dir=new"],
          "--num_val=0", "give one of --num_val and --val_source"),
    jsonl("source-missing", ["--source=absent", "--local_dir=new", "--num_val=1"], "--source='absent'", "no such"),
    jsonl("source-is-a-folder", ["--source=inputs", "--local_dir=new", "--num_val=1"], "--source=", "a folder"),
    jsonl("no-such-field", ["--source=inputs/sources/good/train.jsonl", "--local_dir=new", "--num_val=1"],
          "train.jsonl line 1", "has no field 'prompt' (it has question, answer)"),
    jsonl("line-cut", ["--source=inputs/sources/cut/train.jsonl", "--local_dir=new", "--num_val=1",
                       "--prompt=question"], "train.jsonl line 2", "is not JSON"),
    fetch("no-folder", ["a/b"], "--to"),
    fetch("to-a-file", ["a/b", "--to=inputs/rewards/good.py"], "--to='inputs/rewards/good.py'", "is a file"),
    fetch("check-of-nothing", ["a/b", "--to=new", "--check_only"], "--to='new'", "no such folder"),
    fetch("unknown-hub", ["a/b", "--to=new", "--from=hugging"], "--from", "hugging", "modelscope"),
    fetch("offline", ["a/b", "--to=new"], "NAME='a/b'", "the hub did not give it"),
    Case("init-in-a-file", "grpo_jax.init", ["inputs/rewards/good.py"], ("FOLDER=", "is a file")),
    gsm8k("no-folder", ["--source=inputs/sources/good"], "--local_dir"),
    gsm8k("source-missing", ["--local_dir=new", "--source=absent"], "--source='absent'", "no such folder"),
    gsm8k("source-of-no-name", ["--local_dir=new", f"--source={'x' * 300}"], "--source=", "255 bytes"),
    gsm8k("split-missing", source("no-test"), "--source='inputs/sources/no-test'", "must hold test.jsonl"),
    gsm8k("line-cut", source("cut"), "train.jsonl line 2", "is not JSON"),
    gsm8k("nested-without-end", source("nested"), "train.jsonl line 1", "is not JSON"),
    gsm8k("half-a-character", source("surrogate"), "train.jsonl line 1", "lone surrogate"),
    gsm8k("no-answer", source("no-answer"), "train.jsonl line 1", "answer must be a string"),
    gsm8k("no-number", source("no-number"), "train.jsonl line 1", 'no "#### NUMBER"'),
    gsm8k("empty-split", source("empty"), "its train split is empty"),
    gsm8k("parquet-cut", source("parquet"), "cannot be read as Parquet"),
    gsm8k("negative-calculations", [*source("good"), "--max_calculations=-1"], "--max_calculations=-1",
          "at least 0"),
    gsm8k("nothing-left", [*source("good"), "--max_calculations=1"], "--max_calculations=1", "leaves no problem"),
    gsm8k("folder-is-a-file", ["--local_dir=inputs/rewards/good.py", "--source=inputs/sources/good"],
          "--local_dir='inputs/rewards/good.py'", "cannot be written to"),
    # data.arithmetic
    arithmetic("no-problems", ["--local_dir=new", "--num_train=0"], "--num_train=0", "at least 1"),
    arithmetic("difficulty", ["--local_dir=new", "--difficulty=9"], "--difficulty", "9"),
    arithmetic("share", ["--local_dir=new", "--direct_share=nan"], "--direct_share=nan", "from 0 to 1"),
    arithmetic("too-many", ["--local_dir=new", "--num_train=1000000", "--difficulty=1"],
               "difficulty=1", "ask for fewer"),
    arithmetic("folder-is-a-file", ["--local_dir=inputs/rewards/good.py", "--num_train=5", "--num_val=2"],
               "--local_dir='inputs/rewards/good.py'", "cannot be written to"),
    arithmetic("folder-that-cannot-be", ["--local_dir=/proc/nowhere", "--num_train=5", "--num_val=2"],
               "--local_dir='/proc/nowhere'", "cannot be written to"),
    arithmetic("null-byte", ["--local_dir=a\0b"], "--local_dir='a\\x00b'", "control characters"),
]  # fmt: skip

OTHERS_ON_DEVICES = [
    doctor("workdir-is-a-file", {}, "--workdir='inputs/rewards/good.py'", "must be a folder",
           workdir="inputs/rewards/good.py", needs_device=True),
    doctor("model-truncated", {"model.path": f"{MODELS}/truncated"}, "model.path=", "cut short",
           needs_device=True),
    doctor("data-truncated", {"arithmetic.num_train": 0, "data.val_files": FILES["data.val_files"],
           "data.train_files": repr((f"{DATA}/truncated.parquet",))},
           "data.train_files=", "cannot be read as Parquet", needs_device=True),
    doctor("reward-raises", {"reward.function": "inputs/rewards/raises.py:score"}, "reward.function=",
           "ZeroDivisionError", needs_device=True),
    doctor("vllm-not-installed", {"rollout.engine": "vllm"}, "rollout.engine='vllm'", "not installed",
           needs_device=True),
    evaluate("model-not-finite", [f"--model={MODELS}/not-finite", GOOD[1], "--max_response_length=4"], "--model=",
             "final_norm/scale", "not finite", needs_device=True),
]  # fmt: skip

TABLE = {case.name: case for case in (*TRAIN, *ON_DEVICES, *OTHERS, *OTHERS_ON_DEVICES)}
