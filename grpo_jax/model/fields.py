"""Values of a config.json, one by one and checked: what is wrong with one is a `ConfigError` that names it."""

from typing import Any

from grpo_jax.config import ConfigError

KEY = "model.path"
"""The key that errors about a model's folder name."""
LIMIT = 2**31
FLOAT32_LIMIT = 3.4e38


def refusal(name: str, value: Any, rule: str) -> ConfigError:
    """The error about one field of config.json."""
    return ConfigError(KEY, f"config.json: {name}={value!r:.200}", rule)


def size(hf: dict[str, Any], name: str, default: int | None = None) -> int:
    """A whole number that an array can have for its size."""
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(KEY, "config.json", f"lacks {name}")
    if type(value) is not int or not 0 < value < LIMIT:
        raise refusal(name, value, "must be a whole number, at least 1 and below 2**31")
    return value


def number(hf: dict[str, Any], name: str, default: float | None = None) -> float:
    """A number above 0."""
    value = hf.get(name)
    value = default if value is None else value
    if value is None:
        raise ConfigError(KEY, "config.json", f"lacks {name}")
    if type(value) not in (int, float) or not 0 < value < FLOAT32_LIMIT:
        raise refusal(name, value, "must be a number above 0")
    return float(value)


def switch(hf: dict[str, Any], name: str, default: bool = False) -> bool:
    """True or false."""
    value = hf.get(name)
    if not isinstance(value, bool | None):
        raise refusal(name, value, "must be true or false")
    return default if value is None else value
