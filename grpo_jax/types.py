"""The values that travel between the stages, with their shapes.

Letters used in every docstring of the package:

    P  prompts a step              B   completions, P * G         V  vocabulary
    G  completions of one prompt   T   padded tokens of a row     D  model width
    N  layers   F  MLP width       H   query heads   K  key/value heads   Dh  head width

One convention holds everywhere: `logprobs[b, t]` is log p(`tokens[b, t]` | `tokens[b, :t]`), and column 0
is 0. Log-probabilities therefore line up with `tokens` and `completion_mask` without a shift.
"""

import dataclasses
from typing import Any

import flax.struct
import jax

Params = Any
"""A pytree of parameter arrays."""

Metrics = dict[str, Any]
"""Metric name -> scalar."""


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
    """Which weights sampled it."""


@dataclasses.dataclass(frozen=True)
class RolloutGroup:
    """A prompt with exactly G completions (host)."""

    prompt: Prompt
    completions: tuple[Completion, ...]


@flax.struct.dataclass
class TrainBatch:
    """Completions ready for the trainer; every field is [B, T].

    On the host, numpy, one completion a row. In the jitted steps, `jax.Array`: rows hold several sequences one
    after the other, or nothing but padding (`batching.pack`).
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
    kl_coef: Any = None
    """float32; the coefficient of the KL in the loss, the same on every token; None: `algorithm.kl_coef`."""
    loss_weights: Any = None
    """float32; what the token weighs in the loss of its mini-batch; None until that is known."""


@flax.struct.dataclass
class TrainState:
    """All that training changes. The frozen reference parameters travel beside it."""

    step: jax.Array
    """int32 scalar: updates applied, the skipped ones not counted."""
    params: Params
    opt_state: Any
