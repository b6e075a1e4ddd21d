"""LoRA on GSM8K: "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685.

    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k
    hf download Qwen/Qwen2.5-3B-Instruct --local-dir models/Qwen2.5-3B-Instruct
    python -m grpo_jax.train --config=configs/gsm8k_lora.py
    python -m grpo_jax.train --config=configs/gsm8k_lora.py:smoke   # a tiny random model: it runs

What differs from configs/gsm8k.py, and why (numbers without a reason are those of verl's example of LoRA):

- adapters of rank 32, with alpha 32 on all linear layers as shipped, are the only parameters that are trained; the
  model is held once, in bfloat16, for policy and reference (docs/lora.md);
- Qwen2.5-3B-Instruct; a learning rate of 3e-6, for adapters that begin at 0;
- 1,024 prompts a step, groups of 5, answers of up to 1,024 tokens, four updates a step, in the order of the file,
  15 epochs, at temperature 1;
- nothing on the host: the adapters' state is small.

Nothing was measured yet with this model. `python -m grpo_jax.plan` says what it takes; for 7B on one card of 40 or
24 GB, docs/lora.md has the settings.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import load_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/gsm8k.py with LoRA; `variant` is "" or "smoke"."""
    config = load_config(Path(__file__).with_name("gsm8k.py"), variant)
    config.lora.rank = 32
    config.algorithm.update(ref_offload=False)
    config.optim.update(learning_rate=3e-6, offload=False)
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-lora")
    if variant == "smoke":
        return config
    config.model.path = "models/Qwen2.5-3B-Instruct"
    config.data.update(train_batch_size=1024, max_response_length=1024, shuffle=False)
    config.algorithm.group_size = 5
    config.actor.num_minibatches = 4
    config.rollout.update(temperature=1.0, gpu_memory_utilization=0.6)
    config.trainer.total_epochs = 15
    return config
