"""Accuracy and pass@k on held-out problems, through the same engine and rewards as training.

    python -m grpo_jax.evaluate --model=HF_DIR --data=FILE.parquet [--engine=local] [--temperature=0]
        [--num=N] [--num_samples=1] [--json=OUT.json] [--generations=OUT.jsonl]

Greedy unless a temperature is given. OUT.json gets {"accuracy": ..., "num": ..., "pass@k": ...}; OUT.jsonl one
line a completion.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from grpo_jax.rewards.base import Reward
from grpo_jax.rollout import RolloutEngine, SamplingParams
from grpo_jax.run.metrics import CORRECT_REWARD
from grpo_jax.types import Metrics, Prompt, RolloutGroup


@dataclasses.dataclass(frozen=True)
class Evaluation:
    groups: list[RolloutGroup]
    rewards: np.ndarray
    """[P, G] float32."""
    correctness: np.ndarray
    """[P, G] float32; what `metrics.CORRECT_REWARD` is held against."""
    errors: tuple[str, ...]
    """Of the reward function, where it may go on after one."""

    @property
    def accuracy(self) -> float:
        """Share of the completions that are correct."""
        return float((self.correctness >= CORRECT_REWARD).mean())

    def pass_at(self, k: int) -> float:
        """Mean over prompts of the estimated chance that one of k completions is correct."""
        samples = self.rewards.shape[1]
        counts = (self.correctness >= CORRECT_REWARD).sum(axis=1)
        return float(np.mean([pass_at_k(samples, int(c), k) for c in counts]))

    def summary(self) -> Metrics:
        """accuracy, num, and pass@k for k = 1, 2, 4, ... up to the number of samples, where there are several."""
        samples = self.rewards.shape[1]
        ks = [2**i for i in range(int(math.log2(samples)) + 1)] if samples > 1 else []
        passes = {f"pass@{k}": self.pass_at(k) for k in ks}
        return {"accuracy": self.accuracy, "num": len(self.rewards), **passes}

    def records(self) -> list[dict[str, Any]]:
        """One dictionary a completion, in order."""
        return rollout_records(self.groups, self.rewards)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k out of n samples, c of them correct, is correct.

    1 - C(n - c, k) / C(n, k), the unbiased estimate of arXiv:2107.03374 (1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    reward: Reward,
    sampling: SamplingParams,
    *,
    seed: int,
    progress: str,
) -> Evaluation:
    """Completes the prompts with the engine's present weights and scores the completions."""
    groups = engine.generate(prompts, sampling, seed=seed, progress=progress)
    result = reward.score(groups)
    return Evaluation(groups, result.rewards, result.correctness, result.errors)


def rollout_records(groups: Sequence[RolloutGroup], rewards: np.ndarray) -> list[dict[str, Any]]:
    """What is written of completions to files: one dictionary each."""
    return [
        {
            "prompt_id": group.prompt.prompt_id,
            "prompt": group.prompt.text,
            "ground_truth": group.prompt.ground_truth,
            "completion": completion.text,
            "reward": float(rewards[p, g]),
            "num_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
            "policy_version": completion.policy_version,
        }
        for p, group in enumerate(groups)
        for g, completion in enumerate(group.completions)
    ]


def write_jsonl(path: Path, records: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def main() -> None:
    from grpo_jax.config import CHOICES
    from grpo_jax.config.command_line import make_parser, one_line_errors

    parser = make_parser("grpo_jax.evaluate", __doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--data", required=True, help="Parquet file with verl's columns")
    parser.add_argument("--engine", default="local", choices=CHOICES["rollout.engine"])
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
        "--dtype", default="float32", choices=CHOICES["model.dtype"], help="of the computation"
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
    from grpo_jax.config import ConfigError

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


def _reward_section(function: str) -> Any:
    """One function, and nothing that shapes what it gives."""
    from grpo_jax.config import RewardSection

    return RewardSection(
        function=function,
        extra_functions=(),
        weights=(),
        overlong_buffer=0,
        overlong_penalty=0.0,
        num_workers=2,
        timeout_s=10.0,
        on_error="zero",
    )


def _rollout_section(args: Any) -> Any:
    """The engine of this command: one, on the GPUs that it shares with JAX, given its weights once."""
    from grpo_jax.config import RolloutSection

    return RolloutSection(
        engine=args.engine,
        temperature=args.temperature,
        top_p=1.0,
        top_k=0,
        stop_token_ids=(),
        batch_size=args.batch_size,
        max_lag=0,
        update_weights="between",
        placement="colocated",
        num_replicas=0,
        tensor_parallel_size=args.tensor_parallel_size,
        gpu_memory_utilization=args.gpu_memory_utilization,
        max_num_seqs=1024,
        enforce_eager=False,
        sleep=False,
        engine_args=(),
        python=args.python,
        ray_address="",
        weight_sync="auto",
        bucket_mb=192,
        probe_every=0,
        probe_threshold=0.1,
        start_timeout_s=900.0,
        timeout_s=300.0,
        max_restarts=0,
        api_port=0,
    )


def _run(args: Any) -> None:
    import jax.numpy as jnp

    from grpo_jax.config import MeshSection
    from grpo_jax.data.prompts import encode_prompts, load_tokenizer
    from grpo_jax.data.schema import read_rows
    from grpo_jax.model.hf import inspect_folder, load_params
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.rewards import make_reward
    from grpo_jax.rollout import EngineError, check_engine, make_engine
    from grpo_jax.run.prepare import check_tokenizer, share_gpus
    from grpo_jax.run.workdir import start_logging

    section = _rollout_section(args)
    if section.engine == "vllm":
        start_logging()  # it takes a minute or two to start, and says so
    check_engine(section)
    share_gpus(section)
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
        mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
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
