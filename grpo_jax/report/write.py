"""Writes report.html of a run, and the pages of its steps."""

from collections.abc import Sequence
from pathlib import Path

from grpo_jax.report.page import run_page
from grpo_jax.report.read import RunFacts, read_run
from grpo_jax.run.workdir import Workdir
from grpo_jax.storage.files import write_whole


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of one run, or of several beside one another.

    Args:    paths: workdirs, at least one; output: the file; None: report.html of the first.
    Returns: the file.
    Raises:  ConfigError: a workdir holds no run. OSError: the file cannot be written.
    """
    runs = [read_run(path) for path in paths]
    file = output or Workdir(paths[0]).report
    links = [_links(run, file.absolute().parent) for run in runs]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, run_page(runs, links))
    return file


def _links(run: RunFacts, base: Path) -> dict[int, str]:
    """Step -> address of its page, seen from the folder `base`."""
    return {}
