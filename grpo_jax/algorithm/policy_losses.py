"""The policy losses: what pulls good tokens up and bad ones down, one function a paper.

Each takes log-probabilities of the sampled tokens, [R, T] float32, and returns three arrays of that shape:

    loss             whose weighted sum `losses.grpo_loss` takes
    clipped          1 where a bound has changed the ratio and thereby the loss
    clipped_lower    1 where the second bound has, if there is one: metric "actor/pg_clipfrac_lower"

Outside the completions everything that enters is 0. Rows may hold several sequences (`segment_ids`). The
advantages of a completion's tokens are one number, except where `algorithm.adv_estimator` is per token.
"""

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
    """What a policy loss may look at; all [R, T], float32 but for the last, 0 outside the completions."""

    logprobs: jax.Array
    """Of the policy that is differentiated."""
    old_logprobs: jax.Array
    advantages: jax.Array
    mask: jax.Array
    """1 on completion tokens."""
    segment_ids: jax.Array
    """int32; number the sequences of a row, 0 is padding."""


def clipped_surrogate(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
) -> Losses:
    """The clipped policy loss of each token.

        r = p / p_old,   L = max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high));   where A < 0: min(L, -A c)

    PPO, arXiv:1707.06347 (7); clip_high above clip_low: DAPO, arXiv:2503.14476; c is `dual_clip`, a bound
    on the loss of a bad token that became likely: arXiv:1912.09729 (5).

    Args:
        logprobs, old_logprobs, advantages: [R, T] float32.
        clip_low: in (0, 1).
        clip_high: above 0.
        dual_clip: above 1; 0: no such bound.

    Returns:
        loss: [R, T] float32.
        clipped: [R, T] float32; 1 where the clipped ratio decides, and the gradient is 0.
        dual_clipped: [R, T] float32; 1 where `dual_clip` decides, and the gradient is 0.
    """
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs))
    loss, clipped = _pessimistic(ratio, advantages, clip_low, clip_high)
    if dual_clip == 0:
        return loss, clipped, jnp.zeros_like(loss)
    bound = -advantages * dual_clip
    dual_clipped = (advantages < 0) & (loss > bound)
    loss = jnp.where(dual_clipped, bound, loss)
    return loss, clipped, dual_clipped.astype(jnp.float32)


def _pessimistic(
    ratio: jax.Array, advantages: jax.Array, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """max(-A r, -A clip(r)), and where the second one is larger."""
    loss = -advantages * ratio
    loss_clipped = -advantages * jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    # `where` and not `maximum`, which halves gradients on a tie: a ratio on a bound is not clipped.
    clipped = loss_clipped > loss
    return jnp.where(clipped, loss_clipped, loss), clipped.astype(jnp.float32)


def gspo_surrogate(tokens: PolicyTokens, *, clip_low: float, clip_high: float) -> Losses:
    """The clipped policy loss of a whole completion, on each of its tokens.

        s = exp(mean_t log(p / p_old)),   L = max(-A s, -A clip(s, 1 - clip_low, 1 + clip_high))

    GSPO, arXiv:2507.18071 (5) to (7): rewards are of completions, and so is the ratio; its geometric mean stays
    near 1, hence bounds of some 1e-4. Written as GSPO-token (13), s stop-gradient(1 / p) p: the same value and,
    summed over the completion with `seq-mean-token-mean`, the same gradient, without one through the sums.

    Args:    tokens: as there; clip_low: in (0, 1); clip_high: above 0.
    Returns: `Losses`; there is no second bound.
    """
    log_ratios = tokens.logprobs - tokens.old_logprobs
    of_sequence = jax.lax.stop_gradient(sequence_means(log_ratios, tokens.mask, tokens.segment_ids))
    through = tokens.logprobs - jax.lax.stop_gradient(tokens.logprobs)
    log_s = through + of_sequence
    ratio = jnp.exp(jnp.where(log_s > GSPO_LOG_RATIO_BOUND, GSPO_LOG_RATIO_BOUND, log_s))
    loss, clipped = _pessimistic(ratio, tokens.advantages, clip_low, clip_high)
    return loss, clipped, jnp.zeros_like(loss)


def cispo_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, *, clip_low: float, clip_high: float
) -> Losses:
    """The policy gradient of each token, weighted with its clipped ratio.

        L = -stop_gradient(clip(r, 1 - clip_low, 1 + clip_high)) A log p

    CISPO, arXiv:2506.13585: a bound on the weight, not on the gradient, so that rare tokens go on learning.

    Args:    as `clipped_surrogate`.
    Returns: `Losses`; clipped says where the ratio is out of bounds, of either sign of A.
    """
    ratio = jax.lax.stop_gradient(jnp.exp(log_ratio(logprobs, old_logprobs)))
    weight = jnp.clip(ratio, 1 - clip_low, 1 + clip_high)
    loss = -weight * advantages * logprobs
    return loss, (weight != ratio).astype(jnp.float32), jnp.zeros_like(loss)


def geo_mean_surrogate(tokens: PolicyTokens, *, clip_low: float, clip_high: float) -> Losses:
    """The policy loss with the geometric mean of a completion's clipped ratios, on each of its tokens.

        L = -A exp(mean_t x),   x = log(p / p_old), at most clip_high where A > 0, at least -clip_low where A < 0

    GMPO, arXiv:2507.20673: outliers among the ratios weigh less than in a mean. The bounds are those of
    log-ratios, not of ratios.

    Args:    tokens: as there; clip_low: in (0, 1); clip_high: above 0.
    Returns: `Losses`; as in verl, clipped says where a log-ratio is out of bounds and A > 0, the last one where
             A < 0. Of these only clip_high for A > 0 and clip_low for A < 0 change the loss.
    """
    x, advantages = tokens.logprobs - tokens.old_logprobs, tokens.advantages
    bounded = jnp.where((advantages > 0) & (x > clip_high), clip_high, x)
    bounded = jnp.where((advantages < 0) & (x < -clip_low), -clip_low, bounded)
    means = sequence_means(bounded, tokens.mask, tokens.segment_ids)
    advantage = sequence_means(advantages, tokens.mask, tokens.segment_ids)
    loss = -advantage * jnp.exp(means)
    is_outside = (x > clip_high) | (x < -clip_low)
    clipped = (is_outside & (advantages > 0)).astype(jnp.float32)
    return loss, clipped, (is_outside & (advantages < 0)).astype(jnp.float32)


def sapo_loss(
    logprobs: jax.Array,
    old_logprobs: jax.Array,
    advantages: jax.Array,
    *,
    tau_positive: float,
    tau_negative: float,
) -> Losses:
    """The policy loss with a soft gate in place of clipping.

        L = -A (4 / tau) sigmoid(tau (r - 1)),   tau = tau_positive where A > 0, else tau_negative

    SAPO, arXiv:2511.20347. At r = 1 the gate's slope is 1, the policy gradient's; it falls smoothly on
    both sides, faster with a larger tau.

    Args:    logprobs, old_logprobs, advantages: [R, T] float32; both tau above 0.
    Returns: `Losses`; nothing is clipped.
    """
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs))
    tau = jnp.where(advantages > 0, tau_positive, tau_negative)
    loss = -advantages * jax.nn.sigmoid(tau * (ratio - 1)) * (4 / tau)
    return loss, jnp.zeros_like(loss), jnp.zeros_like(loss)


def policy_gradient_loss(logprobs: jax.Array, advantages: jax.Array) -> Losses:
    """L = -A log p: REINFORCE, Williams 1992, doi.org/10.1007/BF00992696. Right for the policy that sampled only.

    Args:    logprobs, advantages: [R, T] float32.
    Returns: `Losses`; nothing is clipped.
    """
    loss = -advantages * logprobs
    return loss, jnp.zeros_like(loss), jnp.zeros_like(loss)


def _clip(x: PolicyTokens, a: AlgorithmSection) -> Losses:
    bounds = dict(clip_low=a.clip_low, clip_high=a.clip_high, dual_clip=a.dual_clip)
    return clipped_surrogate(x.logprobs, x.old_logprobs, x.advantages, **bounds)


def _cispo(x: PolicyTokens, a: AlgorithmSection) -> Losses:
    bounds = dict(clip_low=a.clip_low, clip_high=a.clip_high)
    return cispo_loss(x.logprobs, x.old_logprobs, x.advantages, **bounds)


def _sapo(x: PolicyTokens, a: AlgorithmSection) -> Losses:
    taus = dict(tau_positive=a.sapo_tau_positive, tau_negative=a.sapo_tau_negative)
    return sapo_loss(x.logprobs, x.old_logprobs, x.advantages, **taus)


POLICY_LOSSES: dict[str, Callable[[PolicyTokens, AlgorithmSection], Losses]] = {
    "clip": _clip,
    "gspo": lambda x, a: gspo_surrogate(x, clip_low=a.clip_low, clip_high=a.clip_high),
    "cispo": _cispo,
    "geo_mean": lambda x, a: geo_mean_surrogate(x, clip_low=a.clip_low, clip_high=a.clip_high),
    "sapo": _sapo,
    "policy_gradient": lambda x, a: policy_gradient_loss(x.logprobs, x.advantages),
}
"""`algorithm.policy_loss` -> function."""
