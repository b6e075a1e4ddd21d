"""What the pages cost: size, seconds to write and to open, and the share of a step that saving tokens takes.

    python benchmarks/report.py [--browser]

Runs of 10, 1,000 and 10,000 steps are made up, with 256 completions a step, and so is a step of 1,024 completions
of 400 tokens. With --browser (Chromium, its driver, selenium) pages are opened, too, five times each.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from grpo_jax.report.write import write_report
from grpo_jax.run.token_file import write_tokens
from grpo_jax.types import (
    Completion,
    Prompt,
    RewardResult,
    RolloutGroup,
    ScoredBatch,
    StepResult,
    TokenUse,
    TokenValues,
)

ROOT = Path(__file__).resolve().parents[1]
GROUPS, GROUP_SIZE, TOKENS, PROMPT = 256, 4, 400, 100


def helper(path: Path):
    """A module of a folder that is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(action, times: int = 3) -> float:
    """Median of the wall-clock times."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        action()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def made_up_step() -> StepResult:
    """A step with random tokens: the worst to compress."""
    random = np.random.default_rng(0)
    text = "a word " * TOKENS

    def completion() -> Completion:
        ids = tuple(random.integers(0, 150_000, TOKENS).tolist())
        return Completion(ids, tuple((-random.random(TOKENS)).tolist()), text, "stop", 3)

    groups = [
        RolloutGroup(
            Prompt(f"train/{n}", (1,) * PROMPT, "What?", "7", "", {}),
            tuple(completion() for _ in range(GROUP_SIZE)),
            (0, n),
        )
        for n in range(GROUPS)
    ]
    values = lambda: random.random((GROUPS * GROUP_SIZE, PROMPT + TOKENS), np.float32)
    flags = lambda: values() > 0.5
    tokens = TokenValues(values(), values(), values(), values(), values(), flags(), flags())
    rewards = RewardResult.of_one(random.random((GROUPS, GROUP_SIZE)).astype(np.float32), ())
    use = TokenUse(*np.zeros((2, GROUPS * GROUP_SIZE), int))
    return StepResult(ScoredBatch(groups, rewards), use, [], {}, tokens)


def opening_ms(pages: list[Path]) -> list[str]:
    """Medians of five, by the page's own clock."""
    shots = helper(ROOT / "docs" / "screenshots.py")
    with shots.browser() as driver:
        return [f"{statistics.median(shots.open_page(driver, page) for _ in range(5)):.0f}" for page in pages]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--browser", action="store_true")
    args = parser.parse_args()
    run_folders = helper(ROOT / "tests" / "report" / "run_folders.py")
    with tempfile.TemporaryDirectory() as folder:
        rows, pages = [], []
        for num_steps in (10, 1_000, 10_000):
            path = run_folders.write_run(Path(folder) / str(num_steps), num_steps, num_completions=256)
            taken = seconds(lambda path=path: write_report([path]))
            pages.append(path / "report.html")
            rows.append((f"{num_steps:,} steps", f"{pages[-1].stat().st_size / 1e6:.2f}", f"{taken:.2f}"))
        path = Path(folder) / "10"
        result, file = made_up_step(), path / "rollouts" / "step-000003.parquet"
        saving = seconds(lambda: write_tokens(file, result, 0))
        without = dataclasses.replace(result, tokens=None)
        alone = seconds(lambda: write_tokens(path / "none.parquet", without, 0))
        start = time.perf_counter()
        write_report([path])
        made = time.perf_counter() - start
        pages.append(path / "report" / "step-000003.html")
        rows.append(("a step's page", f"{pages[-1].stat().st_size / 1e6:.2f}", f"{made:.2f}"))
        opened = opening_ms(pages) if args.browser else [""] * len(rows)
        print("page            MB     s to write   ms to open")
        for (name, size, taken), ms in zip(rows, opened, strict=True):
            print(f"{name:<15} {size:<6} {taken:<12} {ms}")
        size = file.stat().st_size / 1e6
        print(f"tokens of {GROUPS * GROUP_SIZE:,} completions of {TOKENS}: {saving:.2f} s, {size:.1f} MB")
        print(f"  the sampler's alone: {alone:.2f} s")


if __name__ == "__main__":
    sys.exit(main())
