"""Dr. GRPO on GSM8K: "Understanding R1-Zero-Like Training: A Critical Perspective", arXiv:2503.20783.

    python -m grpo_jax.train --config=configs/gsm8k_dr_grpo.py
    python -m grpo_jax.train --config=configs/gsm8k_dr_grpo.py:smoke   # a tiny random model: it runs

What differs from configs/gsm8k.py, and why:

- advantages are not divided by the group's spread, which weighs very easy and very hard problems more
  (section 3.1);
- the divisor of the loss is a constant, the length limit, and not the number of tokens: a long wrong
  completion is punished as much a token as a short one, so that wrong answers have no reason to grow (section
  3.1);
- no KL term: the rule that gives the rewards cannot be exploited by moving away from the reference, and no
  reference model has to be held;
- the plain clipped surrogate, without a dual clip.
"""

import runpy
from pathlib import Path

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """configs/gsm8k.py, which explains every key, as Dr. GRPO; `variant` is "" or "smoke"."""
    config = runpy.run_path(str(Path(__file__).with_name("gsm8k.py")))["get_config"](variant)
    config.algorithm.update(
        adv_estimator="grpo_no_std",
        loss_agg="seq-mean-token-sum-norm",  # loss_norm=0: by data.max_response_length
        kl_coef=0.0,
        dual_clip=0.0,
    )
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-dr-grpo")
    return config
