"""The command that scores a run's model as its last validation did."""

import shlex
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, unread_keys
from grpo_jax.rollout.base import derive_seed
from grpo_jax.run.workdir import Workdir

FLAGS: dict[str, tuple[str, Any]] = {
    "reward": ("reward.function", "gsm8k"),
    "chat_template_args": ("data.chat_template_args", ()),
    "max_response_length": ("data.max_response_length", 512),
    "max_prompt_length": ("data.max_prompt_length", 2048),
    "overlong_prompts": ("data.overlong_prompts", "filter"),
    "allow_beyond_max_position": ("model.allow_beyond_max_position", False),
    "temperature": ("eval.temperature", 0.0),
    "num_samples": ("eval.num_samples", 1),
    "num": ("eval.num_prompts", 0),
    "stop_token_ids": ("rollout.stop_token_ids", ()),
    "dtype": ("model.dtype", "float32"),
    "engine": ("rollout.engine", "local"),
    "batch_size": ("rollout.batch_size", 256),
    "python": ("rollout.python", ""),
    "tensor_parallel_size": ("rollout.tensor_parallel_size", 1),
    "gpu_memory_utilization": ("rollout.gpu_memory_utilization", 0.5),
}
"""Flag of `evaluate` -> the key that stands for it in a run, and the flag's default."""


def evaluation_command(config: Config, workdir: Workdir, model: Path, step: int) -> str:
    """A line for a shell, with the flags that differ from their defaults.

    Args: model: the folder that the run wrote; step: of the validation.
    """
    words = [f"--model={model}"]
    if config.lora.rank:
        words = [f"--model={workdir.base_model(config)}", f"--adapter={model}"]
    is_generated = config.arithmetic.num_train > 0
    data = (str(workdir.data / "val.parquet"),) if is_generated else config.data.val_files
    words += _words("data", data if len(data) > 1 else data[0])
    unread = unread_keys(config)  # those of another engine
    for name, (key, default) in FLAGS.items():
        if key not in unread and (value := config.get(key)) != default:
            words += _words(name, value)
    if config.eval.temperature > 0:
        words.append(f"--seed={derive_seed(config.trainer.seed, step, 'validation')}")
    return f"python -m grpo_jax.evaluate {shlex.join(words)}"


def _words(name: str, value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}"] if value is True else [f"--{name}={value}"]
