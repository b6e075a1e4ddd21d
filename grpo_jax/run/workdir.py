"""The folder of a run: what lies where, whose run it is, and the log."""

import contextlib
import dataclasses
import datetime
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grpo_jax.config import KEYS, Config, ConfigError, differences, parse_config, unread_keys, unread_warning
from grpo_jax.config.sections import ARRAYS, FREE, LENGTH
from grpo_jax.config.text import printable
from grpo_jax.run import lock
from grpo_jax.run.retention import saved_steps
from grpo_jax.storage.files import sweep, write_whole
from grpo_jax.storage.manifest import read_facts

logger = logging.getLogger("grpo_jax")

EPOCH_MODEL = "checkpoint-epoch-"


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What was so when a run began, and is to stay so while it goes on."""

    date: datetime.datetime
    """What chat templates take for today's."""
    prompts: str
    """Fingerprint of the training prompts."""

    def to_json(self) -> dict[str, str]:
        return {"date": self.date.isoformat(), "prompts": self.prompts}


class OtherRun(ConfigError):
    """A workdir holds a run with another value of a key."""


class Workdir:
    """Paths of one run. Creating the object writes nothing."""

    def __init__(self, path: Path):
        self.path = path
        self.lock = path / "lock"
        """Held while a run is under way; says by whom."""
        self.config = path / "config.json"
        self.beginning = path / "beginning.json"
        self.log = path / "train.log"
        self.metrics = path / "metrics.jsonl"
        self.alarms = path / "alarms.jsonl"
        self.starts = path / "starts.jsonl"
        """A line each time that a process took the run up: its command, versions, devices."""
        self.report = path / "report.html"
        self.step_pages = path / "report"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / "checkpoints"
        self.model_files = path / "model_files"
        """config.json and tokenizer of the model, so that a checkpoint can be exported without its origin."""
        self.data = path / "data"
        self.random_model = path / "random-model"
        self.sft_model = path / "sft-model"
        self.validation = path / "validation"
        self.rollouts = path / "rollouts"
        self.ledger = path / "ledger"
        self.hangs = path / "hangs"
        self.learning_curve = path / "learning_curve.png"

    def log_of(self, rank: int) -> Path:
        """The log of a process of the run that is not the first one."""
        return self.path / f"train-{rank}.log"

    def base_model(self, config: Config) -> Path:
        """The Hugging Face folder that GRPO starts from."""
        if config.sft.num_steps:
            return self.sft_model
        return self.random_model if config.model.path == "random" else Path(config.model.path)

    def epoch_model(self, epoch: int) -> Path:
        """The Hugging Face folder, or with LoRA the PEFT folder, written after an epoch, counted from 1."""
        return self.path / f"{EPOCH_MODEL}{epoch}"

    @property
    def final_model(self) -> Path:
        """The same of a run that ended within an epoch."""
        return self.path / "checkpoint-final"

    def models(self) -> list[str]:
        """Names of the Hugging Face or PEFT folders that the run has written, the last one last."""
        numbers = [path.name.removeprefix(EPOCH_MODEL) for path in self.path.glob(f"{EPOCH_MODEL}*")]
        epochs = sorted(int(number) for number in numbers if number.isdecimal())
        final = [self.final_model.name] if self.final_model.is_dir() else []
        return [self.epoch_model(epoch).name for epoch in epochs] + final

    def check(self, config: Config) -> None:
        """Refuses a folder that holds another run, or in which one is under way.

        Raises:
            ConfigError: another process holds the lock; or, with resume=force, config.json differs in a key that
                its checkpoints depend on.
            OtherRun: config.json differs in a key that changes what is computed.
        """
        check_place("--workdir", self.path)
        for folder in (
            self.checkpoints,
            self.model_files,
            self.data,
            self.validation,
            self.rollouts,
            self.hangs,
        ):
            if folder.exists() and not folder.is_dir():
                raise ConfigError("--workdir", str(self.path), f"{folder.name} in it must be a folder")
        for file in (self.lock, self.config, self.beginning, self.log, self.metrics):
            if file.is_dir():
                raise ConfigError("--workdir", str(self.path), f"{file.name} in it must be a file, no folder")
        lock.check_free(self.lock)
        self._check_config(config)

    def _check_config(self, config: Config) -> None:
        is_forced = config.checkpoint.resume == "force"
        try:
            held = self.read_config()
        except ConfigError as error:
            if is_forced:
                return
            raise _with_way_out(error) from None
        if held is None:
            return
        changed = differences(held.to_dict(), config.to_dict())
        if is_forced:
            self._check_arrays(changed)
            return
        free = {FREE, LENGTH} if config.optim.schedule == "constant" else {FREE}
        # What neither run reads may differ: a file need not state it for a run that was begun with it.
        unread = unread_keys(held).keys() & unread_keys(config).keys()
        for key, (old, new) in changed.items():
            if KEYS[key].resume in free or key in unread:
                continue
            rule = f"the run in {self.path} has {old!r}; {self._ways_out(key)}"
            raise OtherRun(key, new, rule)

    def _ways_out(self, key: str) -> str:
        if KEYS[key].resume == ARRAYS and saved_steps(self.checkpoints):
            return "choose another --workdir: its checkpoints hold other arrays"
        condition = ", where that fits the devices," if key.startswith("mesh.") else ""
        insist = f"insist on going on{condition} with --config.checkpoint.resume=force"
        return f"choose another --workdir, or {insist}"

    def read_config(self) -> Config | None:
        """The configuration of the run in this folder: config.json, or what its last checkpoint knows of it.

        Returns: None where there is neither, and nothing that it would say something about.
        Raises:  ConfigError: it cannot be read, or is of a version with other keys.
        """
        held = self._read(self.config)
        if held is None:
            return None
        try:
            return parse_config(held)
        except (ConfigError, AttributeError, TypeError) as error:
            raise self._unreadable(self.config, error) from None

    def _read(self, file: Path) -> Any:
        """JSON of config.json or beginning.json, or what the last checkpoint's manifest has of it.

        Returns: None where the file is missing; without checkpoints also where it is empty, as a kill left it in
            older versions.
        Raises:  ConfigError: it is damaged, and no manifest has it.
        """
        try:
            return json.loads(file.read_text())
        except FileNotFoundError:
            return None
        except (OSError, RecursionError) as error:
            raise self._unreadable(file, error) from None
        except ValueError as error:
            steps = saved_steps(self.checkpoints)
            for step in reversed(steps):
                with contextlib.suppress(ValueError, KeyError):
                    held = read_facts(self.checkpoints / str(step))[file.stem]
                    text = "WARNING: %s is damaged; what the checkpoint of step %d knows of it is taken"
                    logger.warning(text, file, step)
                    return held
            if not steps and not file.stat().st_size:
                return None
            raise self._unreadable(file, error) from None

    def _unreadable(self, file: Path, error: Exception) -> ConfigError:
        rule = f"holds a {file.name} that cannot be read ({type(error).__name__}: {error})"
        return ConfigError("--workdir", str(self.path), rule)

    def _check_arrays(self, changed: dict[str, tuple[Any, Any]]) -> None:
        if not saved_steps(self.checkpoints):
            return
        for key, (old, new) in changed.items():
            if KEYS[key].resume != ARRAYS:
                continue
            if key == "algorithm.ref_refresh_every" and old > 0:
                continue  # the reference is there, however often it changes
            rule = f"the checkpoints in {self.path} were written with {old!r}, and hold other arrays"
            raise ConfigError(key, new, rule)

    def read_beginning(self, *, is_forced: bool) -> Beginning | None:
        """What `record_beginning` wrote; None where there is nothing.

        Args:   is_forced: whether a file that cannot be read counts as none.
        Raises: ConfigError: it cannot be read.
        """
        try:
            held = self._read(self.beginning)
            if held is None:
                return None
            return Beginning(datetime.datetime.fromisoformat(held["date"]), held["prompts"])
        except (ValueError, KeyError, TypeError) as error:
            if is_forced:
                return None
            refusal = error if isinstance(error, ConfigError) else self._unreadable(self.beginning, error)
            raise _with_way_out(refusal) from None

    def check_prompts(self, config: Config, held: Beginning, prompts: str) -> None:
        """Refuses to go on after a checkpoint with other training prompts; with resume=force it warns.

        Args:   held: of this folder; prompts: fingerprint of the prompts as they are now.
        Raises: ConfigError: they are others.
        """
        if held.prompts == prompts or not saved_steps(self.checkpoints):
            return
        key = "arithmetic.num_train" if config.arithmetic.num_train else "data.train_files"
        what = f"gives other prompts than those that the run in {self.path} was begun with: a file, the tokenizer "
        what += "or its chat template has changed"
        if config.checkpoint.resume != "force":
            insist = "choose another --workdir, or insist on going on with --config.checkpoint.resume=force"
            raise ConfigError(key, config.get(key), f"{what}; {insist}")
        logger.warning("WARNING: %s=%r %s.", key, config.get(key), what)

    @contextlib.contextmanager
    def hold(self, config: Config) -> Iterator[None]:
        """Makes the folder this process's own, and removes what dead runs left half written.

        Raises: ConfigError: another process has it, or has made another run of it since `check`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--workdir", str(self.path), f"cannot be made ({error.strerror})") from None
        with lock.hold(self.lock):
            self._check_config(config)
            for folder in (self.path, self.checkpoints, self.data):
                sweep(folder)
            yield

    def open(self, config: Config, beginning: Beginning) -> None:
        """Writes config.json and beginning.json if there are none, and starts the log. The folder must be held.

        The log begins with the keys that are set and that nothing reads, if there are any.
        """
        if self._is_missing(self.config):
            self.record(config)
        if self._is_missing(self.beginning):
            self.record_beginning(beginning)
        start_logging(self.log)
        if warning := unread_warning(config):
            logger.warning(warning)

    def _is_missing(self, file: Path) -> bool:
        return not file.exists() or not file.stat().st_size

    def record(self, config: Config) -> None:
        """Writes config.json: the configuration that the run has from now on."""
        write_whole(self.config, json.dumps(config.to_dict(), indent=2) + "\n")

    def record_beginning(self, beginning: Beginning) -> None:
        """Writes beginning.json: what is to stay so from now on."""
        write_whole(self.beginning, json.dumps(beginning.to_json(), indent=2) + "\n")


def check_place(key: str, path: Path) -> None:
    """Raises: ConfigError: there can be no folder PATH, or it cannot be written to. Args: key: that named it."""
    existing = next(path for path in (path, *path.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(key, str(path), f"must be a folder, but {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(key, str(path), f"{existing} cannot be written to")


def start_logging(file: Path | None = None, *, console: bool = True) -> None:
    """Sends this package's messages to the console as they are, and to `file` with the time."""
    logging.raiseExceptions = False  # a log on a full disk hides no message of the run's own
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    if console:
        handler = _Terminal() if sys.stdout.isatty() else logging.StreamHandler(sys.stdout)
        handler.setFormatter(_Printable("%(message)s"))
        logger.addHandler(handler)
    elif file is None:
        logger.addHandler(logging.NullHandler())  # or Python would print warnings itself
    if file is not None:
        to_file = logging.FileHandler(file)
        to_file.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s"))
        logger.addHandler(to_file)


class _Printable(logging.Formatter):
    """Python's, where texts of models and of reward functions never act on a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class _Terminal(logging.Handler):
    """Prints messages above the lines that are alive."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)


def _with_way_out(error: ConfigError) -> ConfigError:
    insist = "if this is the run's folder, --config.checkpoint.resume=force goes on without that file"
    return ConfigError(error.key, error.value, f"{error.rule}; {insist}")
