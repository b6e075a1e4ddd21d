"""The commands of the pages are run, in their order, in a folder as `grpo_jax.init` leaves it: no network, no GPU.

A tiny random model stands for the real ones, and training ends after a step. What is not run stands in `NOT_RUN`
with the reason; any other command must run.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import docs_pages as docs
import jax
import pytest

NETWORK, DEVICES, SERVER = "needs a network", "needs GPUs or TPUs", "serves, and does not end"
MINUTES, MAKER, NO_COMMAND = "takes minutes, and is for figures", "makes an environment", "flags alone"
NOT_RUN = [
    (r"^(git clone|hf download|modelscope)|-m grpo_jax.fetch", NETWORK),
    (r"-m grpo_jax.data.gsm8k --local_dir=data/gsm8k$", NETWORK),
    (r"logging.loggers=\(console,tensorboard,wandb\)", f"{NETWORK}; tests/run/test_trackers.py"),
    (r"^pip install|-m venv|^export |\. \.venv", MAKER),
    (r"^tensorboard|^curl", SERVER),
    (r"--engine=vllm|rollout.python=|placement=separate", f"{DEVICES}; tests/vllm"),
    (r"^docs/tpu.md: ", f"{DEVICES}, and Google's cloud; pytest -m libtpu compiles"),
    (
        r"^launch/|--hosts ",
        "needs several hosts; tests/run/test_launch_scripts.py, tests/integration/test_hosts.py",
    ),
    (r"^docs/hosts.md: ", "needs several processes; tests/integration/test_hosts.py"),
    (r"^python benchmarks/", MINUTES),
    (r"grpo_jax.doctor --log=", "of an installation that fails; tests/integration/test_doctor_command.py"),
    (r"--config=configs/quickstart.py$", MINUTES + "; a step of it: test_recipes.py"),
    (r"^pytest|^bash .ci/run|^mike", "is for developers"),
    (r"^docs/own_task.md: ", "tests/integration/test_own_task.py"),
    (r"^docs/your_own.md: ", "tests/integration/test_your_own.py"),
    (r"^docs/recipes.md: ", "tests/integration/test_recipes.py"),
    (r"^--config\.", NO_COMMAND),
]
"""(what the command is like, why it is not run); the pattern is looked for in it, and in "PAGE: COMMAND"."""

TINY = {
    **{
        "model.dtype": "float32",
        "model.remat": "none",
        "model.scan_layers": False,
        "rollout.engine": "local",
    },
    **{"data.train_batch_size": 16, "data.max_prompt_length": 512, "data.max_response_length": 8},
    **{"algorithm.group_size": 4, "actor.micro_batch_size_per_device": 8, "eval.num_prompts": 4},
    **{"trainer.phase_timeout_s": 300, "mesh.fsdp": 1},
}
STARTS_RUNS = re.compile(r"python -m grpo_jax\.(train|doctor|mismatch)(?= --)")
PLACEHOLDERS = {
    "FOLDER": "gsm8k-lines",
    "WORKDIR-A": "outputs/grpo_jax/qwen-0.5b",
    "WORKDIR-B": "outputs/grpo_jax/gsm8k",
    "WORKDIR/checkpoints/87": "WORKDIR/checkpoints/3",
    "--step=10": "--step=3",
    "--config=...": "--config=configs/gsm8k.py",
    "--model=...": "--model=models/Qwen2.5-0.5B-Instruct",
    "--data=...": "--data=data/gsm8k/test.parquet",
    "--workdir=...": "--workdir=runs/another",
}
PAGES = [docs.ROOT / "README.md", docs.ROOT / "CONTRIBUTING.md", *sorted(docs.DOCS.glob("*.md"))]


def reason(command):
    """Why a command is not run; None: it is."""
    texts = (command.text, f"{command.page}: {command.text}")
    return next((why for like, why in NOT_RUN if any(re.search(like, text) for text in texts)), None)


def to_run(page):
    """The lines of the page's bash blocks all of whose commands are run."""
    lines = {}
    for command in docs.commands(page):
        lines.setdefault((command.line, command.source), []).append(command)
    return [source for (_, source), parts in lines.items() if not any(map(reason, parts))]


def filled(line, page, index):
    """The line as a reader would fill it in; runs are tiny, and each but the README's has a folder of its own."""
    for name, value in PLACEHOLDERS.items():
        line = line.replace(name, value)
    line = line.replace("WORKDIR", "runs/lora-0" if page.stem == "lora" else "outputs/grpo_jax/qwen-0.5b")
    settings = TINY | ({"logging.save_rollouts": True} if page.stem == "README" else {"trainer.num_steps": 1})
    if page.stem == "sharding":
        settings = {key: value for key, value in settings.items() if not key.startswith("mesh.")}
    flags = "".join(f" --config.{key}={value}" for key, value in settings.items())
    own = "" if page.stem == "README" or "--workdir" in line else f" --workdir=runs/{page.stem}-{index}"
    line = line.replace("grpo_jax.evaluate ", "grpo_jax.evaluate --max_response_length=8 --num=4 ")
    return STARTS_RUNS.sub(lambda match: match[0] + own + flags, line)


def run(line, folder):
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(docs.ROOT), "PATH": path, "JAX_PLATFORMS": "cpu"}
    environment |= {"XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, f"{line}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"


def run_page(page, folder):
    for index, line in enumerate(to_run(page)):
        line = filled(line, page, index)
        for output in re.findall(r"--output=(\S+)", line):  # of another page; nothing is overwritten
            shutil.rmtree(folder / output, ignore_errors=True)
        run(line, folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes, models and problems, the files that pages show, and what the README's commands leave."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("configs", "examples", "launch"):
        shutil.copytree(docs.ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "gsm8k-lines").mkdir()
    for split in ("train", "test"):
        sample = docs.ROOT / "tests" / "data" / f"gsm8k_sample_{split}.jsonl"
        lines = sample.read_text().splitlines(keepends=True)[: TINY["data.train_batch_size"]]
        (folder / "gsm8k-lines" / f"{split}.jsonl").write_text("".join(lines))
    make_model(
        folder / "models" / "Qwen2.5-0.5B-Instruct", (folder / "gsm8k-lines" / "train.jsonl").read_text()
    )
    rows = [{"prompt": f"What is {i} + 1?", "solution": str(i + 1)} for i in range(80)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for size in ("3B", "7B"):
        (folder / "models" / f"Qwen2.5-{size}-Instruct").symlink_to("Qwen2.5-0.5B-Instruct")
    for page in PAGES:
        for block in docs.FENCE.finditer(page.read_text()):
            if shown := re.match(r'"""(\w+\.py): ', block[3]):
                (folder / shown[1]).write_text(block[3])
    run_page(PAGES[0], folder)
    return folder


def make_model(folder, text):
    """A tiny random model in a Hugging Face folder, wide enough for adapters of rank 32."""
    from grpo_jax.config import MeshSection, RandomModelSection
    from grpo_jax.model import random_model
    from grpo_jax.model.sharding import make_mesh

    section = RandomModelSection(vocab_size=512, hidden_size=64, intermediate_size=96, num_layers=1)
    tokenizer = random_model.make_tokenizer(text.splitlines(), section.vocab_size)
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    random_model.make_random_model(folder, section, tokenizer, seed=0, mesh=mesh)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)], ids=docs.name)
def test_the_commands_of_the_page(page, folder):
    if page.stem != "README":
        run_page(page, folder)
    else:
        assert (folder / "my-model" / "model.safetensors").is_file() and (folder / "result.json").is_file()


def test_every_reason_is_that_of_some_command():
    commands = [command for page in PAGES for command in docs.commands(page)]
    assert {reason(command) for command in commands} == {None, *(why for _, why in NOT_RUN)}


def test_a_command_without_a_reason_is_run():
    command = docs.Command("docs/new.md", 1, ("python", "-m", "grpo_jax.audit", "WORKDIR"))
    assert reason(command) is None
    assert reason(dataclasses.replace(command, words=("hf", "download", "x"))) == NETWORK
    line = "python -m grpo_jax.train --config=... --config.lora.rank=8"
    text = filled(line, docs.DOCS / "new.md", 3)
    assert text.startswith("python -m grpo_jax.train --workdir=runs/new-3 --config.model.dtype=float32 ")
    assert text.endswith(" --config=configs/gsm8k.py --config.lora.rank=8")
