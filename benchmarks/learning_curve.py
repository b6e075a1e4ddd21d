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
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
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
    print(f"peer      {peer_versions(args.peer_python)}")
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
    print(f"picture   {args.picture}")
    if args.json:
        content = {"before": before, "accuracies": accuracies, "curves": curves}
        Path(args.json).write_text(json.dumps(content))


def our_config(overrides: Sequence[str]) -> Any:
    """The configuration that our side will have, from which TRL's settings are taken."""
    from grpo_jax.config.command_line import one_line_errors, parse_command_line

    argv = [f"--config={ROOT / CONFIG}", *flags(EQUAL), *overrides]
    with one_line_errors():
        return parse_command_line("grpo_jax.train", None, argv)[0]


def flags(values: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def run(command: Sequence[str], log: Path) -> str:
    """Runs a command to its end, keeping what it prints. Returns that; ends everything if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("w") as output:
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=env).returncode
    text = log.read_text(errors="replace")
    if code:
        sys.exit(f"{' '.join(command)}\nended with exit code {code}:\n{text[-3000:]}")
    return text


def peer_versions(python: str) -> str:
    code = "import trl, torch, transformers as t; print(f'TRL {trl.__version__}, torch {torch.__version__}, "
    code += "transformers {t.__version__}')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the peer needs TRL: pip install trl datasets, or name its environment in --peer_python\n"
                 f"{done.stderr[-500:]}")  # fmt: skip
    return done.stdout.splitlines()[-1]


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
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [line["reward/mean"] for line in lines if line["step"]], next(workdir.glob("checkpoint-*"))


def train_theirs(
    args: Any, config: Any, overrides: Sequence[str], seed: int, warm: Path, workdir: Path
) -> tuple[list[float], Path]:
    """Returns the mean reward of each step, and the trained model's folder."""
    rows = config.data.train_batch_size * config.algorithm.group_size
    micro_rows = min(rows, 32)  # the loss does not depend on it
    settings = dict(
        per_device_train_batch_size=micro_rows,
        gradient_accumulation_steps=rows // micro_rows,
        num_generations=config.algorithm.group_size,
        max_completion_length=config.data.max_response_length,
        temperature=config.rollout.temperature,
        epsilon=config.algorithm.clip_low,
        epsilon_high=config.algorithm.clip_high,
        learning_rate=config.optim.learning_rate,
        adam_beta1=config.optim.beta1,
        adam_beta2=config.optim.beta2,
        adam_epsilon=1e-8,
        weight_decay=config.optim.weight_decay,
        beta=config.algorithm.kl_coef,
        max_grad_norm=config.optim.max_grad_norm,
        num_train_epochs=config.trainer.total_epochs,
        max_steps=config.trainer.num_steps or -1,
        seed=seed,
    )
    command = [
        args.peer_python, str(HERE / "peers" / "trl_curve.py"), f"--model={warm / 'sft-model'}",
        f"--data={warm / 'data' / 'train.parquet'}", f"--output={workdir}", f"--settings={json.dumps(settings)}",
    ]  # fmt: skip
    text = run(command, workdir.with_suffix(".log"))
    lines = [line.removeprefix("STEP ") for line in text.splitlines() if line.startswith("STEP ")]
    return [json.loads(line)["reward"] for line in lines], workdir


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


def last_quarter(curve: Sequence[float]) -> float:
    return statistics.fmean(curve[-max(1, len(curve) // 4) :])


def mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def print_curves(curves: dict[str, list[list[float]]]) -> None:
    """The curves as CSV, and how far their means are apart."""
    columns = [(f"{side} {i}", run) for side, runs in curves.items() for i, run in enumerate(runs)]
    print("step," + ",".join(name for name, _ in columns))
    for step, values in enumerate(zip(*(run for _, run in columns), strict=True), 1):
        print(f"{step}," + ",".join(f"{value:.4f}" for value in values))
    ours, theirs = (mean_curve(runs) for runs in curves.values())
    difference = statistics.fmean(a - b for a, b in zip(ours, theirs, strict=True))
    for side, runs in curves.items():
        print(f"{side:<9} mean reward over all steps " + ", ".join(f"{statistics.fmean(r):.3f}" for r in runs)
              + "; over the last quarter " + ", ".join(f"{last_quarter(r):.3f}" for r in runs))  # fmt: skip
    print(f"ours less theirs, mean over all steps and seeds: {difference:+.4f}")


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """Each run thin, each side's mean thick."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
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
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})
    pyplot.close(figure)


if __name__ == "__main__":
    main()
