"""Families of models: what their config.json says, in the switches of `ModelConfig`.

A new family is a row of `FAMILIES`, a row or two of `tensors.tensor_specs` where its tensors have other names, and
rows of `tests/family_models.py` (docs/families.md).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from grpo_jax.config import ConfigError
from grpo_jax.model.fields import KEY, number, refusal, size, switch
from grpo_jax.model.rope import parse_local_theta, parse_rope

COMMON = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "quantization_config": None,
}
"""Fields that change what is computed, with the value that is implemented where a family does not read them."""
LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is told."""

    switches: dict[str, Any]
    """Fields of `ModelConfig`."""
    read: Callable[[dict[str, Any]], dict[str, Any]] = lambda hf: {}
    """config.json -> further fields of `ModelConfig`."""
    reads: tuple[str, ...] = ()
    """Which of the fields of `COMMON` it reads, so that other values are implemented, or do nothing."""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of config.json, where transformers has others than `config.parse_hf_config`."""
    only: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of config.json that no other family has, with the value that is implemented."""


def _qwen(hf: dict[str, Any]) -> dict[str, Any]:
    """Windows of the layers from `max_window_layers` on, or those that `layer_types` names."""
    if not switch(hf, "use_sliding_window"):
        _refuse_layer_types(hf)
        return {}
    first = hf.get("max_window_layers", 28)
    if type(first) is not int or first < 0:
        raise refusal("max_window_layers", first, "must be a whole number, at least 0")
    return {"windows": _windows(hf, lambda i: i >= first)}


def _mistral(hf: dict[str, Any]) -> dict[str, Any]:
    """One window for all layers, or none."""
    _refuse_layer_types(hf)
    return {"windows": _windows(hf, lambda i: True)}


def _gemma3(hf: dict[str, Any]) -> dict[str, Any]:
    """Layers with windows and a RoPE of their own but for every sixth, and scales of embeddings and scores."""
    period = size(hf, "sliding_window_pattern", size(hf, "_sliding_window_pattern", 6))
    windows = _windows(hf, lambda i: (i + 1) % period != 0)
    width = number(hf, "query_pre_attn_scalar")
    has_cap = hf.get("final_logit_softcapping") is not None
    return {
        "windows": windows,
        "other_rope_theta": parse_local_theta(hf),
        "other_rope_layers": tuple(window > 0 for window in windows),
        "score_width": 0.0 if width == size(hf, "head_dim") else width,
        "embedding_scale": math.sqrt(size(hf, "hidden_size")),
        "logits_soft_cap": number(hf, "final_logit_softcapping") if has_cap else 0.0,
    }


def _phi3(hf: dict[str, Any]) -> dict[str, Any]:
    """Windows as Mistral's. Any scaling that it names but LongRoPE, transformers takes for that or refuses."""
    scaling = parse_rope(hf)[1]
    if scaling is not None and scaling.kind != "longrope":
        raise refusal("rope_scaling", scaling.kind, "only longrope is implemented of Phi-3's")
    return _mistral(hf)


def _qwen3_moe(hf: dict[str, Any]) -> dict[str, Any]:
    """Experts in every layer."""
    experts = size(hf, "num_experts", size(hf, "num_local_experts", 128))
    per_token = size(hf, "num_experts_per_tok", 8)
    if per_token > experts:
        raise refusal("num_experts_per_tok", per_token, f"must be at most num_experts={experts}")
    return {
        "intermediate_size": size(hf, "moe_intermediate_size"),
        "num_experts": experts,
        "experts_per_token": per_token,
        "norm_shares": switch(hf, "norm_topk_prob"),
    }


def _smollm3(hf: dict[str, Any]) -> dict[str, Any]:
    """Layers that do not rotate: every fourth, or those that `no_rope_layers` names by 0."""
    layers = range(size(hf, "num_hidden_layers"))
    period = size(hf, "no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers") or [int((i + 1) % period != 0) for i in layers]
    if (
        not isinstance(rotates, list)
        or len(rotates) < len(layers)
        or not set(map(str, rotates)) <= {"0", "1"}
    ):
        raise refusal("no_rope_layers", rotates, f"must have 0 or 1 for each of {len(layers)} layers")
    _refuse_layer_types(hf)
    return {"other_rope_layers": tuple(not rotates[i] for i in layers)}


def _windows(hf: dict[str, Any], is_sliding: Callable[[int], bool]) -> tuple[int, ...]:
    """Windows of the layers that `layer_types` names.

    Args: is_sliding: tells it of the layer of a number where there is no `layer_types`.
    """
    layers = range(size(hf, "num_hidden_layers"))
    if hf.get("sliding_window") is None:
        _refuse_layer_types(hf)
        return ()
    window = size(hf, "sliding_window")
    kinds = hf.get("layer_types") or [LAYER_TYPES[is_sliding(i)] for i in layers]
    if (
        not isinstance(kinds, list)
        or len(kinds) != len(layers)
        or not set(map(str, kinds)) <= set(LAYER_TYPES)
    ):
        raise refusal(
            "layer_types", kinds, f"must name for each of {len(layers)} layers one of {LAYER_TYPES}"
        )
    windows = tuple(window if kind == LAYER_TYPES[1] else 0 for kind in kinds)
    return windows if any(windows) else ()


def _refuse_layer_types(hf: dict[str, Any]) -> None:
    kinds = hf.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != LAYER_TYPES[0] for kind in kinds):
        raise refusal("layer_types", kinds, f"without windows, layers can be {LAYER_TYPES[0]} only")


WINDOW = {"sliding_window": 4096}
FAMILIES: dict[str, Family] = {
    "Qwen2ForCausalLM": Family(
        dict(qkv_bias=True, qk_norm=False), _qwen, ("use_sliding_window", "attention_bias"), WINDOW
    ),
    "Qwen3ForCausalLM": Family(
        dict(qkv_bias=False, qk_norm=True), _qwen, ("use_sliding_window",), WINDOW
    ),
    "LlamaForCausalLM": Family(dict(qkv_bias=False, qk_norm=False)),
    "MistralForCausalLM": Family(
        dict(qkv_bias=False, qk_norm=False), _mistral, ("use_sliding_window",), WINDOW
    ),
    "Gemma3ForCausalLM": Family(
        dict(
            qkv_bias=False, qk_norm=True, post_norms=True, norm_plus_one=True, activation="gelu_tanh",
        ),
        _gemma3,
        ("hidden_act", "use_sliding_window", "rope_parameters", "final_logit_softcapping"),
        WINDOW | dict(head_dim=256, query_pre_attn_scalar=256, rope_theta=1e6, tie_word_embeddings=True),
        {"hidden_activation": "gelu_pytorch_tanh"},
    ),
    "Phi3ForCausalLM": Family(
        dict(qkv_bias=False, qk_norm=False, is_fused=True),
        _phi3,
        ("partial_rotary_factor", "use_sliding_window"),
        dict(rms_norm_eps=1e-5),
    ),
    "Qwen3MoeForCausalLM": Family(
        dict(qkv_bias=False, qk_norm=True), _qwen3_moe, only=dict(decoder_sparse_step=1, mlp_only_layers=[])
    ),
    "SmolLM3ForCausalLM": Family(
        dict(qkv_bias=False, qk_norm=False),
        _smollm3,
        defaults=dict(rope_theta=2e6, tie_word_embeddings=True, num_key_value_heads=4),
    ),
    "Olmo2ForCausalLM": Family(
        dict(
            qkv_bias=False, qk_norm=False, qk_norm_whole=True, pre_norms=False, post_norms=True,
            norm_in_float32=True,
        ),
        defaults=dict(rms_norm_eps=1e-5),
    ),
}  # fmt: skip

HARMLESS = (
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "initializer_range",
    "use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "_name_or_path",
    "tie_word_embeddings", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "max_window_layers", "layer_types",
    "pretraining_tp", *COMMON,
)  # fmt: skip
"""Fields of config.json that are read, or change nothing that is computed."""


def find_family(hf: dict[str, Any]) -> Family:
    """Returns the family of a config.json.

    Raises: ConfigError: there is none, or the model has switches that its family does not implement; names them.
    """
    names = hf.get("architectures") or ["(none)"]
    name = names[0] if isinstance(names, list) else names
    if not isinstance(name, str) or name not in FAMILIES:
        unknown = sorted(key for key, value in hf.items() if key not in HARMLESS and value is not None)
        rule = f"architecture must be one of {', '.join(FAMILIES)}"
        if unknown:
            rule += f"; of its config.json, no family here knows {', '.join(unknown[:20])}"
        raise ConfigError(KEY, name, rule)
    family = FAMILIES[name]
    only = {key: value for key, value in COMMON.items() if key not in family.reads} | family.only
    wrong = {key: hf[key] for key, value in only.items() if hf.get(key) is not None and hf[key] != value}
    if wrong:
        are = ", ".join(f"{key}={value!s:.50}" for key, value in wrong.items())
        raise ConfigError(
            KEY, f"config.json: {are}", f"only {', '.join(f'{k}={only[k]}' for k in wrong)} is implemented"
        )
    _refuse_rope_of_others(hf, family)
    return family


def _refuse_rope_of_others(hf: dict[str, Any], family: Family) -> None:
    """Raises: ConfigError: `rope_parameters` hold what only other families have."""
    rope = hf.get("rope_parameters")
    if not isinstance(rope, dict):
        return
    if "sliding_attention" in rope and "rope_parameters" not in family.reads:
        raise refusal("rope_parameters", rope, "layers of this architecture have one RoPE")
    share = rope.get("partial_rotary_factor")
    if share not in (None, 1) and "partial_rotary_factor" not in family.reads:
        raise refusal("partial_rotary_factor", share, "heads of this architecture are rotated whole")
