"""Folders of runs as training leaves them, of any length, made in no time."""

import json
import math

import numpy as np

from grpo_jax.config import Config
from grpo_jax.run import ledger

PHASES = {
    "gen": 4.0,
    "reward": 0.5,
    "old_log_prob": 1.0,
    "ref": 1.0,
    "update_actor": 3.0,
    "update_weights": 0.25,
}


def metrics_line(step):
    """What training writes of a step: values that tests can compute themselves."""
    share = step / (step + 100)
    return {
        "step": step, "epoch": 1, "time": 1.7e9 + 10 * step,
        "reward/mean": share, "reward/std": 0.4, "reward/gsm8k/mean": share, "accuracy": share,
        "frac_reward_zero_std": 0.2, "kl/mean": 1e-3 * share, "actor/entropy": 1 - share / 2,
        "actor/pg_clipfrac": 0.01, "actor/pg_clipfrac_lower": 0.0, "actor/ppo_kl": 1e-4,
        "actor/grad_norm": 0.5 + 0.1 * math.sin(step), "actor/loss": -0.01 * math.cos(step), "actor/lr": 1e-6,
        "training/rollout_probs_diff_mean": 2e-3, "training/rollout_probs_diff_max": 0.1,
        "training/token_mult_prob_error": 1.002, "training/token_age_mean": 0.5, "training/token_age_max": 1,
        "training/policy_lag": 1, "response_length/mean": 100 + share, "response_length/max": 200,
        "response_length/min": 10, "response_length/clip_ratio": 0.05, "response_length/repeat_ratio": 0.01,
        "prompt_length/mean": 60.0, "prompt_length/max": 90, "perf/throughput": 1234.5,
        "perf/max_memory_allocated_gb": 60.0, "perf/memory_planned_gb": 65.0, "perf/mfu/actor": 0.41,
        **{f"timing_s/{phase}": seconds for phase, seconds in PHASES.items()},
        "timing_s/step": sum(PHASES.values()) + 0.25, "timing_s/ledger": 0.01,
        **({"val/accuracy": share} if step % 10 == 0 else {}),
    }  # fmt: skip


def write_run(path, num_steps, *, planned=None, num_completions=16):
    """The folder of a run. Args: planned: steps in all, where that differs."""
    (path / "ledger").mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(Config().to_dict()))
    lines = [{"step": 0, "epoch": 0, "val/accuracy": 0.0}, *map(metrics_line, range(1, num_steps + 1))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    random, chain = np.random.default_rng(0), ""
    with (path / "ledger" / ledger.FILE).open("w") as file:
        for step in range(1, num_steps + 1):
            rewards = [float(i % 2) for i in range(num_completions)]
            tokens = random.integers(10, 200, num_completions).tolist()
            entry = {"step": step, "trained": {"reward": rewards, "tokens": tokens}}
            line, chain = ledger.to_line(entry, chain)
            file.write(line)
    start = {
        "command": "python -m grpo_jax.train --config=configs/gsm8k.py --config.optim.learning_rate=2e-6",
        "recipe": "configs/gsm8k.py", "replaced": {"optim.learning_rate": 5e-7}, "num_steps": planned or num_steps,
        "versions": {"jax": "0.10.2"}, "devices": "1 x NVIDIA H200", "host": "node-1",
    }  # fmt: skip
    (path / "starts.jsonl").write_text(json.dumps(start) + "\n")
    alarm = {"step": 7, "event": "begins", "alarm": "loss-spike", "since": 7, "seen": "actor/loss=9",
             "cause": "<b>an odd batch</b>", "remedy": "look at it"}  # fmt: skip
    (path / "alarms.jsonl").write_text(json.dumps(alarm) + "\n")
    return path
