"""Compiling the steps before they run: what they return, and how much memory they take."""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Program:
    """One that was compiled."""

    name: str
    """Of its function."""
    compiled: Any
    """`jax.stages.Compiled`."""


_seen: contextvars.ContextVar[list[Program] | None] = contextvars.ContextVar("seen", default=None)


@contextlib.contextmanager
def programs_compiled() -> Iterator[list[Program]]:
    """Lists what `compile_ahead` compiles within the context, for who wants to look into it."""
    programs: list[Program] = []
    token = _seen.set(programs)
    try:
        yield programs
    finally:
        _seen.reset(token)


def compile_ahead(step: Any, *args: Any, **static: Any) -> tuple[Any, int]:
    """Compiles a jitted function. A later call with arguments like these compiles nothing.

    Args:    args: arrays, or `jax.ShapeDtypeStruct`s with shardings in their place; static: those of its static
             arguments.
    Returns: what the function returns, as `jax.ShapeDtypeStruct`s with shardings, and the bytes that it takes on
             one device with its arguments and results; 0 where the compiler does not say.
    """
    lowered = step.lower(*args, **static)
    compiled = lowered.compile()
    if (seen := _seen.get()) is not None:
        seen.append(Program(step.__name__, compiled))
    abstract = lambda out, sharding: jax.ShapeDtypeStruct(out.shape, out.dtype, sharding=sharding)
    return jax.tree.map(abstract, lowered.out_info, compiled.output_shardings), program_bytes(compiled)


def program_bytes(compiled: Any) -> int:
    """Bytes that a program takes on one device with its arguments and results; 0 where that is not said."""
    sizes = compiled.memory_analysis()
    if sizes is None:
        return 0
    # What is donated is counted among the arguments and among the results.
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    return sizes.argument_size_in_bytes + results + sizes.temp_size_in_bytes
