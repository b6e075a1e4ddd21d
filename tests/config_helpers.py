"""Configurations for tests."""

import pathlib

from grpo_jax.config import load_config, parse_config

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"


def gsm8k(**changes):
    """configs/gsm8k.py as shipped, with dotted keys changed."""
    config = load_config(CONFIGS / "gsm8k.py")
    config.update_from_flattened_dict(changes)
    return parse_config(config)
