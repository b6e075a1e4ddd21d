"""GRPO post-training of language models in JAX. Start reading at `grpo_jax/train.py`."""

__version__ = "0.1.0"
