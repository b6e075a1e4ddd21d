"""The rate of a large matrix product on one device: the limit that an MFU is compared with.

    python benchmarks/matmul.py

Prints one line of JSON: the device, the size, and TFLOP/s, the median of `--rounds` of ten products each. A round
is short: a card that has to slow down under a longer load, for the power it may draw, is measured at its best.
"""

import json
import statistics
import time

import common


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--size", type=int, default=0, help="rows and columns; 0: 8192 on a GPU or TPU, else 512"
    )
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    import jax

    size = args.size or default_size()
    rate = matmul_rate(args.dtype, size, args.rounds)
    print(json.dumps(dict(device=jax.devices()[0].device_kind, size=size, tflops=rate / 1e12)))


def default_size() -> int:
    """Smaller on a CPU, which would take minutes."""
    import jax

    return 512 if jax.default_backend() == "cpu" else 8192


def matmul_rate(dtype: str, size: int, rounds: int = 5) -> float:
    """FLOP/s of a square matrix product of random numbers."""
    import jax
    import jax.numpy as jnp

    x = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()

    def once() -> float:
        start = time.perf_counter()
        jax.block_until_ready([product(x) for _ in range(10)])
        return (time.perf_counter() - start) / 10

    return 2 * size**3 / statistics.median(once() for _ in range(rounds))


if __name__ == "__main__":
    main()
