"""All recipes on the quickstart's task: held-out accuracy before and after, over several seeds.

    python benchmarks/recipes.py                                        # every recipe, seeds 0, 1, 2
    python benchmarks/recipes.py --recipes=gsm8k_rloo,gsm8k_dapo --seeds=0
    python benchmarks/recipes.py --seeds=0 --config.trainer.num_steps=2 --config.sft.num_steps=10

Claimed: each recipe improves the quickstart's accuracy, on every seed. A run is configs/quickstart.py (model,
data, learning rate, steps) with all that a recipe changes of configs/gsm8k.py, but for the number of completions a
prompt and the temperature, which stay the quickstart's. The recipes of a seed begin with the same warm-started
model, made once. Each run is the README's own command in a process and a folder of its own; the accuracies are the
first and the last `val/accuracy` of its metrics.jsonl. Seconds are those of the run, the warm start not counted.
All other arguments, written --config.SECTION.KEY=VALUE, go to both commands; those of sft and random_model to the
warm start only.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
OF_THE_RUN = {"algorithm.group_size", "rollout.temperature", "logging.experiment_name"}


def main() -> None:
    recipes = sorted(path.stem for path in CONFIGS.glob("gsm8k_*.py"))
    parser = common.make_parser(__doc__)
    parser.add_argument("--recipes", default=",".join(["gsm8k", *recipes]), help="separated by commas")
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    args, overrides = parser.parse_known_args()
    common.print_environment()
    seeds = [int(seed) for seed in args.seeds.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        models = {seed: warm_start(Path(folder) / str(seed), seed, overrides) for seed in seeds}
        print_table(args, models, overrides)


def print_table(args: argparse.Namespace, models: dict[int, Path], overrides: list[str]) -> None:
    """One line a recipe: accuracy after each seed, the mean before and after, and seconds a run.

    Args: models: seed -> the model that it begins with.
    """
    seeds = list(models)
    columns = " ".join(f"{f'seed {seed}':>8}" for seed in seeds)
    print(f"{'recipe':<22} {'before':>8} {columns} {'mean':>8} {'points':>8} {'a run':>8}")
    improved = True
    for recipe in args.recipes.split(","):
        flags = [f"--config.{key}={value}" for key, value in differences(recipe).items()]
        begin = lambda seed: [
            *common.without(("sft", "random_model"), overrides),
            *of_seed(seed),
            "--config.sft.num_steps=0",
            f"--config.model.path={models[seed]}",
        ]
        runs = [run([*flags, *begin(seed)]) for seed in seeds]
        before, after, seconds = (statistics.mean(values) for values in zip(*runs, strict=True))
        improved &= all(run[1] > run[0] for run in runs)
        each = " ".join(f"{run[1]:>8.1%}" for run in runs)
        points = 100 * (after - before)
        print(
            f"{recipe:<22} {before:>8.1%} {each} {after:>8.1%} {points:>+8.1f} {seconds:>6.0f} s", flush=True
        )
    print(f"aim: every recipe improves on every seed: {'reached' if improved else 'not reached'}")


def differences(recipe: str) -> dict[str, Any]:
    """What a recipe changes of configs/gsm8k.py, dotted key -> value, with sizes as in the quickstart."""
    base, values = (common.shipped(name).to_dict() for name in ("gsm8k", recipe))
    changed = {
        f"{section}.{key}": value
        for section, keys in values.items()
        for key, value in keys.items()
        if value != base[section][key] and f"{section}.{key}" not in OF_THE_RUN
    }
    if changed.get("reward.overlong_buffer"):
        changed["reward.overlong_buffer"] = common.shipped("quickstart").data.max_response_length // 5
    return changed


def of_seed(seed: int) -> list[str]:
    return [f"--config.trainer.seed={seed}"]


def warm_start(workdir: Path, seed: int, overrides: list[str]) -> Path:
    """Makes the model that all recipes of a seed begin with."""
    command([sys.executable, "-m", "grpo_jax.sft", "--config=configs/quickstart.py", f"--workdir={workdir}",
             *overrides, *of_seed(seed)])  # fmt: skip
    return workdir / "sft-model"


def command(words: list[str]) -> None:
    done = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nended with exit code {done.returncode}:\n{done.stdout[-2000:]}")


def run(flags: list[str]) -> tuple[float, float, float]:
    """Trains once. Returns accuracy before and after, and seconds."""
    with tempfile.TemporaryDirectory() as workdir:
        start = time.perf_counter()
        command([sys.executable, "-m", "grpo_jax.train", "--config=configs/quickstart.py",
                 f"--workdir={workdir}", *flags])  # fmt: skip
        seconds = time.perf_counter() - start
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    accuracies = [m["val/accuracy"] for m in map(json.loads, lines) if "val/accuracy" in m]
    return accuracies[0], accuracies[-1], seconds


if __name__ == "__main__":
    main()
