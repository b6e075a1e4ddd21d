"""How much the local engine decodes at once, and what its cache takes; no device is needed."""

from jax.sharding import AbstractMesh, Mesh

from grpo_jax.config import Config
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.counts import cache_bytes
from grpo_jax.model.sharding import num_batch_shards
from grpo_jax.model.transformer import bucket_length


def prompts_per_batch(batch_size: int, num_prompts: int, num_samples: int, shards: int) -> int:
    """Prompts whose samples are decoded at once: about `batch_size` completions, in whole batch shards."""
    wanted = min(num_prompts, max(1, batch_size // num_samples))
    while wanted * num_samples % shards:
        wanted += 1
    return wanted


def sampling_bytes(config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh) -> dict[str, int]:
    """Keys and values of one batch on each device, of its prompts and then of all its rows, by name."""
    section, group, prompt = config.rollout, config.algorithm.group_size, config.data.max_prompt_length
    prompts = prompts_per_batch(
        section.batch_size, config.data.train_batch_size, group, num_batch_shards(mesh)
    )
    tensor = mesh.shape["tensor"]
    heads = 1 if model.num_kv_heads % tensor else tensor  # copied where they do not divide
    on_a_device = prompts / num_batch_shards(mesh) * cache_bytes(model) / heads
    columns = bucket_length(prompt)
    longest = columns + config.data.max_response_length - 1
    return {
        "cache of the prompts": round(on_a_device * columns),
        "cache of the completions": round(on_a_device * group * longest),
    }
