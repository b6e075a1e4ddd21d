"""Wall time and held-out accuracy of the quickstart, over several seeds.

    python benchmarks/quickstart.py                  # seeds 0, 1, 2
    python benchmarks/quickstart.py --seeds=3 --config.trainer.num_steps=2 --config.sft.num_steps=10

Claimed: without a network or a GPU, under 5 minutes on two CPU cores from nothing to a trained model, and greedy
accuracy on held-out problems at least 30 points higher after GRPO than before it, on every seed. Each seed is the
README's own command in a process and a folder of its own; the wall time is that of the whole process, the
accuracies are the first and the last `val/accuracy` of its metrics.jsonl. All other arguments go to the command.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common

AIM_S, AIM_POINTS = 300.0, 30.0
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="separated by commas")
    args, overrides = parser.parse_known_args()
    common.print_environment()
    good = True
    print(f"{'seed':>6} {'before':>8} {'after':>8} {'points':>8} {'wall time':>11}")
    for seed in map(int, args.seeds.split(",")):
        before, after, seconds = run(seed, overrides)
        points = 100 * (after - before)
        good &= points >= AIM_POINTS and seconds <= AIM_S
        print(f"{seed:>6} {before:>8.1%} {after:>8.1%} {points:>+8.1f} {seconds:>9.0f} s", flush=True)
    verdict = "reached" if good else "not reached"
    print(f"aim: at most {AIM_S:.0f} s and at least {AIM_POINTS:+.0f} points on every seed: {verdict}")


def run(seed: int, overrides: list[str]) -> tuple[float, float, float]:
    """Trains once. Returns accuracy before and after, and seconds."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            sys.executable, "-m", "grpo_jax.train", "--config=configs/quickstart.py",
            f"--config.trainer.seed={seed}", f"--workdir={workdir}", *overrides,
        ]  # fmt: skip
        start = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stdout[-2000:]}")
        lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    accuracies = [m["val/accuracy"] for m in map(json.loads, lines) if "val/accuracy" in m]
    return accuracies[0], accuracies[-1], seconds


if __name__ == "__main__":
    main()
