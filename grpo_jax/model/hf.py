"""Hugging Face folders <-> Flax parameters.

`inspect_folder` reads only headers and refuses whatever could not be loaded, before a device is touched.
`load_params` then moves one tensor at a time from its file to its sharded place: no device holds what belongs to
another, and the host never holds more than one tensor. `save_folder` writes such a folder again.
"""

import dataclasses
import fnmatch
import functools
import json
import logging
import math
import shutil
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import unflatten_dict
from huggingface_hub import split_state_dict_into_shards_factory
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from grpo_jax.config import ConfigError, ModelSection
from grpo_jax.model.config import ModelConfig, parse_hf_config
from grpo_jax.model.fields import KEY, LIMIT
from grpo_jax.model.lora import adapter_of, merged, scale_of
from grpo_jax.model.rope import max_position
from grpo_jax.model.sharding import fetch
from grpo_jax.model.tensors import (
    TensorSpec,
    each_tensor,
    stored_index,
    stored_shape,
    tensor_shape,
    tensor_specs,
)
from grpo_jax.model.transformer import abstract_params, param_shardings
from grpo_jax.storage.manifest import NAME, damage, has_manifest, new_folder
from grpo_jax.types import Params

logger = logging.getLogger(__name__)

DTYPES: dict[str, Any] = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
MAX_SHARD_BYTES = 5 * 10**9
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.tiktoken", "chat_template.*", "licen[cs]e*", "notice*",
    "readme*", "use_policy*",
)  # fmt: skip
"""What is copied beside a model's weights, in small letters: configuration, tokenizer, chat template, licence."""
NAMED_TEMPLATES = "additional_chat_templates/*.jinja"


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file."""

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
    """Of the stored tensors: "F32", "BF16" or "F16". Models saved from this one have it too."""
    eos_token_ids: tuple[int, ...]
    max_position: int | None = None
    """The longest sequence that the model was made for, tokens; None: its config.json does not say."""

    def with_config(self, **changes: Any) -> "ModelFolder":
        """Returns the same folder with other values of some fields of its `ModelConfig`."""
        return dataclasses.replace(self, config=dataclasses.replace(self.config, **changes))


# ---- inspecting ----


def inspect_folder(path: str | Path, section: ModelSection | None = None) -> ModelFolder:
    """Checks a folder without reading weights: config, names, shapes, dtypes and file lengths.

    Args:    section: as in `parse_hf_config`.
    Raises:  ConfigError: names the file or tensor that is missing, misshapen, cut short or unknown.
    """
    folder = Path(path)
    if not folder.is_dir():
        fetch = f"`hf download OWNER/NAME --local-dir {path}` fetches a model from the hub"
        raise ConfigError(KEY, str(path), f"there is no such folder; {fetch}")
    if (folder / "adapter_config.json").exists():
        rule = "holds an adapter (adapter_config.json): it is for lora.path, and its model for model.path"
        raise ConfigError(KEY, str(path), rule)
    hf = read_json(folder / "config.json")
    config = parse_hf_config(hf, section)
    tensors = _read_headers(folder)
    _check_tensors(config, tensors, folder)
    dtypes = {stored.dtype for stored in tensors.values()}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F32"
    return ModelFolder(
        folder, config, tensors, dtype, _eos_token_ids(folder, hf), max_position=max_position(hf)
    )


def verify_weights(path: str | Path) -> None:
    """Compares the weights of a folder that `save_folder` wrote with their checksums; others have none.

    Raises: ConfigError: they are damaged.
    """
    if has_manifest(Path(path)) and (reason := damage(Path(path), "*.safetensors")):
        raise ConfigError(KEY, str(path), f"is damaged: {reason}; changed on purpose, remove its {NAME}")


def read_json(path: Path, key: str = KEY) -> dict[str, Any]:
    """Reads a JSON object of a model's folder.

    Args:   key: that errors name.
    Raises: ConfigError: the file is missing or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(key, str(path), "this file is missing from the folder") from None
    except OSError as error:
        raise ConfigError(key, str(path), f"cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(key, str(path), f"is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ConfigError(key, str(path), "is not a JSON object")
    return content


def _read_headers(folder: Path) -> dict[str, StoredTensor]:
    index = folder / "model.safetensors.index.json"
    files = _shards(index) if index.exists() else ["model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for name in files:
        tensors.update(read_header(folder / name))
    return tensors


def _shards(index: Path) -> list[str]:
    """The files that an index names. They must lie beside it: a model's folder gives nothing from elsewhere."""
    shards = read_json(index).get("weight_map")
    named = list(shards.values()) if isinstance(shards, dict) else [None]
    names = [name for name in named if isinstance(name, str) and Path(name).name == name]
    if len(names) < len(named):
        raise ConfigError(KEY, str(index), "its weight_map must name a file of this folder for each tensor")
    return sorted(set(names))


def read_header(file: Path, key: str = KEY) -> dict[str, StoredTensor]:
    """Reads names, shapes and dtypes of one safetensors file. `safe_open` checks that the file is complete.

    Args:   key: that errors name.
    Raises: ConfigError: it is missing or damaged.
    """
    try:
        if not file.exists():
            raise ConfigError(key, str(file), f"this weights file is missing; {_remedy(file.parent)}")
        with safe_open(file, framework="np") as content:
            names = content.keys()
            slices = {name: content.get_slice(name) for name in names}
            return {n: StoredTensor(file, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()}
    except OSError as error:
        raise ConfigError(key, str(file), f"cannot be read ({error})") from None
    except SafetensorError as error:
        raise ConfigError(key, str(file), _what_is_wrong(str(error), file)) from None


def _remedy(folder: Path) -> str:
    """What brings back a damaged file of a folder."""
    if has_manifest(folder):
        return "a run wrote it: `python -m grpo_jax.export --checkpoint=WORKDIR --output=NEW` makes it again"
    return "download it again"


def _what_is_wrong(error: str, file: Path) -> str:
    """Says what an error of `safe_open` means for a file."""
    size = file.stat().st_size
    if "header too small" in error or "invalid header length" in error:
        return f"is cut short at {size} bytes; {_remedy(file.parent)}"
    if "not fully covered" in error:
        cut = f"is cut short or too long: {size} bytes instead of those in its header"
        return f"{cut}; {_remedy(file.parent)}"
    # "header too large": a Git LFS pointer or a web page, whose first letters make an absurd length.
    return f"is not a safetensors file ({error})"


def _check_tensors(config: ModelConfig, tensors: dict[str, StoredTensor], folder: Path) -> None:
    expected = set()
    for spec, name, _, of_parameter in each_tensor(config):
        shape = tensor_shape(spec, of_parameter)
        expected.add(name)
        if name not in tensors:
            raise ConfigError(KEY, str(folder), f"tensor {name} is missing")
        if tensors[name].shape != shape:
            rule = f"tensor {name} has shape {list(tensors[name].shape)}, config.json asks for {list(shape)}"
            raise ConfigError(KEY, str(folder), rule)
        if tensors[name].dtype not in DTYPES:
            rule = f"tensor {name} has dtype {tensors[name].dtype}; must be one of {', '.join(DTYPES)}"
            raise ConfigError(KEY, str(folder), rule)
    ignored = sorted(set(tensors) - expected - {"lm_head.weight"})
    if ignored:
        logger.warning("%s: %d tensors are not used, %s the first", folder, len(ignored), ignored[0])


def _eos_token_ids(folder: Path, hf: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    ids = (read_json(generation) if generation.exists() else {}).get("eos_token_id")
    ids = hf.get("eos_token_id") if ids is None else ids
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(type(i) is int and 0 <= i < LIMIT for i in ids):
        rule = f"eos_token_id={ids!r:.200} of its configuration must be whole numbers, from 0 on"
        raise ConfigError(KEY, str(folder), rule)
    return tuple(ids)


# ---- loading ----


def load_params(folder: ModelFolder, config: ModelConfig, mesh: Mesh) -> Params:
    """Reads the weights into sharded arrays of `config.param_dtype`, one tensor at a time; no adapters."""
    return jax.tree.map(lambda read: read(), param_readers(folder, config, mesh))


def param_readers(folder: ModelFolder, config: ModelConfig, mesh: Mesh) -> Params:
    """A tree like the parameters, with a function in the place of each that reads it as `load_params` does."""
    return tensor_readers(tensor_specs(config), folder.tensors, config, mesh)


def tensor_readers(
    specs: Iterable[TensorSpec], tensors: dict[str, StoredTensor], config: ModelConfig, mesh: Mesh
) -> Params:
    """The same of some parameters, from the files of their tensors."""
    shapes, shardings = abstract_params(config)[0], param_shardings(config, mesh)
    parts: dict[tuple[str, ...], list[TensorSpec]] = {}
    for spec in specs:
        parts.setdefault(spec.path, []).append(spec)
    readers: dict[tuple[str, ...], Any] = {}
    for path, of_path in parts.items():
        leaf, sharding = of_path[0].of(shapes), of_path[0].of(shardings)
        if of_path[0].is_stacked:
            readers[path] = functools.partial(_read_stacked, tensors, of_path, leaf, sharding)
        else:
            [spec] = of_path
            readers[path] = functools.partial(_read_tensor, tensors, spec.name, spec, leaf, sharding)
    return unflatten_dict(readers)


def _read_stacked(
    tensors: dict[str, StoredTensor],
    specs: Sequence[TensorSpec],
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    """Fills a parameter that is stacked over layers in place, so that only one layer is ever held twice.

    Args: specs: one, or that of each expert.
    """
    stacked = jnp.zeros(leaf.shape, leaf.dtype, device=sharding)
    one = jax.ShapeDtypeStruct(specs[0].shape_of_one(leaf.shape), leaf.dtype)
    of_one = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[len(leaf.shape) - len(one.shape) :]))
    for i in range(leaf.shape[0]):
        for spec in specs:
            part = _read_tensor(tensors, spec.name.format(i), spec, one, of_one)
            # Waiting keeps the host from reading ahead: dispatched but unfinished copies would fill its memory.
            stacked = jax.block_until_ready(_insert(stacked, part, spec.place(i), sharding=sharding))
    return stacked


@functools.partial(jax.jit, donate_argnums=0, static_argnames="sharding")
def _insert(
    stacked: jax.Array, part: jax.Array, place: tuple[int, ...], *, sharding: NamedSharding
) -> jax.Array:
    start = (*place, *(0 for _ in part.shape))
    inserted = jax.lax.dynamic_update_slice(stacked, part.reshape((1,) * len(place) + part.shape), start)
    return jax.lax.with_sharding_constraint(inserted, sharding)


def _read_tensor(
    tensors: dict[str, StoredTensor],
    name: str,
    spec: TensorSpec,
    leaf: jax.ShapeDtypeStruct,
    sharding: NamedSharding,
) -> jax.Array:
    # Opened anew for each tensor: an open file stays mapped, and its pages would count as the host's memory.
    with safe_open(tensors[name].file, framework="np") as file:
        stored = file.get_slice(name)

        def read(index: Any) -> np.ndarray:
            rows, *columns = stored_index(spec, leaf.shape, index)
            rows = slice(spec.first_row + rows.start, spec.first_row + rows.stop)
            part = stored[(rows, *columns)]
            target = tuple(len(range(*s.indices(n))) for s, n in zip(index, leaf.shape, strict=True))
            part = part.T if spec.num_inputs else part
            # Always a copy: the mapped file must not outlive this call inside an array.
            return np.array(part.reshape(target), dtype=leaf.dtype, order="C")

        return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, read))


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
    """Writes a Hugging Face folder. It gets its name only when it is complete.

    Every process of a run calls this; the first one writes, a file at a time. Adapters are merged.

    Args:
        params: as from `load_params`, on any devices or the host, with or without adapters.
        files_from: folder whose config.json, tokenizer and generation files are copied.
        dtype: "F32", "BF16" or "F16".
        max_shard_bytes: a larger model is written as several files with an index.
    """
    if jax.process_index():
        _write_weights(None, params, config, DTYPES[dtype], max_shard_bytes)
        return
    with new_folder(target, {}) as folder:
        copy_side_files(files_from, folder)
        _write_weights(folder, params, config, DTYPES[dtype], max_shard_bytes)


def _write_weights(
    folder: Path | None, params: Params, config: ModelConfig, dtype: Any, max_shard_bytes: int
) -> None:
    """Writes the safetensors files of a folder, and their index where they are several.

    Args: folder: None: only takes part in bringing the parameters to the first process.
    """
    plan = split_state_dict_into_shards_factory(
        stored_bytes(config, dtype),
        get_storage_size=int,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    specs = tensor_specs(config)
    for file, names in plan.filename_to_tensors.items():
        tensors = stored_tensors(params, specs, config, dtype, frozenset(names))
        if folder is None:
            continue
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if folder is not None and plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def copy_side_files(source: Path, target: Path) -> None:
    """Copies the files of `SIDE_FILES` and `NAMED_TEMPLATES`: no trainer's states, no other weights."""
    for file in [*source.iterdir(), *source.glob(NAMED_TEMPLATES)]:
        is_named = file.parent != source or any(fnmatch.fnmatchcase(file.name.lower(), p) for p in SIDE_FILES)
        if is_named and file.is_file():
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)


def write_eos_token_ids(folder: Path, eos_token_ids: Iterable[int]) -> None:
    """Lets generation_config.json name these ids: wherever the model goes, completions end at any of them."""
    ids = list(dict.fromkeys(eos_token_ids))
    if set(ids) == set(_eos_token_ids(folder, read_json(folder / "config.json"))):
        return
    file = folder / "generation_config.json"
    content = read_json(file) if file.exists() else {}
    file.write_text(json.dumps(content | {"eos_token_id": ids}, indent=2) + "\n")


def stored_bytes(config: ModelConfig, dtype: Any) -> dict[str, int]:
    """Returns the bytes of each Hugging Face tensor of the model, by its name."""
    itemsize = np.dtype(dtype).itemsize
    return {
        name: math.prod(tensor_shape(spec, shape)) * itemsize for spec, name, _, shape in each_tensor(config)
    }


def _on_device(leaf: Any) -> Any:
    """A parameter whose layers can be taken out one by one: on the host, JAX could only copy all of it."""
    is_on_host = isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "pinned_host"
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device")) if is_on_host else leaf


def stored_tensors(
    params: Params,
    specs: Iterable[TensorSpec],
    config: ModelConfig,
    dtype: Any,
    names: Container[str] | None = None,
) -> dict[str, np.ndarray]:
    """Returns tensors on the host as they are stored, by name, a parameter after the other. All processes call it.

    Args:
        params: a tree with the parameters of `specs`; adapters in it are merged into their kernels.
        names: of the tensors; None: all.
    """
    sources: dict[tuple[str, ...], list[tuple[TensorSpec, str, int | None]]] = {}
    for spec, name, layer, _ in each_tensor(config, specs):
        if names is None or name in names:
            sources.setdefault(spec.path, []).append((spec, name, layer))
    scale = scale_of(config)
    parts: dict[str, dict[int, np.ndarray]] = {}
    for path, of_path in sources.items():
        whole = jax.tree.map(_on_device, (of_path[0][0].of(params), adapter_of(params, path)))
        for spec, name, layer in of_path:
            place = spec.place(layer)
            kernel, adapter = jax.tree.map(lambda x, place=place: x[place] if place else x, whole)
            rows = _to_stored(merged(kernel, adapter, scale), spec, dtype)
            parts.setdefault(name, {})[spec.first_row] = rows
    ordered = {name: [rows for _, rows in sorted(found.items())] for name, found in parts.items()}
    return {name: np.concatenate(rows) if len(rows) > 1 else rows[0] for name, rows in ordered.items()}


def _to_stored(leaf: jax.Array, spec: TensorSpec, dtype: Any) -> np.ndarray:
    array = fetch(leaf)
    stored = stored_shape(spec, array.shape)
    array = array.reshape(stored[::-1]).T if spec.num_inputs else array.reshape(stored)
    return np.ascontiguousarray(array, dtype=dtype)
