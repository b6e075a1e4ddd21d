"""Sizes and switches of a model: `ModelConfig`, read from the content of a config.json and written back.

A new family of models is a row of `FAMILIES` and, where its tensors have other names, `hf.tensor_specs`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import ConfigError, ModelSection, RandomModelSection
from grpo_jax.model.fields import KEY, number, refusal, size, switch
from grpo_jax.model.rope import RopeScaling, parse_rope

RANDOM_MAX_POSITION = 4096
"""Tokens, `max_position_embeddings` of a random model."""

FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen2ForCausalLM": dict(qkv_bias=True, qk_norm=False),
    "Qwen3ForCausalLM": dict(qkv_bias=False, qk_norm=True),
    "LlamaForCausalLM": dict(qkv_bias=False, qk_norm=False),
}


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

    @property
    def can_extrapolate(self) -> bool:
        """Whether its RoPE says something of positions beyond the window. The dynamic rule does not."""
        return self.rope_scaling is None or self.rope_scaling.kind != "dynamic"


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
    theta, scaling = parse_rope(hf)
    return ModelConfig(
        **_parse_sizes(hf),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=number(hf, "rms_norm_eps", 1e-6),
        tie_embeddings=switch(hf, "tie_word_embeddings"),
        **FAMILIES[family],
        **_computation(section),
    )


def _parse_sizes(hf: dict[str, Any]) -> dict[str, Any]:
    """The sizes among the fields of `ModelConfig`."""
    hidden, heads = size(hf, "hidden_size"), size(hf, "num_attention_heads")
    kv_heads, head_dim = size(hf, "num_key_value_heads", heads), size(hf, "head_dim", hidden // heads)
    if heads % kv_heads:
        raise refusal("num_key_value_heads", kv_heads, f"must divide num_attention_heads={heads}")
    if head_dim % 2:
        raise refusal("head_dim", head_dim, "must be even, for RoPE")
    return dict(
        vocab_size=size(hf, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=size(hf, "intermediate_size"),
        num_layers=size(hf, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
    )


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
