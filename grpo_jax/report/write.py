"""Writes report.html of a run, and the pages of its steps."""

import os
from collections.abc import Sequence
from pathlib import Path

from grpo_jax.config import ConfigError
from grpo_jax.report.page import run_page
from grpo_jax.report.read import RunFacts, check_is_run, read_run, saved_steps
from grpo_jax.report.rollouts import files_of, read_step
from grpo_jax.report.step_page import step_page
from grpo_jax.run.workdir import Workdir
from grpo_jax.storage.files import write_whole

COMPARISON = "comparison.html"
MOST_PAGES = 100
"""Pages of steps that are made unasked, those of the last steps: one can have 5 MB."""


def write_report(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Writes the page of one run, or of several beside one another, and the missing pages of their steps.

    Args:    paths: workdirs, at least one; output: the file; None: report.html, or of several, comparison.html
             in the first.
    Returns: the file.
    Raises:  ConfigError: a workdir holds no run. OSError: a file cannot be written.
    """
    return write_runs([read_run(path) for path in paths], output)


def write_runs(runs: Sequence[RunFacts], output: Path | None = None) -> Path:
    """The same of runs that were read already; what is wrong with their steps is added to their notes."""
    paths = [run.path for run in runs]
    file = output or (Workdir(paths[0]).report if len(paths) == 1 else paths[0] / COMPARISON)
    file.parent.mkdir(parents=True, exist_ok=True)
    notes = [write_missing_steps(Workdir(path)) for path in paths]
    links = [_links(run, file.absolute().parent) for run in runs]
    for run, more in zip(runs, notes, strict=True):
        run.notes.extend(more)
    write_whole(file, run_page(runs, links))
    return file


def write_missing_steps(workdir: Workdir) -> list[str]:
    """Writes the pages of the last steps that have none, or an older one. Returns what went wrong, a line each."""
    notes, steps = [], saved_steps(workdir)
    for step in steps[-MOST_PAGES:]:
        sources = [s for s in steps if s >= step][:2]  # the next one, too, since the page has a link to it
        changed = max(f.stat().st_mtime for s in sources for f in files_of(workdir, s) if f.exists())
        page = page_of(workdir, step)
        if page.exists() and page.stat().st_mtime >= changed:
            continue
        try:
            write_step(workdir, step)
        except ConfigError as error:
            notes.append(f"step {step} has no page: {error.rule}")
    return notes


def write_step(workdir: Workdir, step: int) -> Path:
    """Writes the page of a step, and returns it.

    Raises: ConfigError: it has no rollouts that could be read. OSError: it cannot be written.
    """
    check_is_run(workdir)
    steps = saved_steps(workdir)
    neighbours = {"The run": f"../{workdir.report.name}"}
    before, after = [s for s in steps if s < step][-1:], [s for s in steps if s > step][:1]
    neighbours |= {f"← step {s}": page_of(workdir, s).name for s in before}
    neighbours |= {f"step {s} →": page_of(workdir, s).name for s in after}
    page = page_of(workdir, step)
    html = step_page(read_step(workdir, step), neighbours)
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, html)
    return page


def page_of(workdir: Workdir, step: int) -> Path:
    """The page of a step, whether it is there or not."""
    return workdir.step_pages / f"step-{step:06d}.html"


def _links(run: RunFacts, base: Path) -> dict[int, str]:
    """Step -> address of its page, seen from the folder `base`, of those that there are."""
    pages = {step: page_of(Workdir(run.path), step) for step in run.saved_steps}
    return {
        step: os.path.relpath(page.absolute(), base).replace(os.sep, "/")
        for step, page in pages.items()
        if page.exists()
    }
