"""Seconds of a push: trainer's parameters to a vLLM engine, verified, prefix cache reset.

    python benchmarks/weight_sync.py --shape=qwen2.5-1.5b
    python benchmarks/weight_sync.py --shape=qwen2.5-7b
    python benchmarks/weight_sync.py --shape=qwen2.5-7b --placement=separate    # two GPUs, NCCL
    python benchmarks/several.py 2 python benchmarks/weight_sync.py --workdir=/tmp/w    # as on two hosts

Beside it, in the same run, the time of copying as many bytes on the same device once, as the limit: a push reads
and writes every byte at least once. Aims (one H200): 1.5B 0.06 s, 7B 0.25 s, at most 1 GB of memory.
"""

import contextlib
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import engine_common


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--shape", default="tiny", choices=engine_common.SHAPES)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--pushes", type=int, default=10)
    parser.add_argument("--bucket_mb", type=int, default=192)
    parser.add_argument("--gpu_memory_utilization", type=float, default=0.4)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--placement", default="colocated", choices=("colocated", "separate"))
    parser.add_argument("--replicas", type=int, default=0, help="rollout.num_replicas")
    parser.add_argument("--ray_address", default="", help="rollout.ray_address")
    parser.add_argument("--workdir", default="", help="where several processes meet")
    args = parser.parse_args()
    from grpo_jax.rollout import share_devices

    section = dataclasses.replace(
        common.shipped("gsm8k").rollout,
        bucket_mb=args.bucket_mb,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enforce_eager=True,
        weight_sync=args.transport,
        placement=args.placement,
        max_num_seqs=64,
        num_replicas=args.replicas,
        ray_address=args.ray_address,
    )
    share_devices(section)
    from grpo_jax.run.hosts import joined

    with joined(common.shipped("gsm8k"), Path(args.workdir)) as hosts:
        push_as_one_of(hosts, section, args)


def push_as_one_of(hosts: Any, section: Any, args: Any) -> None:
    import jax

    from grpo_jax.config import MeshSection
    from grpo_jax.model.sharding import make_mesh
    from grpo_jax.model.transformer import init_params
    from grpo_jax.rollout import make_engine
    from grpo_jax.rollout.vllm.check import find_vllm

    if hosts.is_first:
        common.print_environment()
        about = f"{engine_common.gpu_name()}; vLLM {find_vllm(section).version}"
        print(f"gpu       {about}; {hosts.count} process(es), {jax.device_count()} device(s)")
    with tempfile.TemporaryDirectory() as temporary:
        folder = engine_common.model_folder(
            engine_common.write_shape(Path(temporary) / "model", args.shape), args.dtype
        )
        mesh = make_mesh(MeshSection())
        engine = make_engine(
            section,
            folder=folder,
            mesh=mesh,
            tokenizer=engine_common.NoTokenizer(),
            max_model_len=1024,
            channel=hosts if hosts.count > 1 else None,
        )
        with contextlib.closing(engine), jax.set_mesh(mesh):
            params = init_params(folder.config, jax.random.key(0), mesh)
            measure(args, engine, params)


def measure(args: Any, engine: Any, params: Any) -> None:
    import jax

    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    jax.block_until_ready(params)
    start = time.perf_counter()
    engine.load_weights(params, version=0)
    print(f"model     {args.shape}, {num_bytes / 1e9:.2f} GB; first push, engine's start included: "
          f"{time.perf_counter() - start:.1f} s")  # fmt: skip
    memory = {} if jax.process_count() > 1 else memory_of_a_push(engine, params)
    seconds = []
    for version in range(3, 3 + args.pushes):
        start = time.perf_counter()
        engine.load_weights(params, version=version)
        seconds.append(time.perf_counter() - start)
    copy = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree))
    limits = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(copy(params))
        limits.append(time.perf_counter() - start)
    median, limit = statistics.median(seconds), min(limits)
    print(f"push      median {median:.4f} s, fastest {min(seconds):.4f}, slowest {max(seconds):.4f} "
          f"({args.pushes} pushes, {num_bytes / median / 1e9:.0f} GB/s)")  # fmt: skip
    ratio = f"a push takes {median / limit:.1f} x that"
    print(f"limit     {limit:.4f} s: reading and writing as many bytes once; {ratio}")
    if memory:
        print("memory    " + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in memory.items())
          + f": {sum(memory.values()) / 1e9:.2f} GB")  # fmt: skip


def memory_of_a_push(engine: Any, params: Any) -> dict[str, int]:
    """Bytes on the GPU beside both models: what is held between pushes, and the most that one push adds."""
    import jax
    import ray

    from grpo_jax.rollout.vllm import cargo

    device = jax.local_devices()[0]
    in_use = lambda: (device.memory_stats() or {}).get("bytes_in_use", 0)
    seen, pack = [before := in_use()], cargo.pack_buckets

    def watched(*args: Any) -> Any:
        for packed in pack(*args):
            seen.append(in_use())
            yield packed

    actor = next(iter(engine._replicas)).actor
    ray.get(actor.memory_peak.remote())
    cargo.pack_buckets = watched
    engine.load_weights(params, version=1)
    cargo.pack_buckets = pack
    slots = getattr(engine._pusher._sender, "_slot_bytes", 0) * 2
    return {"slots": slots, "JAX": max(seen) - before, "engine": ray.get(actor.memory_peak.remote())}


if __name__ == "__main__":
    main()
