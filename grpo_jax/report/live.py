"""Writes the page of a run while it trains: every few minutes, and at its end, however that comes."""

import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import jax

from grpo_jax.config import Config, ConfigError
from grpo_jax.report.starts import Recipe, record_start
from grpo_jax.report.write import write_report
from grpo_jax.run.hosts import Hosts
from grpo_jax.run.workdir import Workdir

logger = logging.getLogger(__name__)


class Reporter:
    """A thread that writes the page of a run every `logging.report_every_s`, once the run has begun."""

    def __init__(self, config: Config, path: Path, recipe: Recipe | None):
        self._config, self._path, self._recipe = config, path, recipe
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, num_steps: int) -> None:
        """Notes down what was started, in the workdir, which this process holds. Args: num_steps: of the run."""
        devices = f"{jax.device_count()} x {jax.local_devices()[0].device_kind}"
        workdir = Workdir(self._path)
        record_start(workdir, self._config, self._recipe, num_steps=num_steps, devices=devices)
        self._thread = threading.Thread(target=self._write_often, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Writes the page for the last time, if the run has begun."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._write()

    def _write_often(self) -> None:
        every_s = self._config.logging.report_every_s
        while every_s and not self._over.wait(every_s):
            self._write()

    def _write(self) -> None:
        """A page that cannot be written is a warning, and no end of the run."""
        try:
            write_report([self._path])
        except (OSError, ConfigError) as error:
            logger.warning("WARNING: %s was not written (%s)", Workdir(self._path).report, error)
        except Exception:  # whatever is wrong with a page, the run goes on
            logger.warning("WARNING: %s was not written", Workdir(self._path).report, exc_info=True)


class NoReporter:
    """Of a process of the run that is not the first."""

    def begin(self, num_steps: int) -> None:
        pass


@contextlib.contextmanager
def reported(
    config: Config, path: Path, hosts: Hosts, recipe: Recipe | None
) -> Iterator[Reporter | NoReporter]:
    """What writes the page of a run. To be entered before the run is opened: the last page is of a closed one.

    Args: path: the workdir; recipe: where the configuration comes from.
    """
    if not hosts.is_first:
        yield NoReporter()
        return
    reporter = Reporter(config, path, recipe)
    try:
        yield reporter
    finally:
        reporter.close()
