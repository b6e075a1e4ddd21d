"""What took a run up: command, recipe, versions and devices, as a line of WORKDIR/starts.jsonl."""

import dataclasses
import importlib.metadata
import json
import os
import platform
from typing import Any

from grpo_jax.config import Config
from grpo_jax.run import lock
from grpo_jax.run.workdir import Workdir

PACKAGES = (
    *(
        "grpo_jax",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "transformers",
        "tokenizers",
        "numpy",
    ),
    *("pyarrow", "ray", "vllm", "torch"),
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The configuration file that a run was started with."""

    name: str
    """As it was given: FILE.py or FILE.py:VARIANT."""
    replaced: dict[str, Any]
    """Keys that flags have changed, with the file's values."""


def record_start(
    workdir: Workdir, config: Config, recipe: Recipe | None, *, num_steps: int, devices: str
) -> None:
    """Adds the line of this process. Args: num_steps: of the whole run; devices: in words."""
    line = lock.this_process() | {
        "recipe": recipe.name if recipe else "",
        "replaced": recipe.replaced if recipe else {},
        "model": config.model.path,
        "num_steps": num_steps,
        "devices": f"{devices}; {os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"Python": platform.python_version(), **versions()},
        "folder": os.getcwd(),
    }
    with workdir.starts.open("a") as file:
        file.write(json.dumps(line, default=str) + "\n")


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
