"""A real model on a real task: reward and held-out accuracy against the step, over seeds and dtypes, beside TRL's.

    python benchmarks/real_model.py --model=models/SmolLM2-135M-Instruct --seeds=0,1,2 --peer=trl
    python benchmarks/real_model.py --model=DIR --folder=runs --time_limit_s=540 --seeds=0 --json=0.json
    python benchmarks/real_model.py --draw=0.json,1.json --picture=real_model.png

Aim, with the default recipe, configs/smollm.py: accuracy rises on every seed, and our curve and TRL's lie within
one another's range. The task is GSM8K, of which --max_calculations keeps the problems whose solution takes so few
(0: all). The recipe's warm start (sft.num_steps; 0: the model as it is) is on the worked answers of all training
problems, is made once, and is where all runs begin. Held-out accuracy is greedy, on the same selection of the test
split.

Both sides have the same folder, problems and order, reward function (strict GSM8K), prompts a step, group size,
lengths, temperature, learning rate (constant), AdamW without weight decay, gradient clipping, KL to a reference
(k3), one update a step, mean over the tokens of the batch, float32 weights, and the dtype of --dtypes in the
computation. Different are the random numbers, what is added to a group's spread (1e-6 here, 1e-4 there), and the
dtype that vLLM computes in, which in TRL is that of the model's folder. On an NVIDIA GPU both sample with vLLM on
that card; elsewhere ours with the local engine and TRL with transformers' generate. Every `--config.KEY=VALUE`
goes to both as far as TRL has the key; --peer_settings changes TRL's alone.

The run that --time_limit_s ends is saved, and the same command goes on with it, in the same --folder. --json holds
what there is after each run; --draw makes one table and one picture of several such files. Seconds a step are
medians from the end of one step to that of the next.
"""

import argparse
import contextlib
import itertools
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import common
import curves
import engine_common
import gpu_watch
from curve_report import OURS, TRL, Run, merge, percents, read_run, read_runs, report, write_json

EQUAL = {"optim.weight_decay": 0.0, "data.shuffle": False}
"""What both sides have, whatever the recipe says; an override has the last word."""


def main() -> None:
    args, overrides = parse_args()
    if args.draw:
        return report(merge(read_runs(args.draw.split(","))), Path(args.picture))
    check(args, overrides)
    common.print_environment()
    print(f"gpu       {engine_common.gpu_name()}; vLLM {common.version('vllm')}")
    if args.peer:
        print(f"peer      {curves.trl_versions(args.peer_python)}")
    runs: list[Run] = []
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory())).absolute()
        try:
            for run in train_all(args, overrides, folder):
                runs.append(run)
                write_json(runs, args.json)
        except curves.OutOfTime as stopped:
            print(f"stopped   {stopped} at the time limit; the same command goes on", flush=True)
            runs = [run for run in found(args, folder) if run.lines]
            write_json(runs, args.json)
    if runs:
        report(runs, Path(args.picture))


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default="", help="Hugging Face folder of an instruct model")
    parser.add_argument("--recipe", default="configs/smollm.py", help="configuration of both sides")
    parser.add_argument("--source", default="openai/gsm8k", help="of GSM8K: hub name or folder")
    parser.add_argument("--max_calculations", type=int, default=2, help="of a problem; 0: all problems")
    parser.add_argument("--steps", type=int, default=100, help="of GRPO")
    parser.add_argument("--eval_every", type=int, default=20, help="steps between two evaluations")
    parser.add_argument("--seeds", default="0", help="of the training, separated by commas")
    parser.add_argument(
        "--dtypes", default="", help="values of model.dtype; default: the recipe's, without a GPU float32"
    )
    parser.add_argument("--peer", default="", choices=("", "trl"), help="train TRL too")
    parser.add_argument("--only_peer", action="store_true", help="and not ours")
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter of TRL's environment")
    parser.add_argument("--peer_micro_batch", type=int, default=32, help="TRL: completions in memory at once")
    parser.add_argument(
        "--peer_settings", type=json.loads, default={}, help="JSON: TRL's settings by its own names"
    )
    parser.add_argument("--label", default=OURS, help="of our runs, as 'LoRA', to draw them beside others")
    parser.add_argument("--folder", default="", help="everything stays here; default: a temporary one")
    parser.add_argument(
        "--time_limit_s", type=float, default=math.inf, help="the run under way is saved then"
    )
    parser.add_argument("--picture", default="real_model.png", help="PNG to write")
    parser.add_argument("--json", default="", help="file for the curves")
    parser.add_argument("--draw", default="", help="such files, separated by commas: nothing is trained")
    args, overrides = parser.parse_known_args()
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            parser.error(f"{override}: overrides are written --config.KEY=VALUE")
    if not args.draw and not (Path(args.model) / "config.json").is_file():
        parser.error("--model: must name a Hugging Face folder (or --draw the files of earlier runs)")
    for name, least in (("steps", 1), ("eval_every", 1), ("max_calculations", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name}: must be at least {least}")
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        parser.error("--seeds: must be whole numbers, separated by commas")
    if args.only_peer and not args.peer:
        parser.error("--only_peer: needs --peer")
    args.deadline = time.time() + args.time_limit_s
    args.has_gpu = engine_common.gpu_name() != "no GPU"
    if not args.dtypes:
        args.dtypes = "bfloat16" if args.has_gpu else "float32"
    return args, overrides


# ---- the runs ----


def check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Ends with one line, before anything is made, where the configuration of a run is refused."""
    for dtype in args.dtypes.split(","):
        read_config(args, [*run_flags(args, Path(), args.model, overrides), f"--config.model.dtype={dtype}"])


def read_config(args: argparse.Namespace, arguments: Sequence[str]) -> Any:
    from grpo_jax.config.command_line import one_line_errors, parse_command_line

    with one_line_errors():
        return parse_command_line(
            "grpo_jax.train", None, [f"--config={curves.ROOT / args.recipe}", *arguments]
        )[0]


def plan(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """(side, dtype, seed) of each run."""
    sides = [] if args.only_peer else [args.label]
    sides += [TRL] if args.peer else []
    for seed, dtype, side in itertools.product(args.seeds.split(","), args.dtypes.split(","), sides):
        yield side, dtype, int(seed)


def workdir_of(folder: Path, side: str, dtype: str, seed: int) -> Path:
    return folder / f"{side}-{dtype}-{seed}"


def found(args: argparse.Namespace, folder: Path) -> list[Run]:
    """The runs of the plan as far as they have come."""
    return [read_run(workdir_of(folder, *key), *key) for key in plan(args)]


def train_all(args: argparse.Namespace, overrides: Sequence[str], folder: Path) -> Iterator[Run]:
    """Makes what all begin with, then trains; yields each run at its end.

    Raises: OutOfTime: at the deadline.
    """
    make_data(args, folder)
    model = warm_start(args, folder, overrides)
    for side, dtype, seed in plan(args):
        workdir = workdir_of(folder, side, dtype, seed)
        own = [f"--config.model.dtype={dtype}", f"--config.trainer.seed={seed}"]
        arguments = [*run_flags(args, folder, model, overrides), *own]
        start = time.perf_counter()
        train = train_theirs if side == TRL else train_ours
        if max(read_run(workdir, side, dtype, seed).points("reward/mean"), default=0) < args.steps:
            with gpu_watch.GpuWatch() as watch:
                before = watch.peak_bytes() or 0
                train(args, arguments, workdir)
                watch.wait_until_free(before + 2e9, timeout_s=30)
        run = read_run(workdir, side, dtype, seed)
        print(f"run       {run.label}, seed {seed}: accuracy {percents(run)}, {time.perf_counter() - start:.0f} s",
              flush=True)  # fmt: skip
        yield run


def make_data(args: argparse.Namespace, folder: Path) -> None:
    """Writes all of GSM8K, and the problems that are trained on. Prints how many there are."""
    from grpo_jax.data import gsm8k

    for name, most in (("all", 0), ("data", args.max_calculations)):
        if not (folder / name).exists():
            gsm8k.main(
                [f"--local_dir={folder / name}", f"--source={args.source}", f"--max_calculations={most}"]
            )


def run_flags(args: argparse.Namespace, folder: Path, model: Any, overrides: Sequence[str]) -> list[str]:
    """The configuration of a run, but for its dtype and seed."""
    values = EQUAL | {
        "eval.every_epochs": 0,
        "eval.every_steps": args.eval_every,
        "checkpoint.every_epochs": 0,
        "checkpoint.hf_every_epochs": 0,
        "trainer.total_epochs": 1000,
        "trainer.num_steps": args.steps,
    }
    if not args.has_gpu:
        values["rollout.engine"] = "local"
    fixed = {
        "model.path": Path(model).absolute(),
        "data.train_files": f'("{folder / "data" / "train.parquet"}",)',
        "data.val_files": f'("{folder / "data" / "test.parquet"}",)',
        "sft.num_steps": 0,
    }
    return [*curves.flags(values), *common.without(("sft",), overrides), *curves.flags(fixed)]


def warm_start(args: argparse.Namespace, folder: Path, overrides: Sequence[str]) -> Path:
    """The folder that all runs begin with: the recipe's warm start, made once, or the model as it is.

    Raises: OutOfTime: at the deadline; nothing of it is kept.
    """
    data = f'("{folder / "all" / "train.parquet"}",)'
    values = {"model.path": Path(args.model).absolute(), "data.train_files": data, "data.val_files": data}
    arguments = [*overrides, *curves.flags(values)]
    num_steps = read_config(args, arguments).sft.num_steps
    if not num_steps:
        return Path(args.model)
    target = folder / "warm" / "sft-model"
    if not target.exists():
        start = time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "grpo_jax.sft",
            f"--config={args.recipe}",
            f"--workdir={target.parent}",
        ]
        command += [*arguments, f"--config.sft.train_files={data}"]
        curves.run(command, folder / "warm.log", deadline=args.deadline)
        print(f"warm      {num_steps} supervised updates, {time.perf_counter() - start:.0f} s", flush=True)
    return target


def train_ours(args: argparse.Namespace, arguments: Sequence[str], workdir: Path) -> None:
    command = [sys.executable, "-m", "grpo_jax.train", f"--config={args.recipe}", f"--workdir={workdir}"]
    curves.run([*command, *arguments], log_of(workdir), deadline=args.deadline)


def train_theirs(args: argparse.Namespace, arguments: Sequence[str], workdir: Path) -> None:
    config = read_config(args, arguments)
    settings = curves.trl_settings(
        config, seed=config.trainer.seed, micro_rows=args.peer_micro_batch, dtype=config.model.dtype
    )
    settings |= curves.trl_engine(config) if args.has_gpu else {}
    settings |= args.peer_settings
    command = [
        args.peer_python, str(curves.TRL_CURVE), f"--model={config.model.path}", f"--output={workdir}",
        f"--data={config.data.train_files[0]}", f"--settings={json.dumps(settings)}",
        f"--val_data={config.data.val_files[0]}", f"--eval_every={args.eval_every}",
        f"--max_prompt_length={config.data.max_prompt_length}",
    ]  # fmt: skip
    curves.run(command, log_of(workdir), deadline=args.deadline)


def log_of(workdir: Path) -> Path:
    return workdir.with_name(workdir.name + ".log")


if __name__ == "__main__":
    main()
