"""Accuracy and pass@k on held-out problems, through the same engine and rewards as training.

    python -m grpo_jax.evaluate --model=HF_DIR --data=FILE.parquet [--engine=local] [--temperature=0]
        [--num=N] [--num_samples=1] [--json=OUT.json] [--generations=OUT.jsonl]

Greedy unless a temperature is given. OUT.json gets {"accuracy": ..., "num": ..., "pass@k": ...}; OUT.jsonl one
line a completion.
"""

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, Config, ConfigError, MeshSection, RewardSection, RolloutSection
from grpo_jax.config.command_line import make_parser, one_line_errors
from grpo_jax.rollout import SamplingParams


def main() -> None:
    parser = make_parser("grpo_jax.evaluate", __doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="Parquet file with verl's columns")
    parser.add_argument("--engine", default="local", choices=KEYS["rollout.engine"].choices)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--num", type=int, default=0, help="problems, from the first; 0: all")
    parser.add_argument("--num_samples", type=int, default=1, help="completions a problem, for pass@k")
    parser.add_argument("--max_response_length", type=int, default=512, help="tokens")
    parser.add_argument(
        "--max_prompt_length", type=int, default=2048, help="tokens; longer prompts are left out"
    )
    parser.add_argument("--batch_size", type=int, default=256, help="local: completions decoded at once")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.5, help="vllm: share of a GPU")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="vllm: GPUs of the engine")
    parser.add_argument("--python", default="", help="vllm: interpreter of the environment that has it")
    parser.add_argument(
        "--dtype", default="float32", choices=KEYS["model.dtype"].choices, help="of the computation"
    )
    parser.add_argument("--reward", default="gsm8k", help="as reward.function of a configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default="", help="file for the result")
    parser.add_argument("--generations", default="", help="file for the completions, a JSON line each")
    flags = {
        "model.path": "--model",
        "data.max_prompt_length": "--max_prompt_length",
        "reward.function": "--reward",
    }
    with one_line_errors(flags):
        args = parser.parse_args()
        _check_arguments(args)
        _run(args)


def _check_arguments(args: Any) -> None:
    for name in ("num_samples", "max_response_length", "max_prompt_length", "batch_size"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}", getattr(args, name), "must be at least 1")
    for name in ("temperature", "num", "seed"):
        if not getattr(args, name) >= 0:
            raise ConfigError(f"--{name}", getattr(args, name), "must be at least 0")
    if args.num_samples > 1 and args.temperature == 0:
        raise ConfigError(
            "--num_samples", args.num_samples, "needs a --temperature above 0: greedy gives one"
        )
    for name in ("json", "generations"):
        folder = Path(getattr(args, name)).parent
        if not folder.is_dir():
            raise ConfigError(f"--{name}", getattr(args, name), "its folder does not exist")


def _reward_section(function: str) -> RewardSection:
    """One function, and nothing that shapes what it gives."""
    return dataclasses.replace(Config().reward, function=function, on_error="zero")


def _rollout_section(args: Any) -> RolloutSection:
    """The engine of this command: one, on the GPUs that it shares with JAX, given its weights once."""
    return dataclasses.replace(
        Config().rollout,
        engine=args.engine,
        temperature=args.temperature,
        batch_size=args.batch_size,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        python=args.python,
        probe_every=0,
        max_restarts=0,
    )


def _run(args: Any) -> None:
    import jax.numpy as jnp

    from grpo_jax.data.prompts import encode_prompts, load_tokenizer
    from grpo_jax.data.schema import read_rows
    from grpo_jax.model.hf import inspect_folder, load_params
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.rewards import make_reward
    from grpo_jax.rollout import EngineError, check_engine, make_engine, share_devices, shares_parameters
    from grpo_jax.rollout.evaluation import evaluate, write_jsonl
    from grpo_jax.run.inputs import check_tokenizer
    from grpo_jax.run.workdir import start_logging

    section = _rollout_section(args)
    if not shares_parameters(section):
        start_logging()  # an engine with processes of its own takes a minute or two to start, and says so
    check_engine(section)
    share_devices(section)
    rows = read_rows([args.data], "--data")
    dtype = jnp.dtype(args.dtype)
    folder = inspect_folder(args.model).with_config(dtype=dtype, param_dtype=dtype)
    tokenizer = load_tokenizer(args.model)
    check_tokenizer(tokenizer, folder.config.vocab_size, args.model)
    prompts, counts = encode_prompts(
        rows, tokenizer, max_prompt_length=args.max_prompt_length, overlong="filter", key="--data"
    )
    if counts.num_filtered:
        print(f"{counts.num_filtered} prompts longer than {args.max_prompt_length} tokens are left out")
    prompts = prompts[: args.num or None]
    with make_reward(_reward_section(args.reward), max_response_length=args.max_response_length) as reward:
        mesh = make_mesh(MeshSection())
        longest = max(len(prompt.token_ids) for prompt in prompts)
        engine = make_engine(
            section,
            folder=folder,
            mesh=mesh,
            tokenizer=tokenizer,
            max_model_len=longest + args.max_response_length,
        )
        with contextlib.closing(engine):
            try:
                engine.load_weights(load_params(folder, folder.config, mesh), version=0)
                sampling = SamplingParams(args.num_samples, args.temperature, args.max_response_length)
                result = evaluate(engine, prompts, reward, sampling, seed=args.seed, progress="evaluating")
            except EngineError as failure:
                sys.exit(f"error: {failure}")
    for error in result.errors:
        print(f"reward error, counted as 0: {error}")
    summary = result.summary()
    print(", ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()))
    if args.json:
        Path(args.json).write_text(json.dumps(summary) + "\n")
    if args.generations:
        write_jsonl(Path(args.generations), result.records())


if __name__ == "__main__":
    main()
