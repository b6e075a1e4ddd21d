"""What came out of training runs of several sides, dtypes and seeds: files, tables and the picture."""

import dataclasses
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import curves

OURS, TRL = "grpo_jax", "TRL"
PROBS_DIFF, MULT_ERROR = "training/rollout_probs_diff_mean", "training/token_mult_prob_error"
KEPT = ("step", "time", "reward/mean", "val/accuracy", "kl/mean", "frac_reward_zero_std", "actor/grad_norm")
KEPT += ("response_length/mean", "timing_s/step", PROBS_DIFF, MULT_ERROR)
"""The metrics of a line that are kept; TRL's lines have some of them."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run, as far as it has come."""

    side: str
    dtype: str
    seed: int
    lines: list[dict[str, Any]]
    """Of its metrics.jsonl: step, time and the metrics below."""

    @property
    def label(self) -> str:
        return f"{self.side} {self.dtype}"

    @property
    def key(self) -> tuple[str, str, int]:
        return self.side, self.dtype, self.seed

    def points(self, name: str) -> dict[int, float]:
        return curves.points(self.lines, name)


def read_run(workdir: Path, side: str, dtype: str, seed: int) -> Run:
    lines = curves.read_lines(workdir / "metrics.jsonl")
    return Run(side, dtype, seed, [{k: line[k] for k in KEPT if k in line} for line in lines])


def write_json(runs: Sequence[Run], file: str) -> None:
    """Writes what `read_runs` reads; nothing where no file is named."""
    if file:
        Path(file).write_text(json.dumps([dataclasses.asdict(run) for run in runs]))


def read_runs(files: Sequence[str]) -> list[Run]:
    """The runs of files that `write_json` wrote. Ends the program with one line where a file is none of them."""
    runs: list[Run] = []
    for file in files:
        try:
            runs += [Run(**values) for values in json.loads(Path(file).read_text())]
        except (OSError, ValueError, TypeError) as error:
            sys.exit(f"error: --draw: {file!r} is no file that --json wrote ({error})")
    if not runs:
        sys.exit("error: --draw: there are no runs in these files")
    return runs


def merge(runs: Sequence[Run]) -> list[Run]:
    """One of each side, dtype and seed, that which came farthest; TRL's last, and in order."""
    farthest: dict[tuple[str, str, int], Run] = {}
    for run in runs:
        other = farthest.get(run.key)
        if other is None or len(run.lines) > len(other.lines):
            farthest[run.key] = run
    return sorted(farthest.values(), key=lambda run: (run.side == TRL, run.side, run.dtype, run.seed))


def by_label(runs: Sequence[Run]) -> dict[str, list[Run]]:
    labels = dict.fromkeys(run.label for run in runs)
    return {label: [run for run in runs if run.label == label] for label in labels}


def percents(run: Run) -> str:
    return ", ".join(f"{step}: {value:.1%}" for step, value in sorted(run.points("val/accuracy").items()))


def report(runs: Sequence[Run], picture: Path) -> None:
    """Curves as CSV, one table, one picture."""
    for title, name in (("reward, mean of the sampled completions", "reward/mean"),
                        ("accuracy, held out, greedy", "val/accuracy")):  # fmt: skip
        print(f"\n{title}")
        print_csv([(f"{run.label} {run.seed}", run.points(name)) for run in runs])
    print_table(runs)
    print_means(runs)
    draw(runs, picture)


def print_csv(columns: Sequence[tuple[str, curves.Points]]) -> None:
    print("step," + ",".join(name for name, _ in columns))
    for step in sorted(set().union(*(points for _, points in columns))):
        cells = (f"{points[step]:.4f}" if step in points else "" for _, points in columns)
        print(f"{step}," + ",".join(cells))


def print_table(runs: Sequence[Run]) -> None:
    """A line a run. What a side does not report is a dash."""
    rows = [table_row(run) for run in runs]
    print("\n" + f"{'run':<24}" + "".join(f"{head:>13}" for head in rows[0]))
    for run, row in zip(runs, rows, strict=True):
        print(f"{f'{run.label}, seed {run.seed}':<24}" + "".join(f"{cell:>13}" for cell in row.values()))


def table_row(run: Run) -> dict[str, str]:
    """Head of the column -> what it says of a run."""
    accuracy = run.points("val/accuracy")
    rewards = list(run.points("reward/mean").values())
    no_spread = list(run.points("frac_reward_zero_std").values())
    first_kl = [value for step, value in run.points("kl/mean").items() if step == 1]
    return {
        "steps": str(len(rewards)),
        "before": f"{accuracy[min(accuracy)]:.1%}" if accuracy else "-",
        "after": f"{accuracy[max(accuracy)]:.1%}" if accuracy else "-",
        "last quarter": number([curves.last_quarter(rewards)]) if rewards else "-",
        "no spread": f"{statistics.fmean(no_spread):.1%}" if no_spread else "-",
        "s/step": number(curves.step_seconds(run.lines)),
        "probs diff": number(list(run.points(PROBS_DIFF).values())),
        "mult error": number(list(run.points(MULT_ERROR).values())),
        "kl at 1": number(first_kl),
    }


def number(values: Sequence[float]) -> str:
    """The median, or a dash."""
    return f"{statistics.median(values):.5g}" if values else "-"


def print_means(runs: Sequence[Run]) -> None:
    """Held-out accuracy of each side and dtype over its seeds: mean and range."""
    print("\naccuracy over the seeds: step, mean, range")
    for label, group in by_label(runs).items():
        rows = curves.band([run.points("val/accuracy") for run in group])
        cells = (f"{step}: {mean:.1%} ({least:.1%} to {most:.1%})" for step, mean, least, most in rows)
        print(f"  {label}, {len(group)} seeds: " + ", ".join(cells))


def draw(runs: Sequence[Run], path: Path) -> None:
    """Reward and held-out accuracy against the step: a line for the mean of the seeds, a band for their range."""
    figure, panels = curves.new_figure(2)
    titles = {
        "reward/mean": "mean reward of the sampled completions",
        "val/accuracy": "held-out accuracy, greedy",
    }
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for i, (label, group) in enumerate(by_label(runs).items()):
            rows = curves.band([run.points(name) for run in group])
            if not rows:
                continue
            steps, means, least, most = zip(*rows, strict=True)
            legend = f"{label}, {len(group)} seeds" if len(group) > 1 else label
            marker = "o" if name == "val/accuracy" else None
            axes.plot(steps, means, color=f"C{i}", marker=marker, markersize=4, label=legend)
            axes.fill_between(steps, least, most, color=f"C{i}", alpha=0.2, linewidth=0)
        axes.set_xlabel("step")
        axes.set_title(title, fontsize=10)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0].legend(loc="lower right")
    curves.save_figure(figure, path)
