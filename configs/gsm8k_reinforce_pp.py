"""REINFORCE++ on GSM8K: "REINFORCE++", arXiv:2501.03262.

    python -m grpo_jax.train --config=configs/gsm8k_reinforce_pp.py
    python -m grpo_jax.train --config=configs/gsm8k_reinforce_pp.py:smoke   # a tiny random model: it runs

What differs from configs/gsm8k.py, and why:

- advantages are not centred on the prompt's group but whitened over the whole batch: a group of a few
  completions has a noisy mean and a noisier spread, and a prompt that is always solved need not be pulled
  back to nothing;
- the KL penalty belongs to the reward, token by token, so that an advantage is what is still to come after
  its token;
- the clipped surrogate stays, without a dual clip.

`adv_estimator="reinforce_plus_plus_baseline"`, the paper's other variant, takes the group's mean off first.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """configs/gsm8k.py, which explains every key, as REINFORCE++; `variant` is "" or "smoke"."""
    config = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))["get_config"](variant)
    config.algorithm.update(
        adv_estimator="reinforce_plus_plus", kl_in="reward", kl_estimator="k1", dual_clip=0.0
    )
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-reinforce-pp")
    return config
