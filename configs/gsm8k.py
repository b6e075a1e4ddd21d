"""GRPO on GSM8K with Qwen2.5-7B-Instruct: the run of the verl quickstart, 87 steps.

    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k
    hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct
    python -m grpo_jax.train --config=configs/gsm8k.py

All weights are trained on one H200, at about 150 s a step, with 107 GB of the host's memory (measured with
random weights of that shape, docs/performance.md). A card of 80 GB needs `--config.rollout.sleep=True
--config.actor.micro_batch_size_per_device=2` besides.

As a smoke test, on any machine and with no model (a tiny random one is made; about a minute on two CPU cores):

    python -m grpo_jax.train --config=configs/gsm8k.py:smoke

What is not said here has its default; docs/configuration.md explains every key. Any key can be overridden on
the command line, as in `--config.algorithm.group_size=8`.
"""

from ml_collections import ConfigDict

from grpo_jax.config import defaults


def get_config(variant: str = "") -> ConfigDict:
    """Returns the configuration; `variant` is "", or "smoke": shows that it runs, learns nothing."""
    config = defaults()
    config.data.train_files = ("data/gsm8k/train.parquet",)
    config.data.val_files = ("data/gsm8k/test.parquet",)
    config.algorithm.kl_coef = 0.001
    config.logging.experiment_name = "gsm8k"
    if variant == "smoke":
        config.model.update(path="random", dtype="float32", remat="none")
        config.data.update(train_batch_size=4, max_prompt_length=256, max_response_length=32)
        config.rollout.engine = "local"
        config.eval.num_prompts = 16
        config.trainer.num_steps = 2
        config.logging.experiment_name = "gsm8k-smoke"
        return config
    if variant:
        raise ValueError(f"configs/gsm8k.py:{variant}: the only variant is 'smoke'")
    config.model.path = "models/Qwen2.5-7B-Instruct"
    config.data.train_batch_size = 256
    config.rollout.update(temperature=0.6, gpu_memory_utilization=0.4)
    config.trainer.total_epochs = 3
    return config
