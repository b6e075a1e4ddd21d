"""Rewards: groups of completions go in, one number per completion comes out.

The worker processes of `pool.py` import this file on their way to `worker.py`: it must stay as light as it is
(standard library and `config.py`; no jax, no numpy), or each of them starts seconds later.
"""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_jax.config import ConfigError, RewardSection, nearest, split_file_name

if TYPE_CHECKING:
    from grpo_jax.rewards.base import Reward


class UnreadableError(Exception):
    """A reward function of ours gave up on an answer, for which the completion is to blame and not the run.

    It scores 0 and is counted among the errors, whatever `reward.on_error` says.
    """


NAMES = ("gsm8k", "gsm8k_flexible", "gsm8k_format", "think_format", "math")


def check_names(section: RewardSection) -> None:
    """Raises: ConfigError: a function that is named is none of `NAMES`, and in no file that is there."""
    named = [("reward.function", section.function)]
    for key, name in [*named, *(("reward.extra_functions", name) for name in section.extra_functions)]:
        if name not in NAMES:
            _find_file(key, name)


def make_reward(section: RewardSection, *, max_response_length: int) -> "Reward":
    """Returns the weighted sum of the functions that `section` names, with its length penalty.

    A context manager, since it may hold processes.

    Args: max_response_length: tokens at which a completion is cut; the length penalty ends there.

    Raises:
        ConfigError: an unknown name, or one twice; a file that is missing, cannot be imported or lacks the
            function.
    """
    from grpo_jax.rewards.combined import CombinedReward, LengthPenalty, Part

    weights = section.weights or (1.0,) * (1 + len(section.extra_functions))
    keys = [("reward.function", section.function)]
    keys += [("reward.extra_functions", name) for name in section.extra_functions]
    parts: list[Part] = []
    with contextlib.ExitStack() as stack:  # what was started is closed if a later one cannot be had
        for (key, name), weight in zip(keys, weights, strict=True):
            short = name.rpartition(":")[2]
            if short in [part.name for part in parts] or short == LengthPenalty.NAME:
                raise ConfigError(key, name, f"there is another part of the reward with the name {short}")
            parts.append(Part(short, weight, stack.enter_context(_make_one(key, name, section))))
        stack.pop_all()
    penalty = LengthPenalty(max_response_length, section.overlong_buffer, section.overlong_penalty)
    penalty_or_none = penalty if section.overlong_buffer else None
    return CombinedReward(parts, penalty_or_none, on_error=section.on_error)


def _make_one(key: str, name: str, section: RewardSection) -> "Reward":
    from grpo_jax.rewards import formats, gsm8k
    from grpo_jax.rewards.base import InlineReward

    inline = {
        "gsm8k": (gsm8k.compute_score, gsm8k.explain),
        "gsm8k_flexible": (gsm8k.compute_score_flexible, gsm8k.explain_flexible),
        "gsm8k_format": (formats.gsm8k_format, formats.explain_gsm8k_format),
        "think_format": (formats.think_format, formats.explain_think_format),
    }
    if name in inline:
        return InlineReward(*inline[name])
    if name == "math":
        return _make_pool_reward(
            key, name, "grpo_jax.rewards.math", "compute_score", section, explain="explain"
        )
    path, attribute = _find_file(key, name)
    return _make_pool_reward(key, name, str(Path(path).resolve()), attribute, section, explain=None)


def _find_file(key: str, name: str) -> tuple[str, str]:
    """The file of a function of the user's own, and its name there."""
    file_name = split_file_name(name)
    if file_name is None:
        rule = f"must be one of {', '.join(NAMES)}, or FILE.py:NAME{nearest(name, NAMES)}"
        raise ConfigError(key, name, rule)
    if not Path(file_name[0]).is_file():
        raise ConfigError(key, name, f"there is no file {file_name[0]}")
    return file_name


def _make_pool_reward(
    key: str, name: str, module: str, function: str, section: RewardSection, *, explain: str | None
) -> "Reward":
    from grpo_jax.rewards.base import RewardError
    from grpo_jax.rewards.pool import PoolReward, WorkerPool

    try:
        pool = WorkerPool(module, function, num_workers=section.num_workers, timeout_s=section.timeout_s)
    except RewardError as error:
        raise ConfigError(key, name, str(error)) from None
    return PoolReward(pool, name, on_error=section.on_error, function=function, explain=explain)
