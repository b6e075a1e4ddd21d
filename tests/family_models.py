"""One row for each family of models, and for each switch of one that config.json has.

Every test of `model/test_families.py` and `vllm/test_vllm_families.py` runs for each row by itself.
"""

import dataclasses
import math

import jax
import numpy as np
from tiny_models import save_tiny_model

from grpo_jax.config import MeshSection
from grpo_jax.model.hf import inspect_folder, load_params
from grpo_jax.model.sharding import make_mesh

# Positions up to 80 with theta 100 and heads of 8 channels: wavelengths of 6 to 199 positions.
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 100.0}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# In 32 positions the four frequencies turn 5.1, 1.6, 0.5 and 0.16 times: the first is kept, the others mixed.
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 4.0,
    "beta_slow": 0.2,
}
DEEPSEEK_YARN = YARN_ROPE | {"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": False}


def longrope(head_dim):
    """Of the first half of the channels, and felt at once. Its long factors are for what is beyond the window."""
    pairs = head_dim // 4
    rope = {
        "rope_type": "longrope",
        "rope_theta": 100.0,
        "short_factor": [1.0 + 0.5 * i for i in range(pairs)],
        "long_factor": [9.0] * pairs,
        "partial_rotary_factor": 0.5,
    }
    return dict(rope_parameters=rope, original_max_position_embeddings=128, max_position_embeddings=256)


GEMMA3_ROPE = {
    "full_attention": DEFAULT_ROPE,
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}
GEMMA3 = dict(
    num_hidden_layers=4,
    sliding_window=7,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
    query_pre_attn_scalar=5,
    rope_parameters=GEMMA3_ROPE,
)
QWEN3_MOE = dict(
    rope_parameters=DEFAULT_ROPE,
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    mlp_only_layers=[],
)

ROWS = {
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, rope_parameters=DEFAULT_ROPE)),
    "qwen2-yarn": ("qwen2", dict(tie_word_embeddings=False, rope_parameters=YARN_ROPE)),
    "qwen3": ("qwen3", dict(tie_word_embeddings=False, rope_parameters=DEFAULT_ROPE)),
    "llama-llama3": ("llama", dict(tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE)),
    "llama-linear": ("llama", dict(tie_word_embeddings=True, rope_parameters=LINEAR_ROPE)),
    "llama-dynamic": ("llama", dict(tie_word_embeddings=False, rope_parameters=DYNAMIC_ROPE)),
    "llama-mscale": ("llama", dict(tie_word_embeddings=False, rope_parameters=DEEPSEEK_YARN)),
    "mistral": ("mistral", dict(sliding_window=7, rope_parameters=DEFAULT_ROPE)),
    "mistral-full": ("mistral", dict(sliding_window=None, rope_parameters=DEFAULT_ROPE)),
    "qwen3-windows": ("qwen3", dict(use_sliding_window=True, sliding_window=7, max_window_layers=2)),
    "gemma3": ("gemma3", GEMMA3),
    "gemma3-linear": ("gemma3", GEMMA3 | dict(rope_parameters=GEMMA3_ROPE | {"full_attention": LINEAR_ROPE})),
    "gemma3-cap": ("gemma3", GEMMA3 | dict(final_logit_softcapping=5.0, query_pre_attn_scalar=8)),
    "phi3": ("phi3", dict(rope_parameters=DEFAULT_ROPE | {"partial_rotary_factor": 0.5})),
    "phi3-window": ("phi3", dict(rope_parameters=DEFAULT_ROPE, sliding_window=7, tie_word_embeddings=True)),
    "phi3-longrope": ("phi3", longrope),
    "qwen3-moe": ("qwen3_moe", QWEN3_MOE | dict(norm_topk_prob=True)),
    "qwen3-moe-shares": ("qwen3_moe", QWEN3_MOE | dict(norm_topk_prob=False, num_experts_per_tok=3)),
    "smollm3": ("smollm3", dict(no_rope_layer_interval=2, rope_parameters=DEFAULT_ROPE)),
    "smollm3-yarn": (
        "smollm3",
        dict(num_hidden_layers=3, no_rope_layers=[0, 1, 1], rope_parameters=YARN_ROPE),
    ),
    "olmo2": ("olmo2", dict(rope_parameters=DEFAULT_ROPE)),
}
"""Name -> (key of `tiny_models.FAMILIES`, fields of its config.json, or a function of the width of heads)."""
FAMILY_ROWS = list({kind: row for row, (kind, _) in reversed(ROWS.items())}.values())[::-1]
"""The first row of each family: for tests that take long."""
VOCAB = 64
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    head_dim=8,
    num_hidden_layers=4,
    eos_token_id=None,
    pad_token_id=0,
)


@dataclasses.dataclass
class Model:
    """One random model in both frameworks."""

    torch_model: object
    folder: object

    def params(self, *sizes):
        return load_params(self.folder, self.folder.config, mesh_of(*sizes))


def kind_and_fields(row, sizes):
    """(key of `tiny_models.FAMILIES`, all fields of config.json) of a row with these sizes."""
    kind, fields = ROWS[row]
    return kind, sizes | (fields(sizes["head_dim"]) if callable(fields) else fields)


def make_model(row, path):
    """Writes the random model of a row. Every weight is random, biases and norms too."""
    kind, fields = kind_and_fields(row, SIZES)
    torch_model = save_tiny_model(path, kind, seed=sum(map(ord, row)), scale=0.3, **fields)
    return Model(torch_model, inspect_folder(path))


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape).astype(np.int32)
