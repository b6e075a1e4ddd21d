"""From Flax parameters to Hugging Face tensors, a bucket at a time. Pure, jitted, the same for every transport.

A push never makes a second model. It goes through *buckets* of at most `bucket_bytes`: flat arrays of the model's
dtype, with tensors one after another in checkpoint layout (layers taken out of their stack, kernels
[outputs, inputs]). They do not depend on the mesh that holds the parameters. Only embedding and output head, which
can be larger than a bucket, are cut into runs of rows; and a tensor that several parameters make up comes as the
rows of each.

All layers have the same tensors, so buckets that differ only in their first layer or first row run the same
compiled program (`BucketProgram`).

Every device of the trainer gathers each bucket whole, or, where it is to send with others, its *part*: a bucket is
then `num_parts` parts of equal size, and part t holds the t-th run of the rows of every tensor.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import adapter_of, merged, scale_of
from grpo_jax.model.sharding import replicated
from grpo_jax.model.tensors import TensorSpec, each_tensor, stored_shape, tensor_shape, tensor_specs
from grpo_jax.model.transformer import abstract_params
from grpo_jax.types import Params
from grpo_jax.weight_sync.wire import BLOCK_BYTES, BLOCK_WORDS, WORD_WEIGHTS, Layout, Piece

MOST_SENDERS = 8
"""More do not send faster: an engine's GPU receives what its own link carries."""
HEAD_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
"""Those with a row for each token of the vocabulary: the only ones that are cut into rows."""


@dataclasses.dataclass(frozen=True)
class RelativePiece:
    """A tensor of a bucket, or a run of its rows, relative to the bucket's first layer and first row."""

    spec: TensorSpec
    layer: int | None
    """Counted from the bucket's first layer; None: the parameter is not stacked."""
    num_rows: int | None
    """Counted from the bucket's first row; None: the whole tensor."""


BucketProgram = tuple[RelativePiece, ...]
"""What is put one after the other into a bucket. Buckets with equal programs share a compiled function."""


@dataclasses.dataclass(frozen=True)
class Bucket:
    program: BucketProgram
    first_layer: int
    first_row: int
    pieces: tuple[Piece, ...]
    """What lies where in the bucket, for the receiver."""
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class PushPlan:
    """How the parameters of one model travel. Made once a run."""

    buckets: tuple[Bucket, ...]
    dtype: np.dtype
    """Of the buckets, and of the engine's weights."""
    layout: Layout
    num_parts: int = 1
    """Of each bucket, equal in size and one after the other: each has some of the rows of every tensor."""
    scale: float = 0.0
    """Of the adapters that are merged into the kernels."""


def make_push_plan(
    config: ModelConfig,
    bucket_bytes: int,
    specs: Sequence[TensorSpec] | None = None,
    *,
    num_parts: int = 1,
) -> PushPlan:
    """Plans the buckets of a model, in its dtype of computation.

    Args:
        specs: of what travels; None: of the model, adapters merged into their kernels.
        bucket_bytes: the most that one bucket may take; a tensor that is larger and cannot be cut travels alone.
        num_parts: of a bucket.
    """
    params = abstract_params(config)[0]
    specs = tensor_specs(config) if specs is None else specs
    shapes = {spec: _shape_of_one(params, spec) for spec in specs}
    dtype = np.dtype(config.dtype)
    row_bytes = lambda spec: math.prod(shapes[spec][1:]) * dtype.itemsize
    size = lambda spec: num_parts * _padded_bytes(-(-shapes[spec][0] // num_parts) * row_bytes(spec))
    stacked = [spec for spec in specs if spec.is_stacked]
    single = [spec for spec in specs if not spec.is_stacked and spec.name not in HEAD_TENSORS]
    heads = [spec for spec in specs if spec.name in HEAD_TENSORS]
    programs: list[tuple[BucketProgram, int, int]] = []
    for spec in heads:
        programs += _row_programs(spec, shapes[spec][0], row_bytes(spec), bucket_bytes, num_parts)
    programs += _layer_programs(stacked, size, config.num_layers, bucket_bytes)
    if single:
        programs.append((tuple(RelativePiece(spec, None, None) for spec in single), 0, 0))
    buckets = tuple(
        _bucket(program, layer, row, shapes, dtype.itemsize, num_parts) for program, layer, row in programs
    )
    tensors = {name: tensor_shape(spec, shape) for spec, name, _, shape in each_tensor(config, specs)}
    pieces, sizes = zip(*((bucket.pieces, bucket.num_bytes) for bucket in buckets), strict=True)
    layout = Layout(str(dtype), tensors, pieces, sizes)
    return PushPlan(buckets, dtype, layout, num_parts, scale_of(config))


def pack_buckets(params: Params, plan: PushPlan, mesh: Mesh) -> Iterator[tuple[Bucket, jax.Array, jax.Array]]:
    """Yields each bucket with its bytes and its checksums, one at a time: two would take twice the memory.

    Adapters are merged into their kernels.

    Yields:
        (bucket, flat, blocks): flat [n] of `plan.dtype`, copied to every device of the mesh, or a part on each of
        `senders`; blocks [n * itemsize / BLOCK_BYTES] uint32, of which `wire.piece_checksums` makes one number a
        tensor.
    """
    static = _static(plan, mesh)
    for bucket in plan.buckets:
        start = np.int32(bucket.first_layer), np.int32(bucket.first_row)
        yield bucket, *_pack_bucket(params, *start, program=bucket.program, **static)


def packing_programs(
    params: Params, plan: PushPlan, mesh: Mesh
) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The jitted function of `pack_buckets` with the arguments of each of its programs, and with static ones.

    Args: params: `jax.ShapeDtypeStruct`s with shardings, or arrays.
    """
    first = np.int32(0), np.int32(0)
    static = _static(plan, mesh)
    programs = dict.fromkeys(bucket.program for bucket in plan.buckets)
    return [(_pack_bucket, (params, *first), dict(program=program, **static)) for program in programs]


def senders(mesh: Mesh) -> list[jax.Device]:
    """The devices that send a part of each bucket: all, or as many as divide them, at most `MOST_SENDERS`."""
    return list(_sending_mesh(mesh).devices[:, 0])


def _sending_mesh(mesh: Mesh) -> Mesh:
    """The same devices in the same order, as [senders, devices with the same part]."""
    count = max(n for n in range(1, MOST_SENDERS + 1) if mesh.devices.size % n == 0)
    return Mesh(mesh.devices.reshape(count, -1), ("part", "copy"))


def _static(plan: PushPlan, mesh: Mesh) -> dict[str, Any]:
    """Arguments of `_pack_bucket` that belong to the plan."""
    whole = replicated(mesh)
    split = whole if plan.num_parts == 1 else NamedSharding(_sending_mesh(mesh), PartitionSpec("part"))
    return dict(dtype=plan.dtype, scale=plan.scale, num_parts=plan.num_parts, split=split, whole=whole)


@functools.partial(jax.jit, static_argnames=("program", "dtype", "scale", "num_parts", "split", "whole"))
def _pack_bucket(
    params: Params,
    first_layer: Any,
    first_row: Any,
    *,
    program: BucketProgram,
    dtype: Any,
    scale: float,
    num_parts: int,
    split: NamedSharding,
    whole: NamedSharding,
) -> tuple[jax.Array, jax.Array]:
    constrain, itemsize = jax.lax.with_sharding_constraint, dtype.itemsize
    tensors = []
    for piece in program:
        layer = None if piece.layer is None else first_layer + piece.layer
        x = hf_tensor(params, piece.spec, layer, scale)
        if piece.num_rows is not None:
            x = jax.lax.dynamic_slice_in_dim(x, first_row, piece.num_rows, axis=0)
        x = x.astype(dtype)
        x = _padded(x, 0, -(-len(x) // num_parts) * num_parts).reshape(num_parts, -1)
        x = constrain(x, split)  # before tensors are joined, which the compiler does not split by itself
        tensors.append(_padded(x, 1, _padded_bytes(x.shape[1] * itemsize) // itemsize))
    flat = constrain(jnp.concatenate(tensors, axis=1).reshape(-1), split)
    with jax.named_scope("checksum"):
        words = jax.lax.bitcast_convert_type(flat.reshape(-1, 4 // itemsize), jnp.uint32)
        blocks = jnp.sum(words.reshape(-1, BLOCK_WORDS) * WORD_WEIGHTS[None], axis=1, dtype=jnp.uint32)
    return flat, constrain(blocks, whole)


def _padded(x: jax.Array, axis: int, size: int) -> jax.Array:
    """Appends zeros along an axis."""
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


def hf_tensor(
    params: Params, spec: TensorSpec, layer: jax.Array | int | None, scale: float = 0.0
) -> jax.Array:
    """Returns a parameter as the Hugging Face tensor, or as the rows of one, that it is stored as.

    One layer of it, and one expert, [outputs, inputs].

    Args: scale: of its adapter, if it has one, which is merged into it.
    """
    parts = spec.of(params), adapter_of(params, spec.path)
    for number in spec.place(layer):
        take = lambda x, number=number: jax.lax.dynamic_index_in_dim(x, number, axis=0, keepdims=False)
        parts = jax.tree.map(take, parts)
    leaf = merged(*parts, scale)
    shape = stored_shape(spec, leaf.shape)
    return leaf.reshape(shape[::-1]).T if spec.num_inputs else leaf.reshape(shape)


def _shape_of_one(params: Params, spec: TensorSpec) -> tuple[int, ...]:
    return stored_shape(spec, spec.shape_of_one(spec.of(params).shape))


def _padded_bytes(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _row_programs(
    spec: TensorSpec, num_rows: int, row_bytes: int, bucket_bytes: int, num_parts: int
) -> list[tuple[BucketProgram, int, int]]:
    """Cuts a [V, D] tensor into runs of rows, of equal length where possible so that they share a program."""
    padding = num_parts * BLOCK_BYTES + (num_parts - 1) * row_bytes  # at most
    most = max(1, (bucket_bytes - padding) // row_bytes)
    rows = -(-num_rows // -(-num_rows // most))
    return [
        ((RelativePiece(spec, None, min(rows, num_rows - start)),), 0, start)
        for start in range(0, num_rows, rows)
    ]


def _layer_programs(
    specs: Sequence[TensorSpec], size: Any, num_layers: int, bucket_bytes: int
) -> list[tuple[BucketProgram, int, int]]:
    """Puts several layers into one bucket where they fit, or one layer into several buckets where it does not."""
    groups: list[list[TensorSpec]] = [[]]
    for spec in specs:
        if groups[-1] and sum(map(size, groups[-1])) + size(spec) > bucket_bytes:
            groups.append([])
        groups[-1].append(spec)
    if len(groups) > 1:
        split = [tuple(RelativePiece(spec, 0, None) for spec in group) for group in groups]
        return [(program, layer, 0) for layer in range(num_layers) for program in split]
    step = min(num_layers, bucket_bytes // sum(map(size, specs)))
    return [
        (
            tuple(
                RelativePiece(spec, i, None) for i in range(min(step, num_layers - layer)) for spec in specs
            ),
            layer,
            0,
        )
        for layer in range(0, num_layers, step)
    ]


def _bucket(
    program: BucketProgram,
    layer: int,
    row: int,
    shapes: dict[TensorSpec, tuple[int, ...]],
    itemsize: int,
    num_parts: int,
) -> Bucket:
    pieces, offset = [], 0
    for part in range(num_parts):
        for piece in program:
            shape = shapes[piece.spec]
            name = piece.spec.name if piece.layer is None else piece.spec.name.format(layer + piece.layer)
            first_row, num_rows = (
                (piece.spec.first_row, shape[0]) if piece.num_rows is None else (row, piece.num_rows)
            )
            row_bytes = math.prod(shape[1:]) * itemsize
            most = -(-num_rows // num_parts)
            count = min(most, num_rows - part * most)
            if count > 0:  # few rows may end before the last part
                pieces.append(Piece(name, first_row + part * most, count, offset, count * row_bytes))
            offset += _padded_bytes(most * row_bytes)
    return Bucket(program, layer, row, tuple(pieces), offset)
