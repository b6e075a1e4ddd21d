"""What the learning curves share: child processes with a deadline, TRL's settings, curves over several seeds."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRL_CURVE = Path(__file__).resolve().parent / "peers" / "trl_curve.py"
STOP_S = 60.0
"""How long a trainer may take to end its step and save when told to stop."""

Points = Mapping[int, float]
"""Step -> value."""


class OutOfTime(RuntimeError):
    """A child was stopped at the deadline; the same command goes on."""


# ---- processes ----


def flags(values: Mapping[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in values.items()]


def run(command: Sequence[str], log: Path, *, deadline: float = math.inf) -> None:
    """Runs a command to its end, keeping what it prints. Ends everything if it fails.

    Args:   deadline: time.time() at which it gets SIGTERM, upon which trainers save and end.
    Raises: OutOfTime: the deadline came first.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        env = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=env)
        try:
            process.wait(None if deadline == math.inf else max(0.0, deadline - time.time()))
        except subprocess.TimeoutExpired:
            _stop(process)
            raise OutOfTime(log.stem) from None
        except BaseException:  # Ctrl-C reaches the child too, which saves
            _stop(process)
            raise
    if process.returncode:
        text = log.read_text(errors="replace")
        sys.exit(f"{' '.join(command)}\nended with exit code {process.returncode}:\n{text[-3000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, ours or TRL's; none if there is no such file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---- TRL ----


def trl_versions(python: str) -> str:
    code = "import trl, torch, transformers as t; print(f'TRL {trl.__version__}, torch {torch.__version__}, "
    code += "transformers {t.__version__}')"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the peer needs TRL: pip install trl datasets, or name its environment in --peer_python\n"
                 f"{done.stderr[-500:]}")  # fmt: skip
    return done.stdout.splitlines()[-1]


def trl_settings(config: Any, *, seed: int, micro_rows: int, dtype: str) -> dict[str, Any]:
    """What our configuration says, by TRL's names.

    Args: micro_rows: completions in memory at once; dtype: of the computation, over float32 weights.
    """
    rows = config.completions_per_step
    micro_rows = min(rows, micro_rows)  # the loss does not depend on it
    if rows % micro_rows:
        sys.exit(f"{rows} completions a step are no multiple of TRL's micro-batch, {micro_rows}")
    return dict(
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
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
    )


def trl_engine(config: Any) -> dict[str, Any]:
    """Colocated vLLM, with our share of the card. Its importance sampling, which ours leaves out too, is off."""
    return dict(
        use_vllm=True,
        vllm_mode="colocate",
        vllm_gpu_memory_utilization=config.rollout.gpu_memory_utilization,
        vllm_max_model_length=config.data.max_prompt_length + config.data.max_response_length,
        vllm_importance_sampling_correction=False,
    )


# ---- curves ----


def points(lines: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
    """Step -> the metric, where a line has it."""
    return {line["step"]: line[name] for line in lines if line.get(name) is not None}


def step_seconds(lines: Sequence[Mapping[str, Any]]) -> list[float]:
    """From the end of each step to that of the next. What lies before the end of step 1 is not counted."""
    ends = {line["step"]: line["time"] for line in lines if line["step"] > 0}
    return [end - ends[step - 1] for step, end in sorted(ends.items()) if step - 1 in ends]


def last_quarter(curve: Sequence[float]) -> float:
    return statistics.fmean(curve[-max(1, len(curve) // 4) :])


def mean_curve(runs: Sequence[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in zip(*runs, strict=True)]


def band(runs: Sequence[Points]) -> list[tuple[int, float, float, float]]:
    """(step, mean, least, most) of several runs, at the steps that all of them have."""
    steps = sorted(set(runs[0]).intersection(*runs[1:]))
    columns = [(step, [run[step] for run in runs]) for step in steps]
    return [(step, statistics.fmean(values), min(values), max(values)) for step, values in columns]


# ---- pictures ----


def new_figure(panels: int) -> tuple[Any, Any]:
    """A matplotlib figure with `panels` panels side by side. Returns (figure, axes or a list of them)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(7 if panels == 1 else 5 * panels, 4), dpi=100)


def save_figure(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})
    pyplot.close(figure)
    print(f"picture   {path}")
