"""One training step at a workload: seconds and phases, tokens/s, MFU, idle GPU, memory, time to the first step.

    python benchmarks/step.py               # on a GPU: Qwen2.5-1.5B's shape, 64 prompts x 8, 128 + 512 tokens
    python benchmarks/step.py --peer=trl    # then TRL on the same card: model, prompts, lengths, updates
    python benchmarks/step.py --peer=trl --peer=verl:/path/of/its/environment/bin/python
    python benchmarks/step.py --shape=qwen2.5-7b --prompts=256 --samples=4 --prompt_tokens=512
    python benchmarks/step.py --config.actor.micro_batch_size_per_device=32
    python benchmarks/step.py --processes=2 --config.mesh.data=2 --config.mesh.fsdp=1     # as on two hosts

What runs is the trainer's own command with configs/gsm8k.py, the workload and every `--config.KEY=VALUE` given
here, as a process of its own that is stopped after the last measured step, so that nothing is saved. Weights are
random (bfloat16 in the file, float32 in training), every prompt has the same number of tokens, completions are
sampled at temperature 1 and nearly always run to the full length, the reward is a hash of the completion, there
is one update a step with KL 0.001 to a reference, and no validation. Without a GPU the defaults are a tiny model
and the local engine.

A step lasts from the end of the one before to its own end, with everything in between: what is reported and
written too. MFU is `update_flops` of grpo_jax/run/metrics.py (no recomputation) by the seconds of the update
phase, against the card's data sheet and against a matrix product measured just before by benchmarks/matmul.py. The
GPU's idle share and memory come from NVML (benchmarks/gpu_watch.py) every 50 ms. A peer gets the workload, not the
overrides.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import engine_common
import gpu_watch
import workload

HERE = Path(__file__).resolve().parent
REWARD = HERE / "peers" / "reward.py"
W1 = dict(shape="qwen2.5-1.5b", prompts=64, samples=8, prompt_tokens=128, new=512, engine="vllm")
TINY = dict(shape="tiny", prompts=4, samples=4, prompt_tokens=128, new=16, engine="local")
PEERS = {  # what each needs: a module, and the distribution that holds it
    "trl": {"trl": "trl", "datasets": "datasets"},
    "verl": {
        "verl": "verl",
        "transfer_queue": "TransferQueue",
        "tensordict": "tensordict",
        "hydra": "hydra-core",
        "codetiming": "codetiming",
        "torchdata": "torchdata",
        "datasets": "datasets",
        "ray": "ray",
    },
}
SPARE_STEPS = 3
"""More than are waited for: the last step of all would save."""
STOP_S = 90.0
"""How long a trainer may take to end when told to."""


class TrainerFailed(RuntimeError):
    """A trainer ended, or was ended, before a step could be measured; the message holds its last words."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of any trainer."""

    number: int
    end: float
    """time.time()."""
    phases: dict[str, float]
    """Seconds by name."""
    metrics: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """What was measured of one trainer. Seconds."""

    name: str
    first_step_s: float
    """From the command to the end of the first step."""
    seconds: list[float]
    phases: dict[str, float]
    """Medians."""
    tokens: float
    """Prompts and completions of a step, mean."""
    idle: float | None
    peak_gb: float | None
    """The most that was in use on a GPU, of all processes."""
    trouble: str
    """Why the two above are missing."""
    steps: list[Step]
    """The measured ones."""

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)


def main() -> None:
    args, overrides = parse_args()
    signal.signal(signal.SIGTERM, end)
    common.print_environment()
    print(f"gpu       {engine_common.gpu_name()}; vLLM {common.version('vllm')}, Ray {common.version('ray')}")
    with contextlib.ExitStack() as stack:
        folder = Path(args.folder or stack.enter_context(tempfile.TemporaryDirectory()))
        matmul = measure_matmul()
        model, data = prepare(args, folder)
        try:
            ours = run_ours(args, overrides, folder, model, data)
        except TrainerFailed as failure:
            sys.exit(str(failure))
        print_ours(args, ours, model, matmul)
        runs = [ours]
        for peer in args.peer:
            name, python = interpreter(peer, args)
            missing, versions = look_at(name, python)
            if missing:
                print(f"\n{name}: not run; {python} -m pip install {' '.join(missing)}")
                continue
            print(f"\npeer      {versions}")
            try:
                runs.append(run_peer(name, python, args, folder, model, data))
            except TrainerFailed as failure:
                print(failure, flush=True)  # what was measured of the others is not lost
                continue
            print_run(runs[-1])
        if len(runs) > 1:
            print_ratios(runs)
        if args.json:
            results = [dataclasses.asdict(run) for run in runs]
            content = dict(arguments=vars(args), overrides=overrides, matmul=matmul, runs=results)
            Path(args.json).write_text(json.dumps(content, indent=1))


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """The workload, with defaults for what this machine can do, and the overrides of the configuration."""
    defaults = TINY if engine_common.gpu_name() == "no GPU" else W1
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default=defaults["shape"], choices=engine_common.SHAPES)
    parser.add_argument("--prompts", type=int, default=defaults["prompts"], help="a step")
    parser.add_argument("--samples", type=int, default=defaults["samples"], help="completions a prompt")
    parser.add_argument("--prompt_tokens", type=int, default=defaults["prompt_tokens"])
    parser.add_argument("--new", type=int, default=defaults["new"], help="tokens a completion, at most")
    parser.add_argument("--engine", default=defaults["engine"], choices=("vllm", "local"))
    parser.add_argument("--processes", type=int, default=1, help="of our trainer, each with as many GPUs")
    parser.add_argument("--warmup", type=int, default=2, help="steps before the measured ones, at least 1")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME[:PYTHON]",
        help="trl, verl, or both in turn; with the interpreter of an environment of its own",
    )  # fmt: skip
    parser.add_argument("--peer_python", default=sys.executable, help="interpreter of a peer that names none")
    parser.add_argument("--peer_args", default="", help="added to the peer's command: see benchmarks/peers")
    parser.add_argument(
        "--peer_micro_batch", type=int, default=32, help="TRL: completions on the GPU at once"
    )
    parser.add_argument(
        "--folder", default="", help="model, data and logs stay here; default: a temporary one"
    )
    parser.add_argument("--json", default="", help="file for everything that was measured")
    parser.add_argument(
        "--timeout_s",
        type=float,
        default=1800.0,
        help="for one trainer; the steps that it has done by then count",
    )
    args, overrides = parser.parse_known_args()
    for override in overrides:
        if not override.startswith("--config.") or "=" not in override:
            parser.error(f"{override}: overrides are written --config.KEY=VALUE")
    if args.warmup < 1:
        parser.error("--warmup must be at least 1: the first step compiles")
    if unknown := [peer for peer in args.peer if peer.partition(":")[0] not in PEERS]:
        parser.error(f"--peer={unknown[0]}: must be one of {', '.join(PEERS)}")
    args.peer_micro_batch = min(args.peer_micro_batch, args.prompts * args.samples)
    return args, overrides


def end(number: int, _: Any) -> None:
    """Ends this command and the trainer that it has started, however often it is asked to."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def measure_matmul() -> dict[str, Any]:
    """In a process of its own, which gives the device back."""
    command = [sys.executable, str(HERE / "matmul.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = result["size"]
    print(f"matmul    {result['tflops']:,.4g} TFLOP/s: bfloat16, {size} x {size}, on {result['device']}")
    return result


def prepare(args: Any, folder: Path) -> tuple[Path, Path]:
    """Writes the model's folder and the prompts."""
    start = time.perf_counter()
    model = workload.write_model(folder.absolute() / f"model-{args.shape}", args.shape)
    data = folder.absolute() / "prompts.parquet"
    steps = args.warmup + args.steps + SPARE_STEPS
    workload.write_prompts(data, model, num_prompts=args.prompts * steps, prompt_tokens=args.prompt_tokens)
    batch = (
        f"{args.prompts} prompts of {args.prompt_tokens} tokens x {args.samples} completions of {args.new}"
    )
    seconds = time.perf_counter() - start
    print(f"work      {args.shape}, {batch}, engine {args.engine}; written in {seconds:.0f} s", flush=True)
    return model, data


# ---- ours ----


def run_ours(args: Any, overrides: list[str], folder: Path, model: Path, data: Path) -> Run:
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        workdir = Path(temporary).absolute() / "run"
        several = [sys.executable, str(HERE / "several.py"), str(args.processes)]
        command = [*(several if args.processes > 1 else []), sys.executable, "-m", "grpo_jax.train"]
        command += ["--config=configs/gsm8k.py"]
        command += [f"--workdir={workdir}", *our_flags(args, model, data), *overrides]
        print(f"command   {shlex.join(command)}", flush=True)
        read = lambda: our_steps(workdir / "metrics.jsonl")
        return measure("grpo_jax", command, folder / "grpo_jax.log", read, args)


def our_flags(args: Any, model: Path, data: Path) -> list[str]:
    """The workload, as the trainer's configuration has it; whatever else stands in configs/gsm8k.py."""
    values = {
        "model.path": model,
        "data.train_files": f'("{data}",)',
        "data.val_files": f'("{data}",)',  # read, not used
        "data.train_batch_size": args.prompts,
        "data.max_prompt_length": args.prompt_tokens,
        "data.max_response_length": args.new,
        "algorithm.group_size": args.samples,
        "rollout.engine": args.engine,
        "rollout.temperature": 1.0,
        "reward.function": f"{REWARD}:compute_score",
        "eval.before_training": False,
        "eval.every_epochs": 0,
        "eval.num_prompts": 1,
        "checkpoint.every_epochs": 0,
        "checkpoint.hf_every_epochs": 0,
        "trainer.total_epochs": 1,
    }
    return [f"--config.{key}={value}" for key, value in values.items()]


def our_steps(file: Path) -> list[Step]:
    """The steps in metrics.jsonl; of a line that is being written, the end may be missing."""
    steps = []
    for text in file.read_text().splitlines() if file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            line = json.loads(text)
            phases = {k.removeprefix("timing_s/"): v for k, v in line.items() if k.startswith("timing_s/")}
            steps.append(Step(line["step"], line["time"], phases, line))
    return [step for step in steps if step.number > 0]


# ---- the peers ----


def interpreter(peer: str, args: Any) -> tuple[str, str]:
    """Name and interpreter of NAME[:PYTHON]."""
    name, _, python = peer.partition(":")
    return name, python or args.peer_python


def look_at(name: str, python: str) -> tuple[list[str], str]:
    """What a peer's environment lacks, and the versions of what it has."""
    code = """if True:
        import importlib.metadata as m, importlib.util as u, json, sys
        def version(name):
            try: return m.version(name)
            except m.PackageNotFoundError: return "(none)"
        missing = [name for name in sys.argv[2:] if u.find_spec(name) is None]
        names = (sys.argv[1], "torch", "transformers", "vllm")
        print(json.dumps([missing, ", ".join(f"{name} {version(name)}" for name in names)]))
    """
    done = subprocess.run(
        [python, "-c", code, name, *PEERS[name]], capture_output=True, text=True, check=True
    )
    missing, versions = json.loads(done.stdout.splitlines()[-1])
    return [PEERS[name][module] for module in missing], versions


def run_peer(peer: str, python: str, args: Any, folder: Path, model: Path, data: Path) -> Run:
    log = folder.absolute() / f"{peer}.log"
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        output = Path(temporary).absolute()
        command = [
            python, str(HERE / "peers" / f"{peer}_run.py"), f"--model={model}", f"--data={data}",
            f"--output={output}", f"--prompts={args.prompts}", f"--samples={args.samples}",
            f"--prompt_tokens={args.prompt_tokens}", f"--new={args.new}", f"--steps={args.warmup + args.steps}",
            f"--micro_batch={args.peer_micro_batch}", "--vllm" if args.engine == "vllm" else "--no-vllm",
            *shlex.split(args.peer_args),
        ]  # fmt: skip
        print(f"command   {shlex.join(command)}", flush=True)
        return measure(peer, command, log, lambda: peer_steps(log), args)


def peer_steps(log: Path) -> list[Step]:
    """The lines STEP {...} that the scripts in peers/ print."""
    steps = []
    for text in log.read_text(errors="replace").splitlines() if log.exists() else []:
        if text.startswith("STEP "):
            with contextlib.suppress(json.JSONDecodeError):
                line = json.loads(text.removeprefix("STEP "))
                phases = line.get("phases") or {"gen": line["generation_s"]}
                steps.append(Step(line["step"], line["time"], phases, line))
    return steps


# ---- any trainer ----


def measure(name: str, command: list[str], log: Path, read: Callable[[], list[Step]], args: Any) -> Run:
    """Runs a trainer until its last measured step, and takes the time and the GPU's samples of these."""
    last = args.warmup + args.steps
    with gpu_watch.GpuWatch() as watch:
        at_start = watch.peak_bytes() or 0
        start = time.time()
        with started(command, log) as process:
            steps = wait_for_steps(name, process, log, read, args.warmup, last, start + args.timeout_s)
        watch.wait_until_free(at_start + 2e9, timeout_s=30)
    last = min(last, len(steps))
    ends = [step.end for step in steps[args.warmup - 1 : last]]
    measured = steps[args.warmup : last]
    names = dict.fromkeys(phase for step in measured for phase in step.phases)
    peak = watch.peak_bytes()
    return Run(
        name=name,
        first_step_s=steps[0].end - start,
        seconds=[end - begin for begin, end in itertools.pairwise(ends)],
        phases={n: statistics.median(step.phases.get(n, 0.0) for step in measured) for n in names},
        tokens=statistics.fmean(num_tokens(step.metrics, args) for step in measured),
        idle=watch.idle_share(ends[0], ends[-1]),
        peak_gb=peak / 1e9 if peak else None,
        trouble=watch.trouble,
        steps=measured,
    )


def num_tokens(metrics: dict[str, Any], args: Any) -> float:
    response = metrics["response_length/mean" if "response_length/mean" in metrics else "mean_length"]
    return float(args.prompts * args.samples * (args.prompt_tokens + response))


@contextlib.contextmanager
def started(command: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A trainer in a process group of its own, which is gone afterwards."""
    env = os.environ | {"PYTHONUNBUFFERED": "1"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=HERE.parent, stdout=output, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Our trainer ends at the second signal at the latest, with its engines; the rest is killed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1.5)  # sooner, the second would count as the first
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def wait_for_steps(
    name: str,
    process: subprocess.Popen[bytes],
    log: Path,
    read: Callable[[], list[Step]],
    warmup: int,
    last: int,
    deadline: float,
) -> list[Step]:
    """Shows each step as it ends. Returns them, of a trainer that takes too long as many as there are.

    Raises: TrainerFailed: it ended by itself before the last step, or no step could be measured in time.
    """
    shown = 0
    while True:
        is_over = process.poll() is not None  # before reading: what it wrote last is there then
        is_late = time.time() > deadline
        steps = read()
        for step in steps[shown:]:
            before = steps[step.number - 2].end if step.number > 1 else None
            seconds = f"{step.end - before:.2f} s" if before else "done"
            print(f"  {name} step {step.number}/{last}: {seconds}", flush=True)
        shown = len(steps)
        if shown >= last or (is_late and shown > warmup):
            return steps
        if is_over or is_late:
            how = f"ended with exit code {process.returncode}" if is_over else "took too long (--timeout_s)"
            tail = log.read_text(errors="replace")[-4000:]
            raise TrainerFailed(f"{tail}\n{name} {how} after {shown} of {last} steps")
        time.sleep(0.1)


# ---- what is printed ----


def print_ours(args: Any, run: Run, model: Path, matmul: dict[str, Any]) -> None:
    print_run(run)
    last = run.steps[-1].metrics
    # perf/throughput is that of one of the trainer's devices, which may be fewer than there are.
    devices = round(num_tokens(last, args) / last["timing_s/step"] / last["perf/throughput"])
    update_s = run.phases["update_actor"]
    flops = statistics.median(step_flops(step, args, model, matmul, devices) for step in run.steps)
    rate = flops / update_s / devices
    parts = [f"{rate / matmul['tflops'] / 1e12:.3f} of the measured matmul rate"]
    if peak := data_sheet(matmul["device"]):
        parts.append(f"{rate / peak:.3f} of the data sheet's {peak / 1e12:,.0f}")
    print(
        f"  update MFU          {', '.join(parts)}: {flops:.4g} FLOPs a step, {rate / 1e12:,.4g} TFLOP/s a device"
    )
    print(
        f"  trainer's peak      {last['perf/max_memory_allocated_gb']:.2f} GB (perf/max_memory_allocated_gb)"
    )


def data_sheet(device: str) -> float | None:
    from grpo_jax.run.metrics import PEAK_FLOPS

    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)


def step_flops(step: Step, args: Any, model: Path, matmul: dict[str, Any], devices: int) -> float:
    """FLOPs of a step's update over the lengths that it had.

    The trainer knows every length: its own MFU, where it reports one, is turned back into FLOPs. Elsewhere every
    completion is taken to have the mean length, which leaves their spread out of the attention's share.
    """
    import numpy as np

    from grpo_jax.model.config import parse_hf_config
    from grpo_jax.run.metrics import update_flops

    mfu, peak = step.metrics.get("perf/mfu/actor"), data_sheet(matmul["device"])
    if mfu and peak:
        return float(mfu) * peak * step.phases["update_actor"] * devices
    rows = args.prompts * args.samples
    lengths = np.full(rows, num_tokens(step.metrics, args) / rows)
    return update_flops(parse_hf_config(json.loads((model / "config.json").read_text())), lengths)


def print_run(run: Run) -> None:
    print(f"\n{run.name}")
    print(f"  step                {run.median_s:.3f} s median, {min(run.seconds):.3f} fastest, "
          f"{max(run.seconds):.3f} slowest of {len(run.seconds)}")  # fmt: skip
    phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in run.phases.items())
    print(f"  phases, s, medians  {phases}")
    print(f"  tokens/s            {run.tokens / run.median_s:,.0f} (prompts and completions)")
    if run.idle is not None and run.peak_gb is not None:
        print(f"  GPU idle            {run.idle:.3f} of the measured steps")
        print(f"  GPU memory, peak    {run.peak_gb:.2f} GB in use, of all processes")
    else:
        print(f"  GPU idle, memory    not measured ({run.trouble or 'no samples'})")
    print(f"  first step          {run.first_step_s:.1f} s after the command", flush=True)


def print_ratios(runs: list[Run]) -> None:
    """Every trainer in a column, and how many times longer the peers take."""
    print("\n" + " " * 26 + "".join(f"{run.name:>16}" for run in runs))
    rows: dict[str, Callable[[Run], float | None]] = {
        "step, median s": lambda run: run.median_s,
        "generation, median s": lambda run: run.phases.get("gen"),
        "tokens/s": lambda run: run.tokens / run.median_s,
        "GPU idle, share": lambda run: run.idle,
        "GPU memory, peak GB": lambda run: run.peak_gb,
        "first step after, s": lambda run: run.first_step_s,
    }
    for name, value in rows.items():
        values = [value(run) for run in runs]
        print(f"  {name:<24}" + "".join(f"{'-':>16}" if v is None else f"{v:>16,.2f}" for v in values))
    ratios = [run.median_s / runs[0].median_s for run in runs]
    print(f"  {'ratio of the medians':<24}" + "".join(f"{ratio:>16.2f}" for ratio in ratios))


if __name__ == "__main__":
    main()
