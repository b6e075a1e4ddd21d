"""Where every array lives: one mesh and one table of logical axis rules.

Parameters and activations name their dimensions ("embed", "heads", ...). `AXIS_RULES` says over which mesh axes a
dimension of that name is split. To try another layout, edit the table.
"""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from grpo_jax.config import ConfigError, MeshSection

logger = logging.getLogger(__name__)

MESH_AXES = ("data", "fsdp", "tensor")

AXIS_RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),  # rows of a batch
    "rows_of_parts": ("data",),  # rows of which a device has a part of the width
    "layers": (),  # N, the scanned dimension
    "vocab": ("tensor",),  # V
    "embed": ("fsdp",),  # D of parameters; activations keep their width whole
    "mlp": ("tensor",),  # F
    "experts": (),  # E; each expert is split like an MLP
    "heads": ("tensor",),  # H
    "kv_heads": ("tensor",),  # K
    "head_dim": (),  # Dh
    "lora_rank": (),  # of an adapter: both of its matrices are split as the kernel beside them
}


def make_mesh(section: MeshSection, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices as the axes data, fsdp, tensor, neighbours in the interconnect side by side.

    Args:   devices: to choose from, the first ones if there are too many. None: all devices, of all hosts.
    Raises: ConfigError: the sizes do not fit the number of devices, or of slices.
    """
    devices = jax.devices() if devices is None else devices
    axes, fixed = dataclasses.asdict(section), fixed_devices(section)
    if fixed > len(devices) or (-1 in axes.values() and len(devices) % fixed):
        raise ConfigError("mesh", axes, f"must fit the {len(devices)} device(s) that there are")
    sizes = mesh_sizes(section, len(devices))
    used = math.prod(sizes)
    if used < len(devices):
        if devices[-1].process_index:
            rule = f"must use all {len(devices)} devices of the run's processes, not {used}"
            raise ConfigError("mesh", axes, rule)
        logger.warning("the mesh %s uses %d of %d devices", list(sizes), used, len(devices))
    # Auto: the compiler propagates shardings; we state them on parameters, inputs and a few activations.
    return Mesh(_arranged(sizes, devices[:used], len(devices)), MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def _arranged(sizes: tuple[int, int, int], devices: Sequence[jax.Device], num_there: int) -> np.ndarray:
    """Returns the devices as an array of these sizes.

    GPUs and CPUs stand in the order of their numbers, those of a host side by side: the last axes stay within a
    host where they fit into one, and `data`, over which gradients are summed once, goes across. TPUs of a slice
    are laid along the links of its torus; several slices, which only a network joins, along `data`.
    `jax.make_mesh` does all of it but the last, and takes the hosts of GPUs for slices, which it refuses.

    Args: num_there: with fewer `devices` than that, nothing is known of their shape: they stay in order.
    """
    if devices[0].platform != "tpu" or len(devices) < num_there:
        return np.array(sorted(devices, key=lambda device: device.id)).reshape(sizes)
    num_slices = len({getattr(device, "slice_index", 0) for device in devices})
    if num_slices == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    data, fsdp, tensor = sizes
    check_slices(data, num_slices)
    within, across = (data // num_slices, fsdp, tensor), (num_slices, 1, 1)
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def check_slices(data: int, num_slices: int) -> None:
    """Raises: ConfigError: slices, which only a network joins, do not each have whole parts of the axis `data`."""
    if data % num_slices:
        rule = f"must be a multiple of the {num_slices} slices: fsdp and tensor stay within one"
        raise ConfigError("mesh.data", data, rule)


def fixed_devices(section: MeshSection) -> int:
    """Returns the product of the axis sizes that are not -1."""
    return math.prod(size for size in dataclasses.astuple(section) if size != -1)


def mesh_sizes(section: MeshSection, num_devices: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes data, fsdp and tensor. The axis of -1 takes what the others leave."""
    left = num_devices // fixed_devices(section)
    data, fsdp, tensor = (left if size == -1 else size for size in dataclasses.astuple(section))
    return data, fsdp, tensor


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns how many ways the rows of a batch are split. Numbers of rows must be multiples of it."""
    return math.prod(mesh.shape[axis] for axis in AXIS_RULES["batch"])


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Any, what: str = ""
) -> PartitionSpec:
    """Returns the mesh axes of each dimension. A rule that does not divide its dimension is dropped and logged.

    Args:
        axes: logical name of each dimension; a dimension of None is never split.
        shape: the array's shape, as long as `axes`.
        what: the array's name, for the log. "": nothing is logged, as for activations.
    """
    entries: list[Any] = []
    splitting = splitting_axes(mesh)
    for axis, size in zip(axes, shape, strict=True):
        mesh_axes = tuple(a for a in AXIS_RULES[axis] if a in splitting) if axis else ()
        shards = math.prod(mesh.shape[a] for a in mesh_axes)
        if size % shards:
            if what:
                _warn_once(what, str(axis), size, "+".join(mesh_axes), shards)
            mesh_axes = ()
        entries.append(mesh_axes if len(mesh_axes) > 1 else (mesh_axes[0] if mesh_axes else None))
    return PartitionSpec(*entries)


def splitting_axes(mesh: Any) -> set[str]:
    """The axes of several devices that arrays can be split over here: within `jax.shard_map`, those it leaves."""
    return {a for a, size in mesh.shape.items() if size > 1} - set(mesh.abstract_mesh.manual_axes)


@functools.cache
def _warn_once(what: str, axis: str, size: int, mesh_axes: str, shards: int) -> None:
    logger.warning(
        "sharding: %s is copied, not split: its dimension %s of %d does not divide by mesh axis %s of %d",
        what, axis, size, mesh_axes, shards,
    )  # fmt: skip


def split_over_devices(
    function: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Gives every device its own parts of the arguments, along all axes that are not split already.

    For kernels, which the compiler cannot look into.
    """
    names = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )


def tree_shardings(logical_axes: Any, shapes: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the `NamedSharding` of every leaf.

    Args:
        logical_axes: pytree of `PartitionSpec` holding logical names.
        shapes: the same tree of anything with a `shape`.
    """

    def sharding(path: Any, axes: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(axes, leaf.shape, mesh, jax.tree_util.keystr(path)))

    is_axes = lambda x: isinstance(x, PartitionSpec)
    return jax.tree_util.tree_map_with_path(sharding, logical_axes, shapes, is_leaf=is_axes)


def abstract_like(shapes: Any, shardings: Any) -> Any:
    """Returns `jax.ShapeDtypeStruct`s with shardings, which tell Orbax what to restore and where."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Splits rows over the batch axes and leaves every other dimension whole."""
    return NamedSharding(mesh, PartitionSpec(AXIS_RULES["batch"]))


def place(tree: Any, sharding: NamedSharding) -> Any:
    """Puts host arrays on the devices. Every process has all of them, and gives its own devices their parts."""
    put = lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])
    return jax.tree.map(lambda x: put(np.asarray(x)), tree)


def fetch(tree: Any) -> Any:
    """Whole arrays on the host, in every process, whichever devices hold their parts. All processes call it."""
    leaves, structure = jax.tree.flatten(tree)
    far = [i for i, x in enumerate(leaves) if _is_beyond_reach(x)]
    if far:
        mesh = leaves[far[0]].sharding.mesh
        for i, x in zip(far, _replicate([leaves[i] for i in far], replicated(mesh)), strict=True):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _is_beyond_reach(x: Any) -> bool:
    """Whether devices of other processes hold parts of an array that are nowhere here."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


@functools.partial(jax.jit, static_argnames="sharding")
def _replicate(leaves: list[jax.Array], sharding: NamedSharding) -> list[jax.Array]:
    return [jax.lax.with_sharding_constraint(x, sharding) for x in leaves]


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Puts a whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """States the logical axes of an activation inside a jitted function. Without a mesh it does nothing.

    Inside `jax.shard_map`, dimensions that are split already are left as they are.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh))
