"""GSPO on GSM8K: "Group Sequence Policy Optimization", arXiv:2507.18071.

    python -m grpo_jax.train --config=configs/gsm8k_gspo.py
    python -m grpo_jax.train --config=configs/gsm8k_gspo.py:smoke   # a tiny random model: it runs

What differs from configs/gsm8k.py, and why:

- the ratio is that of a whole completion, the geometric mean of its tokens' ratios: rewards are of
  completions, and the ratio of a single token is one draw, which corrects nothing and adds noise that grows
  with the length (section 3);
- bounds of 3e-4 and 4e-4 (section 5.1): such a mean stays that near to 1, and what is clipped are
  completions;
- the loss is the mean over completions;
- four updates a step, as in the paper: with one the ratio is 1, and GSPO is GRPO;
- no KL term.

Measured on the quickstart's task (docs/benchmarks.md): held-out accuracy from 30.3 % to 96.0 %, mean of three
seeds, 77 s a run on two cores of an AMD EPYC.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import load_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/gsm8k.py as GSPO; `variant` is "" or "smoke"."""
    config = load_config(Path(__file__).with_name("gsm8k.py"), variant)
    config.algorithm.update(
        policy_loss="gspo", clip_low=3e-4, clip_high=4e-4, loss_agg="seq-mean-token-mean", kl_coef=0.0
    )
    config.actor.num_minibatches = 4
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-gspo")
    return config
