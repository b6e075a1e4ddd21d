"""Sizes and switches of a model: `ModelConfig`, read from the content of a config.json and written back.

A new family of models is a row of `FAMILIES` and, where its tensors have other names, `hf.tensor_specs`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import ConfigError, ModelSection, RandomModelSection

KEY = "model.path"
"""The key that errors about a model's folder name."""

RANDOM_MAX_POSITION = 4096
"""Tokens, `max_position_embeddings` of a random model."""

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": dict(qkv_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": dict(qkv_bias=False, qk_norm=True),
    "LlamaForCausalLM": dict(qkv_bias=False, qk_norm=False),
}


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are encoded: `rope_scaling` of config.json."""

    kind: str
    """"linear" or "llama3"."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and switches of one model, and how it computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    rope_scaling: RopeScaling | None = None
    dtype: Any = jnp.float32
    """Of activations and matrix products."""
    param_dtype: Any = jnp.float32
    remat: str = "none"
    """"none", or a key of `transformer.REMAT_POLICIES`."""
    scan_layers: bool = True
    attention: str | Callable[..., Any] = "plain"
    """Kernel for whole rows: as `fused_attention.choose_kernel` returns it, or a function like those kernels."""


def parse_hf_config(hf: dict[str, Any], section: ModelSection | None = None) -> ModelConfig:
    """Reads the content of a config.json.

    Args:
        section: the `model` section, for what config.json does not say: dtypes, remat, scan_layers. None:
            float32, nothing recomputed.
    Raises: ConfigError: an architecture, or a switch of one, that this package does not implement.
    """
    names = hf.get("architectures") or ["(none)"]
    if names[0] not in FAMILIES:
        raise ConfigError(KEY, names[0], f"architecture must be one of {', '.join(FAMILIES)}")
    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    for key, only in implemented.items():
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
            **_computation(section),
        )
    except KeyError as error:
        raise ConfigError(KEY, "config.json", f"lacks {error.args[0]}") from None


def random_model_config(sizes: RandomModelSection, section: ModelSection | None = None) -> ModelConfig:
    """Returns a Qwen2-shaped model of the given sizes. Args: section: as in `parse_hf_config`."""
    return ModelConfig(
        **dataclasses.asdict(sizes),
        head_dim=sizes.hidden_size // sizes.num_heads,
        rope_theta=10_000.0,
        rms_norm_eps=1e-6,
        tie_embeddings=True,
        **FAMILIES["Qwen2ForCausalLM"],
        **_computation(section),
    )


def hf_config(config: ModelConfig, eos_token_id: int, pad_token_id: int) -> dict[str, Any]:
    """Returns the config.json of a new Qwen2-shaped model; trained models keep the file they came with."""
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
        "max_position_embeddings": RANDOM_MAX_POSITION,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "use_sliding_window": False,
        "dtype": "float32",
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }


def _computation(section: ModelSection | None) -> dict[str, Any]:
    """The fields of `ModelConfig` that the `model` section sets. The kernel depends on the devices as well."""
    if section is None:
        return {}
    return dict(
        dtype=jnp.dtype(section.dtype),
        param_dtype=jnp.dtype(section.param_dtype),
        remat=section.remat,
        scan_layers=section.scan_layers,
    )


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
