"""Products of rows with one of several matrices each, by a Pallas kernel for NVIDIA GPUs.

`jax.lax.ragged_dot` computes every row with every matrix on these. The rows come sorted by matrix, and those of
a matrix fill whole blocks, so that a block of the result needs one matrix only. Every sum has one order: equal
inputs give equal bits, gradients too.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Tiles:
    """What one program of a kernel computes at a time. Powers of 2."""

    rows: int = 128
    """Those of a block."""
    outputs: int = 256
    depth: int = 64
    """Of the sum that is added up at a time."""
    warps: int = 8
    stages: int = 3
    """Loads under way."""


TILES = Tiles()


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_product(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, tiles: Tiles = TILES, interpret: bool = False
) -> jax.Array:
    """Multiplies each row by the matrix of its group.

    Args:
        x: [R, I], sorted by group; R is a multiple of `tiles.rows`. Rows beyond the last group are left out.
        kernels: [E, I, O], in x's dtype.
        sizes: [E] int32, rows of each group, multiples of `tiles.rows`.
        interpret: computes without a GPU, slowly: for tests.
    Returns: [R, O] in x's dtype, summed in float32; rows beyond the last group are 0.
    """
    return _rows_times(x, kernels, sizes, False, tiles, interpret)


def _forward(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, tiles: Tiles, interpret: bool
) -> tuple[jax.Array, Any]:
    return _rows_times(x, kernels, sizes, False, tiles, interpret), (x, kernels, sizes)


def _backward(tiles: Tiles, interpret: bool, kept: Any, dy: jax.Array) -> tuple[Any, ...]:
    x, kernels, sizes = kept
    dx = _rows_times(dy, kernels, sizes, True, tiles, interpret)
    return dx, _outer_sums(x, dy, sizes, tiles, interpret), None


grouped_product.defvjp(_forward, _backward)


def _rows_times(
    x: jax.Array, kernels: jax.Array, sizes: jax.Array, turned: bool, tiles: Tiles, interpret: bool
) -> jax.Array:
    """Args: turned: whether kernels are [E, O, I]."""
    from jax.experimental import pallas as pl  # here: no other model needs it at its start
    from jax.experimental.pallas import triton

    num_inputs, num_outputs = kernels.shape[:0:-1] if turned else kernels.shape[1:]
    columns = _divisor(tiles.outputs, num_outputs)
    depth = _divisor(tiles.depth, num_inputs)
    num_blocks = x.shape[0] // tiles.rows
    ends = jnp.cumsum(sizes) // tiles.rows
    # As `searchsorted`, which XLA computes by a loop.
    groups = jnp.sum(ends[None] <= jnp.arange(num_blocks)[:, None], axis=1, dtype=jnp.int32)

    def multiply(groups_ref: Any, x_ref: Any, kernels_ref: Any, y_ref: Any) -> None:
        group = groups_ref[pl.program_id(1)]
        first = pl.program_id(0) * columns

        def add(step: Any, total: jax.Array) -> jax.Array:
            here, there = pl.ds(step * depth, depth), pl.ds(first, columns)
            kernel = kernels_ref[group, there, here] if turned else kernels_ref[group, here, there]
            return total + triton.dot(x_ref[:, here], kernel.T if turned else kernel)

        start = jnp.zeros((tiles.rows, columns), jnp.float32)
        steps = (group < kernels.shape[0]).astype(jnp.int32) * (num_inputs // depth)
        y_ref[...] = jax.lax.fori_loop(0, steps, add, start).astype(y_ref.dtype)

    return pl.pallas_call(
        multiply,
        grid=(num_outputs // columns, num_blocks),
        in_specs=[
            pl.BlockSpec(groups.shape, lambda column, block: (0,)),
            pl.BlockSpec((tiles.rows, num_inputs), lambda column, block: (block, 0)),
            pl.BlockSpec(kernels.shape, lambda column, block: (0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((tiles.rows, columns), lambda column, block: (block, column)),
        out_shape=jax.ShapeDtypeStruct((x.shape[0], num_outputs), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_product",
    )(groups, x, kernels)


def _outer_sums(x: jax.Array, dy: jax.Array, sizes: jax.Array, tiles: Tiles, interpret: bool) -> jax.Array:
    """The gradient of the kernels, [E, I, O]: of each group the sum of its rows' outer products."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    num_inputs, num_outputs = x.shape[1], dy.shape[1]
    rows, columns = _divisor(tiles.rows, num_inputs), _divisor(tiles.outputs, num_outputs)
    depth = min(tiles.depth, tiles.rows)
    ends = jnp.cumsum(sizes)

    def multiply(begins_ref: Any, ends_ref: Any, x_ref: Any, dy_ref: Any, sum_ref: Any) -> None:
        group = pl.program_id(2)

        def add(step: Any, total: jax.Array) -> jax.Array:
            here = pl.ds(pl.multiple_of(step * depth, depth), depth)
            return total + triton.dot(x_ref[here, :].T, dy_ref[here, :])

        start = jnp.zeros((rows, columns), jnp.float32)
        steps = begins_ref[group] // depth, ends_ref[group] // depth
        sum_ref[...] = jax.lax.fori_loop(*steps, add, start).astype(sum_ref.dtype)

    return pl.pallas_call(
        multiply,
        grid=(num_outputs // columns, num_inputs // rows, sizes.shape[0]),
        in_specs=[
            pl.BlockSpec(sizes.shape, lambda column, row, group: (0,)),
            pl.BlockSpec(sizes.shape, lambda column, row, group: (0,)),
            pl.BlockSpec((x.shape[0], rows), lambda column, row, group: (0, row)),
            pl.BlockSpec((x.shape[0], columns), lambda column, row, group: (0, column)),
        ],
        out_specs=pl.BlockSpec((None, rows, columns), lambda column, row, group: (group, row, column)),
        out_shape=jax.ShapeDtypeStruct((sizes.shape[0], num_inputs, num_outputs), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="grouped_outer_sums",
    )(ends - sizes, ends, x, dy)


def _divisor(size: int, whole: int) -> int:
    """The largest power of 2 up to `size` that divides `whole`."""
    return min(size, whole & -whole)
