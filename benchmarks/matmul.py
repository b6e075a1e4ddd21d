"""The rate of a large bfloat16 matrix product on one device, with which an MFU can be compared.

    python benchmarks/matmul.py

Prints one line of JSON: the device, the size, and TFLOP/s, the median of `--rounds`. Each round is a chain of
products in one compiled program, long enough for the card to settle at the power it may draw.
"""

import json
import statistics
import time

import common


def main() -> None:
    parser = common.make_parser(__doc__)
    parser.add_argument(
        "--size", type=int, default=0, help="rows and columns; 0: 8192 on a GPU or TPU, else 256"
    )
    parser.add_argument("--products", type=int, default=200, help="a round")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    import jax
    import jax.numpy as jnp

    size = args.size or (256 if jax.default_backend() == "cpu" else 8192)
    keys = jax.random.split(jax.random.key(0))
    # The spread of the entries stays as it is through the chain.
    x, w = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    w = w * jnp.bfloat16(size**-0.5)
    chain = jax.jit(lambda x, w: jax.lax.fori_loop(0, args.products, lambda _, y: y @ w, x))
    jax.block_until_ready(chain(x, w))
    rates = []
    for _ in range(args.rounds):
        start = time.perf_counter()
        jax.block_until_ready(chain(x, w))
        rates.append(args.products * 2 * size**3 / (time.perf_counter() - start) / 1e12)
    device = jax.devices()[0].device_kind
    print(json.dumps(dict(device=device, size=size, tflops=statistics.median(rates))))


if __name__ == "__main__":
    main()
