"""Where the batches of a run stand: in memory, and as JSON for its checkpoints.

What is sampled and not trained on yet belongs to it, so that no answer is asked for twice: groups that dynamic
sampling has left over, and those of batches ahead that have come back.
"""

import base64
import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from grpo_jax.config import KEYS, Config
from grpo_jax.config.sections import FIXED
from grpo_jax.types import Completion, Prompt, RewardResult, RolloutGroup

logger = logging.getLogger(__name__)

PromptKey = tuple[str, tuple[int, ...]]
"""(prompt id, token ids)"""


@dataclasses.dataclass(frozen=True)
class ScoredGroup:
    group: RolloutGroup
    rewards: RewardResult
    """Of this one group."""


@dataclasses.dataclass(frozen=True)
class Position:
    """Where the batches of a run stand."""

    prompt_iterator: Mapping[str, Any]
    num_rollout_batches: int
    """Batches of prompts taken in the whole run, interruptions or not. The next one's seed follows from it."""
    surplus: Sequence[ScoredGroup] = ()
    """Groups that dynamic sampling keeps for the next step."""
    ahead: Sequence[Mapping[int, RolloutGroup]] = ()
    """Of each batch that was asked for ahead, the groups that have come back, by their place in it."""
    lost: Sequence[tuple[int, int]] = ()
    """`RolloutGroup.origin` of groups that were left over, and that this run has no use for; not saved."""

    def to_json(self, rewarded_by: str) -> dict[str, Any]:
        """As `json.dumps` takes it, to the last bit. Args: rewarded_by: `reward_settings` of the run."""
        common = {"rewarded_by": rewarded_by}
        surplus = [_group_to_json(s.group) | rewards_to_json(s.rewards) | common for s in self.surplus]
        return {
            "prompt_iterator": dict(self.prompt_iterator),
            "num_rollout_batches": self.num_rollout_batches,
            "surplus": surplus,
            "ahead": [
                [_group_to_json(group) for _, group in sorted(groups.items())] for groups in self.ahead
            ],
        }

    @classmethod
    def from_json(
        cls, held: Mapping[str, Any], prompts: Sequence[Prompt], group_size: int, rewarded_by: str
    ) -> "Position":
        """What `to_json` returned. Groups that do not fit this run are left out, with a warning.

        Such are there where checkpoint.resume=force goes on with another group size, other prompts or another
        reward; without them the run has lost a few completions, and nothing else.

        Args:
            prompts: all of the training data, among which those of the groups are found.
            rewarded_by: `reward_settings` of the run: rewards by others mean something else.
        """
        by_key = {(prompt.prompt_id, prompt.token_ids): prompt for prompt in prompts}
        surplus, lost = [], []
        for number, entry in enumerate(held["surplus"]):
            if entry.get("origin") is None:  # of an older version: of no batch that is known
                entry = {**entry, "origin": (-1, number)}
            group = _group_from_json(entry, by_key, group_size)
            if group is not None and entry.get("rewarded_by", rewarded_by) == rewarded_by:
                surplus.append(ScoredGroup(group, rewards_from_json(entry)))
            else:
                lost.append(entry)
        if lost:
            logger.warning(
                "WARNING: %d of the %d groups that dynamic sampling had left over are dropped: the prompts, "
                "algorithm.group_size=%d or the reward are others than theirs (%s).",
                len(lost), len(held["surplus"]), group_size, ", ".join(entry["prompt_id"] for entry in lost),
            )  # fmt: skip
        ahead = [
            {
                _place(group): group
                for entry in batch
                if (group := _group_from_json(entry, by_key, group_size))
            }
            for batch in held.get("ahead", [])
        ]
        origins = tuple(_origin_from_json(entry) for entry in lost)
        return cls(
            held["prompt_iterator"], held["num_rollout_batches"], tuple(surplus), tuple(ahead), origins
        )


def reward_settings(config: Config) -> str:
    """What the rewards of a run depend on, as JSON."""
    names = [name for name, key in KEYS.items() if name.startswith("reward.") and key.resume == FIXED]
    return json.dumps({name: config.get(name) for name in (*names, "data.max_response_length")})


def _place(group: RolloutGroup) -> int:
    assert group.origin is not None, "groups of batches ahead come from a batch"
    return group.origin[1]


def _group_to_json(group: RolloutGroup) -> dict[str, Any]:
    return {
        "prompt_id": group.prompt.prompt_id,
        "prompt_token_ids": list(group.prompt.token_ids),
        "origin": group.origin,
        "completions": [
            {
                "token_ids": _encode(np.array(c.token_ids, np.int32)),
                "sampler_logprobs": _encode(np.array(c.sampler_logprobs, np.float64)),
                "text": c.text,
                "finish_reason": c.finish_reason,
                "policy_version": c.policy_version,
                "changes": c.changes,
                "drawable": None if c.drawable is None else _encode(c.drawable),
            }
            for c in group.completions
        ],
    }


def _group_from_json(
    entry: Mapping[str, Any], prompts: Mapping[PromptKey, Prompt], group_size: int
) -> RolloutGroup | None:
    """A group that `_group_to_json` wrote; None where it is of another size, or its prompt not among `prompts`."""
    prompt = prompts.get((entry["prompt_id"], tuple(entry["prompt_token_ids"])))
    if prompt is None or len(entry["completions"]) != group_size:
        return None
    completions = tuple(_completion_from_json(c) for c in entry["completions"])
    return RolloutGroup(prompt, completions, _origin_from_json(entry))


def _origin_from_json(entry: Mapping[str, Any]) -> tuple[int, int]:
    """`RolloutGroup.origin`."""
    number, place = entry["origin"]
    return number, place


def _completion_from_json(c: Mapping[str, Any]) -> Completion:
    ids = _decode(c["token_ids"], np.int32)
    drawable = c.get("drawable")
    return Completion(
        token_ids=tuple(ids),
        sampler_logprobs=tuple(_decode(c["sampler_logprobs"], np.float64)),
        text=c["text"],
        finish_reason=c["finish_reason"],
        policy_version=c["policy_version"],
        changes=tuple((first, version) for first, version in c.get("changes", ())),
        drawable=None if drawable is None else _array(drawable, np.uint32).reshape(len(ids), -1),
    )


def rewards_to_json(rewards: RewardResult) -> dict[str, Any]:
    """As `json.dumps` takes them, to the last bit; without the errors."""
    return {
        "rewards": rewards.rewards.tolist(),
        "unshaped": rewards.unshaped.tolist(),
        "correctness": rewards.correctness.tolist(),
        "parts": {name: values.tolist() for name, values in rewards.parts.items()},
    }


def rewards_from_json(entry: Mapping[str, Any], errors: Sequence[str] = ()) -> RewardResult:
    """What `rewards_to_json` returned, which leaves the errors out."""
    # float32 -> float64 -> text -> float32 gives the same bits back.
    values = {name: np.array(entry[name], np.float32) for name in ("rewards", "unshaped", "correctness")}
    parts = {name: np.array(value, np.float32) for name, value in entry["parts"].items()}
    return RewardResult(**values, parts=parts, errors=tuple(errors))


def _encode(values: np.ndarray) -> str:
    """Numbers as text: a third of what JSON makes of them."""
    return base64.b64encode(values.tobytes()).decode()


def _array(text: str, dtype: Any) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype)


def _decode(held: str | list, dtype: Any) -> list:
    """What `_encode` wrote, or the list of numbers that older versions wrote."""
    return _array(held, dtype).tolist() if isinstance(held, str) else held
