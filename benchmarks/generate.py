"""Tokens sampled per second: the local rollout engine beside `transformers.generate`, on the same CPU.

    python benchmarks/generate.py            # the shapes of configs/quickstart.py
    python benchmarks/generate.py --table    # these and larger models, smaller batches, longer completions
    python benchmarks/generate.py --hidden=512 --mlp=1536 --layers=8 --heads=8 --prompts=4 --samples=4 --new=128

Aim: at least 3 times the tokens/s at the quickstart's shapes; docs/benchmarks.md has what was reached. Both
sides load the same random float32 model and continue the same prompts, as many samples a prompt, with
temperature 1 over the whole vocabulary; the stop id is one that no token has, so that every completion has the
full length. What is timed: on our side `LocalEngine.generate`, which also returns log-probabilities and decodes
to text; on the other only `generate`, which does neither. The first call of each, ours compiling, is not timed.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

AIM = 3.0
SHAPES: dict[str, dict[str, int]] = {
    "quickstart": {},
    "quickstart, 16 completions": dict(prompts=4, samples=4),
    "quickstart, 1 completion": dict(prompts=1, samples=1, new=64),
    "width 256, 4 layers, 64 x 64 tokens": dict(
        hidden=256, mlp=768, layers=4, heads=4, prompts=8, samples=8, new=64
    ),
    "width 512, 8 layers, 16 x 128 tokens": dict(
        hidden=512, mlp=1536, layers=8, heads=8, prompts=4, samples=4, new=128
    ),
    "width 512, 8 layers, vocabulary 32,000": dict(
        hidden=512, mlp=1536, layers=8, heads=8, vocab=32000, prompts=4, samples=4, new=32
    ),
}


def main() -> None:
    parser = common.make_parser(__doc__)
    common.add_model_arguments(parser)
    config = common.shipped("quickstart")
    prompts, samples = config.data.train_batch_size, config.algorithm.group_size
    parser.add_argument("--prompts", type=int, default=prompts, help="different prompts")
    parser.add_argument("--samples", type=int, default=samples, help="completions a prompt, decoded at once")
    parser.add_argument("--prompt_tokens", type=int, default=40, help="mean prompt length; 3/4 to 5/4 of it")
    parser.add_argument("--new", type=int, default=32, help="tokens a completion")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--table", action="store_true", help="several shapes instead of one")
    args = parser.parse_args()
    common.measure_shapes(measure, args, SHAPES)


def measure(args: Any) -> float:
    """Prints both speeds for one set of sizes. Returns their ratio."""
    rng = np.random.default_rng(0)
    longest = args.prompt_tokens + args.prompt_tokens // 4
    lengths = rng.integers(args.prompt_tokens - args.prompt_tokens // 4, longest + 1, args.prompts)
    prompts = [rng.integers(3, min(args.vocab, 260), n).tolist() for n in lengths]  # no special tokens
    rows = args.prompts * args.samples
    print(
        f"{common.describe_model(args)}\n"
        f"batch     {rows} completions of {args.new} tokens ({args.prompts} prompts of "
        f"{min(lengths)} to {max(lengths)} tokens x {args.samples})"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        common.write_random_model(folder, args)
        runs = [our_run(folder, prompts, args), peer_run(folder, prompts, args)]
    seconds = common.alternate(runs, args.rounds)
    return common.print_comparison(seconds, rows * args.new, "transformers.generate", AIM)


def our_run(folder: Path, prompts: list[list[int]], args: Any) -> Callable[[], None]:
    from grpo_jax.config import MeshSection
    from grpo_jax.data.prompts import load_tokenizer
    from grpo_jax.model.hf import inspect_folder, load_params
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.rollout import SamplingParams
    from grpo_jax.rollout.local import LocalEngine
    from grpo_jax.types import Prompt

    mesh = make_mesh(MeshSection())
    model = inspect_folder(folder).with_config(scan_layers=args.scan_layers)
    engine = LocalEngine(
        model.config, mesh, load_tokenizer(folder), (args.vocab,), batch_size=len(prompts) * args.samples
    )
    engine.load_weights(load_params(model, model.config, mesh), version=0)
    sampling = SamplingParams(args.samples, 1.0, args.new)
    encoded = [Prompt(f"random/{i}", tuple(ids), "", "", "random", {}) for i, ids in enumerate(prompts)]
    calls = iter(range(1_000_000))  # another seed each time, as in training

    def run() -> None:
        groups = engine.generate(encoded, sampling, seed=next(calls))
        assert all(len(c.token_ids) == args.new for group in groups for c in group.completions)

    return run


def peer_run(folder: Path, prompts: list[list[int]], args: Any) -> Callable[[], None]:
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    generation = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=args.samples,
        max_new_tokens=args.new, eos_token_id=args.vocab, pad_token_id=0,
    )  # fmt: skip
    model.generation_config = generation

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(tokens, attention_mask=mask, generation_config=generation)
        assert out.shape == (len(prompts) * args.samples, longest + args.new)

    return run


if __name__ == "__main__":
    main()
