"""Rotary embeddings, RoFormer, arXiv:2104.09864: how config.json tells them, and their angles.

Every kind of scaling is computed as transformers computes it (`modeling_rope_utils.py`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from grpo_jax.config import ConfigError
from grpo_jax.model.fields import KEY, number, refusal, size, switch


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are encoded: `rope_scaling` of config.json."""

    kind: str
    """"linear", "llama3", "yarn", "dynamic" or "longrope"."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    """Both tables, cosine and sine, are multiplied by it."""
    is_truncated: bool = True
    """"yarn": whether the channels between which it interpolates are whole numbers."""
    short_factors: tuple[float, ...] = ()
    """"longrope": the divisor of each frequency, within the original window."""


def parse_rope(hf: dict[str, Any]) -> tuple[float, RopeScaling | None]:
    """rope_theta and scaling: transformers 5 writes `rope_parameters`, older releases two keys."""
    rope: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        rope |= _object(hf, name)
    if "full_attention" in rope:  # transformers 5, of models whose layers differ; what is beside it is older
        rope |= _object(rope, "full_attention")
    theta = number({"rope_theta": hf.get("rope_theta")} | rope, "rope_theta", 10_000.0)
    scaling = _parse_scaling(rope, hf)
    if scaling is not None and scaling.kind == "yarn" and theta <= 1:
        raise refusal("rope_theta", theta, "must be above 1 for YaRN")
    return theta, scaling


def parse_local_theta(hf: dict[str, Any]) -> float:
    """rope_theta of the layers with windows, where they have their own: either style of it, as above."""
    local = _object(_object(hf, "rope_parameters"), "sliding_attention")
    if local.get("rope_type", "default") != "default":
        raise refusal(
            "rope_parameters", hf["rope_parameters"], "layers with windows have rope_type=default only"
        )
    return number({"rope_theta": hf.get("rope_local_base_freq")} | local, "rope_theta", 10_000.0)


def _object(hf: dict[str, Any], name: str) -> dict[str, Any]:
    value = hf.get(name)
    if not isinstance(value, dict | None):
        raise refusal(name, value, "must be an object")
    return value or {}


def _parse_scaling(rope: dict[str, Any], hf: dict[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling("linear", number(rope, "factor"))
    if kind == "dynamic":
        length = size(hf, "max_position_embeddings")
        return RopeScaling("dynamic", number(rope, "factor"), original_max_position=length)
    if kind == "yarn":
        return _parse_yarn(rope)
    if kind in ("longrope", "su"):
        return _parse_longrope(rope, hf)
    if kind == "llama3":
        low, high = number(rope, "low_freq_factor"), number(rope, "high_freq_factor")
        if low >= high:
            raise refusal("low_freq_factor", low, f"must be below high_freq_factor={high}")
        length = size(rope, "original_max_position_embeddings")
        return RopeScaling("llama3", number(rope, "factor"), low, high, length)
    rule = "RoPE scaling must be default, linear, dynamic, yarn, longrope or llama3"
    raise ConfigError(KEY, f"rope_type={kind!s:.200}", rule)


def _parse_yarn(rope: dict[str, Any]) -> RopeScaling:
    """YaRN, arXiv:2309.00071, with its attention factor where config.json does not give one."""
    factor = number(rope, "factor")
    if factor < 1:
        raise refusal("factor", factor, "must be at least 1 for YaRN")
    magnitude = lambda scale: 0.1 * scale * math.log(factor) + 1.0
    scale, scale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    default = magnitude(1.0)
    if scale and scale_all:
        default = magnitude(number(rope, "mscale")) / magnitude(number(rope, "mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        original_max_position=size(rope, "original_max_position_embeddings"),
        beta_fast=number(rope, "beta_fast", 32.0),
        beta_slow=number(rope, "beta_slow", 1.0),
        attention_factor=number(rope, "attention_factor", default),
        is_truncated=switch(rope, "truncate", True),
    )


def _parse_longrope(rope: dict[str, Any], hf: dict[str, Any]) -> RopeScaling:
    """LongRoPE, arXiv:2402.13753, within the original window."""
    name = "original_max_position_embeddings"
    window = size(hf, name, size(rope, name, 4096))
    factor = number(rope, "factor", size(hf, "max_position_embeddings") / window)
    factors = rope.get("short_factor")
    if not isinstance(factors, list) or not factors:
        raise refusal("short_factor", factors, "must be a list of numbers")
    short = tuple(number({"short_factor": value}, "short_factor") for value in factors)
    default = math.sqrt(1 + math.log(factor) / math.log(window)) if factor > 1 < window else 1.0
    return RopeScaling(
        "longrope",
        factor,
        original_max_position=window,
        attention_factor=number(rope, "attention_factor", default),
        short_factors=short,
    )


def max_position(hf: dict[str, Any]) -> int | None:
    """The longest sequence that a model was made for, tokens; None: its config.json does not say.

    Linear scaling multiplies `max_position_embeddings`: some folders have it from before the scaling. So do some
    with YaRN, whose window is the original one times the factor: vLLM has no table for what is beyond.
    """
    if hf.get("max_position_embeddings") is None:
        return None
    length, scaling = size(hf, "max_position_embeddings"), parse_rope(hf)[1]
    if scaling is not None and scaling.kind == "linear":
        return int(length * scaling.factor)
    if scaling is not None and scaling.kind == "yarn":
        return int(scaling.original_max_position * scaling.factor)
    if scaling is not None and scaling.kind == "longrope":
        return min(length, scaling.original_max_position)
    return length


def rope_frequencies(width: int, theta: float, scaling: RopeScaling | None) -> jax.Array:
    """Returns the angle per position of each pair of channels.

    The llama3 rule divides the frequencies of long wavelengths by `factor`, keeps those of short ones, and
    interpolates in between (as published with Llama 3.1's weights). YaRN does so along the channels. The dynamic
    rule changes nothing within the window, LongRoPE divides each by a number of its own, and beyond the window of
    these two this package does not go (docs/families.md).

    Args:    width: channels that are turned.
    Returns: [width / 2] float32.
    """
    frequencies = 1.0 / theta ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is None or scaling.kind == "dynamic":
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "longrope":
        return frequencies / jnp.asarray(scaling.short_factors, jnp.float32)
    if scaling.kind == "yarn":
        keep = _kept_by_yarn(width, theta, scaling)
    else:
        turns = scaling.original_max_position * frequencies / (2 * math.pi)
        span = scaling.high_freq_factor - scaling.low_freq_factor
        keep = jnp.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def _kept_by_yarn(width: int, theta: float, scaling: RopeScaling) -> jax.Array:
    """How much of each frequency stays: 1 above `beta_fast` turns in the original window, 0 below `beta_slow`."""

    def channel(turns: float) -> float:
        length = scaling.original_max_position / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(theta))

    low, high = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.is_truncated:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    high += 0.001 * (low == high)
    return 1 - jnp.clip((jnp.arange(width // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)


def rope_tables(
    frequencies: jax.Array, positions: jax.Array, scaling: RopeScaling | None
) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of every position, [B, T, 1, Dr/2] float32.

    Args: frequencies: [Dr/2]; positions: [B, T] int32.
    """
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    factor = 1.0 if scaling is None else scaling.attention_factor
    tables = jnp.cos(angles), jnp.sin(angles)
    return tables if factor == 1 else (factor * tables[0], factor * tables[1])


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel i together with channel i + Dr/2, the pairing of Hugging Face weights. x: [B, T, H, Dh].

    Args: cos, sin: [B, T, 1, Dr/2] float32. Where Dr is less than Dh, the channels from Dr on stay as they are.
    """
    turned = 2 * cos.shape[-1]
    if turned < x.shape[-1]:
        return jnp.concatenate([apply_rope(x[..., :turned], cos, sin), x[..., turned:]], axis=-1)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
