"""GRPO on GSM8K's easier problems with SmolLM2-135M-Instruct: a real model and a real task, minutes on one GPU.

    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k
    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k-easy --max_calculations=2
    hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-Instruct
    python -m grpo_jax.train --config=configs/smollm.py

The model does not know the form "#### 18", and most of GSM8K is too hard for it. So it is first trained on the
worked answers of all of GSM8K's training problems, two passes, and GRPO is on the problems of one or two
calculations only. The learning rate of GRPO is 20 times the one that suits a model of 7B.

As a smoke test, on any machine and with no model: `--config=configs/smollm.py:smoke`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import load_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration; `variant` is "" or "smoke"."""
    config = load_config(Path(__file__).with_name("gsm8k.py"), variant)
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "smollm")
    if variant == "smoke":
        return config
    config.model.path = "models/SmolLM2-135M-Instruct"
    config.sft.update(num_steps=234, learning_rate=1e-4, train_files=("data/gsm8k/train.parquet",))
    config.data.update(
        train_files=("data/gsm8k-easy/train.parquet",),
        val_files=("data/gsm8k-easy/test.parquet",),
        train_batch_size=64,
        max_prompt_length=256,
        max_response_length=256,
    )
    config.algorithm.update(group_size=16, ref_offload=False)
    config.optim.update(learning_rate=2e-5, offload=False)
    config.actor.update(micro_batch_size_per_device=32, logits_chunk_tokens=4096)
    config.rollout.temperature = 0.8
    config.trainer.num_steps = 100  # of the 120 of three epochs
    config.eval.every_steps = 20
    return config
