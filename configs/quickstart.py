"""GRPO from nothing, on any machine: no network, no GPU, no model; three minutes on two CPU cores.

    python -m grpo_jax.train --config=configs/quickstart.py

What it does: makes a tokenizer and a small random Qwen2-shaped model, generates three-step arithmetic word
problems, teaches the model by supervised training (the warm start), then improves it with GRPO. Three
fifths of the worked examples only state the answer ("#### 9"), the others work it out ("7+5=12, 12-3=9 ####
9"). The warm-started model imitates the more frequent kind and is mostly wrong; sampled at temperature 1
it sometimes works a problem out, which earns more, and GRPO makes that its habit and corrects its arithmetic.

Measured over three seeds (docs/benchmarks.md): held-out accuracy 27 to 30 % after the warm start, 97 to 99 %
at the end; 169 to 195 s on two cores of a Xeon of 2.5 GHz.
"""

from ml_collections import ConfigDict

from grpo_jax.config import defaults


def get_config() -> ConfigDict:
    """Returns the defaults with a small model and generated problems."""
    config = defaults()
    config.model.update(path="random", dtype="float32", remat="none", scan_layers=False)
    config.random_model.update(hidden_size=128, intermediate_size=384)
    config.arithmetic.update(num_train=480, num_val=256, num_sft=8192, difficulty=3, direct_share=0.6)
    config.sft.update(num_steps=550, batch_size=72, learning_rate=3e-3)
    config.data.update(train_batch_size=32, max_prompt_length=96, max_response_length=32)
    config.algorithm.update(group_size=8, kl_coef=0.001, ref_offload=False)
    config.rollout.engine = "local"
    config.optim.update(learning_rate=1e-4, offload=False)  # the model is small, and not pretrained
    # 72 examples mostly fill four micro-batches of 8 packed rows: larger ones would be computed with more padding.
    config.actor.update(micro_batch_size_per_device=8, logits_chunk_tokens=32768)
    config.trainer.deterministic = True
    config.eval.every_steps = 5  # of 15
    config.logging.experiment_name = "quickstart"
    return config
