"""The folder of a run: what lies where, whose run it is, and the log."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, Config, ConfigError, parse_config, unread_keys, unread_warning
from grpo_jax.config.sections import ARRAYS, FREE, LENGTH

logger = logging.getLogger("grpo_jax")


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
            held = parse_config(json.loads(self.config.read_text()))
        except ValueError as error:  # ConfigError and JSONDecodeError
            if is_forced:
                return
            rule = f"holds a config.json that cannot be read ({error})"
            raise ConfigError("--workdir", str(self.path), rule) from None
        differences = _differences(held.to_dict(), config.to_dict())
        if is_forced:
            self._check_arrays(differences)
            return
        free = {FREE, LENGTH} if config.optim.schedule == "constant" else {FREE}
        # What neither run reads may differ: a file need not state it for a run that was begun with it.
        unread = unread_keys(held).keys() & unread_keys(config).keys()
        for key, (old, new) in differences.items():
            if KEYS[key].resume in free or key in unread:
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
        for key, (old, new) in differences.items():
            if KEYS[key].resume != ARRAYS:
                continue
            if key == "algorithm.ref_refresh_every" and old > 0:
                continue  # the reference is there, however often it changes
            rule = f"the checkpoints in {self.path} were written with {old!r}, and hold other arrays"
            raise ConfigError(key, new, rule)

    def open(self, config: Config) -> None:
        """Creates the folder, writes config.json if there is none, and starts the log.

        The log begins with the keys that are set and that nothing reads, if there are any.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if not self.config.exists():
            self.record(config)
        start_logging(self.log)
        if warning := unread_warning(config):
            logger.warning(warning)

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
