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
CONFIG = Path(__file__).resolve().parent / "tiny_config.py"
STEPS_PER_EPOCH = 13 // 4

# A reward that depends on the text alone and has some spread whatever an untrained model writes.
# A file "slow" beside it gives a test the time to interrupt a step.
REWARD_FILE = """
import pathlib, time

def score(*, data_source, solution_str, ground_truth, extra_info):
    if pathlib.Path(__file__).with_name("slow").exists():
        time.sleep(0.05)
    return sum(solution_str.encode()) % 5 / 4
"""


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


def train_argv(workdir, overrides=(), config=CONFIG):
    """Arguments of `python -m grpo_jax.train` for a tiny run."""
    return [f"--config={config}", f"--workdir={workdir}", *flags(dict(overrides))]


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


def run_train(workdir, overrides=(), *, config=CONFIG):
    """Trains in this process; whether that went well is the caller's to check."""
    return call(train.main, train_argv(workdir, overrides, config))


def train_ok(workdir, overrides=(), *, config=CONFIG):
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


def write_failing_reward(folder):
    """A reward that fails in the fourth step, of 16 completions each, if one process scores. Returns its name."""
    failing = """
calls = 0

def failing(**kwargs):
    global calls
    calls += 1
    assert calls <= 48, "the fourth step"
    return score(**kwargs)
"""
    (folder / "failing.py").write_text(REWARD_FILE + failing)
    return f"{folder / 'failing.py'}:failing"


def tree_digest(folder):
    """Path -> hash of every file below `folder`; folders too, so that an empty new one shows."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(Path(folder).rglob("*"))
    }


def read_events(workdir):
    """All of TensorBoard's events, of which none may be there twice.

    Returns ({(name, step): value}, {(name, step): text}).
    """
    from tensorboardX.proto.event_pb2 import Event

    scalars, texts = {}, {}
    for file in sorted((Path(workdir) / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # a TFRecord: length, its checksum, the event, its checksum
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            at += 12 + size + 4
            for value in event.summary.value:
                key = (value.tag, event.step)
                if value.WhichOneof("value") == "simple_value":
                    assert key not in scalars
                    scalars[key] = value.simple_value
                elif value.HasField("tensor"):
                    assert key not in texts
                    texts[key] = value.tensor.string_val[0].decode()
    return scalars, texts


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
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target_of = lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device)
    with ocp.StandardCheckpointer() as checkpointer:
        for item in ("params", "optimizer"):
            metadata = checkpointer.metadata(folder / item).item_metadata
            target = jax.tree.map(target_of, dict(metadata))
            restored = checkpointer.restore(folder / item, target)
            for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
                leaf = np.asarray(leaf)
                arrays[item + jax.tree_util.keystr(path)] = (str(leaf.dtype), leaf.shape, leaf.tobytes())
    progress = json.loads((folder / "progress" / "metadata").read_text())
    return arrays, progress
