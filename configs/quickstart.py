"""GRPO from nothing, on any machine: no network, no GPU, no model; a few minutes on two CPU cores.

    python -m grpo_jax.train --config=configs/quickstart.py

What it does: makes a tokenizer and a small random Qwen2-shaped model, generates three-step arithmetic word
problems, teaches the model by supervised training (the warm start), then improves it with GRPO. About two
thirds of the worked examples only state the answer ("#### 9"), the others work it out ("7+5=12, 12-3=9 ####
9"). The warm-started model imitates the more frequent kind and is mostly wrong; sampled at temperature 1
it sometimes works a problem out, which earns more, and GRPO makes that its habit and corrects its arithmetic.

Measured results over several seeds, with the hardware: docs/benchmarks.md.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config() -> config_dict.ConfigDict:
    """configs/gsm8k.py, which explains every key, with a small model and generated problems."""
    config = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))["get_config"]()
    config.model.update(path="random", dtype="float32", remat="none", scan_layers=False)
    config.random_model.update(
        vocab_size=512, hidden_size=128, intermediate_size=384, num_layers=2, num_heads=4, num_kv_heads=2
    )
    config.arithmetic.update(num_train=1280, num_val=256, num_sft=8192, difficulty=3, direct_share=0.65)
    config.sft.update(num_steps=600, batch_size=64, learning_rate=3e-3)

    config.data.update(train_batch_size=32, max_prompt_length=96, max_response_length=32)
    config.algorithm.update(group_size=8, ref_offload=False)
    config.rollout.update(engine="local", temperature=1.0)
    config.optim.update(learning_rate=1e-4, offload=False)  # the model is small, and not pretrained
    config.trainer.update(total_epochs=1, deterministic=True)  # 40 steps

    config.actor.micro_batch_size_per_device = (
        32  # what the CPU's memory allocator likes; 256 takes twice as long
    )
    config.actor.logits_chunk_tokens = 32768
    config.eval.every_steps = 10
    config.logging.experiment_name = "quickstart"
    return config
