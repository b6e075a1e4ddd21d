"""Tiny random models of every family, made by transformers, and the same sizes as a `ModelConfig`.

Large enough for every mesh of the tests to split something, and for key/value heads to be shared.
"""

import copy

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from grpo_jax.model.config import ModelConfig

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
    "phi3": (Phi3Config, Phi3ForCausalLM),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
SIZES = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=None,
    pad_token_id=None,
)


def tiny_torch_model(family="qwen2", *, seed=0, scale=0.3, **changes):
    """transformers' model. Every weight is random: biases and norms do not stay the 0 and 1 they start with.

    Args:
        scale: standard deviation of all weights but norms, which lie between 0.5 and 1.5. None: all weights are
            as transformers initializes them.
        changes: keys of config.json, `vocab_size` and others, that are added to `SIZES` or replace them.
    """
    config_type, model_type = FAMILIES[family]
    torch.manual_seed(seed)
    fields = copy.deepcopy(SIZES | changes)  # transformers writes into what it is given
    model = model_type(config_type(**fields)).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters() if scale else ():
            parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(0, scale)
            if family == "gemma3" and "norm" in name:
                parameter.sub_(1)  # its norms multiply by 1 + weight
    return model


def save_tiny_model(folder, family="qwen2", **options):
    """Writes a tiny model as a Hugging Face folder. Returns the model. Args: options: of `tiny_torch_model`."""
    model = tiny_torch_model(family, **options)
    model.save_pretrained(folder)
    return model


def tiny_config(**changes):
    """The `ModelConfig` of a model of these sizes, with every switch of every family on."""
    sizes = dict(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_layers=3, num_heads=4, num_kv_heads=2,
        head_dim=4, rope_theta=10_000.0, rms_norm_eps=1e-6, tie_embeddings=False, qkv_bias=True, qk_norm=True,
    )  # fmt: skip
    return ModelConfig(**(sizes | changes))
