"""Causal attention within the sequences of packed rows, by a fused kernel of the device.

    cudnn     cuDNN's flash attention; NVIDIA GPUs from Hopper on, float16 and bfloat16
    splash    JAX's Pallas kernel for TPUs
    plain     matrix products and a mask (`attention.attend`); any device, any dtype

cuDNN is told where each sequence begins and how long it is, and computes nothing between two of them; splash gets
the number of each token's sequence and skips the blocks above the diagonal. Scores [T, T] are never held.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from grpo_jax.model.sharding import partition_spec

KEPT = "attention"
"""Name, for `jax.checkpoint`, of what attention gives and of what a kernel's backward pass needs beside it."""


@flax.struct.dataclass
class Sequences:
    """Which sequence each token of a row belongs to. The padding at a row's end is a sequence like the others, so
    that every token's attention is computed: what a kernel leaves unwritten could be NaN, and 0 * NaN is NaN."""

    segment_ids: jax.Array
    """[B, T] int32."""
    starts: jax.Array
    """[B, M] int32; first column of each sequence, -1 where there are fewer than M."""
    lengths: jax.Array
    """[B, M] int32; -1 as above."""


def max_sequences(length: int) -> int:
    """How many sequences a row of `length` tokens may hold, its padding not counted.

    cuDNN wants a bound, and its backward pass takes memory, and time, as if there were so many rows: 132 of them,
    for a row of 4,224 tokens, took an eighth of an update. 16 of lengths that spread widely fill rows to 96 %
    where they have a fifth of a row's length in the mean, and to 92 % where an eighth. Where they are so short
    that rows stay half empty, there are few rows.
    """
    return max(1, min(length // 32, 16))


def find_sequences(segment_ids: jax.Array) -> Sequences:
    """Where the sequences of each row begin and how long they are.

    Args: segment_ids: [B, T] int32; at most `max_sequences(T)` different ones a row beside 0, each in one piece.
    """
    length = segment_ids.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    is_start = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.sort(jnp.where(is_start, columns, length), axis=1)[:, : max_sequences(length) + 1]
    lengths = jnp.diff(starts, axis=1, append=jnp.full_like(starts[:, :1], length))
    is_there = starts < length
    return Sequences(segment_ids, jnp.where(is_there, starts, -1), jnp.where(is_there, lengths, -1))


def choose_kernel(wanted: str, dtype: Any, head_dim: int) -> str:
    """What `model.attention` comes to on the devices at hand: "cudnn", "splash" or "plain".

    Raises: ValueError: the kernel that is wanted cannot do it; says why.
    """
    if wanted == "plain":
        return wanted
    possible = {"cudnn": _why_not_cudnn(dtype, head_dim), "splash": _why_not_splash(head_dim)}
    if wanted == "auto":
        return next((name for name, why in possible.items() if not why), "plain")
    if possible[wanted]:
        raise ValueError(possible[wanted])
    return wanted


def _why_not_cudnn(dtype: Any, head_dim: int) -> str:
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return "needs an NVIDIA GPU"
    if float(device.compute_capability) < 9:
        return f"needs compute capability 9.0 (Hopper) or later, and this GPU has {device.compute_capability}"
    if jnp.dtype(dtype).itemsize != 2:
        return "needs model.dtype=bfloat16"
    return "" if head_dim % 8 == 0 and head_dim <= 256 else f"does not know heads of width {head_dim}"


def _why_not_splash(head_dim: int) -> str:
    if jax.devices()[0].platform != "tpu":
        return "needs a TPU"
    return "" if head_dim % 128 == 0 else f"does not know heads of width {head_dim}"


def is_kept(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """For `jax.checkpoint`: keeps what is named `KEPT`, and what cuDNN's forward pass gives, which has no name."""
    is_named = primitive.name == "name" and parameters.get("name") == KEPT
    return is_named or primitive.name.startswith("dot_product_attention_fwd")


def fused_attention(kernel: str, q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> jax.Array:
    """Each token sees itself and those before it in its own sequence.

    Args:
        kernel: "cudnn" or "splash"; "shapes": for counting memory without either.
        q: [B, T, H, Dh]; k, v: [B, T, K, Dh].
    Returns: [B, T, H, Dh] in the dtype of v.
    """
    kernels: dict[str, Callable[..., jax.Array]] = {"cudnn": _cudnn, "splash": _splash, "shapes": _shapes}
    function = kernels[kernel]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(q, k, v, sequences)
    # Kernels are opaque to the compiler: every device is given its own rows and heads.
    spec = lambda x, head_axis: partition_spec(("batch", None, head_axis, None), x.shape, mesh)
    heads, kv_heads = spec(q, "heads"), spec(k, "kv_heads")
    if heads != kv_heads:  # some heads are copied to every device: then all of them are
        heads = kv_heads = PartitionSpec(kv_heads[0])
    rows = PartitionSpec(heads[0])
    split = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(heads, kv_heads, kv_heads, jax.tree.map(lambda _: rows, sequences)),
        out_specs=heads,
        check_vma=False,
    )
    return split(q, k, v, sequences)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> jax.Array:
    # Not public, because `jax.nn.dot_product_attention` cannot say where sequences begin.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if jax.__version_info__ < (0, 11, 1):
        # Before, the offsets of keys were computed with the number of query heads (jax 0.11.1 has it right).
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    offsets = jnp.pad(sequences.starts, ((0, 0), (0, 1)), constant_values=-1)
    return dot_product_attention(
        q,
        k,
        v,
        q_seqlen=sequences.lengths,
        kv_seqlen=sequences.lengths,
        q_offsets=offsets,
        kv_offsets=offsets,
        scale=1 / math.sqrt(q.shape[-1]),
        mask_type=MaskType.PADDING_CAUSAL,
    )


def _splash(
    q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences, interpret: bool = False
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    attend = jax.vmap(_splash_kernel(q.shape[2], q.shape[1], interpret))
    ids = splash.SegmentIds(sequences.segment_ids, sequences.segment_ids)
    # Splash leaves the scale to its caller.
    return heads_first(attend(heads_first(q) / math.sqrt(q.shape[-1]), heads_first(k), heads_first(v), ids))


@jax.custom_vjp
def _shapes(q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> jax.Array:
    """Computes nothing, and keeps for the backward pass what a flash kernel keeps."""
    return q


def _shapes_forward(q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences) -> Any:
    shape = (*sequences.starts.shape, q.shape[2], q.shape[1])
    # A number of this layer: a constant would be kept once for all of them.
    statistics = jnp.full(shape, q[0, 0, 0, 0], jnp.float32)
    out = checkpoint_name(q, KEPT)
    return out, (q, k, v, out, checkpoint_name(statistics, KEPT))


def _shapes_backward(kept: Any, cotangent: jax.Array) -> Any:
    q, k, v, out, statistics = kept
    return q + out + cotangent + statistics.sum().astype(q.dtype), k, v, None  # needs all of it


_shapes.defvjp(_shapes_forward, _shapes_backward)


@functools.lru_cache(maxsize=8)
def _splash_kernel(num_heads: int, length: int, interpret: bool) -> Any:
    """The kernel of one row; its block tables are numpy and the same for every row and layer."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # As large as it may be: with blocks of 128 a row of 4,224 tokens takes nine times as many steps.
    block = next((size for size in (512, 384, 256) if length % size == 0), math.gcd(length, 128))
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * num_heads)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            causal, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret,
            residual_checkpoint_name=KEPT,
        )  # fmt: skip
