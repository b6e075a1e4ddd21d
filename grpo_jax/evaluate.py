"""Accuracy and pass@k on held-out problems, through the same engine and rewards as training.

    python -m grpo_jax.evaluate --model=HF_DIR --data=FILE.parquet [--adapter=PEFT_DIR] [--engine=local]
        [--temperature=0] [--num=N] [--num_samples=1] [--json=OUT.json] [--generations=OUT.jsonl]
        [--chat_template_args NAME=VALUE ...] [--phase_timeout_s=86400]

Greedy unless a temperature is given. OUT.json gets {"accuracy": ..., "num": ..., "pass@k": ...}; OUT.jsonl one
line a completion.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import KEYS, Config, ConfigError, LoraSection, check_value
from grpo_jax.config.command_line import Parser, make_parser, one_line_errors

if TYPE_CHECKING:
    from grpo_jax.rollout.evaluation import Evaluation
    from grpo_jax.run.metrics import Timers
    from grpo_jax.types import Prompt


NUMBERS = {
    "temperature": "eval.temperature",
    "num": "eval.num_prompts",
    "num_samples": "eval.num_samples",
    "max_response_length": "data.max_response_length",
    "max_prompt_length": "data.max_prompt_length",
    "batch_size": "rollout.batch_size",
    "gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "tensor_parallel_size": "rollout.tensor_parallel_size",
    "seed": "trainer.seed",
    "phase_timeout_s": "trainer.phase_timeout_s",
}
"""Flags, and the keys whose rules hold for them."""


def command_parser() -> Parser:
    parser = make_parser("grpo_jax.evaluate", __doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--adapter", default="", help="PEFT folder of an adapter of that model")
    parser.add_argument("--data", required=True, nargs="+", help="Parquet files with verl's columns")
    parser.add_argument("--engine", default="local", choices=KEYS["rollout.engine"].choices)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    parser.add_argument("--num", type=int, default=0, help="problems, from the first; 0: all")
    parser.add_argument("--num_samples", type=int, default=1, help="completions a problem, for pass@k")
    parser.add_argument("--max_response_length", type=int, default=512, help="tokens")
    parser.add_argument(
        "--max_prompt_length", type=int, default=2048, help="tokens; longer prompts are left out"
    )
    parser.add_argument(
        "--overlong_prompts",
        default="filter",
        choices=KEYS["data.overlong_prompts"].choices,
        help="or their left end is cut",
    )
    parser.add_argument(
        "--stop_token_ids", type=int, nargs="+", default=(), help="they end a completion, beside EOS"
    )
    parser.add_argument(
        "--allow_beyond_max_position",
        action="store_true",
        help="prompt and response may exceed config.json's max_position_embeddings",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="local: completions decoded at once")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.5, help="vllm: share of a GPU")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="vllm: GPUs of the engine")
    parser.add_argument("--python", default="", help="vllm: interpreter of the environment that has it")
    parser.add_argument(
        "--dtype", default="float32", choices=KEYS["model.dtype"].choices, help="of the computation"
    )
    parser.add_argument("--reward", default="gsm8k", help="as reward.function of a configuration")
    parser.add_argument(
        "--chat_template_args",
        nargs="+",
        default=(),
        metavar="NAME=VALUE",
        help="as data.chat_template_args of a configuration",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--phase_timeout_s",
        type=float,
        default=86400.0,
        help="time until a phase counts as hanging; 0: never",
    )
    parser.add_argument("--json", default="", help="file for the result")
    parser.add_argument("--generations", default="", help="file for the completions, a JSON line each")
    return parser


def main() -> None:
    flags = {
        "model.path": "--model",
        "lora.path": "--adapter",
        "data.max_prompt_length": "--max_prompt_length",
        "reward.function": "--reward",
        "rollout.engine": "--engine",
        "rollout.python": "--python",
        "rollout.tensor_parallel_size": "--tensor_parallel_size",
        "rollout.gpu_memory_utilization": "--gpu_memory_utilization",
        "rollout.stop_token_ids": "--stop_token_ids",
        "data.chat_template_args": "--chat_template_args",
    }
    with one_line_errors(flags):
        args = command_parser().parse_args()
        _check_arguments(args)
        _run_watched(args)


def _check_arguments(args: Any) -> None:
    for name, key in NUMBERS.items():
        check_value(f"--{name}", KEYS[key], getattr(args, name))
    if args.num_samples > 1 and args.temperature == 0:
        raise ConfigError(
            "--num_samples", args.num_samples, "needs a --temperature above 0: greedy gives one"
        )
    for name in ("json", "generations"):
        folder = Path(getattr(args, name)).parent
        if not folder.is_dir():
            raise ConfigError(f"--{name}", getattr(args, name), "its folder does not exist")
        if getattr(args, name) and Path(getattr(args, name)).is_dir():
            raise ConfigError(f"--{name}", getattr(args, name), "must be a file, and is a folder")


def make_config(args: Any) -> Config:
    """The configuration of this command: one engine, on the trainer's own devices, given its weights once."""
    base, replace = Config(), dataclasses.replace
    # An adapter is merged before it is rounded.
    own_dtype = "float32" if args.adapter else args.dtype
    return replace(
        base,
        model=replace(base.model, path=args.model, dtype=args.dtype, param_dtype=own_dtype),
        lora=_lora_section(args.adapter),
        data=replace(base.data, max_response_length=args.max_response_length),
        optim=replace(base.optim, offload=False),
        rollout=replace(
            base.rollout,
            engine=args.engine,
            batch_size=args.batch_size,
            tensor_parallel_size=args.tensor_parallel_size,
            gpu_memory_utilization=args.gpu_memory_utilization,
            python=args.python,
            stop_token_ids=tuple(args.stop_token_ids),
            max_restarts=0,
        ),
        reward=replace(base.reward, function=args.reward, on_error="zero"),
    )


def _lora_section(path: str) -> LoraSection:
    """Of the adapter in a PEFT folder; rank 0 without a path. Raises: ConfigError: it is none."""
    from grpo_jax.model.peft import read_section

    return read_section(Path(path)) if path else LoraSection()


def _run_watched(args: Any) -> None:
    from grpo_jax.run.hangs import watched
    from grpo_jax.run.metrics import Timers

    timers = Timers()
    with watched(timers, None, args.phase_timeout_s, "--phase_timeout_s"):
        _run(args, timers)


def _run(args: Any, timers: Timers) -> None:
    from grpo_jax.model.hf import inspect_folder, verify_weights
    from grpo_jax.model.peft import inspect_adapter, with_adapters
    from grpo_jax.rewards import make_reward
    from grpo_jax.rollout import check_engine, shares_parameters
    from grpo_jax.run.devices import open_devices
    from grpo_jax.run.inputs import check_positions, load_model_tokenizer
    from grpo_jax.run.workdir import start_logging

    config = make_config(args)
    if not shares_parameters(config.rollout):
        start_logging()  # an engine with processes of its own takes a minute or two to start, and says so
    with timers.within("read_inputs"):
        check_engine(config.rollout)
        for flag, path in (("--model", args.model), ("--adapter", args.adapter)):
            if path:
                _check_is_no_workdir(flag, Path(path))
        folder = inspect_folder(args.model, config.model)
        if args.adapter:
            folder = dataclasses.replace(folder, config=with_adapters(folder.config, config.lora))
            inspect_adapter(args.adapter, folder.config, folder)
        tokenizer = load_model_tokenizer(folder)
        prompts = _read_prompts(args, tokenizer)
        verify_weights(args.model)
    can_extrapolate = folder.config.can_extrapolate
    if not (args.allow_beyond_max_position and can_extrapolate):
        lengths = ("longest prompt", _longest(prompts)), ("--max_response_length", args.max_response_length)
        allow = "--allow_beyond_max_position" if can_extrapolate else ""
        check_positions(folder.max_position, *lengths, allow=allow)
    with make_reward(config.reward, max_response_length=args.max_response_length) as reward:
        with timers.within("open_devices"):
            mesh = open_devices(config, folder.config, engine=config.rollout)
        with timers.within("testing"):
            result = _evaluate(args, config, folder, tokenizer, prompts, reward, mesh)
        _report(args, result)


def _check_is_no_workdir(flag: str, path: Path) -> None:
    """Raises: ConfigError: a folder is a run's workdir, or one that is missing from it; names the models in it."""
    from grpo_jax.run.workdir import Workdir

    workdir, above = Workdir(path), Workdir(path.parent)
    if workdir.metrics.is_file() or workdir.checkpoints.is_dir():
        export = f"none yet; `python -m grpo_jax.export --checkpoint={path} --output=HF_DIR` makes one"
        found = ", ".join(str(path / name) for name in workdir.models()) or export
        raise ConfigError(flag, str(path), f"is the workdir of a run; the models in it: {found}")
    if not path.exists() and (names := above.models()):
        raise ConfigError(flag, str(path), f"there is no such folder; {path.parent} has {', '.join(names)}")


def _read_prompts(args: Any, tokenizer: Any) -> list[Prompt]:
    from grpo_jax.data.prompts import encode_prompts
    from grpo_jax.data.schema import read_rows

    rows = read_rows(args.data, "--data")
    limit = args.max_prompt_length
    prompts, counts = encode_prompts(
        rows,
        tokenizer,
        max_prompt_length=limit,
        overlong=args.overlong_prompts,
        key="--data",
        template_args=args.chat_template_args,
    )
    if counts.num_filtered:
        print(f"{counts.num_filtered} prompts longer than {limit} tokens are left out")
    return prompts[: args.num or None]


def _longest(prompts: list[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def _evaluate(
    args: Any, config: Config, folder: Any, tokenizer: Any, prompts: list[Prompt], reward: Any, mesh: Any
) -> Evaluation:
    import jax

    from grpo_jax.learner.optimizer import read_leaf
    from grpo_jax.rollout import EngineError, SamplingParams, make_engine
    from grpo_jax.rollout.evaluation import evaluate
    from grpo_jax.run.inputs import check_weights, first_params

    engine = make_engine(
        config.rollout,
        folder=folder,
        mesh=mesh,
        tokenizer=tokenizer,
        max_model_len=_longest(prompts) + args.max_response_length,
    )
    with contextlib.closing(engine):
        try:
            params = jax.tree.map(read_leaf, first_params(config, folder, folder.config, mesh))
            check_weights(params, folder.path)
            engine.load_weights(params, version=0)
            sampling = SamplingParams(args.num_samples, args.temperature, args.max_response_length)
            return evaluate(engine, prompts, reward, sampling, seed=args.seed, progress="evaluating")
        except EngineError as failure:
            sys.exit(f"error: {failure}")


def _report(args: Any, result: Evaluation) -> None:
    from grpo_jax.rollout.base import LONGEST_ERROR, one_line
    from grpo_jax.rollout.evaluation import write_jsonl
    from grpo_jax.storage.files import write_whole

    for error in result.errors:
        print(f"reward error, counted as 0: {one_line(error, LONGEST_ERROR)}")
    summary = result.summary()
    print(", ".join(f"{k}={v:.4f}" if isinstance(v, float) else f"{k}={v}" for k, v in summary.items()))
    if args.json:
        write_whole(Path(args.json), json.dumps(summary) + "\n")
    if args.generations:
        write_jsonl(Path(args.generations), result.records())


if __name__ == "__main__":
    main()
