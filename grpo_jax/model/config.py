from grpo_jax.model.transformer import ModelConfig as ModelConfig
