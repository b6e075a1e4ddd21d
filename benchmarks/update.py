"""Tokens trained per second: our update beside the same GRPO update in plain PyTorch, on the same CPU.

    python benchmarks/update.py             # the shapes of configs/quickstart.py
    python benchmarks/update.py --table     # these and larger models, longer rows
    python benchmarks/update.py --hidden=512 --mlp=1536 --layers=8 --heads=8 --rows=16 --micro_rows=16

Claimed: at least as many tokens/s as PyTorch. One update is a forward and a backward pass over all rows, the
clipped surrogate with dual clip, KL (k3) to a reference given as numbers, mean over tokens, clipping by the
global norm, and AdamW, in float32. The peer is transformers' own model with logits [B, T, V] held whole, no
recomputation, and torch's fused AdamW; on its side only these steps are timed, on ours also the transfer of the
batch and every metric that training reports. Before anything is timed, both must give the same loss to 1e-4 and
the same gradient norm to 1e-3 of itself. Tokens are those of the prompts and completions, padding not counted.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import numpy as np

AIM = 1.0
CLIP_LOW, CLIP_HIGH, DUAL_CLIP, KL_COEF = 0.2, 0.2, 3.0, 0.001
OPTIM = dict(learning_rate=1e-5, beta1=0.9, beta2=0.999, weight_decay=0.01, max_grad_norm=1.0)
SHAPES: dict[str, dict[str, int]] = {
    "quickstart": {},
    "quickstart, 64 rows": dict(rows=64),
    "width 256, 4 layers, 64 rows of ~190": dict(
        hidden=256, mlp=768, layers=4, rows=64, prompt_tokens=64, new=128, micro_rows=16
    ),
    "width 512, 8 layers, 16 rows of ~190": dict(
        hidden=512, mlp=1536, layers=8, heads=8, rows=16, prompt_tokens=64, new=128, micro_rows=8
    ),
    "width 512, 8 layers, vocabulary 32,000": dict(
        hidden=512, mlp=1536, layers=8, heads=8, vocab=32000, rows=8, prompt_tokens=64, new=128, micro_rows=8
    ),
}


def main() -> None:
    parser = common.make_parser(__doc__)
    common.add_model_arguments(parser)
    config = common.shipped("quickstart")
    rows, actor = config.data.train_batch_size * config.algorithm.group_size, config.actor
    micro_rows, chunk = actor.micro_batch_size_per_device, actor.logits_chunk_tokens
    parser.add_argument("--rows", type=int, default=rows, help="completions an update")
    parser.add_argument(
        "--micro_rows", type=int, default=micro_rows, help="actor.micro_batch_size_per_device"
    )
    parser.add_argument("--chunk_tokens", type=int, default=chunk, help="actor.logits_chunk_tokens")
    parser.add_argument("--remat", default=config.model.remat, help="model.remat: none, dots, full")
    parser.add_argument("--prompt_tokens", type=int, default=36, help="mean prompt length; 5/6 to 7/6 of it")
    parser.add_argument("--new", type=int, default=18, help="mean completion length; 5/6 to 7/6 of it")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--table", action="store_true", help="several shapes instead of one")
    args = parser.parse_args()
    common.measure_shapes(measure, args, SHAPES)


def measure(args: Any) -> float:
    """Checks that both sides agree, then prints both speeds for one set of sizes. Returns their ratio."""
    batch = make_batch(args)
    tokens = int(batch.segment_ids.sum())
    print(
        f"{common.describe_model(args)}, remat {args.remat}\n"
        f"batch     {args.rows} rows of {batch.tokens.shape[1]} columns, {tokens:,} tokens, "
        f"{int(batch.completion_mask.sum()):,} of them completions; micro-batches of {args.micro_rows} rows"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        common.write_random_model(folder, args)
        ours, batch = our_update(folder, batch, args)
        theirs = peer_update(folder, batch)
    first, second = ours(), theirs()
    print(f"loss      {first[0]:.6f} and {second[0]:.6f}; gradient norm {first[1]:.6f} and {second[1]:.6f}")
    if abs(first[0] - second[0]) > 1e-4 or abs(first[1] - second[1]) > 1e-3 * abs(second[1]):
        sys.exit("the two updates are not the same: nothing is timed")
    seconds = common.alternate([ours, theirs], args.rounds)
    return common.print_comparison(seconds, tokens, "PyTorch", AIM)


def make_batch(args: Any) -> Any:
    """Random rows and advantages; `TrainBatch` of numpy arrays without log-probabilities."""
    from grpo_jax.learner.batching import add_advantages, make_sft_batch

    rng = np.random.default_rng(0)

    def draw(mean: int) -> list[int]:
        return rng.integers(3, args.vocab, rng.integers(mean - mean // 6, mean + mean // 6 + 1)).tolist()

    batch = make_sft_batch([(draw(args.prompt_tokens), draw(args.new)) for _ in range(args.rows)], pad_id=0)
    return add_advantages(batch, rng.normal(size=(1, args.rows)))


def our_update(folder: Path, batch: Any, args: Any) -> tuple[Callable[[], tuple[float, float]], Any]:
    """Returns the update, which gives loss and gradient norm, and the batch with log-probabilities.

    The old ones are the model's own moved a little, so that some ratios are clipped; the reference likewise.
    """
    import jax

    from grpo_jax.algorithm import Algorithm
    from grpo_jax.algorithm.loss import grpo_loss
    from grpo_jax.config import AlgorithmSection, MeshSection, OptimSection
    from grpo_jax.learner import make_optimizer
    from grpo_jax.learner.batching import add_loss_weights
    from grpo_jax.learner.forward import make_forward_step, score_rows, to_micro_batches
    from grpo_jax.learner.update import make_update_step
    from grpo_jax.model.hf import inspect_folder, load_params
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.model.transformer import bucket_length

    mesh = make_mesh(MeshSection(data=1, fsdp=-1, tensor=1))
    model = inspect_folder(folder).with_config(scan_layers=args.scan_layers, remat=args.remat).config
    shape = (args.micro_rows, bucket_length(2 * (args.prompt_tokens + args.new)))
    algorithm = AlgorithmSection(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=DUAL_CLIP, kl_coef=KL_COEF)
    optim = OptimSection(offload=False, **OPTIM)
    optimizer = make_optimizer(optim, model, mesh, num_updates=1)
    forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=args.chunk_tokens)
    loss = functools.partial(grpo_loss, algorithm=Algorithm.of(algorithm))
    with jax.set_mesh(mesh):
        params = load_params(inspect_folder(folder), model, mesh)
        logprobs = score_rows(forward, params, batch, shape, mesh)
        noise = np.random.default_rng(1).normal(0, 0.2, (2, *logprobs.shape)).astype(np.float32)
        old, ref = np.where(batch.completion_mask > 0, logprobs + noise, np.float32(0))
        batch = batch.replace(old_logprobs=old, ref_logprobs=ref, sampler_logprobs=old)
        weighted = add_loss_weights(batch, "token-mean", 1.0)
        state = optimizer.init_state(params)
        update = make_update_step(model, mesh, optimizer, forward, loss, optim=optim)

    def run() -> tuple[float, float]:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = update(state, to_micro_batches(weighted, shape, mesh)[0])
            jax.block_until_ready(state)
        return float(metrics["actor/loss"]), float(metrics["actor/grad_norm"])

    return run, batch


def peer_update(folder: Path, batch: Any) -> Callable[[], tuple[float, float]]:
    """The same update in PyTorch, written from the formulas in grpo_jax/algorithm/loss.py."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    betas = (OPTIM["beta1"], OPTIM["beta2"])
    optimizer = torch.optim.AdamW(
        model.parameters(), OPTIM["learning_rate"], betas, weight_decay=OPTIM["weight_decay"], fused=True
    )
    tokens = torch.tensor(batch.tokens, dtype=torch.long)
    attended = torch.tensor(batch.segment_ids)
    mask, advantages, old, ref = (
        torch.tensor(x)[:, 1:]
        for x in (batch.completion_mask, batch.advantages, batch.old_logprobs, batch.ref_logprobs)
    )

    def run() -> tuple[float, float]:
        logits = model(tokens, attention_mask=attended, use_cache=False).logits[:, :-1]
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
        ratio = (logprobs - old).exp()
        per_token = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
        bounded = torch.minimum(per_token, -advantages * DUAL_CLIP)
        per_token = torch.where(advantages < 0, bounded, per_token)
        per_token = per_token + KL_COEF * (torch.expm1(ref - logprobs) - (ref - logprobs))
        loss = (per_token * mask).sum() / mask.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM["max_grad_norm"])
        optimizer.step()
        return loss.item(), float(norm)

    return run


if __name__ == "__main__":
    main()
