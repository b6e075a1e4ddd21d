"""A task of one's own, from JSON lines to a trained model (docs/own_task.md), with a tiny random model.

With a real model, `config.model.path` names its folder, and `random_model` and `sft` are not needed.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the defaults with this example's data and reward."""
    config = defaults()
    config.model.update(path="random", dtype="float32", remat="none", scan_layers=False)
    config.sft.update(num_steps=200, learning_rate=3e-3, train_files=("data/odd_or_even/train.parquet",))
    config.data.update(
        train_files=("data/odd_or_even/train.parquet",),
        val_files=("data/odd_or_even/val.parquet",),
        chat_template_args=("enable_thinking=False",),
        train_batch_size=32,
        max_prompt_length=64,
        max_response_length=16,
    )
    config.algorithm.update(group_size=8, kl_coef=0.001, ref_offload=False)
    config.reward.function = f"{Path(__file__).with_name('reward.py')}:score"
    config.rollout.engine = "local"
    config.optim.update(learning_rate=5e-4, offload=False)
    config.actor.update(micro_batch_size_per_device=32, logits_chunk_tokens=32768)
    config.eval.every_steps = 10
    config.trainer.num_steps = 40
    config.logging.experiment_name = "odd_or_even"
    return config
