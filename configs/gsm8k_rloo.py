"""RLOO on GSM8K: "Back to Basics: Revisiting REINFORCE-Style Optimization for RLHF", arXiv:2402.14740.

    python -m grpo_jax.train --config=configs/gsm8k_rloo.py
    python -m grpo_jax.train --config=configs/gsm8k_rloo.py:smoke   # a tiny random model: it runs

What differs from configs/gsm8k.py, and why:

- a completion is compared with the mean of the others of its prompt: a baseline that does not depend on it
  leaves the gradient unbiased, and there is no spread to divide by;
- the plain policy gradient, one update a step: a policy that starts from a good model and is updated on what
  it has just sampled needs no clipping (section 3.2);
- a completion is one action, its log-probability the sum over its tokens: `seq-mean-token-sum`;
- the KL penalty belongs to the reward, as log p / p_ref of the whole completion.

Measured on the quickstart's task (docs/benchmarks.md): held-out accuracy from 30.3 % to 96.2 %, mean of three
seeds, 53 s a run on two cores of an AMD EPYC.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import load_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/gsm8k.py as RLOO; `variant` is "" or "smoke"."""
    config = load_config(Path(__file__).with_name("gsm8k.py"), variant)
    config.algorithm.update(
        adv_estimator="rloo",
        policy_loss="policy_gradient",
        loss_agg="seq-mean-token-sum",
        kl_in="reward",
        kl_estimator="k1",
    )
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-rloo")
    return config
