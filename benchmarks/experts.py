"""One layer of experts, forward and backward: every expert on every token beside products by groups.

    python benchmarks/experts.py

Prints a line for each way: milliseconds of a layer's forward and backward pass, which computes again what the
forward pass did, and how often that is what one matrix product as large as all that are needed takes on this
device (`matmul`); temporary memory; the largest difference of the result and of the gradients from those of the
first. The default sizes are those of Qwen3-30B-A3B.
"""

import functools
import statistics
import time
from typing import Any

import common
from matmul import default_size, matmul_rate

REPEATS = 5


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=768, help="of an expert")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--per_token", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--ways", default="dense,grouped,lax,tokamax", help="also triton, mosaic: tokamax's")
    args = parser.parse_args()
    common.print_environment()
    products = 2 * 4 * 3 * args.tokens * args.per_token * args.hidden * args.width  # forward, again, two back
    limit = products / matmul_rate(args.dtype, default_size())
    print(f"matmul    {1e3 * limit:8.2f} ms")
    expected: Any = None
    for way in args.ways.split(","):
        try:
            seconds, temporary, found = measure(args, way)
        except Exception as failure:  # a way that this device does not have is a line too
            print(f"{way:9} {type(failure).__name__}: {str(failure)[:200]}", flush=True)
            continue
        expected = expected or found
        worst = ", ".join(f"{difference(a, b):.1e}" for a, b in zip(found, expected, strict=True))
        print(
            f"{way:9} {1e3 * seconds:8.2f} ms  {seconds / limit:6.1f} x matmul  {temporary / 1e9:6.2f} GB  "
            f"differs {worst}",
            flush=True,
        )


def measure(args: Any, way: str) -> tuple[float, int, list[Any]]:
    """Median seconds of a forward and backward pass, bytes of temporary memory, result and gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from grpo_jax.model import experts

    dtype = jnp.dtype(args.dtype)
    keys = jax.random.split(jax.random.key(0), 6)
    scores = jax.random.normal(keys[0], (1, args.tokens, args.experts))
    shares, chosen = jax.lax.top_k(jax.nn.softmax(scores), args.per_token)
    x, y = (jax.random.normal(k, (1, args.tokens, args.hidden), dtype) for k in keys[1:3])
    make = lambda key, *shape: (jax.random.normal(key, shape) / np.sqrt(shape[1])).astype(dtype)
    gate, up = (make(k, args.experts, args.hidden, args.width) for k in keys[3:5])
    kernels = experts.Kernels(gate, up, make(keys[5], args.experts, args.width, args.hidden))
    function = experts.dense if way == "dense" else functools.partial(experts.grouped, product_of(way))

    def run(x: Any, shares: Any, chosen: Any, y: Any, kernels: Any) -> Any:
        result, back = jax.vjp(lambda x, s, w: function(x, s, chosen, w), x, shares, kernels)
        return result, back(y)

    inputs = x, shares.astype(dtype), chosen, y, kernels
    compiled = jax.jit(run).lower(*inputs).compile()
    found = jax.block_until_ready(compiled(*inputs))

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        return time.perf_counter() - start

    seconds = statistics.median(once() for _ in range(REPEATS))
    again = jax.tree.leaves(compiled(*inputs))
    leaves = jax.tree.leaves(found)
    equal = all(bool(jnp.array_equal(a, b)) for a, b in zip(leaves, again, strict=True))
    if not equal:
        print(f"{way:9} gives other bits each time")
    return seconds, compiled.memory_analysis().temp_size_in_bytes, [np.asarray(a, np.float32) for a in leaves]


def product_of(way: str) -> Any:
    """The `GroupedProduct` of a name; numbers after "grouped" are tiles."""
    import jax

    from grpo_jax.model.grouped_product import Tiles, grouped_product

    name, *sizes = way.split("-")
    if name == "grouped":
        tiles = Tiles(*map(int, sizes))
        return lambda *inputs: grouped_product(*inputs, tiles, jax.default_backend() == "cpu")
    if name == "lax":
        return jax.lax.ragged_dot
    import tokamax
    from absl import flags

    if not flags.FLAGS.is_parsed():  # tokamax asks for flags of its own
        flags.FLAGS(["tokamax"])
    return functools.partial(tokamax.ragged_dot, implementation=None if way == "tokamax" else way)


def difference(found: Any, expected: Any) -> float:
    """The largest, as a part of the largest expected value."""
    return float(abs(found - expected).max() / abs(expected).max())


if __name__ == "__main__":
    main()
