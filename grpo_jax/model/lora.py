"""LoRA in the parameter tree: which parameters are trained, and what an adapter adds to its kernel.

An adapter lies beside its kernel, as `attention.linear` declares it: "q_lora_a" and "q_lora_b" beside "q", both
stacked over layers. Without adapters, every parameter is trained. arXiv:2106.09685.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import AbstractMesh, Mesh

from grpo_jax.model.config import FIRST_OF_FUSED, ModelConfig
from grpo_jax.model.sharding import abstract_like
from grpo_jax.model.transformer import abstract_params, init_boxed, param_shardings
from grpo_jax.types import Params

A, B = "_lora_a", "_lora_b"
"""What the name of a kernel gets for its adapter's two matrices, (inputs..., r) and (r, outputs...).

Kernels that are stored as one tensor (Phi-3) share an A: `FIRST_OF_FUSED`.
"""

NOTHING: Params = {}
"""The frozen parameters of a model that is trained as a whole."""


def split(params: Params) -> tuple[Params, Params]:
    """Returns (frozen, trained) parts of a tree like the parameters: all but the adapters, and the adapters.

    Without adapters nothing is frozen: (`NOTHING`, params).
    """
    flat = flatten_dict(params)
    trained = {path: leaf for path, leaf in flat.items() if path[-1].endswith((A, B))}
    if not trained:
        return NOTHING, params
    return unflatten_dict({path: flat[path] for path in flat if path not in trained}), unflatten_dict(trained)


def join(frozen: Params, trained: Params) -> Params:
    """Undoes `split`. Nothing is copied."""
    return unflatten_dict(flatten_dict(frozen) | flatten_dict(trained)) if frozen else trained


@functools.lru_cache(maxsize=16)
def abstract_trained(config: ModelConfig) -> Params:
    """Returns the shape (`jax.ShapeDtypeStruct`) of every parameter that is trained."""
    return split(abstract_params(config)[0])[1]


def trained_shardings(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Returns the `NamedSharding` of every parameter that is trained."""
    return split(param_shardings(config, mesh))[1]


def abstract_frozen(config: ModelConfig, mesh: Mesh | AbstractMesh) -> Params:
    """Returns shape, dtype and sharding of every parameter that is not trained."""
    shapes, shardings = abstract_params(config)[0], param_shardings(config, mesh)
    return split(abstract_like(shapes, shardings))[0]


def num_trained(config: ModelConfig) -> int:
    """Returns how many numbers all trained parameters have together."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_trained(config)))


def init_adapters(config: ModelConfig, key: jax.Array, mesh: Mesh) -> Params:
    """Creates adapters in their places on the mesh, as peft does: A uniform, B zero, which add nothing yet."""
    make = lambda key: split(nn.unbox(init_boxed(config, key)))[1]
    return jax.jit(make, out_shardings=trained_shardings(config, mesh))(key)


def adapter_of(params: Params, path: tuple[str, ...]) -> tuple[Any, Any] | None:
    """Returns the two leaves of the adapter of the kernel at `path` of a tree; None: it has none."""
    *modules, name = path
    module = functools.reduce(lambda tree, key: tree[key], modules, params)
    if name + B not in module:
        return None
    first = name if name + A in module else FIRST_OF_FUSED[name]
    return module[first + A], module[name + B]


def merged(kernel: jax.Array, adapter: tuple[jax.Array, jax.Array] | None, scale: float) -> jax.Array:
    """Returns one layer's kernel, (inputs..., outputs...), its adapter added in float32 and rounded once."""
    if adapter is None:
        return kernel
    a, b = (matrix.astype(jnp.float32) for matrix in adapter)
    rank, width = b.shape[0], math.prod(a.shape[:-1])
    # In full, whatever the default of the device: an engine gets what a file gets.
    product = jnp.matmul(a.reshape(width, rank), b.reshape(rank, -1), precision="highest")
    return (kernel.astype(jnp.float32) + scale * product.reshape(kernel.shape)).astype(kernel.dtype)


def scale_of(config: ModelConfig) -> float:
    """Returns what `merged` multiplies by; 0 without adapters."""
    return 0.0 if config.lora is None else config.lora.scale
