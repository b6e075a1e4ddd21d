"""Generated tokens per second: our vLLM server beside vLLM's own `LLM.generate`, on the same GPU in turn.

    python benchmarks/rollouts.py --shape=qwen2.5-1.5b

Same shape with random weights, prompts, number of completions, lengths (no stop token: every completion is of full
length), memory and engine settings. Ours always returns log-probabilities; vLLM's is measured with and without.
Aims: at least 0.97 of `LLM.generate` with, and 0.90 of it without log-probabilities.
"""

import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import engine_common
import numpy as np

RESULT = "RESULT "
OURS = "grpo_jax, with log-probabilities"
DIFFERENCE = "difference"


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default="tiny", choices=engine_common.SHAPES)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--new", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    parser.add_argument("--enforce_eager", action="store_true")
    parser.add_argument(
        "--side", default="", choices=("", "ours", "theirs"), help="used by the script itself"
    )
    args = parser.parse_args()
    if args.side:
        (ours if args.side == "ours" else theirs)(args)
        return
    common.print_environment()
    print(f"gpu       {engine_common.gpu_name()}")
    tokens = args.prompts * args.samples * args.new
    shape = f"{args.prompts} prompts of {args.prompt_tokens} tokens, {args.samples} completions of {args.new}"
    print(f"work      {args.shape}, {shape}: {tokens:,} tokens a round, {args.rounds} rounds")
    results: dict[str, list[float]] = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, __file__, *sys.argv[1:], f"--side={side}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
            for line in run.stdout or ():  # what has been measured is shown, whatever becomes of the rest
                if line.startswith(RESULT):
                    results |= json.loads(line.removeprefix(RESULT))
                    print(f"  {line.removeprefix(RESULT).strip()}", flush=True)
            errors = run.stderr.read() if run.stderr else ""
        if run.returncode:
            sys.exit(f"{side} failed:\n{errors[-3000:]}")
    rate = {
        name: tokens / statistics.median(seconds) for name, seconds in results.items() if name != DIFFERENCE
    }
    for name, value in rate.items():
        print(f"  {name:<42} {value:>8,.0f} tokens/s, ours {rate[OURS] / value:.2f} x that")
    probability, ratio, level = results[DIFFERENCE]
    print(f"  trainer and engine, {args.dtype}: |p - p| {probability:.4f} on average, |log p - log p| {ratio:.4f} "
          f"(mean p {level:.2f})")  # fmt: skip


def report(name: str, values: list[float]) -> None:
    """Hands a result to the process that prints the table."""
    print(RESULT + json.dumps({name: values}), flush=True)


def prompts_of(args: Any) -> list[list[int]]:
    rng = np.random.default_rng(0)
    vocab = engine_common.SHAPES[args.shape]["vocab_size"]
    return rng.integers(10, vocab - 10, (args.prompts, args.prompt_tokens)).tolist()


def theirs(args: Any) -> None:
    import vllm

    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.write_shape(Path(temporary) / "model", args.shape)
        llm = vllm.LLM(
            str(folder), load_format="dummy", dtype=args.dtype, max_model_len=args.prompt_tokens + args.new,
            max_num_seqs=1024, gpu_memory_utilization=args.gpu_memory_utilization, skip_tokenizer_init=True,
            enforce_eager=args.enforce_eager, generation_config="vllm",
        )  # fmt: skip
        prompts = [{"prompt_token_ids": ids} for ids in prompts_of(args)]

        def run(logprobs: int | None, new: int) -> float:
            sampling = vllm.SamplingParams(
                n=args.samples,
                temperature=1.0,
                max_tokens=new,
                logprobs=logprobs,
                detokenize=False,
                ignore_eos=True,
            )
            start = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            assert (
                sum(len(c.token_ids) for o in outputs for c in o.outputs) == args.prompts * args.samples * new
            )
            llm.reset_prefix_cache()
            return seconds

        run(0, 8)
        report("LLM.generate, with log-probabilities", [run(0, args.new) for _ in range(args.rounds)])
        report("LLM.generate, without log-probabilities", [run(None, args.new) for _ in range(args.rounds)])


def ours(args: Any) -> None:
    from grpo_jax.config import MeshSection
    from grpo_jax.rollout import share_devices

    section = dataclasses.replace(
        common.shipped("gsm8k").rollout,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=args.enforce_eager,
    )
    share_devices(section)
    import jax

    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.model.transformer import init_params
    from grpo_jax.rollout import SamplingParams, make_engine
    from grpo_jax.types import Prompt

    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.model_folder(
            engine_common.write_shape(Path(temporary) / "model", args.shape), args.dtype
        )
        mesh = make_mesh(MeshSection())
        engine = make_engine(
            section, folder=folder, mesh=mesh, tokenizer=engine_common.NoTokenizer(),
            max_model_len=args.prompt_tokens + args.new,
        )  # fmt: skip
        prompts = [Prompt(str(i), tuple(ids), "", "", "", {}) for i, ids in enumerate(prompts_of(args))]
        with contextlib.closing(engine), jax.set_mesh(mesh):
            params = init_params(folder.config, jax.random.key(0), mesh)
            engine.load_weights(params, version=0)

            def run(new: int, seed: int) -> float:
                start = time.perf_counter()
                groups = engine.generate(prompts, SamplingParams(args.samples, 1.0, new), seed=seed)
                seconds = time.perf_counter() - start
                assert (
                    sum(len(c.token_ids) for g in groups for c in g.completions)
                    == args.prompts * args.samples * new
                )
                return seconds

            run(8, 0)
            report(OURS, [run(args.new, 1 + i) for i in range(args.rounds)])
            report(DIFFERENCE, difference(args, engine, params, folder, mesh, prompts[:8]))


def difference(args: Any, engine: Any, params: Any, folder: Any, mesh: Any, prompts: Any) -> list[float]:
    """(mean |p_trainer - p_engine|, mean |log ratio|, mean p) over the tokens of a few completions.

    The final norm is scaled up first: a random model is otherwise so undecided that any two agree.
    """
    from grpo_jax.learner.batching import make_train_batch
    from grpo_jax.learner.forward import make_forward_step, score_rows
    from grpo_jax.rollout import SamplingParams

    params = params | {"final_norm": {"scale": params["final_norm"]["scale"] * 12}}
    engine.load_weights(params, version=1)
    groups = engine.generate(prompts, SamplingParams(args.samples, 1.0, args.new), seed=99)
    batch = make_train_batch(groups, pad_id=0)
    score = make_forward_step(folder.config, mesh, temperature=1.0, chunk_tokens=1024)
    trainer = score_rows(score, params, batch, (4, batch.tokens.shape[1]), mesh)
    mask = np.asarray(batch.completion_mask) > 0
    trainer, sampler = trainer[mask], np.asarray(batch.sampler_logprobs)[mask]
    probabilities = np.abs(np.exp(trainer) - np.exp(sampler)).mean()
    return [float(probabilities), float(np.abs(trainer - sampler).mean()), float(np.exp(sampler).mean())]


if __name__ == "__main__":
    main()
