"""The folder of a run: what lies where, whose run it is, and the log."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError, parse_config

logger = logging.getLogger("grpo_jax")

# May differ when a run goes on: they change what is reported and how long it takes, not what is computed.
FREE_SECTIONS = ("eval", "checkpoint", "logging")
FREE_KEYS = {
    "trainer.flat_reward_steps", "trainer.compile_cache", "reward.num_workers", "reward.timeout_s",
    "algorithm.ref_offload",
}  # fmt: skip
COMPUTING_ROLLOUT_KEYS = {
    "engine", "temperature", "top_p", "top_k", "stop_token_ids", "max_lag", "update_weights", "engine_args"
}  # fmt: skip
ARRAY_KEYS = (
    "model.dtype", "model.param_dtype", "optim.moments_dtype", "optim.offload", "algorithm.ref_refresh_every"
)  # fmt: skip
"""They decide which arrays a checkpoint holds, and in which dtypes: not even resume=force can change them."""
LENGTH_KEYS = {"trainer.total_epochs", "trainer.num_steps"}  # free too, unless the schedule depends on them


class Workdir:
    """Paths of one run. Creating the object writes nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.config = path / "config.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model_files = path / "model_files"
        """config.json and tokenizer of the model, so that a checkpoint can be exported without its origin."""
        self.data = path / "data"
        self.random_model = path / "random-model"
        self.sft_model = path / "sft-model"
        self.validation = path / "validation"
        self.rollouts = path / "rollouts"
        self.learning_curve = path / "learning_curve.png"

    def epoch_model(self, epoch: int) -> Path:
        """The Hugging Face folder written after an epoch, counted from 1."""
        return self.path / f"checkpoint-epoch-{epoch}"

    @property
    def final_model(self) -> Path:
        """The Hugging Face folder of a run that ended within an epoch."""
        return self.path / "checkpoint-final"

    def check(self, config: Config) -> None:
        """Refuses a folder that holds another run.

        Raises: ConfigError: config.json is there and differs in a key that changes what is computed; with
            resume=force, in one that its checkpoints depend on.
        """
        existing = next(path for path in (self.path, *self.path.absolute().parents) if path.exists())
        if not existing.is_dir():
            raise ConfigError("--workdir", str(self.path), f"must be a folder, but {existing} is a file")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError("--workdir", str(self.path), f"{existing} cannot be written to")
        if not self.config.exists():
            return
        is_forced = config.checkpoint.resume == "force"
        try:
            held = parse_config(json.loads(self.config.read_text())).to_dict()
        except ValueError as error:  # ConfigError and JSONDecodeError
            if is_forced:
                return
            rule = f"holds a config.json that cannot be read ({error})"
            raise ConfigError("--workdir", str(self.path), rule) from None
        differences = _differences(held, config.to_dict())
        if is_forced:
            self._check_arrays(differences)
            return
        for key, (old, new) in differences.items():
            section, name = key.split(".")
            is_free = section in FREE_SECTIONS or key in FREE_KEYS
            is_free |= section == "rollout" and name not in COMPUTING_ROLLOUT_KEYS
            if is_free or (key in LENGTH_KEYS and config.optim.schedule == "constant"):
                continue
            raise ConfigError(
                key,
                new,
                f"the run in {self.path} has {old!r}; choose another --workdir, or insist on going on with "
                "--config.checkpoint.resume=force",
            )

    def _check_arrays(self, differences: dict[str, tuple[Any, Any]]) -> None:
        if not saved_steps(self.checkpoints):
            return
        for key in filter(differences.__contains__, ARRAY_KEYS):
            old, new = differences[key]
            if key == "algorithm.ref_refresh_every" and old > 0:
                continue  # the reference is there, however often it changes
            rule = f"the checkpoints in {self.path} were written with {old!r}, and hold other arrays"
            raise ConfigError(key, new, rule)

    def open(self, config: Config) -> None:
        """Creates the folder, writes config.json if there is none, and starts the log."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.record(config)
        start_logging(self.log)

    def record(self, config: Config) -> None:
        """Writes config.json: the configuration that the run has from now on."""
        self.config.write_text(json.dumps(config.to_dict(), indent=2) + "\n")


def saved_steps(checkpoints: Path) -> list[int]:
    """The steps that a folder holds checkpoints of; none if there is no such folder."""
    if not checkpoints.is_dir():
        return []
    return [int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()]


def start_logging(file: Path | None = None, *, console: bool = True) -> None:
    """Sends this package's messages to the console as they are, and to `file` with the time."""
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if console:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
    if file is not None:
        to_file = logging.FileHandler(file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(to_file)


def _differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    return {
        f"{section}.{key}": (old[section][key], value)
        for section, values in new.items()
        for key, value in values.items()
        if old[section][key] != value
    }
