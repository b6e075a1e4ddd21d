"""docs/own_task.md: its commands, in their order, in a folder with nothing but the examples."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import integration_helpers as helpers
import pytest

PAGE = helpers.ROOT / "docs" / "own_task.md"
SHORT = " --config.trainer.num_steps=1 --config.sft.num_steps=1 --config.eval.num_prompts=8"


def commands():
    """The commands of the page, each one line."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    return "".join(blocks).replace("\\\n", "").splitlines()


@pytest.mark.slow
def test_the_page_as_a_new_user_would_follow_it(tmp_path):
    shutil.copytree(helpers.ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__*"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PYTHONPATH": str(helpers.ROOT), "PATH": path, "JAX_PLATFORMS": "cpu"}
    seen = []
    for command in commands():
        seen.append(command.split()[2] if command.startswith("python -m") else command.split()[0])
        command += SHORT if "grpo_jax.train" in command else ""
        command = command.replace("checkpoint-epoch-1", "checkpoint-final")  # of one step
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    modules = [f"grpo_jax.{name}" for name in ("data.jsonl", "doctor", "train", "evaluate")]
    assert seen == ["python", modules[0], "pytest", *modules[1:]]
    lines = [json.loads(line) for line in (tmp_path / "after.jsonl").read_text().splitlines()]
    assert len(lines) == 128
    assert all(line["prompt"].endswith("assistant\n<think>\n\n</think>\n\n") for line in lines)
    assert all("Reply with <answer>odd</answer>" in line["prompt"] for line in lines)


def test_the_line_that_the_page_shows_is_one_of_the_example(tmp_path):
    make = helpers.ROOT / "examples" / "odd_or_even" / "make_problems.py"
    subprocess.run([sys.executable, make, tmp_path / "problems.jsonl"], check=True)
    shown = re.search(r"```json\n(.*?)\n```", PAGE.read_text(), re.S)[1]
    assert shown in (tmp_path / "problems.jsonl").read_text().splitlines()
