"""verl's main_ppo at a workload of benchmarks/step.py; prints one line "STEP {...}" a step.

    python benchmarks/peers/verl_run.py --model=DIR --data=FILE.parquet --prompts=64 --samples=8 ...

`step.py --peer=verl` runs it. verl's own defaults stand wherever the workload says nothing; what is set beyond it:
packed sequences with flash-attn where that is installed (padded ones with PyTorch's attention where not), gradient
checkpointing, micro-batches by tokens, nothing offloaded that verl lets stay, no checkpoints, no validation. What
stands after `--` goes to verl as it is, for another choice. All that verl prints is passed on.

Written for verl 0.9.1, whose console line has every metric as `name:value`.
"""

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REWARD = Path(__file__).resolve().parent / "reward.py"
STEP = re.compile(r"\bstep:(\d+) - (.*)")
NUMBER = re.compile(r"(?:np\.\w+\()?(-?\d+(?:\.\d*)?(?:e[+-]?\d+)?|nan|inf)", re.IGNORECASE)
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HYDRA_FULL_ERROR": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_DEDUP_LOGS": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag in ("--model", "--data", "--output"):
        parser.add_argument(flag, required=True)
    for flag in ("--prompts", "--samples", "--prompt_tokens", "--new", "--steps"):
        parser.add_argument(flag, type=int, required=True)
    parser.add_argument("--micro_batch", type=int, default=0, help="not used: verl counts tokens")
    parser.add_argument("--update_tokens", type=int, default=20480, help="of a micro-batch of the update")
    parser.add_argument(
        "--score_tokens", type=int, default=40960, help="of a micro-batch of log-probabilities"
    )
    parser.add_argument("--kl", type=float, default=0.001)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--learning_rate", type=float, default=1e-6)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    parser.add_argument("--vllm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("overrides", nargs="*", help="after --: verl's own KEY=VALUE")
    args = parser.parse_args()
    if not args.vllm:
        sys.exit("verl samples with vLLM, not with transformers: --engine=vllm")
    settings = [f"{key}={value}" for key, value in verl_settings(args).items()]
    command = [sys.executable, "-m", "verl.trainer.main_ppo", *settings, *args.overrides]
    with subprocess.Popen(
        command, cwd=args.output, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", env=os.environ | ENVIRONMENT,
    ) as process:  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # and wait for it to end
        try:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                if step := parse_step(line, time.time()):
                    print("STEP " + json.dumps(step), flush=True)
        except KeyboardInterrupt:
            pass  # step.py has what it waits for
        finally:
            if process.poll() is None:
                process.terminate()
    sys.exit(process.returncode)


def verl_settings(args: Any) -> dict[str, Any]:
    """The workload in verl's words."""
    longest = args.prompt_tokens + args.new
    score_tokens = max(args.score_tokens, longest)
    data = {
        "algorithm.adv_estimator": "grpo",
        "algorithm.use_kl_in_reward": False,
        # data: the file as it is; verl wants one for validation too
        "data.train_files": args.data,
        "data.val_files": args.data,
        "data.val_max_samples": 8,
        "data.train_batch_size": args.prompts,
        "data.max_prompt_length": args.prompt_tokens,
        "data.max_response_length": args.new,
        "data.shuffle": False,
        "data.truncation": "error",
        "data.filter_overlong_prompts": False,
        "data.dataloader_num_workers": 2,
    }
    return (
        data
        | update_settings(args, longest, score_tokens)
        | rollout_settings(args, longest, score_tokens)
        | run_settings(args)
    )


def update_settings(args: Any, longest: int, score_tokens: int) -> dict[str, Any]:
    """Model and update: one update over the whole batch. Args: score_tokens: in a micro-batch that is scored."""
    actor, ref, model = (f"actor_rollout_ref.{part}" for part in ("actor", "ref", "model"))
    has_flash = importlib.util.find_spec("flash_attn") is not None
    settings = {
        f"{model}.path": args.model,
        f"{model}.enable_gradient_checkpointing": True,
        f"{model}.use_remove_padding": has_flash,
        f"{actor}.strategy": "fsdp",
        f"{actor}.optim.lr": args.learning_rate,
        f"{actor}.ppo_mini_batch_size": args.prompts,
        f"{actor}.ppo_epochs": 1,
        f"{actor}.use_dynamic_bsz": True,
        f"{actor}.ppo_max_token_len_per_gpu": max(args.update_tokens, longest),
        f"{actor}.use_kl_loss": args.kl > 0,
        f"{actor}.kl_loss_coef": args.kl,
        f"{actor}.kl_loss_type": "low_var_kl",
        f"{actor}.entropy_coeff": 0,
        f"{actor}.fsdp_config.param_offload": False,
        f"{actor}.fsdp_config.optimizer_offload": False,
        f"{ref}.fsdp_config.param_offload": False,
        f"{ref}.log_prob_use_dynamic_bsz": True,
        f"{ref}.log_prob_max_token_len_per_gpu": score_tokens,
    }
    if not has_flash:
        print(
            "flash-attn is not installed: padded batches and PyTorch's attention, which is slower", flush=True
        )
        settings[f"+{model}.override_config.attn_implementation"] = "sdpa"
    return settings


def rollout_settings(args: Any, longest: int, score_tokens: int) -> dict[str, Any]:
    """Sampling and rewards."""
    rollout = "actor_rollout_ref.rollout"
    return {
        f"{rollout}.name": "vllm",
        f"{rollout}.n": args.samples,
        f"{rollout}.temperature": args.temperature,
        f"{rollout}.tensor_model_parallel_size": 1,
        f"{rollout}.gpu_memory_utilization": args.gpu_memory_utilization,
        f"{rollout}.max_model_len": longest,
        f"{rollout}.max_num_seqs": min(args.prompts * args.samples, 1024),
        f"{rollout}.max_num_batched_tokens": 16384,
        f"{rollout}.log_prob_use_dynamic_bsz": True,
        f"{rollout}.log_prob_max_token_len_per_gpu": score_tokens,
        "reward.custom_reward_function.path": REWARD,
        "reward.custom_reward_function.name": "compute_score",
        "reward.num_workers": 4,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": 4,
    }


def run_settings(args: Any) -> dict[str, Any]:
    """One epoch of `args.steps` steps, without validation and checkpoints."""
    return {
        "trainer.n_gpus_per_node": 1,
        "trainer.nnodes": 1,
        "trainer.logger": "[console]",
        "trainer.save_freq": -1,
        "trainer.test_freq": -1,
        "trainer.val_before_train": False,
        "trainer.resume_mode": "disable",
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": args.steps,
        "trainer.default_local_dir": args.output,
        "hydra.run.dir": args.output,
        # verl reserves more CPUs for its workers than a small host has
        "ray_kwargs.ray_init.num_cpus": max(48, os.cpu_count() or 1),
        "+ray_kwargs.ray_init.include_dashboard": False,
        "+ray_kwargs.ray_init.object_store_memory": 4 * 10**9,
    }


def parse_step(line: str, now: float) -> dict[str, Any] | None:
    """The metrics of a console line; None for any other line."""
    found = STEP.search(line)
    if not found:
        return None
    values = {}
    for part in found[2].split(" - "):
        name, _, text = part.partition(":")
        if number := NUMBER.match(text.strip()):
            values[name] = float(number[1])
    phases = {name.removeprefix("timing_s/"): v for name, v in values.items() if name.startswith("timing_s/")}
    return dict(
        step=int(found[1]),
        time=now,
        generation_s=phases.get("gen"),
        phases=phases,
        mean_length=values.get("response_length/mean"),
        reward=values.get("critic/score/mean"),
        allocated_gb=values.get("actor/perf/max_memory_allocated_gb"),
        mfu=values.get("perf/mfu/actor"),
    )


if __name__ == "__main__":
    main()
