"""The configuration: its keys, the rules they obey, and how a command reads them. Standard library only."""

from grpo_jax.config.rules import *  # noqa: F403
