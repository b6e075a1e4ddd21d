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


LIMIT = 2**31
FLOAT32_LIMIT = 3.4e38


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
class Lora:
    """Adapters beside a model's kernels, the only parameters that are trained. arXiv:2106.09685."""

    rank: int
    scale: float
    """Of A B, what is added to a kernel: alpha / rank."""
    targets: tuple[str, ...]
    """The kernels that have one, by their names in the parameter tree."""
    param_dtype: Any = jnp.float32
    """Of the adapters that the optimizer changes."""


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
    """Of the parameters; with `lora`, of those that are frozen."""
    remat: str = "none"
    """"none", or a key of `transformer.REMAT_POLICIES`."""
    scan_layers: bool = True
    attention: str | Callable[..., Any] = "plain"
    """Kernel for whole rows: as `fused_attention.choose_kernel` returns it, or a function like those kernels."""
    lora: Lora | None = None
    """None: every parameter is trained."""

    @property
    def trained_dtype(self) -> Any:
        """Of the parameters that the optimizer changes."""
        return self.param_dtype if self.lora is None else self.lora.param_dtype

    def with_trained_dtype(self, dtype: Any) -> "ModelConfig":
        """The same model with another `trained_dtype`."""
        if self.lora is None:
            return dataclasses.replace(self, param_dtype=dtype)
        return dataclasses.replace(self, lora=dataclasses.replace(self.lora, param_dtype=dtype))


def parse_hf_config(hf: dict[str, Any], section: ModelSection | None = None) -> ModelConfig:
    """Reads the content of a config.json.

    Args:
        section: the `model` section, for what config.json does not say: dtypes, remat, scan_layers. None:
            float32, nothing recomputed.
    Raises: ConfigError: an architecture, or a switch of one, that this package does not implement.
    """
    names = hf.get("architectures") or ["(none)"]
    family = names[0] if isinstance(names, list) else names
    if not isinstance(family, str) or family not in FAMILIES:
        raise ConfigError(KEY, family, f"architecture must be one of {', '.join(FAMILIES)}")
    implemented = {
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "use_sliding_window": False,
    }
    for key, only in implemented.items():
        if family == "Qwen2ForCausalLM" and key == "attention_bias":
            continue
        if hf.get(key, only) != only:
            raise ConfigError(KEY, f"config.json: {key}={hf[key]}", f"only {key}={only} is implemented")
    theta, scaling = _parse_rope(hf)
    return ModelConfig(
        **_parse_sizes(hf),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=_number(hf, "rms_norm_eps", 1e-6),
        tie_embeddings=_switch(hf, "tie_word_embeddings"),
        **FAMILIES[family],
        **_computation(section),
    )


def _parse_sizes(hf: dict[str, Any]) -> dict[str, Any]:
    """The sizes among the fields of `ModelConfig`."""
    hidden, heads = _size(hf, "hidden_size"), _size(hf, "num_attention_heads")
    kv_heads, head_dim = _size(hf, "num_key_value_heads", heads), _size(hf, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise _refusal("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
    if head_dim % 2:
        raise _refusal("head_dim", head_dim, "must be even, for RoPE")
    return dict(
        vocab_size=_size(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_size(hf, "intermediate_size"),
        num_layers=_size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


def max_position(hf: dict[str, Any]) -> int | None:
    """The longest sequence that a model was made for, tokens; None: its config.json does not say.

    Linear scaling multiplies `max_position_embeddings`: some folders have it from before the scaling.
    """
    if hf.get("max_position_embeddings") is None:
        return None
    length, scaling = _size(hf, "max_position_embeddings"), _parse_rope(hf)[1]
    return int(length * (scaling.factor if scaling is not None and scaling.kind == "linear" else 1))


def _refusal(name: str, value: Any, rule: str) -> ConfigError:
    return ConfigError(KEY, f"config.json: {name}={value!r:.200}", rule)


def _size(hf: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number that an array can have for its size."""
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(KEY, "config.json", f"lacks {name}")
    if type(value) is not int or not 0 < value < LIMIT:
        raise _refusal(name, value, "must be a whole number, at least 1 and below 2**31")
    return value


def _number(hf: dict[str, Any], name: str, default: float | None = None) -> float:
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(KEY, "config.json", f"lacks {name}")
    if type(value) not in (int, float) or not 0 < value < FLOAT32_LIMIT:
        raise _refusal(name, value, "must be a number above 0")
    return float(value)


def _switch(hf: dict[str, Any], name: str) -> bool:
    value = hf.get(name)
    if not isinstance(value, bool | None):
        raise _refusal(name, value, "must be true or false")
    return bool(value)


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
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        value = hf.get(name)
        if not isinstance(value, dict | None):
            raise _refusal(name, value, "must be an object")
        rope |= value or {}
    theta = _number({"rope_theta": hf.get("rope_theta")} | rope, "rope_theta", 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _number(rope, "factor"))
    if kind == "llama3":
        low, high = _number(rope, "low_freq_factor"), _number(rope, "high_freq_factor")
        if low >= high:
            raise _refusal("low_freq_factor", low, f"must be below high_freq_factor={high}")
        length = _size(rope, "original_max_position_embeddings")
        return theta, RopeScaling("llama3", _number(rope, "factor"), low, high, length)
    raise ConfigError(KEY, f"rope_type={kind!s:.200}", "RoPE scaling must be default, linear or llama3")
