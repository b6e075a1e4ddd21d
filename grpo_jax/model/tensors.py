"""Which parameter is which tensor of a Hugging Face folder: `tensor_specs`.

Loading, saving and pushes to a rollout engine all go by this table.
"""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from grpo_jax.model.config import ModelConfig
from grpo_jax.model.transformer import abstract_params


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """A parameter and its Hugging Face counterpart: a tensor, or some rows of one.

    A kernel (inputs..., outputs...) is stored as the matrix [outputs, inputs], a bias (heads, width) as a vector;
    embeddings and norms are stored as they are.
    """

    path: tuple[str, ...]
    """Keys in the parameter tree."""
    name: str
    """Hugging Face name. In that of a parameter that is stacked over layers, "{}" stands for the layer."""
    num_inputs: int = 0
    """How many leading dimensions of a kernel are its input. 0: not a kernel."""
    expert: int | None = None
    """Which one, where the parameter is stacked over experts as well. None: it is not."""
    first_row: int = 0
    """Where its rows begin in a tensor that several parameters make up."""
    num_rows: int = 0
    """Of such a tensor. 0: it is this parameter alone."""

    @property
    def is_stacked(self) -> bool:
        return "{}" in self.name

    def of(self, tree: Any) -> Any:
        """Returns this parameter's leaf of a tree like the parameters."""
        return functools.reduce(operator.getitem, self.path, tree)

    def place(self, layer: Any) -> tuple[Any, ...]:
        """Indices of what is one tensor, or rows of one, in the parameter. Args: layer: its number, if stacked."""
        return ((layer,) if self.is_stacked else ()) + (() if self.expert is None else (self.expert,))

    def shape_of_one(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of what is one tensor, or rows of one. Args: shape: of the parameter."""
        return tuple(shape[len(self.place(0)) :])

    def groups(self, rank: int) -> tuple[int, ...]:
        """Returns how many dimensions of the parameter make up each stored one, inputs first."""
        if self.num_inputs:
            return (self.num_inputs, rank - self.num_inputs)
        return (rank,) if self.name.endswith("bias") else (1,) * rank


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Returns every parameter of the model with its Hugging Face name, in the order of a checkpoint."""
    specs = [TensorSpec(("embedding",), "model.embed_tokens.weight")]
    specs += _attention_specs(config) + _mlp_specs(config) + _norm_specs(config)
    specs += [TensorSpec(("final_norm", "scale"), "model.norm.weight")]
    if not config.tie_embeddings:
        specs += [TensorSpec(("lm_head",), "lm_head.weight")]
    return specs


def _attention_specs(config: ModelConfig) -> list[TensorSpec]:
    layer, attention = "model.layers.{}.self_attn.", ("layers", "attention")
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    if config.is_fused:
        rows = {name: number * config.head_dim for name, number in heads.items()}
        specs = _fused(attention, f"{layer}qkv_proj.weight", rows)
    else:
        specs = [TensorSpec((*attention, n), f"{layer}{n}_proj.weight", 1) for n in heads]
    if config.qkv_bias:
        specs += [TensorSpec((*attention, f"{n}_bias"), f"{layer}{n}_proj.bias") for n in heads]
    if config.qk_norm or config.qk_norm_whole:
        specs += [TensorSpec((*attention, f"{n}_norm", "scale"), f"{layer}{n}_norm.weight") for n in "qk"]
    return [*specs, TensorSpec((*attention, "o"), f"{layer}o_proj.weight", 2)]


def _mlp_specs(config: ModelConfig) -> list[TensorSpec]:
    layer, mlp = "model.layers.{}.mlp.", ("layers", "mlp")
    if config.is_fused:
        rows = dict.fromkeys(("gate", "up"), config.intermediate_size)
        gates = _fused(mlp, f"{layer}gate_up_proj.weight", rows)
        return [*gates, TensorSpec((*mlp, "down"), f"{layer}down_proj.weight", 1)]
    names = ("gate", "up", "down")
    if not config.num_experts:
        return [TensorSpec((*mlp, n), f"{layer}{n}_proj.weight", 1) for n in names]
    experts = [
        TensorSpec((*mlp, n), f"{layer}experts.{e}.{n}_proj.weight", 1, expert=e)
        for e in range(config.num_experts)
        for n in names
    ]
    return [TensorSpec((*mlp, "router"), f"{layer}gate.weight", 1), *experts]


def _fused(path: tuple[str, ...], name: str, rows: dict[str, int]) -> list[TensorSpec]:
    """Kernels whose outputs follow each other as the rows of one tensor. Args: rows: of each, by its key."""
    ends = list(itertools.accumulate(rows.values()))
    return [
        TensorSpec((*path, key), name, 1, first_row=end - rows[key], num_rows=ends[-1])
        for key, end in zip(rows, ends, strict=True)
    ]


def _norm_specs(config: ModelConfig) -> list[TensorSpec]:
    """Of the norms beside attention and MLP. What stands after attention has one name in all families."""
    if config.pre_norms and not config.post_norms:
        names = {"attention_norm": "input", "mlp_norm": "post_attention"}
    else:
        names = {"attention_post_norm": "post_attention", "mlp_post_norm": "post_feedforward"}
        if config.pre_norms:
            names = {"attention_norm": "input", "mlp_norm": "pre_feedforward"} | names
    layer = "model.layers.{}."
    return [
        TensorSpec(("layers", key, "scale"), f"{layer}{name}_layernorm.weight") for key, name in names.items()
    ]


def each_tensor(
    config: ModelConfig, specs: Iterable[TensorSpec] | None = None
) -> Iterator[tuple[TensorSpec, str, int | None, tuple[int, ...]]]:
    """Yields (spec, Hugging Face name, layer, shape of that parameter) layer by layer.

    A tensor that several parameters make up comes once for each. The shape is that of one layer, and one expert.

    Args: specs: of the parameters; None: those of `tensor_specs`.
    """
    shapes = abstract_params(config)[0]
    specs = list(tensor_specs(config) if specs is None else specs)
    stacked = [spec for spec in specs if spec.is_stacked]
    for spec in specs:
        if not spec.is_stacked:
            yield spec, spec.name, None, spec.shape_of_one(spec.of(shapes).shape)
    for layer in range(config.num_layers):
        for spec in stacked:
            yield spec, spec.name.format(layer), layer, spec.shape_of_one(spec.of(shapes).shape)


def stored_shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape that a parameter is stored in. Args: shape: of one layer and one expert of it."""
    whole = stored_index(spec, shape, (slice(None),) * len(shape))
    return tuple(s.stop for s in whole)


def tensor_shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the whole tensor that a parameter is stored in. Args: as `stored_shape`."""
    rows, *rest = stored_shape(spec, shape)
    return (spec.num_rows or rows, *rest)


def stored_index(spec: TensorSpec, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Returns where a slice of the parameter lies among what is stored of it.

    Of the dimensions that make up a stored one (`TensorSpec.groups`), only the first may be cut.
    """
    result, at = [], 0
    for size in spec.groups(len(shape)):
        inner = math.prod(shape[at + 1 : at + size])
        start, stop, _ = index[at].indices(shape[at])
        assert all(index[d].indices(shape[d]) == (0, shape[d], 1) for d in range(at + 1, at + size))
        result.append(slice(start * inner, stop * inner))
        at += size
    return tuple(reversed(result)) if spec.num_inputs else tuple(result)
