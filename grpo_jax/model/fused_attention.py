"""Causal attention within the sequences of packed rows, by a fused kernel of the device.

    cudnn     cuDNN's flash attention; NVIDIA GPUs from Hopper on, float16 and bfloat16
    splash    JAX's Pallas kernel for TPUs
    plain     matrix products and a mask (`attention.attend`); any device, any dtype

cuDNN is told where each sequence begins and how long it is, and computes nothing between two sequences. Splash
gets the number of each token's sequence and skips the blocks above the diagonal. Neither holds the scores, [T, T].
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from grpo_jax.config import ConfigError
from grpo_jax.model.sharding import partition_spec, split_over_devices, splitting_axes

KEPT = "attention"
"""Name, for `jax.checkpoint`, of attention's output and of what else a kernel's backward pass needs."""


@flax.struct.dataclass
class Sequences:
    """Which sequence each token of a row belongs to.

    The padding at the end of a row is a sequence too, so that the kernel writes every token's output. What it
    leaves unwritten could be NaN, and 0 * NaN is NaN.
    """

    segment_ids: jax.Array
    """[B, T] int32."""
    starts: jax.Array
    """[B, M] int32; first column of each sequence, -1 where there are fewer than M."""
    lengths: jax.Array
    """[B, M] int32; -1 as above."""


def max_sequences(length: int) -> int:
    """Returns how many sequences a row of `length` tokens may hold, its padding not counted.

    cuDNN needs a bound, and its backward pass takes memory and time in proportion to it: with a bound of 132 for
    rows of 4,224 tokens, it took an eighth of an update. 16 sequences of widely spread lengths fill a row to 96 %
    if their mean length is a fifth of the row, and to 92 % if it is an eighth. Shorter sequences leave rows half
    empty, but then there are few rows.
    """
    return max(1, min(length // 32, 16))


def find_sequences(segment_ids: jax.Array) -> Sequences:
    """Finds where the sequences of each row begin and how long they are.

    Args: segment_ids: [B, T] int32. A row holds at most `max_sequences(T)` different ids other than 0, each in one
        piece.
    """
    length = segment_ids.shape[1]
    columns = jnp.arange(length, dtype=jnp.int32)[None]
    is_start = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    starts = jnp.sort(jnp.where(is_start, columns, length), axis=1)[:, : max_sequences(length) + 1]
    lengths = jnp.diff(starts, axis=1, append=jnp.full_like(starts[:, :1], length))
    exists = starts < length
    return Sequences(segment_ids, jnp.where(exists, starts, -1), jnp.where(exists, lengths, -1))


@dataclasses.dataclass(frozen=True)
class DeviceKind:
    """What decides which kernels a device can run."""

    platform: str
    """"cuda", "tpu", "cpu" or another."""
    compute_capability: float = 0.0
    """Of an NVIDIA GPU."""


DEVICE_KINDS = {
    "h100": DeviceKind("cuda", 9.0),
    "h200": DeviceKind("cuda", 9.0),
    "b200": DeviceKind("cuda", 10.0),
    "a100": DeviceKind("cuda", 8.0),
    "a100-40": DeviceKind("cuda", 8.0),
    "l40s": DeviceKind("cuda", 8.9),
    "tpu-v4": DeviceKind("tpu"),
    "tpu-v5e": DeviceKind("tpu"),
    "tpu-v5p": DeviceKind("tpu"),
    "tpu-v6e": DeviceKind("tpu"),
}
"""Devices that can be planned for by name; `cards.CARDS` has the same names."""


def local_device_kind() -> DeviceKind:
    """Returns the kind of the devices at hand."""
    return device_kind(jax.devices()[0])


def mesh_device_kind(mesh: Mesh) -> DeviceKind:
    """Returns the kind of the devices that programs for a mesh are compiled for. They need not be here."""
    return device_kind(mesh.devices.flat[0])


def device_kind(device: jax.Device) -> DeviceKind:
    """Returns the kind of a device, which may be one of a topology that is only described."""
    if device.platform == "gpu" and "cuda" in device.client.platform_version:
        return DeviceKind("cuda", float(device.compute_capability))
    return DeviceKind(device.platform)


def choose_kernel(
    wanted: str, dtype: Any, head_dim: int, device: DeviceKind, has_windows: bool = False
) -> str:
    """Returns the kernel that `model.attention` stands for on a device: "cudnn", "splash" or "plain".

    Args:   has_windows: whether layers have sliding windows.
    Raises: ConfigError: the device has no such kernel or dtype, or the kernel cannot compute this model; says why.
    """
    if device.platform == "tpu" and jnp.dtype(dtype) == jnp.float16:
        raise ConfigError("model.dtype", "float16", "needs an NVIDIA GPU: TPUs multiply in bfloat16")
    if wanted == "plain":
        return wanted
    obstacles = {
        "cudnn": _why_not_cudnn(device, dtype, head_dim, has_windows),
        "splash": _why_not_splash(device, head_dim),
    }
    if wanted == "auto":
        return next((name for name, why in obstacles.items() if not why), "plain")
    if obstacles[wanted]:
        raise ConfigError("model.attention", wanted, obstacles[wanted])
    return wanted


def _why_not_cudnn(device: DeviceKind, dtype: Any, head_dim: int, has_windows: bool) -> str:
    if device.platform != "cuda":
        return "needs an NVIDIA GPU"
    if device.compute_capability < 9:
        return f"needs compute capability 9.0 (Hopper) or later, and this GPU has {device.compute_capability}"
    if jnp.dtype(dtype).itemsize != 2:
        return "needs model.dtype=bfloat16 or float16"
    if has_windows:  # its comparison with the plain computation did not pass on an H100 (docs/families.md)
        return "is not used for models with sliding windows: take plain"
    return "" if head_dim % 8 == 0 and head_dim <= 256 else f"does not know heads of width {head_dim}"


def _why_not_splash(device: DeviceKind, head_dim: int) -> str:
    if device.platform != "tpu":
        return "needs a TPU"
    return "" if head_dim % 128 == 0 else f"does not know heads of width {head_dim}"


def is_kept(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """For `jax.checkpoint`: keeps what is named `KEPT`, and the unnamed results of cuDNN's forward pass."""
    is_named = primitive.name == "name" and parameters.get("name") == KEPT
    return is_named or primitive.name.startswith("dot_product_attention_fwd")


Kernel = Callable[..., jax.Array]
"""(q, k, v, sequences, ...) -> output, as `fused_attention`, for the rows and heads of one device."""


def fused_attention(
    kernel: str | Kernel, q: jax.Array, k: jax.Array, v: jax.Array, sequences: Sequences, **masking: Any
) -> jax.Array:
    """Computes attention in which each token sees itself and the earlier tokens of its own sequence.

    Args:
        kernel: "cudnn", "splash" or a function that takes their place.
        q: [B, T, H, Dh]; k, v: [B, T, K, Dh].
        masking: `window` (not for cuDNN): how many tokens a token sees, itself included; not there: all of its
            sequence. `divisor`: of the scores; not there: the root of Dh.
    Returns: [B, T, H, Dh] in the dtype of v.
    """
    kernels: dict[str, Kernel] = {"cudnn": _cudnn, "splash": _splash}
    function = kernels[kernel] if isinstance(kernel, str) else kernel
    if masking:
        function = functools.partial(function, **masking)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or not splitting_axes(mesh):
        return function(q, k, v, sequences)
    spec = lambda x, head_axis: partition_spec(("batch", None, head_axis, None), x.shape, mesh)
    heads, kv_heads = spec(q, "heads"), spec(k, "kv_heads")
    if heads != kv_heads:  # if some heads are copied to every device, all of them are
        heads = kv_heads = PartitionSpec(kv_heads[0])
    rows = PartitionSpec(heads[0])
    in_specs = heads, kv_heads, kv_heads, jax.tree.map(lambda _: rows, sequences)
    return split_over_devices(function, mesh, in_specs, heads)(q, k, v, sequences)


def _cudnn(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    divisor: float | None = None,
) -> jax.Array:
    # Not public, because `jax.nn.dot_product_attention` cannot say where sequences begin.
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    if jax.__version_info__ < (0, 11, 1):
        # Earlier releases compute the offsets of keys with the number of query heads (fixed in jax 0.11.1).
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
        scale=1 / (divisor or math.sqrt(q.shape[-1])),
        mask_type=MaskType.PADDING_CAUSAL,
    )


def _splash(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: Sequences,
    window: int | None = None,
    divisor: float | None = None,
    interpret: bool = False,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    heads_first = lambda x: jnp.swapaxes(x, 1, 2)
    attend = jax.vmap(_splash_kernel(q.shape[2], q.shape[1], interpret, window))
    ids = splash.SegmentIds(sequences.segment_ids, sequences.segment_ids)
    # Splash leaves the scale to its caller.
    q = q / (divisor or math.sqrt(q.shape[-1]))
    return heads_first(attend(heads_first(q), heads_first(k), heads_first(v), ids))


@functools.lru_cache(maxsize=8)
def _splash_kernel(num_heads: int, length: int, interpret: bool, window: int | None = None) -> Any:
    """Returns the kernel of one row. Its tables of blocks are constants, the same for every row and layer."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    # As large as possible: with blocks of 128, a row of 4,224 tokens takes nine times as many steps.
    block = next((size for size in (512, 384, 256) if length % size == 0), math.gcd(length, 128))
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block, block_q_dkv=block, block_kv_dkv=block,
        block_kv_dkv_compute=block, block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    square = (length, length)
    mask = masks.LocalMask(square, (window - 1, 0), 0) if window else masks.CausalMask(square)
    causal = masks.MultiHeadMask([mask] * num_heads)
    with jax.ensure_compile_time_eval():
        return splash.make_splash_mha(
            causal, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret,
            residual_checkpoint_name=KEPT,
        )  # fmt: skip
