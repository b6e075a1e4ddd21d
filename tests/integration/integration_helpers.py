"""A tiny run of the real thing: arguments for a configuration that trains in seconds, and ways to start it."""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

from grpo_jax import train

ROOT = Path(__file__).resolve().parent.parent.parent
QUICKSTART = ROOT / "configs" / "quickstart.py"

TINY = {  # over configs/quickstart.py; whatever a test relies on stands here, not there
    "model.path": "random",
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "model.remat": "none",
    "model.scan_layers": False,
    "random_model.vocab_size": 300,
    "random_model.hidden_size": 32,
    "random_model.intermediate_size": 48,
    "random_model.num_layers": 1,
    "random_model.num_heads": 2,
    "random_model.num_kv_heads": 1,
    "data.train_batch_size": 4,
    "data.max_prompt_length": 80,
    "data.max_response_length": 8,
    "data.shuffle": True,
    "arithmetic.num_train": 13,  # 3 steps an epoch; one problem is left over in each
    "arithmetic.num_val": 5,
    "arithmetic.num_sft": 40,
    "arithmetic.difficulty": 1,
    "arithmetic.direct_share": 0.0,
    "sft.num_steps": 0,
    "sft.batch_size": 16,
    "sft.learning_rate": 1e-2,
    "algorithm.adv_estimator": "grpo",
    "algorithm.group_size": 4,
    "algorithm.loss_agg": "token-mean",
    "algorithm.kl_coef": 0.0,
    "algorithm.kl_in": "loss",
    "algorithm.entropy_coef": 0.0,
    "optim.learning_rate": 1e-2,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "actor.num_minibatches": 1,
    "actor.num_epochs": 1,
    "actor.micro_batch_size_per_device": 64,
    "actor.micro_batch_tokens_per_device": 0,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "reward.num_workers": 1,
    "reward.on_error": "stop",
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "eval.before_training": False,
    "eval.every_epochs": 0,
    "eval.every_steps": 0,
    "eval.num_prompts": 0,
    "eval.temperature": 0.0,
    "eval.num_samples": 1,
    "checkpoint.every_epochs": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.hf_every_epochs": 0,
    "checkpoint.max_to_keep": 2,
    "trainer.total_epochs": 1,
    "trainer.num_steps": 0,
    "trainer.seed": 0,
}
STEPS_PER_EPOCH = 13 // 4


# A reward that depends on the text alone and has some spread whatever an untrained model writes.
REWARD_FILE = '''
def score(*, data_source, solution_str, ground_truth, extra_info):
    return sum(solution_str.encode()) % 5 / 4
'''


def score(text):
    """The same reward, for tests to compute it anew."""
    return sum(text.encode()) % 5 / 4


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str


def flags(overrides):
    """`--config.KEY=VALUE` for every key, as one writes it in a shell."""
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def train_argv(workdir, overrides=(), config=QUICKSTART):
    """Arguments of `python -m grpo_jax.train` for a tiny run."""
    return [f"--config={config}", f"--workdir={workdir}", *flags(TINY | dict(overrides))]


def call(main, argv):
    """Calls the `main` of a command in this process."""
    out, err, old = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["command", *map(str, argv)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = old
    return Result(code, out.getvalue(), err.getvalue())


def run_train(workdir, overrides=(), *, config=QUICKSTART):
    """Trains in this process; whether that went well is the caller's to check."""
    return call(train.main, train_argv(workdir, overrides, config))


def train_ok(workdir, overrides=(), *, config=QUICKSTART):
    """Trains in this process, which must go well; returns what was printed."""
    result = run_train(workdir, overrides, config=config)
    assert result.code == 0, result.err + result.out[-3000:]
    return result.out


def start(module, argv, **env):
    """Starts `python -m MODULE` as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONUNBUFFERED": "1"} | env,
    )


def run_module(module, argv, **env):
    """Runs `python -m MODULE` to its end."""
    process = start(module, argv, **env)
    out, err = process.communicate(timeout=300)
    return Result(process.returncode, out, err)


def read_jsonl(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def read_lines(workdir):
    """The lines of metrics.jsonl."""
    return read_jsonl(Path(workdir) / "metrics.jsonl")


def without_clock(line):
    """A line of metrics.jsonl without what depends on the clock or the machine's state."""
    clocked = ("timing_s/", "perf/")
    return {name: value for name, value in line.items() if not name.startswith(clocked) and name != "time"}


def tree_digest(folder):
    """Path -> hash of every file below `folder`; folders too, so that an empty new one shows."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(Path(folder).rglob("*"))
    }


def read_tensors(folder):
    """Name -> bytes of every tensor of a Hugging Face folder; equal dictionaries are equal bits."""
    from safetensors.numpy import load_file

    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return {name: (str(t.dtype), t.shape, t.tobytes()) for name, t in tensors.items()}


def read_checkpoint(workdir, step):
    """Every array of one Orbax checkpoint, read by Orbax alone: path -> bytes; and its progress."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    folder = Path(workdir).absolute() / "checkpoints" / str(step)
    arrays = {}
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            metadata = checkpointer.metadata(folder / item).item_metadata
            device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
            target = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), dict(metadata)
            )
            restored = checkpointer.restore(folder / item, target)
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                leaf = np.asarray(leaf)
                arrays[item + jax.tree_util.keystr(path)] = (str(leaf.dtype), leaf.shape, leaf.tobytes())
    progress = json.loads((folder / "progress" / "metadata").read_text())
    return arrays, progress
