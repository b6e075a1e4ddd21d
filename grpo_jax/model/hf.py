"""Hugging Face folders <-> Flax parameters.

`inspect_folder` reads only headers: it refuses whatever could not be loaded, before a device is touched.
`load_params` then moves one tensor at a time from its file into its sharded place: no device holds what is
not its own, and the host never holds more than one tensor. `save_folder` writes the same folder back.
"""

import dataclasses
import functools
import json
import logging
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import safe_open
from safetensors.numpy import save_file

from grpo_jax.config import ConfigError
from grpo_jax.model.attention import RopeScaling
from grpo_jax.model.transformer import ModelConfig, abstract_params, param_shardings
from grpo_jax.types import Params

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
FAMILIES: dict[str, Any] = {
    "Qwen2ForCausalLM": dict(qkv_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": dict(qkv_bias=False, qk_norm=True),
    "LlamaForCausalLM": dict(qkv_bias=False, qk_norm=False),
}
MAX_SHARD_BYTES = 5 * 10**9
MAX_HEADER_BYTES = 10**8  # of a safetensors file, by its definition
KEY = "model.path"


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One parameter and its Hugging Face counterpart.

    A kernel (inputs..., outputs...) is stored as the matrix [outputs, inputs]; a bias (heads, width) as a
    vector; embeddings and norms as they are.
    """

    path: tuple[str, ...]
    """Keys in the parameter tree."""
    name: str
    """Hugging Face name; "{}" stands for the layer where the parameter is stacked over layers."""
    num_inputs: int = 0
    """> 0: a kernel; so many leading dimensions are its input."""

    @property
    def is_stacked(self) -> bool:
        return "{}" in self.name

    def groups(self, rank: int) -> tuple[int, ...]:
        """How many dimensions of the parameter make up each stored one, inputs first."""
        if self.num_inputs:
            return (self.num_inputs, rank - self.num_inputs)
        return (rank,) if self.name.endswith("bias") else (1,) * rank


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """A Hugging Face folder whose headers have been checked."""

    path: Path
    config: ModelConfig
    tensors: dict[str, StoredTensor]
    dtype: str
    """Of the stored tensors: "F32", "BF16" or "F16". What is saved from this model has it too."""
    eos_token_ids: tuple[int, ...]


def tensor_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every parameter of the model with its Hugging Face name, in the order of a checkpoint."""
    layer, attention, mlp = "model.layers.{}.", ("layers", "attention"), ("layers", "mlp")
    specs = [TensorSpec(("embedding",), "model.embed_tokens.weight")]
    specs += [TensorSpec((*attention, n), f"{layer}self_attn.{n}_proj.weight", 1) for n in ("q", "k", "v")]
    if config.qkv_bias:
        specs += [TensorSpec((*attention, f"{n}_bias"), f"{layer}self_attn.{n}_proj.bias") for n in "qkv"]
    if config.qk_norm:
        specs += [
            TensorSpec((*attention, f"{n}_norm", "scale"), f"{layer}self_attn.{n}_norm.weight") for n in "qk"
        ]
    specs += [TensorSpec((*attention, "o"), layer + "self_attn.o_proj.weight", 2)]
    specs += [TensorSpec((*mlp, n), f"{layer}mlp.{n}_proj.weight", 1) for n in ("gate", "up", "down")]
    specs += [
        TensorSpec(("layers", "attention_norm", "scale"), layer + "input_layernorm.weight"),
        TensorSpec(("layers", "mlp_norm", "scale"), layer + "post_attention_layernorm.weight"),
        TensorSpec(("final_norm", "scale"), "model.norm.weight"),
    ]
    if not config.tie_embeddings:
        specs += [TensorSpec(("lm_head",), "lm_head.weight")]
    return specs


# ---- config.json ----


def parse_hf_config(hf: dict[str, Any], **overrides: Any) -> ModelConfig:
    """Reads the content of a config.json.

    Args:    overrides: fields of `ModelConfig` that config.json does not know (dtype, remat, ...).
    Raises:  ConfigError: an architecture, or a switch of one, that this package does not implement.
    """
    names = hf.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise ConfigError(KEY, names[0], f"architecture must be one of {', '.join(FAMILIES)}")
    unsupported = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    for key, only in unsupported.items():
        if names[0] == "Qwen2ForCausalLM" and key == "attention_bias":
            continue
        if hf.get(key, only) != only:
            raise ConfigError(KEY, f"config.json: {key}={hf[key]}", f"only {key}={only} is implemented")
    try:
        heads = hf["num_attention_heads"]
        theta, scaling = _parse_rope(hf)
        return ModelConfig(
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=hf.get("num_key_value_heads") or heads,
            head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
            tie_embeddings=hf.get("tie_word_embeddings", False),
            **FAMILIES[names[0]],
            **overrides,
        )
    except KeyError as error:
        raise ConfigError(KEY, "config.json", f"lacks {error.args[0]}") from None


def _parse_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling: transformers 5 writes `rope_parameters`, older releases two keys."""
    rope = dict(hf.get("rope_scaling") or {})
    rope.update(hf.get("rope_parameters") or {})
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", float(rope["factor"]))
    if kind == "llama3":
        return theta, RopeScaling(
            "llama3",
            float(rope["factor"]),
            float(rope["low_freq_factor"]),
            float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )
    raise ConfigError(KEY, f"rope_type={kind}", "RoPE scaling must be default, linear or llama3")


def hf_config(config: ModelConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """The config.json of a new Qwen2-shaped model; trained ones keep the file they came with."""
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": "float32",
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


# ---- inspecting ----


def inspect_folder(path: str | Path, **overrides: Any) -> ModelFolder:
    """Checks a folder without reading weights: config, names, shapes, dtypes and file lengths.

    Args:    overrides: as in `parse_hf_config`.
    Raises:  ConfigError: names the file or tensor that is missing, misshapen, cut short or unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        fetch = f"`hf download OWNER/NAME --local-dir {path}` fetches a model from the hub"
        raise ConfigError(KEY, str(path), f"there is no such folder; {fetch}")
    hf = read_json(folder / "config.json")
    config = parse_hf_config(hf, **overrides)
    tensors = _read_headers(folder)
    _check_tensors(config, tensors, folder)
    dtypes = {stored.dtype for stored in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    return ModelFolder(folder, config, tensors, dtype, _eos_token_ids(folder, hf))


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a model's folder; ConfigError where it is missing or is something else."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(KEY, str(path), "this file is missing from the model's folder") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(KEY, str(path), f"is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(KEY, str(path), "is not a JSON object")
    return content


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(read_json(index).get("weight_map", {}).values()))
    else:
        files = ["model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors.update(_read_header(folder / name))
    return tensors


def _read_header(file: Path) -> dict[str, StoredTensor]:
    """Names, shapes and dtypes of one safetensors file, and whether the file is as long as they need."""
    if not file.exists():
        raise ConfigError(KEY, str(file), "this weights file is missing; is the download complete?")
    size = file.stat().st_size
    with file.open("rb") as handle:
        prefix = handle.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        # A Git LFS pointer or a web page: its first letters make an absurd length.
        if length > MAX_HEADER_BYTES:
            raise ConfigError(KEY, str(file), "is not a safetensors file")
        if 8 + length > size:
            raise ConfigError(KEY, str(file), f"is cut short at {size} bytes; download it again")
        try:
            header = json.loads(handle.read(length))
            header.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in header.values()]
            tensors = {n: StoredTensor(file, tuple(e["shape"]), e["dtype"]) for n, e in header.items()}
        except (ValueError, TypeError, AttributeError, LookupError):
            raise ConfigError(KEY, str(file), "is not a safetensors file") from None
    wanted = 8 + length + max(ends, default=0)
    if size < wanted:
        raise ConfigError(KEY, str(file), f"is cut short at {size} of {wanted} bytes; download it again")
    if size > wanted:  # safetensors would refuse it, but only once devices hold part of the model
        raise ConfigError(KEY, str(file), f"has {size} bytes instead of {wanted}; download it again")
    return tensors


def _check_tensors(config: ModelConfig, tensors: dict[str, StoredTensor], folder: Path) -> None:
    expected = {name: stored_shape(spec, shape) for spec, name, _, shape in _each_tensor(config)}
    for name, shape in expected.items():
        if name not in tensors:
            raise ConfigError(KEY, str(folder), f"tensor {name} is missing")
        if tensors[name].shape != shape:
            rule = f"tensor {name} has shape {list(tensors[name].shape)}, config.json asks for {list(shape)}"
            raise ConfigError(KEY, str(folder), rule)
        if tensors[name].dtype not in DTYPES:
            rule = f"tensor {name} has dtype {tensors[name].dtype}; must be one of {', '.join(DTYPES)}"
            raise ConfigError(KEY, str(folder), rule)
    ignored = sorted(set(tensors) - set(expected) - {"lm_head.weight"})
    if ignored:
        logger.warning("%s: %d tensors are not used, %s the first", folder, len(ignored), ignored[0])


def _eos_token_ids(folder: Path, hf: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    ids = (read_json(generation) if generation.exists() else {}).get("eos_token_id")
    ids = hf.get("eos_token_id") if ids is None else ids
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (int(ids),)


# ---- loading ----


def load_params(folder: ModelFolder, config: ModelConfig, mesh: Mesh) -> Params:
    """Reads the weights into sharded arrays of `config.param_dtype`, one tensor at a time."""
    shapes, shardings = abstract_params(config)[0], param_shardings(config, mesh)
    params: dict[str, Any] = {}
    for spec in tensor_specs(config):
        shape, sharding = _get(shapes, spec.path).shape, _get(shardings, spec.path)
        if not spec.is_stacked:
            leaf = _read_tensor(folder, spec.name, spec, shape, config.param_dtype, sharding)
        else:
            leaf = _read_stacked(folder, spec, shape, config.param_dtype, sharding)
        _set(params, spec.path, leaf)
    return params


def _read_stacked(
    folder: ModelFolder, spec: TensorSpec, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding
) -> jax.Array:
    """Fills a parameter that is stacked over layers in place, so that only one layer is ever held twice."""
    stacked = jnp.zeros(shape, dtype, device=sharding)
    layer_sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    for i in range(shape[0]):
        layer = _read_tensor(folder, spec.name.format(i), spec, shape[1:], dtype, layer_sharding)
        # Waiting keeps the host from reading ahead: dispatched but unfinished copies would pile up in memory.
        stacked = jax.block_until_ready(_insert(stacked, layer, i, sharding=sharding))
    return stacked


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _insert(stacked: jax.Array, layer: jax.Array, i: int, *, sharding: NamedSharding) -> jax.Array:
    inserted = jax.lax.dynamic_update_index_in_dim(stacked, layer, i, 0)
    return jax.lax.with_sharding_constraint(inserted, sharding)


def _read_tensor(
    folder: ModelFolder,
    name: str,
    spec: TensorSpec,
    shape: tuple[int, ...],
    dtype: Any,
    sharding: NamedSharding,
) -> jax.Array:
    # Opened anew for each tensor: an open file stays mapped, and its pages would count as the host's memory.
    with safe_open(folder.tensors[name].file, framework="np") as file:
        stored = file.get_slice(name)

        def read(index: Any) -> np.ndarray:
            part = stored[_stored_index(spec, shape, index)]
            target = tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
            part = part.T if spec.num_inputs else part
            # A copy in every case: the mapped file must not outlive this call inside an array.
            return np.array(part.reshape(target), dtype=dtype, order="C")

        return jax.block_until_ready(jax.make_array_from_callback(shape, sharding, read))


def _stored_index(spec: TensorSpec, shape: tuple[int, ...], index: tuple[slice, ...]) -> tuple[slice, ...]:
    """Where a slice of the parameter lies in the stored tensor; only a group's first dimension may be cut."""
    result, at = [], 0
    for size in spec.groups(len(shape)):
        inner = math.prod(shape[at + 1 : at + size])
        start, stop, _ = index[at].indices(shape[at])
        assert all(index[d].indices(shape[d]) == (0, shape[d], 1) for d in range(at + 1, at + size))
        result.append(slice(start * inner, stop * inner))
        at += size
    return tuple(reversed(result)) if spec.num_inputs else tuple(result)


# ---- saving ----


def save_folder(
    target: Path,
    params: Params,
    config: ModelConfig,
    *,
    files_from: Path,
    dtype: str,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a Hugging Face folder; it appears under its name only when it is complete.

    Args:
        params: as `load_params` gives them, wherever they live.
        files_from: folder whose config.json, tokenizer and generation files are copied.
        dtype: "F32", "BF16" or "F16".
        max_shard_bytes: a larger model is written as several files with an index.
    """
    temporary = target.with_name(target.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    copy_side_files(files_from, temporary)
    shards = _plan_shards(config, DTYPES[dtype], max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        name = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {
            tensor_name: _to_stored(params, spec, layer, DTYPES[dtype]) for spec, tensor_name, layer in shard
        }
        save_file(tensors, temporary / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    if len(shards) > 1:
        total = sum(stored_bytes(config, DTYPES[dtype]).values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (temporary / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)


def copy_side_files(source: Path, target: Path) -> None:
    """Copies everything small that makes a model's folder complete: config, tokenizer, chat template, licence."""
    for file in sorted(source.iterdir()):
        is_weights = file.suffix in (".safetensors", ".bin", ".pth", ".gguf") or ".index.json" in file.name
        if file.is_file() and not is_weights and not file.name.startswith("."):
            shutil.copyfile(file, target / file.name)


def stored_bytes(config: ModelConfig, dtype: Any) -> dict[str, int]:
    """Bytes of each Hugging Face tensor of the model."""
    itemsize = np.dtype(dtype).itemsize
    return {name: math.prod(shape) * itemsize for _, name, _, shape in _each_tensor(config)}


def _plan_shards(
    config: ModelConfig, dtype: Any, limit: int
) -> list[list[tuple[TensorSpec, str, int | None]]]:
    shards: list[list[tuple[TensorSpec, str, int | None]]] = [[]]
    sizes, used = stored_bytes(config, dtype), 0
    for spec, name, layer, _ in _each_tensor(config):
        if shards[-1] and used + sizes[name] > limit:
            shards.append([])
            used = 0
        shards[-1].append((spec, name, layer))
        used += sizes[name]
    return shards


def _to_stored(params: Params, spec: TensorSpec, layer: int | None, dtype: Any) -> np.ndarray:
    leaf = _get(params, spec.path)
    array = np.asarray(leaf if layer is None else leaf[layer])
    stored = stored_shape(spec, array.shape)
    array = array.reshape(stored[::-1]).T if spec.num_inputs else array.reshape(stored)
    return np.ascontiguousarray(array, dtype=dtype)


# ---- both ways ----


def _each_tensor(config: ModelConfig) -> Iterator[tuple[TensorSpec, str, int | None, tuple[int, ...]]]:
    """(spec, Hugging Face name, layer, shape of that parameter) for every tensor, layer by layer."""
    shapes = abstract_params(config)[0]
    specs = tensor_specs(config)
    stacked = [spec for spec in specs if spec.is_stacked]
    for spec in specs:
        if not spec.is_stacked:
            yield spec, spec.name, None, _get(shapes, spec.path).shape
    for layer in range(config.num_layers):
        for spec in stacked:
            yield spec, spec.name.format(layer), layer, _get(shapes, spec.path).shape[1:]


def stored_shape(spec: TensorSpec, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the Hugging Face tensor of a parameter (of one layer of it) of the given shape."""
    whole = _stored_index(spec, shape, (slice(None),) * len(shape))
    return tuple(s.stop for s in whole)


def _get(tree: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _set(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf
