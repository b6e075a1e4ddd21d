"""Rewards: groups of completions go in, one number per completion comes out.

The worker processes of `pool.py` import this file on their way to `worker.py`: it must stay as light as it is
(standard library and `config.py`; no jax, no numpy), or each of them starts seconds later.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from grpo_jax.config import ConfigError, RewardSection, nearest

if TYPE_CHECKING:
    from grpo_jax.rewards.base import Reward

NAMES = ("gsm8k", "gsm8k_flexible", "math")


def make_reward(section: RewardSection) -> "Reward":
    """Returns the reward that `section.function` names; a context manager, since it may hold processes.

    Raises:
        ConfigError: an unknown name; a file that is missing, cannot be imported or lacks the function.
    """
    name = section.function
    if name in ("gsm8k", "gsm8k_flexible"):
        from grpo_jax.rewards import gsm8k
        from grpo_jax.rewards.base import InlineReward

        if name == "gsm8k":
            return InlineReward(gsm8k.compute_score, gsm8k.explain)
        return InlineReward(gsm8k.compute_score_flexible, gsm8k.explain_flexible)
    if name == "math":
        return _make_pool_reward("grpo_jax.rewards.math", "compute_score", section, explain="explain")
    path, colon, attribute = name.rpartition(":")
    if not colon or not path.endswith(".py") or not attribute.isidentifier():
        rule = f"must be one of {', '.join(NAMES)}, or FILE.py:NAME{nearest(name, NAMES)}"
        raise ConfigError("reward.function", name, rule)
    if not Path(path).is_file():
        raise ConfigError("reward.function", name, f"there is no file {path}")
    return _make_pool_reward(str(Path(path).resolve()), attribute, section, explain=None)


def _make_pool_reward(module: str, function: str, section: RewardSection, *, explain: str | None) -> "Reward":
    from grpo_jax.rewards.base import RewardError
    from grpo_jax.rewards.pool import PoolReward, WorkerPool

    try:
        pool = WorkerPool(module, function, num_workers=section.num_workers, timeout_s=section.timeout_s)
    except RewardError as error:
        raise ConfigError("reward.function", section.function, str(error)) from None
    return PoolReward(pool, section, function=function, explain=explain)
