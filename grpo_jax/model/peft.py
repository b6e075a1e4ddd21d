"""Adapters by their names outside: which kernels get one, and PEFT folders.

A PEFT folder holds adapter_config.json and adapter_model.safetensors, as `peft` and vLLM read them. Its tensors
are stored as a model's are: A [r, inputs], B [outputs, r], so that `hf` reads and writes them too.
"""

import dataclasses
import fnmatch
import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from safetensors import safe_open
from safetensors.numpy import save_file

from grpo_jax.config import ConfigError, LoraSection
from grpo_jax.model.config import Lora, ModelConfig
from grpo_jax.model.hf import (
    ModelFolder,
    StoredTensor,
    read_header,
    read_json,
    stored_tensors,
    tensor_readers,
)
from grpo_jax.model.lora import A, B, adapter_of
from grpo_jax.model.tensors import TensorSpec, each_tensor, tensor_shape, tensor_specs
from grpo_jax.model.transformer import abstract_params
from grpo_jax.storage.manifest import NAME, damage, has_manifest, new_folder, read_facts
from grpo_jax.types import Params

KEY = "lora.path"
"""The key that errors about a PEFT folder name."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the name of every tensor."""
BASE = "base_fingerprint"
"""Among the facts of the manifest: which model the adapter belongs to."""
SETS = {"all-linear": ("attention", "mlp"), "attention": ("attention",), "mlp": ("mlp",)}
"""Named sets of `lora.targets`, by the modules of their kernels."""
UNTRAINED = ("embed_tokens", "lm_head", "embedding")
PLAIN = {"peft_type": "LORA", "bias": "none"}
NOT_IMPLEMENTED = (
    "use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "lora_bias",
    "layers_to_transform", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
"""What changes the meaning of an adapter's tensors, or adds others."""


# ---- which kernels ----


def with_adapters(model: ModelConfig, section: LoraSection) -> ModelConfig:
    """The model with adapters on the chosen kernels; as it is where `lora.rank` is 0.

    Raises: ConfigError: a target that is no kernel, or a rank beyond the model's width.
    """
    if not section.rank:
        return model
    if section.rank > model.hidden_size:
        rule = f"must be at most the model's width, hidden_size={model.hidden_size}"
        raise ConfigError("lora.rank", section.rank, rule)
    kernels = {spec.path[-1]: spec for spec in tensor_specs(model) if spec.num_inputs and spec.is_stacked}
    if model.num_experts:
        kernels = {name: spec for name, spec in kernels.items() if spec.path[-2] != "mlp"}
    chosen = {name for target in section.targets for name in _matches(target, kernels)}
    targets = tuple(name for name in kernels if name in chosen)
    lora = Lora(section.rank, section.alpha / section.rank, targets, model.param_dtype)
    # What is frozen needs no more bits than it is computed with.
    return dataclasses.replace(model, param_dtype=model.dtype, lora=lora)


def _matches(target: str, kernels: dict[str, TensorSpec]) -> list[str]:
    """The names of the kernels that an entry of `lora.targets` stands for."""
    if target in UNTRAINED:
        rule = "embedding and output head get no adapter, which tied ones would share: name others"
        raise ConfigError("lora.targets", target, rule)
    if target in SETS:
        if not {spec.path[-2] for spec in kernels.values()}.issuperset(SETS[target]):
            rule = "experts and their router get no adapters: choose attention"
            raise ConfigError("lora.targets", target, rule)
        return [name for name, spec in kernels.items() if spec.path[-2] in SETS[target]]
    outside = {name: module_name(spec).partition(".{}.")[2] for name, spec in kernels.items()}
    # Kernels that are one tensor outside have no names of their own.
    inside = lambda name: () if kernels[name].num_rows else (name,)
    known = {name: (long.rpartition(".")[2], long, *inside(name)) for name, long in outside.items()}
    found = [name for name, names in known.items() if any(fnmatch.fnmatchcase(n, target) for n in names)]
    if not found:
        names = ", ".join(dict.fromkeys([*SETS, *(short for short, *_ in known.values())]))
        raise ConfigError("lora.targets", target, f"matches no layer of this model; there are {names}")
    return found


def module_name(spec: TensorSpec) -> str:
    """The Hugging Face name of the layer that a kernel belongs to, "{}" in the place of its number."""
    return spec.name.removesuffix(".weight")


def short_name(spec: TensorSpec) -> str:
    """The last part of `module_name`."""
    return module_name(spec).rpartition(".")[2]


def adapted_specs(config: ModelConfig) -> list[TensorSpec]:
    """The kernels that have an adapter."""
    shapes = abstract_params(config)[0]
    kernels = [spec for spec in tensor_specs(config) if spec.num_inputs]
    return [spec for spec in kernels if adapter_of(shapes, spec.path) is not None]


def adapter_specs(config: ModelConfig) -> list[TensorSpec]:
    """Every parameter of the adapters with its name in a PEFT folder: both of a layer side by side.

    Those of kernels that are stored as one tensor are rows of its B.
    """
    specs = []
    for spec in adapted_specs(config):
        *modules, name = spec.path
        begin = PREFIX + module_name(spec)
        if not spec.first_row:  # the first of those that share an A
            specs += [TensorSpec((*modules, name + A), f"{begin}.lora_A.weight", spec.num_inputs)]
        rows = dict(first_row=spec.first_row, num_rows=spec.num_rows)
        specs += [TensorSpec((*modules, name + B), f"{begin}.lora_B.weight", 1, **rows)]
    return specs


# ---- reading ----


def inspect_adapter(
    path: str | Path, config: ModelConfig, base: ModelFolder | None = None
) -> dict[str, StoredTensor]:
    """Checks a PEFT folder without reading weights.

    Args:    config: with adapters, which the folder must hold exactly; base: the model that they are to be put on.
    Returns: its tensors.
    Raises:  ConfigError: it is none, is of another base, or holds what is not implemented.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ConfigError(KEY, str(path), "there is no such folder")
    if (folder / "config.json").exists() or list(folder.glob("model*.safetensors")):
        raise ConfigError(
            KEY, str(path), f"holds a model beside {CONFIG}: an adapter's folder holds nothing else"
        )
    _check_adapter_config(folder, config)
    tensors = read_header(folder / WEIGHTS, KEY)
    expected = {
        name: tensor_shape(spec, shape) for spec, name, _, shape in each_tensor(config, adapter_specs(config))
    }
    for name, shape in expected.items():
        if name not in tensors:
            raise ConfigError(KEY, str(path), f"lacks {name}, which lora.targets asks for")
        if tensors[name].shape != shape:
            rule = f"is of another model: {name} has shape {list(tensors[name].shape)}, not {list(shape)}"
            raise ConfigError(KEY, str(path), rule)
    if others := sorted(tensors.keys() - expected.keys()):
        raise ConfigError(KEY, str(path), f"holds {others[0]}, which is of no layer of lora.targets")
    if has_manifest(folder):
        _check_manifest(folder, base)
    return tensors


def _check_manifest(folder: Path, base: ModelFolder | None) -> None:
    """Of a folder that `save_adapter` wrote; others have none.

    Raises: ConfigError: its weights are damaged, or belong to another model.
    """
    if reason := damage(folder, "*.safetensors"):
        raise ConfigError(KEY, str(folder), f"is damaged: {reason}; changed on purpose, remove its {NAME}")
    if base is not None and read_facts(folder).get(BASE, fingerprint(base)) != fingerprint(base):
        raise ConfigError(KEY, str(folder), f"is an adapter of another base than {base.path}")


def _check_adapter_config(folder: Path, config: ModelConfig) -> None:
    """Raises: ConfigError: the adapter is not what the configuration says."""
    content, lora = read_adapter_config(folder), config.lora
    assert lora is not None
    for name, only in PLAIN.items():
        if content.get(name, only) != only:
            raise ConfigError(
                KEY, str(folder), f"{name}={content[name]!r:.100} of its {CONFIG} must be {only!r}"
            )
    for name in NOT_IMPLEMENTED:
        if content.get(name):
            raise ConfigError(
                KEY, str(folder), f"{name}={content[name]!r:.100} of its {CONFIG} is not implemented"
            )
    alpha = lora.scale * lora.rank
    for name, key, wanted in (("r", "lora.rank", lora.rank), ("lora_alpha", "lora.alpha", alpha)):
        if not np.isclose(content[name], wanted):
            raise ConfigError(
                key, f"{wanted:g}", f"must be {content[name]:g}, as in the {CONFIG} of {folder}"
            )


def read_section(folder: Path) -> LoraSection:
    """The `lora` section of an adapter, its targets by the names of its tensors: peft writes them in many ways.

    Raises: ConfigError: as `read_adapter_config`, or there are no such tensors.
    """
    content = read_adapter_config(folder)
    modules = (name.rpartition(".lora_A.")[0] for name in read_header(folder / WEIGHTS, KEY))
    targets = {".".join(module.split(".")[-2:]) for module in modules if module}
    if not targets:
        raise ConfigError(KEY, str(folder), f"there is no adapter of LoRA in its {WEIGHTS}")
    rank, alpha = int(content["r"]), float(content["lora_alpha"])
    return LoraSection(rank=rank, alpha=alpha, targets=tuple(sorted(targets)), path=str(folder))


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json, with numbers for rank and alpha.

    Raises: ConfigError: the file is missing or holds something else.
    """
    content = read_json(folder / CONFIG, KEY)
    for name in ("r", "lora_alpha"):
        if type(content.get(name)) not in (int, float) or not content[name] > 0:
            raise ConfigError(KEY, str(folder), f"{name} of its {CONFIG} must be a number above 0")
    return content


def adapter_readers(path: str | Path, config: ModelConfig, mesh: Mesh) -> Params:
    """A tree of the adapters, with a function in the place of each that reads it, in `trained_dtype`.

    Args: path: of a folder that `inspect_adapter` has checked.
    """
    return tensor_readers(adapter_specs(config), read_header(Path(path) / WEIGHTS, KEY), config, mesh)


def fingerprint(base: ModelFolder) -> str:
    """A number of the first row of every tensor of a model: of its weights, without reading them all."""
    total = hashlib.sha256()
    for name, stored in sorted(base.tensors.items()):
        with safe_open(stored.file, framework="np") as file:
            row = file.get_slice(name)[:1]
        total.update(name.encode() + np.ascontiguousarray(row).tobytes())
    return total.hexdigest()


# ---- writing ----


def save_adapter(target: Path, adapters: Params, config: ModelConfig, base: ModelFolder) -> None:
    """Writes a PEFT folder, in float32. It gets its name only when it is complete.

    Every process of a run calls this; the first one writes.

    Args:
        adapters: as from `lora.split`, on any devices or the host.
        base: the model that they belong to.
    """
    tensors = stored_tensors(adapters, adapter_specs(config), config, np.dtype(np.float32))
    if jax.process_index():
        return
    with new_folder(target, {BASE: fingerprint(base)}) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / CONFIG).write_text(json.dumps(adapter_config(config, base.path), indent=2) + "\n")


def adapter_config(config: ModelConfig, base: Path) -> dict[str, Any]:
    """Returns the content of adapter_config.json. Args: base: the folder of the model."""
    assert config.lora is not None
    alpha = config.lora.scale * config.lora.rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.absolute()),
        "r": config.lora.rank,
        "lora_alpha": round(alpha) if np.isclose(alpha, round(alpha)) else alpha,
        "lora_dropout": 0.0,
        "target_modules": list(dict.fromkeys(map(short_name, adapted_specs(config)))),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
