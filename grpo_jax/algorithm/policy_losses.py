"""The policy losses: they make good tokens more likely and bad ones less likely. One function a paper.

Each takes the sampled tokens (`PolicyTokens`) and the `algorithm` section, and returns three [R, T] float32
arrays:

    loss             `loss.grpo_loss` takes its weighted sum
    clipped          1 where a bound has changed the ratio and thereby the loss: metric "actor/pg_clipfrac"
    clipped_lower    1 where a second bound has, if there is one: metric "actor/pg_clipfrac_lower"

Everything that enters is 0 outside the completions. A row may hold several sequences (`segment_ids`). All tokens
of a completion have the same advantage, unless `algorithm.adv_estimator` is per token.

A new loss is a function here and a row of `POLICY_LOSSES`; one of your own is `algorithm.policy_loss`=FILE.py:NAME
with the same arguments and results.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from grpo_jax.algorithm.ratios import log_ratio, sequence_means
from grpo_jax.config import AlgorithmSection

GSPO_LOG_RATIO_BOUND = 10.0
"""The log-ratio of a sequence is clamped from above, as in verl."""

Losses = tuple[jax.Array, jax.Array, jax.Array]
"""(loss, clipped, clipped_lower), each [R, T] float32."""


@flax.struct.dataclass
class PolicyTokens:
    """What a policy loss reads; all [R, T], float32 except the last two, and 0 outside the completions."""

    logprobs: jax.Array
    """Of the policy that is differentiated."""
    old_logprobs: jax.Array
    advantages: jax.Array
    mask: jax.Array
    """1 on completion tokens."""
    segment_ids: jax.Array
    """int32; 1, 2, ... number the sequences of a row, 0 is padding."""
    ages: jax.Array | None = None
    """int32; by how many steps the weights that sampled the token are older than those before the update."""


def clipped_surrogate(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """The clipped policy loss of each token.

        r = p / p_old,   L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   where A < 0: min(L, -A c)

    PPO, arXiv:1707.06347 (7); clip_high above clip_low: DAPO, arXiv:2503.14476; c is `dual_clip`, a bound
    on the loss of a bad token that became likely: arXiv:1912.09729 (5), off where it is 0.

    Returns: `Losses`; clipped: where the clipped ratio decides, clipped_lower: where `dual_clip` does. The
             gradient is 0 in both cases.
    """
    ratio = jnp.exp(log_ratio(tokens.logprobs, tokens.old_logprobs))
    loss, clipped = _pessimistic(ratio, tokens.advantages, algorithm)
    if algorithm.dual_clip == 0:
        return loss, clipped, jnp.zeros_like(loss)
    bound = -tokens.advantages * algorithm.dual_clip
    dual_clipped = (tokens.advantages < 0) & (loss > bound)
    loss = jnp.where(dual_clipped, bound, loss)
    return loss, clipped, dual_clipped.astype(jnp.float32)


def _pessimistic(
    ratio: jax.Array, advantages: jax.Array, algorithm: AlgorithmSection
) -> tuple[jax.Array, jax.Array]:
    """max(-A r, -A clip(r)), and where the second one is larger."""
    loss = -advantages * ratio
    loss_clipped = -advantages * jnp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    # `where` and not `maximum`, which halves gradients on a tie: a ratio on a bound is not clipped.
    clipped = loss_clipped > loss
    return jnp.where(clipped, loss_clipped, loss), clipped.astype(jnp.float32)


def gspo_surrogate(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """The clipped policy loss of a whole completion, on each of its tokens.

        s = exp(mean_t log(p / p_old)),   L = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    GSPO, arXiv:2507.18071 (5) to (7): rewards are of completions, and so is the ratio; its geometric mean stays
    near 1, hence bounds of some 1e-4. Written as GSPO-token (13), s stop-gradient(1 / p) p: the same value and,
    summed over the completion with `seq-mean-token-mean`, the same gradient, without one through the sums.

    Returns: `Losses`; there is no second bound.
    """
    log_ratios = tokens.logprobs - tokens.old_logprobs
    of_sequence = jax.lax.stop_gradient(sequence_means(log_ratios, tokens.mask, tokens.segment_ids))
    through = tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
    log_s = through + of_sequence
    ratio = jnp.exp(jnp.where(log_s > GSPO_LOG_RATIO_BOUND, GSPO_LOG_RATIO_BOUND, log_s))
    loss, clipped = _pessimistic(ratio, tokens.advantages, algorithm)
    return loss, clipped, jnp.zeros_like(loss)


def cispo_loss(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """The policy gradient of each token, weighted with its clipped ratio.

        L = -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log p

    CISPO, arXiv:2506.13585: a bound on the weight, not on the gradient, so that rare tokens go on learning.

    Returns: `Losses`; clipped: where the ratio is out of bounds, whatever the sign of A.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio(tokens.logprobs, tokens.old_logprobs)))
    weight = jnp.clip(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    loss = -weight * tokens.advantages * tokens.logprobs
    return loss, (weight != ratio).astype(jnp.float32), jnp.zeros_like(loss)


def geo_mean_surrogate(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """The policy loss with the geometric mean of a completion's clipped ratios, on each of its tokens.

        L = -A exp(mean_t x),   x = log(p / p_old), at most clip_high where A > 0, at least -clip_low where A < 0

    GMPO, arXiv:2507.20673: outliers among the ratios weigh less than in a mean. The bounds are those of
    log-ratios, not of ratios.

    Returns: `Losses`; as in verl, clipped: where a log-ratio is out of bounds and A > 0, clipped_lower: where it
             is and A < 0. Of these only clip_high for A > 0 and clip_low for A < 0 change the loss.
    """
    x, advantages = tokens.logprobs - tokens.old_logprobs, tokens.advantages
    clip_low, clip_high = algorithm.clip_low, algorithm.clip_high
    bounded = jnp.where((advantages > 0) & (x > clip_high), clip_high, x)
    bounded = jnp.where((advantages < 0) & (x < -clip_low), -clip_low, bounded)
    means = sequence_means(bounded, tokens.mask, tokens.segment_ids)
    advantage = sequence_means(advantages, tokens.mask, tokens.segment_ids)
    loss = -advantage * jnp.exp(means)
    is_outside = (x > clip_high) | (x < -clip_low)
    clipped = (is_outside & (advantages > 0)).astype(jnp.float32)
    return loss, clipped, (is_outside & (advantages < 0)).astype(jnp.float32)


def sapo_loss(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """The policy loss with a soft gate in place of clipping.

        L = -A (4 / tau) sigmoid(tau (r - 1)),   tau = sapo_tau_positive where A > 0, else sapo_tau_negative

    SAPO, arXiv:2511.20347. At r = 1 the gate's slope is 1, the policy gradient's; it falls smoothly on
    both sides, faster with a larger tau.

    Returns: `Losses`; nothing is clipped.
    """
    ratio = jnp.exp(log_ratio(tokens.logprobs, tokens.old_logprobs))
    tau = jnp.where(tokens.advantages > 0, algorithm.sapo_tau_positive, algorithm.sapo_tau_negative)
    loss = -tokens.advantages * jax.nn.sigmoid(tau * (ratio - 1)) * (4 / tau)
    return loss, jnp.zeros_like(loss), jnp.zeros_like(loss)


def policy_gradient_loss(tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
    """L = -A log p: REINFORCE, Williams 1992, doi.org/10.1007/BF00992696. Right for the policy that sampled only.

    Returns: `Losses`; nothing is clipped.
    """
    loss = -tokens.advantages * tokens.logprobs
    return loss, jnp.zeros_like(loss), jnp.zeros_like(loss)


@dataclasses.dataclass(frozen=True)
class PolicyLoss:
    """A policy loss, and which configurations it goes with."""

    function: Callable[[PolicyTokens, AlgorithmSection], Losses]
    is_per_completion: bool = False
    """All tokens of a completion have one ratio. Needs one advantage and one sampler correction a completion."""
    has_ratio: bool = True
    """False: it reads no `old_logprobs`, and is right for one update a step only."""

    def __call__(self, tokens: PolicyTokens, algorithm: AlgorithmSection) -> Losses:
        return self.function(tokens, algorithm)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "clip": PolicyLoss(clipped_surrogate),
    "gspo": PolicyLoss(gspo_surrogate, is_per_completion=True),
    "cispo": PolicyLoss(cispo_loss),
    "geo_mean": PolicyLoss(geo_mean_surrogate, is_per_completion=True),
    "sapo": PolicyLoss(sapo_loss),
    "policy_gradient": PolicyLoss(policy_gradient_loss, has_ratio=False),
}
"""`algorithm.policy_loss` -> loss."""
