"""Weights & Biases, MLflow and trackio beside metrics.jsonl: the same numbers, and never a reason to stop.

Where they go, online or not, and with which key, is said by each service's own environment variables. A run that
goes on continues the same run there: its name is in WORKDIR/trackers.json.
"""

import contextlib
import importlib.util
import io
import json
import logging
import netrc
import os
import urllib.parse
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from grpo_jax.config import Config, ConfigError
from grpo_jax.config.text import verbatim
from grpo_jax.storage.files import write_whole

logger = logging.getLogger(__name__)

PACKAGES = {"wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
"""Logger -> the package that it needs, which is also the name of the extra."""


class Tracker(Protocol):
    """A run of a service. Any method may raise what it likes."""

    def write(self, values: Mapping[str, float], step: int) -> None:
        """Writes finite numbers by name."""

    def write_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        """Writes texts, as a table where the service has tables."""

    def close(self) -> None: ...


def check_trackers(loggers: Sequence[str]) -> None:
    """Raises: ConfigError: a logger's package is not installed, or it has no key and is not offline."""
    for name in loggers:
        if name not in PACKAGES:
            continue
        if importlib.util.find_spec(PACKAGES[name]) is None:
            rule = f"the package {PACKAGES[name]} is not installed: pip install 'grpo_jax[{name}]'"
            raise ConfigError("logging.loggers", name, rule)
        if name == "wandb" and not _has_wandb_key():
            rule = "has no key: run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
            raise ConfigError("logging.loggers", name, rule)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_MODE", "online") in ("offline", "disabled", "dryrun"):
        return True
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urllib.parse.urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC", ""), "~/.netrc", "~/_netrc"):
        try:
            if file and netrc.netrc(Path(file).expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError, RuntimeError):
            continue
    return False


class Trackers:
    """All that a run was asked to write to. One that fails is told of once, and left out from then on."""

    def __init__(self, folder: Path, config: Config):
        """Args: folder: the workdir."""
        self._open: dict[str, Tracker] = {}
        names = [name for name in config.logging.loggers if name in PACKAGES]
        if not names:
            return
        ids = _read_ids(folder / "trackers.json", names)
        for name in names:
            self._try(name, partial(self._start, name, folder, config, ids[name]))

    def _start(self, name: str, folder: Path, config: Config, run_id: str) -> None:
        self._open[name] = MAKERS[name](folder, config, run_id)

    def write(self, values: Mapping[str, float | None], step: int) -> None:
        """Writes the points of a step; None is no point."""
        points = {name: value for name, value in values.items() if value is not None}
        for name, tracker in list(self._open.items()):
            self._try(name, partial(tracker.write, points, step))

    def write_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        for which, tracker in list(self._open.items()):
            self._try(which, partial(tracker.write_samples, name, texts, step))

    def close(self) -> None:
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open = {}

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # a network, a server, a full disk
            self._open.pop(name, None)
            reason = str(error).strip().partition("\n")[0]
            logger.warning("WARNING: %s gets no more points, training goes on: %s", name, reason)


def _read_ids(file: Path, names: Sequence[str]) -> dict[str, str]:
    """The run's ids by logger: those that an earlier start left, and new ones for the others."""
    try:
        ids = {str(name): str(value) for name, value in json.loads(file.read_text()).items()}
    except (OSError, ValueError, AttributeError):
        ids = {}
    new = {name: uuid.uuid4().hex[:16] for name in names if name not in ids}
    if new:
        write_whole(file, json.dumps(ids | new) + "\n")
    return ids | new


class Wandb:
    """A run of Weights & Biases, whose files are in WORKDIR/wandb."""

    def __init__(self, folder: Path, config: Config, run_id: str):
        import wandb

        self._run = wandb.init(
            project=config.logging.project_name.replace("/", "-"),
            name=config.logging.experiment_name,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config.to_dict(),
            settings=wandb.Settings(silent=True, console="off"),
        )
        # wandb's own step may never go back, as a run does that was interrupted between two checkpoints.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({"step": step, **values})

    def write_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        import wandb

        table = wandb.Table(columns=["step", "sample"], data=[[step, text] for text in texts])
        self._run.log({"step": step, f"{name}_table": table})

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in WORKDIR/mlruns."""

    def __init__(self, folder: Path, config: Config, run_id: str):
        # A folder of files, the only store that needs no server and no database, has to be asked for.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        uri = os.environ.get("MLFLOW_TRACKING_URI") or (folder / "mlruns").resolve().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name, tag = config.logging.project_name, "grpo_jax.id"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found = self._client.search_runs([number], f"tags.`{tag}` = '{run_id}'", max_results=1)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        tags = {tag: run_id}
        run = self._client.create_run(number, tags=tags, run_name=config.logging.experiment_name)
        self._run = run.info.run_id
        self._client.log_dict(self._run, config.to_dict(), "config.json")

    def write(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._run, name.replace("@", "_at_"), value, step=step)

    def write_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        content = {"columns": ["step", "sample"], "data": [[step, text] for text in texts]}
        self._client.log_dict(self._run, content, f"{name}/step-{step:06d}.json")

    def close(self) -> None:
        self._client.set_terminated(self._run)


class Trackio:
    """A run of trackio: in TRACKIO_DIR, or in WORKDIR/trackio."""

    def __init__(self, folder: Path, config: Config, run_id: str):
        os.environ.setdefault("TRACKIO_DIR", str((folder / "trackio").resolve()))  # read when it is imported
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):  # it prints how to look at it
            self._run = trackio.init(
                config.logging.project_name.replace("/", "-"),
                name=f"{config.logging.experiment_name}-{run_id[:6]}".replace("/", "-"),
                config=config.to_dict(),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def write_samples(self, name: str, texts: Sequence[str], step: int) -> None:
        import trackio

        self._run.log({f"{name}_samples": trackio.Markdown(verbatim(texts))}, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            self._run.finish()


MAKERS: dict[str, Callable[[Path, Config, str], Tracker]] = {
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
}
