"""Compiling the steps before they run: what they return, and how much memory they take."""

from typing import Any

import jax


def compile_ahead(step: Any, *args: Any) -> tuple[Any, int]:
    """Compiles a jitted function. A later call with arguments like these compiles nothing.

    Args:    args: arrays, or `jax.ShapeDtypeStruct`s with shardings in their place.
    Returns: what the function returns, as `jax.ShapeDtypeStruct`s with shardings, and the bytes that it takes on
             one device with its arguments and results; 0 where the compiler does not say.
    """
    lowered = step.lower(*args)
    compiled = lowered.compile()
    abstract = lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)
    return jax.tree.map(abstract, lowered.out_info, compiled.output_shardings), _size(compiled)


def _size(compiled: Any) -> int:
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    # What is donated is counted among the arguments and among the results.
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes
