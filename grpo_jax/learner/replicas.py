"""The copies of the parameters along the mesh axis `data`, each at work on rows of its own.

What they add up over the micro-batches of an update, gradients and metrics, stays with each of them until the end:
the network carries it once an update. Left to the compiler it would carry it once a micro-batch. Along the other
axes, each copy is split as `sharding.AXIS_RULES` says, and the compiler does the rest.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"

WHOLE, ROWS, OWN = "whole", "rows", "own"
"""How copies have an array: all the same; each some of its rows; each another one, [copies, ...] together."""

_SPECS = {WHOLE: PartitionSpec(), ROWS: PartitionSpec(AXIS), OWN: PartitionSpec(AXIS)}


def has_copies(mesh: Mesh) -> bool:
    """Whether there is more than one."""
    return mesh.shape[AXIS] > 1


def each(
    function: Callable[..., Any], mesh: Mesh, takes: Sequence[str], gives: str | Sequence[str]
) -> Callable[..., Any]:
    """Has each copy compute `function` of what it has. With one copy, it is the function itself.

    Args:
        takes: how the copies have each argument.
        gives: the same for the result, or for each of several results.
    """
    if not has_copies(mesh):
        return function
    results = (gives,) if isinstance(gives, str) else tuple(gives)

    @functools.wraps(function)
    def of_copy(*args: Any) -> Any:
        mine = [_take(x) if kind == OWN else x for x, kind in zip(args, takes, strict=True)]
        result = function(*mine)
        out = (result,) if isinstance(gives, str) else result
        given = tuple(_give(x) if kind == OWN else x for x, kind in zip(out, results, strict=True))
        return given[0] if isinstance(gives, str) else given

    specs = tuple(_SPECS[kind] for kind in results)
    return jax.shard_map(
        of_copy,
        mesh=mesh,
        in_specs=tuple(_SPECS[kind] for kind in takes),
        out_specs=specs[0] if isinstance(gives, str) else specs,
        # Some compilers fail if any axis is left to them; axes of one device need not be.
        axis_names={AXIS} | {axis for axis, size in mesh.shape.items() if size == 1},
        check_vma=False,
    )


def own_shardings(shardings: Any, mesh: Mesh) -> Any:
    """The shardings of arrays of which each copy has its own. Args: shardings: of one copy's."""
    if not has_copies(mesh):
        return shardings
    own = lambda s: NamedSharding(s.mesh, PartitionSpec(AXIS, *s.spec))
    return jax.tree.map(own, shardings)


def _take(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[0], tree)


def _give(tree: Any) -> Any:
    return jax.tree.map(lambda x: x[None], tree)
