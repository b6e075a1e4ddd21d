"""What the benchmarks of the vLLM engine share: full-size shapes with random weights, and a stand-in tokenizer."""

import json
import subprocess
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                 num_key_value_heads=2, tie_word_embeddings=True, vocab_size=8192),
    "qwen2.5-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12,
                         num_key_value_heads=2, tie_word_embeddings=True, vocab_size=151936),
    "qwen2.5-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                       num_key_value_heads=4, tie_word_embeddings=False, vocab_size=152064),
    "qwen3-30b-a3b-4-layers": dict(
        architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True,
        num_hidden_layers=4, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        tie_word_embeddings=False, vocab_size=151936, decoder_sparse_step=1, mlp_only_layers=[],
    ),
}  # fmt: skip


def write_shape(folder: Path, shape: str) -> Path:
    """A model's folder without weights: both sides make random ones."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "dtype": "bfloat16",
        "eos_token_id": 151645,
        "bos_token_id": 151643,
        **SHAPES[shape],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def model_folder(folder: Path, dtype: str) -> Any:
    """What `inspect_folder` would say of the folder if it held weights."""
    import jax.numpy as jnp

    from grpo_jax.model.config import parse_hf_config
    from grpo_jax.model.hf import ModelFolder

    config = parse_hf_config(json.loads((folder / "config.json").read_text()))
    unread = ModelFolder(folder, config, {}, "BF16", ())
    return unread.with_config(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))


class NoTokenizer:
    """Decoding costs nothing, on neither side."""

    eos_token_id = None

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [""] * len(rows)


def gpu_name() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True).stdout.splitlines()[0]
    except (OSError, IndexError):
        return "no GPU"
