"""The values that travel between the stages, with their shapes.

Letters used in every docstring of the package:

    P  prompts a step              B   completions, P * G         V  vocabulary
    G  completions of one prompt   T   padded tokens of a row     D  model width
    N  layers   F  MLP width       H   query heads   K  key/value heads   Dh  head width

One convention holds everywhere: `logprobs[b, t]` is log p(`tokens[b, t]` | `tokens[b, :t]`), and column 0
is 0. Log-probabilities therefore line up with `tokens` and `completion_mask` without a shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.struct
import jax
import numpy as np

Params = Any
"""A pytree of parameter arrays."""

Metrics = dict[str, Any]
"""Metric name -> scalar."""

Timer = Callable[[str], AbstractContextManager[None]]
"""Measures the phase of the given name."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a prompt dataset, encoded (host)."""

    prompt_id: str
    """Where it came from: "FILE_STEM/ROW"."""
    token_ids: tuple[int, ...]
    """The chat template and generation prompt included."""
    text: str
    """What `token_ids` encode."""
    ground_truth: str
    data_source: str
    extra_info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Completion:
    """What the rollout engine answered to one prompt (host)."""

    token_ids: tuple[int, ...]
    """At least one; the stop token, if it stopped, is the last."""
    sampler_logprobs: tuple[float, ...]
    """As long as `token_ids`: log-probability under the distribution that was sampled from."""
    text: str
    """`token_ids` decoded without special tokens."""
    finish_reason: str
    """"stop": ended by itself; "length": cut at the limit."""
    policy_version: int
    """Which weights sampled its first token."""
    changes: tuple[tuple[int, int], ...] = ()
    """(number of a token, policy version) where the weights changed on the way: from that token on."""
    drawable: np.ndarray | None = None
    """[n, ceil(V / 32)] uint32: bit v % 32 of word v // 32 is set where token v could be drawn as that token of
    the completion. None: all could (`rollout.top_p` is 1 and `rollout.top_k` 0), or the engine does not tell."""

    @property
    def token_versions(self) -> np.ndarray:
        """[n] int32: which weights sampled each token."""
        versions = np.full(len(self.token_ids), self.policy_version, np.int32)
        for first, version in self.changes:
            versions[first:] = version
        return versions


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """A prompt with exactly G completions (host)."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    origin: tuple[int, int] | None = None
    """(number of its batch of prompts in the whole run, its place in that batch), both from 0. Seed and epoch
    follow from the first, which is -1 where an older version has not saved it. None: not of training."""


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """The rewards of P groups of G completions (host); arrays are [P, G] float32, finite."""

    rewards: np.ndarray
    """What is trained on."""
    unshaped: np.ndarray
    """The same without the length penalty."""
    correctness: np.ndarray
    """Of the first function alone: a completion is correct from 1 on."""
    parts: Mapping[str, np.ndarray]
    """What each function gave, and the length penalty, by name; not yet weighted."""
    errors: tuple[str, ...]
    """One line for each completion whose function failed, and gave 0 therefore."""

    @property
    def has_spread(self) -> np.ndarray:
        """[P] bool: the groups whose unshaped rewards differ. The others teach nothing about the answer."""
        return self.unshaped.max(axis=1) != self.unshaped.min(axis=1)

    @classmethod
    def of_one(cls, rewards: np.ndarray, errors: tuple[str, ...]) -> RewardResult:
        """The result of a single function."""
        return cls(rewards, rewards, rewards, {}, errors)

    def take(self, groups: Sequence[int]) -> RewardResult:
        """Returns the rewards of some of the groups; the errors stay behind."""
        index = list(groups)
        return RewardResult(
            self.rewards[index],
            self.unshaped[index],
            self.correctness[index],
            {name: values[index] for name, values in self.parts.items()},
            (),
        )

    @classmethod
    def join(cls, results: Sequence[RewardResult]) -> RewardResult:
        """Puts the groups of several results one after the other."""
        return cls(
            np.concatenate([r.rewards for r in results]),
            np.concatenate([r.unshaped for r in results]),
            np.concatenate([r.correctness for r in results]),
            {name: np.concatenate([r.parts[name] for r in results]) for name in results[0].parts},
            tuple(error for r in results for error in r.errors),
        )


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """The completions of a step with their rewards, and what was sampled for it but is not trained on (host)."""

    groups: list[RolloutGroup]
    rewards: RewardResult
    dropped: ScoredBatch | None = None
    """Groups whose rewards are all equal, which dynamic sampling leaves out; None where there are none."""
    kept: tuple[RolloutGroup, ...] = ()
    """Groups that dynamic sampling has sampled, too, and left over for later steps."""
    metrics: Metrics = dataclasses.field(default_factory=dict)
    """With dynamic sampling, how many groups were sampled, kept and left out, by metric name."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """How much one step has to do, for estimates."""

    num_prompts: int
    """P."""
    group_size: int
    """G."""
    prompt_tokens: float
    """Of a prompt, in the mean."""
    response_tokens: float
    """Of a completion, in the mean."""


@dataclasses.dataclass(frozen=True)
class TokenUse:
    """What the updates of a step made of its completions (host); arrays are [B], in group order."""

    minibatch: np.ndarray
    """int: the mini-batch that it was in, from 0."""
    num_tokens: np.ndarray
    """int: its tokens that weigh in the policy loss."""


@dataclasses.dataclass(frozen=True)
class TokenValues:
    """What the updates of a step computed of its tokens (host); arrays are [B, T], in group order, each row
    prompt, completion, padding. They mean something on the completions' tokens only."""

    trainer_logprobs: np.ndarray
    """float32; the trainer's own before the first update, or where it is never computed apart, of the first update
    of its mini-batch."""
    old_logprobs: np.ndarray
    """float32; what ratios are taken to: the same, or the sampler's (`algorithm.old_logprobs`)."""
    logprobs: np.ndarray
    """float32; of the policy that the last update of its mini-batch differentiated."""
    ref_logprobs: np.ndarray | None
    """float32; the reference's; None where there is none."""
    advantages: np.ndarray
    """float32."""
    is_clipped: np.ndarray
    """bool; where a bound changed the policy loss in that update."""
    weighs: np.ndarray
    """bool; what weighs in the policy loss at all."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step leaves for the reports (host)."""

    rollouts: ScoredBatch
    use: TokenUse
    updates: list[Metrics]
    """The metrics of each update, by name."""
    metrics: Metrics
    """The step's, by name."""
    tokens: TokenValues | None = None
    """In steps whose rollouts are saved."""


@flax.struct.dataclass
class TrainBatch:
    """Completions ready for the trainer; every field but `drawable` is [B, T].

    On the host, numpy, one completion a row. In the jitted steps, `jax.Array`: rows hold several sequences one
    after the other, or nothing but padding (`learner/packing.py`).
    """

    tokens: jax.Array
    """int32; prompt, completion, padding."""
    positions: jax.Array
    """int32; position of the token within its own sequence."""
    segment_ids: jax.Array
    """int32; 0 is padding, 1, 2, ... number the sequences of a row."""
    completion_mask: jax.Array
    """float32; 1 on the tokens that the policy sampled."""
    sampler_logprobs: jax.Array
    """float32; 0 outside the completion, here and below."""
    advantages: jax.Array
    """float32; the completion's advantage on each of its tokens."""
    old_logprobs: Any = None
    """float32; the trainer's own before the first update, or the sampler's (`algorithm.old_logprobs`);
    None where the update is the first one."""
    ref_logprobs: Any = None
    """float32; the reference's; None without a KL term."""
    token_ages: Any = None
    """int32; by how many steps the weights that sampled the token are older than those that are trained; None
    where the tokens are not sampled."""
    kl_coef: Any = None
    """float32; the coefficient of the KL in the loss, the same on every token; None: `algorithm.kl_coef`."""
    drawable: Any = None
    """[B, T, ceil(V / 32)] uint32, as `Completion.drawable` and 0 outside the completions: log-probabilities are
    those of the distribution over these tokens alone. None: over all."""
    loss_weights: Any = None
    """float32; what the token weighs in the loss of its mini-batch; None until that is known."""


@flax.struct.dataclass
class LossScale:
    """Where the loss scaling of float16 stands (`learner/loss_scale.py`)."""

    scale: jax.Array
    """float32 scalar: what the loss is multiplied by before it is differentiated."""
    good_updates: jax.Array
    """int32 scalar: updates since the scale changed."""


@flax.struct.dataclass
class TrainState:
    """All that training changes. The frozen reference parameters travel beside it."""

    step: jax.Array
    """int32 scalar: updates applied, the skipped ones not counted."""
    params: Params
    opt_state: Any
    loss_scale: LossScale | None = None
    """None where the computation is not in float16."""
