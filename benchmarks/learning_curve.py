"""Reward against step: our training beside TRL's, from the same warm-started model, on a CPU.

    python benchmarks/learning_curve.py --seeds=0,1,2 --picture=docs/images/learning_curve_trl.png
    python benchmarks/learning_curve.py --peer_python=OTHER_ENVIRONMENT/bin/python

Expected: curves that lie within one another's spread between seeds. The model, its warm start and the problems are
those of configs/quickstart.py: both sides start from the same Hugging Face folder, take the same problems in the
same order and score completions by the same function (the GSM8K rule). Equal are also: prompts a step, group size,
lengths, temperature, learning rate (constant), AdamW without weight decay, gradient clipping, ratio clipping, one
update a step, mean over the tokens of the batch, no KL, float32. Different: the random numbers that completions
are sampled with, and what is added to a group's spread (1e-6 here, 1e-4 there). Ours samples with the local
engine, TRL with transformers' generate. Every `--config.KEY=VALUE` goes to both as far as TRL has the key.

Printed are both curves as CSV, one column a run, and the greedy held-out accuracy of every model at the end, which
`grpo_jax.evaluate` measures for both. The peer needs trl and datasets.
"""

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from curves import (
    ROOT,
    TRL_CURVE,
    flags,
    last_quarter,
    mean_curve,
    new_figure,
    read_lines,
    run,
    save_figure,
    trl_settings,
    trl_versions,
)

CONFIG = "configs/quickstart.py"
SIDES = {"grpo_jax": "tab:blue", "TRL": "tab:orange"}
EQUAL = {
    "optim.weight_decay": 0.0,
    "algorithm.dual_clip": 0.0,
    "algorithm.kl_coef": 0.0,
    "data.shuffle": False,
    "eval.before_training": False,
    "eval.every_epochs": 0,
    "eval.every_steps": 0,
}
"""What the shipped configuration has otherwise."""


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="of the training, separated by commas")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter of TRL's environment")
    parser.add_argument("--picture", default="learning_curve_trl.png", help="PNG to write")
    parser.add_argument("--json", default="", help="file for the curves")
    parser.add_argument("--folder", default="", help="all runs stay here; default: a temporary one")
    args, overrides = parser.parse_known_args()
    config = our_config(overrides)
    common.print_environment()
    common.warn_if_busy()
    print(f"peer      {trl_versions(args.peer_python)}")
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        warm = warm_start(folder, overrides)
        before = evaluate(config, warm / "sft-model", warm)
        print(f"before    accuracy {before:.1%} (greedy, held out)", flush=True)
        curves: dict[str, list[list[float]]] = {side: [] for side in SIDES}
        accuracies: dict[str, list[float]] = {side: [] for side in SIDES}
        for seed in map(int, args.seeds.split(",")):
            for side, train in zip(SIDES, (train_ours, train_theirs), strict=True):
                start = time.perf_counter()
                curve, model = train(args, config, overrides, seed, warm, folder / f"{side}-{seed}")
                seconds = time.perf_counter() - start
                curves[side].append(curve)
                accuracies[side].append(evaluate(config, model, warm))
                print(f"  {side:<9} seed {seed}: mean reward of the last quarter {last_quarter(curve):.3f}, "
                      f"accuracy {accuracies[side][-1]:.1%}, {seconds:.0f} s", flush=True)  # fmt: skip
    print_curves(curves)
    draw(curves, Path(args.picture))
    if args.json:
        content = {"before": before, "accuracies": accuracies, "curves": curves}
        Path(args.json).write_text(json.dumps(content))


def our_config(overrides: Sequence[str]) -> Any:
    """The configuration that our side will have, from which TRL's settings are taken."""
    from grpo_jax.config.command_line import one_line_errors, parse_command_line

    argv = [f"--config={ROOT / CONFIG}", *flags(EQUAL), *overrides]
    with one_line_errors():
        return parse_command_line("grpo_jax.train", None, argv)[0]


def warm_start(folder: Path, overrides: Sequence[str]) -> Path:
    """Makes the model that both start from, and the problems. Returns the workdir that holds them."""
    warm = folder / "warm"
    if not (warm / "sft-model").exists():
        command = [sys.executable, "-m", "grpo_jax.sft", f"--config={CONFIG}", f"--workdir={warm}"]
        run([*command, *flags(EQUAL), *overrides], folder / "warm.log")
    return warm


def train_ours(
    args: Any, config: Any, overrides: Sequence[str], seed: int, warm: Path, workdir: Path
) -> tuple[list[float], Path]:
    """Returns the mean reward of each step, and the trained model's folder."""
    values = {
        "model.path": warm / "sft-model",
        "arithmetic.num_train": 0,  # read from the files
        "data.train_files": f'("{warm / "data" / "train.parquet"}",)',
        "data.val_files": f'("{warm / "data" / "val.parquet"}",)',
        "sft.num_steps": 0,
        "trainer.seed": seed,
    }
    command = [sys.executable, "-m", "grpo_jax.train", f"--config={CONFIG}", f"--workdir={workdir}"]
    ours = common.without(("sft", "random_model", "arithmetic"), overrides)
    run([*command, *flags(EQUAL), *ours, *flags(values)], workdir.with_suffix(".log"))
    return rewards(workdir), next(workdir.glob("checkpoint-*"))


def train_theirs(
    args: Any, config: Any, overrides: Sequence[str], seed: int, warm: Path, workdir: Path
) -> tuple[list[float], Path]:
    """Returns the mean reward of each step, and the trained model's folder."""
    settings = trl_settings(config, seed=seed, micro_rows=32, dtype="float32")
    command = [
        args.peer_python, str(TRL_CURVE), f"--model={warm / 'sft-model'}",
        f"--data={warm / 'data' / 'train.parquet'}", f"--output={workdir}", f"--settings={json.dumps(settings)}",
    ]  # fmt: skip
    run(command, workdir.with_suffix(".log"))
    return rewards(workdir), workdir


def rewards(workdir: Path) -> list[float]:
    return [line["reward/mean"] for line in read_lines(workdir / "metrics.jsonl") if line["step"]]


def evaluate(config: Any, model: Path, warm: Path) -> float:
    """Greedy accuracy on the held-out problems, of either side's model."""
    with tempfile.TemporaryDirectory() as temporary:
        result = Path(temporary) / "result.json"
        command = [
            sys.executable, "-m", "grpo_jax.evaluate", f"--model={model}", f"--json={result}",
            f"--data={warm / 'data' / 'val.parquet'}", f"--max_response_length={config.data.max_response_length}",
        ]  # fmt: skip
        run(command, Path(temporary) / "log")
        return float(json.loads(result.read_text())["accuracy"])


def print_curves(curves: dict[str, list[list[float]]]) -> None:
    """The curves as CSV, and how far their means are apart."""
    columns = [(f"{side} {i}", curve) for side, runs in curves.items() for i, curve in enumerate(runs)]
    print("step," + ",".join(name for name, _ in columns))
    for step, values in enumerate(zip(*(curve for _, curve in columns), strict=True), 1):
        print(f"{step}," + ",".join(f"{value:.4f}" for value in values))
    ours, theirs = (mean_curve(runs) for runs in curves.values())
    difference = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    for side, runs in curves.items():
        print(f"{side:<9} mean reward over all steps " + ", ".join(f"{statistics.fmean(r):.3f}" for r in runs)
              + "; over the last quarter " + ", ".join(f"{last_quarter(r):.3f}" for r in runs))  # fmt: skip
    print(f"ours less theirs, mean over all steps and seeds: {difference:+.4f}")


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Each run thin, each side's mean thick."""
    figure, axes = new_figure(1)
    for side, runs in curves.items():
        mean = mean_curve(runs)
        steps = range(1, len(mean) + 1)
        for curve in runs:
            axes.plot(steps, curve, color=SIDES[side], alpha=0.3, linewidth=1)
        label = f"{side}, mean of {len(runs)} seeds" if len(runs) > 1 else side
        axes.plot(steps, mean, color=SIDES[side], linewidth=2, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward of the sampled completions")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    save_figure(figure, path)


if __name__ == "__main__":
    main()
