"""The update and the scoring at full size on this device: tokens a second, MFU, memory, and where the time goes.

    python benchmarks/mfu.py --shape=qwen2.5-1.5b --variants=dots:20:2048,none:20:2048 --profile

Random weights, packed rows; a variant is REMAT:ROWS:CHUNK (model.remat, rows of a micro-batch,
actor.logits_chunk_tokens). The limit beside it is this device's own rate at a large bfloat16 matrix product,
measured in the same process. FLOPs are the model's (`metrics.update_flops`): recomputation is not counted.
"""

import collections
import dataclasses
import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import engine_common
import matmul
import numpy as np

LEARNING_RATE = 1e-6


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default="tiny", choices=engine_common.SHAPES)
    parser.add_argument("--variants", default="dots:4:1024")
    parser.add_argument("--length", type=int, default=640, help="tokens of a row")
    parser.add_argument("--min_length", type=int, default=0, help="shortest sequence; 0: all fill their rows")
    parser.add_argument("--tokens", type=int, default=65536, help="tokens of an update, about")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--param_dtype", default="float32")
    parser.add_argument("--offload", action="store_true", help="optim.offload")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mesh", default="1,1", help="devices: data, fsdp")
    parser.add_argument("--profile", action="store_true", help="print the kernels that take longest")
    args = parser.parse_args()
    if args.offload:
        make_room(args)
    common.print_environment()
    print(f"gpu       {engine_common.gpu_name()}")
    limit = matmul.matmul_rate(args.dtype, matmul.default_size())
    print(f"limit     {limit / 1e12:,.0f} TFLOP/s, a matrix product of {args.dtype}")
    for variant in args.variants.split(","):
        measure(args, variant, limit)


def make_room(args: Any) -> None:
    """As a run does, before the device is touched."""
    from grpo_jax.run.devices import make_room_on_host

    config = common.shipped("gsm8k")
    config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, kl_coef=0.0))
    model = shape_of(args)
    make_room_on_host(config, dataclasses.replace(model, param_dtype=args.param_dtype))


def shape_of(args: Any) -> Any:
    """`ModelConfig` of the shape."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.write_shape(Path(temporary) / "model", args.shape)
        return engine_common.model_folder(folder, args.dtype).config


def measure(args: Any, variant: str, limit: float) -> None:
    import jax

    from grpo_jax.run.metrics import update_flops

    remat, rows, chunk = variant.split(":")
    batch = random_batch(args)
    lengths = np.asarray(batch.segment_ids).sum(axis=1)
    tokens = int(lengths.sum())
    with jax.set_mesh(make_mesh(args.mesh)):
        model, update, score = build(args, remat, (int(rows), args.length), int(chunk), batch)
        flops = update_flops(model, lengths)
        devices = jax.sharding.get_mesh().size
        for name, function, share in (("update", update, 1.0), ("score", score, 1 / 3)):
            start = time.perf_counter()
            function()
            first = time.perf_counter() - start
            seconds = []
            for _ in range(args.rounds):
                start = time.perf_counter()
                function()
                seconds.append(time.perf_counter() - start)
            median = statistics.median(seconds)
            print(
                f"  {variant:<18} {model.attention:<7} {name:<7} {median:7.3f} s (first {first:5.1f})  "
                f"{tokens / median:>9,.0f} tokens/s  {flops * share / median / 1e12:6.1f} TFLOP/s  "
                f"MFU {flops * share / median / limit / devices:.3f} of the limit, mesh {args.mesh}",
                flush=True,
            )
        stats = jax.devices()[0].memory_stats() or {}
        print(
            f"  {variant:<18} peak memory so far {stats.get('peak_bytes_in_use', 0) / 1e9:.1f} GB", flush=True
        )
        if args.profile:
            profile(update)


def make_mesh(sizes: str) -> Any:
    import jax

    from grpo_jax.config import MeshSection
    from grpo_jax.model import sharding

    data, fsdp = map(int, sizes.split(","))
    return sharding.make_mesh(MeshSection(data, fsdp, tensor=1), jax.devices()[: data * fsdp])


def random_batch(args: Any) -> Any:
    """Sequences of random tokens, a fifth of each prompt, one a row."""
    from grpo_jax.learner.batching import add_advantages, add_loss_weights, make_sft_batch

    rng = np.random.default_rng(0)
    vocab = engine_common.SHAPES[args.shape]["vocab_size"]
    mean = args.length if not args.min_length else (args.length + args.min_length) / 2
    lengths = rng.integers(args.min_length or args.length, args.length + 1, round(args.tokens / mean))
    draw = lambda n: rng.integers(10, vocab - 10, n).tolist()
    batch = make_sft_batch([(draw(n // 5), draw(n - n // 5)) for n in lengths], pad_id=0)
    batch = add_advantages(batch, rng.normal(size=(1, len(lengths))))
    zeros = np.zeros(batch.tokens.shape, np.float32)
    return add_loss_weights(batch.replace(sampler_logprobs=zeros, ref_logprobs=zeros), "token-mean", 1.0)


def build(args: Any, remat: str, shape: tuple[int, int], chunk: int, batch: Any) -> Any:
    """Returns the model's config, and an update and a scoring of the whole batch that wait for the device."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.algorithm import Algorithm
    from grpo_jax.algorithm.loss import grpo_loss
    from grpo_jax.learner import make_optimizer
    from grpo_jax.learner.forward import make_forward_step, to_micro_batches
    from grpo_jax.learner.update import make_update_step
    from grpo_jax.model.fused_attention import choose_kernel, mesh_device_kind
    from grpo_jax.model.transformer import init_params

    defaults = common.shipped("gsm8k")
    optim = dataclasses.replace(defaults.optim, offload=args.offload)
    mesh = jax.sharding.get_mesh()
    model = shape_of(args)
    kernel = choose_kernel(args.attention, args.dtype, model.head_dim, mesh_device_kind(mesh))
    model = dataclasses.replace(
        model, param_dtype=jnp.dtype(args.param_dtype), remat=remat, scan_layers=True, attention=kernel
    )
    optimizer = make_optimizer(optim, model, mesh, num_updates=100)
    forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=chunk)
    loss = functools.partial(grpo_loss, algorithm=Algorithm.of(defaults.algorithm))
    update = make_update_step(model, mesh, optimizer, forward, loss, optim=optim)
    state = optimizer.init_state(init_params(optimizer.stored_model(model), jax.random.key(0), mesh))
    micro_batches, _ = to_micro_batches(batch, shape, mesh)

    def run_update() -> None:
        nonlocal state
        state, metrics = update(state, micro_batches)
        jax.block_until_ready(metrics)

    def run_score() -> None:
        params = update.to_compute_dtype(state.params)
        jax.block_until_ready([forward.score(params, micro) for micro in micro_batches])

    return model, run_update, run_score


def profile(function: Any) -> None:
    """Runs `function` once under JAX's profiler and prints the kernels that the device spent most time in."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            function()
        file = next(Path(folder).rglob("*.xplane.pb"))
        planes = jax.profiler.ProfileData.from_file(str(file)).planes
        spent: collections.Counter[str] = collections.Counter()
        for plane in planes:
            if not plane.name.startswith("/device:"):
                continue
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name] += event.duration_ns
    total = sum(spent.values())
    for name, duration in spent.most_common(40):
        print(f"    {duration / 1e6:9.2f} ms {duration / total:6.1%}  {name[:110]}")


if __name__ == "__main__":
    main()
