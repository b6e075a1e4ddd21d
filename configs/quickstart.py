"""GRPO from nothing, on any machine: no network, no GPU, no model, a few minutes on two CPU cores.

python -m grpo_jax.train --config=configs/quickstart.py
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    config = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))["get_config"]()
    config.model.path = "random"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.model.scan_layers = False
    config.random_model.update(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=2
    )
    config.data.train_batch_size = 32
    config.data.max_prompt_length = 96
    config.data.max_response_length = 32
    config.arithmetic.update(num_train=960, num_val=256, num_sft=8192, difficulty=3, direct_share=0.6)
    config.sft.update(num_steps=300, batch_size=64, learning_rate=3e-3)
    config.algorithm.group_size = 8
    config.algorithm.kl_coef = 0.0
    config.optim.learning_rate = 3e-4
    config.actor.micro_batch_size_per_device = 256
    config.actor.logits_chunk_tokens = 65536
    config.rollout.temperature = 1.0
    config.eval.every_steps = 10
    config.trainer.total_epochs = 1
    config.logging.experiment_name = "quickstart"
    return config
