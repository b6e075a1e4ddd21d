"""Loss scaling for float16: gradients of the loss times a number, which keeps them in float16's range.

The smallest float16 is 6e-8 and the largest 65,504. The loss of a token weighs one over the tokens of a batch, so
that most of its gradients would be 0. The number begins at `optim.loss_scale`. It is halved when a gradient
overflows, and that update is skipped; it is doubled after `optim.loss_scale_growth` updates without. Micikevicius
et al., Mixed Precision Training, arXiv:1710.03740, section 3.2; float16 for RL: Qi et al., arXiv:2510.26788.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from grpo_jax.config import OptimSection
from grpo_jax.model.sharding import place, replicated
from grpo_jax.types import LossScale

LARGEST, SMALLEST = 2.0**24, 1.0


@dataclasses.dataclass(frozen=True)
class LossScaling:
    """How the scale begins and moves."""

    first: float
    growth: int
    """Updates without overflow until it is doubled; 0: it never changes."""

    def init(self, mesh: Any) -> LossScale:
        """The scale at step 0, on every device."""
        return place(LossScale(np.float32(self.first), np.int32(0)), replicated(mesh))  # type: ignore[arg-type]

    def abstract(self) -> LossScale:
        """Shapes and dtypes of `init`."""
        of: Any = lambda dtype: jax.ShapeDtypeStruct((), dtype)
        return LossScale(of(np.float32), of(np.int32))

    def explains(self, now: LossScale) -> jax.Array:
        """Whether gradients that are not finite may be the scale's doing, bool: it can still be lowered."""
        return (now.scale > SMALLEST) & (self.growth > 0)

    def next(self, now: LossScale, is_finite: jax.Array) -> LossScale:
        """The scale of the next update."""
        if not self.growth:
            return now
        updates = now.good_updates + 1
        is_due = updates >= self.growth
        grown = jnp.where(is_due, jnp.minimum(2 * now.scale, LARGEST), now.scale)
        scale = jnp.where(is_finite, grown, jnp.maximum(now.scale / 2, SMALLEST))
        return LossScale(scale, jnp.where(is_finite & ~is_due, updates, 0))


def make_loss_scaling(section: OptimSection, dtype: Any) -> LossScaling | None:
    """None where the computation's dtype has the range of float32."""
    if jnp.dtype(dtype) != jnp.float16:
        return None
    return LossScaling(section.loss_scale, section.loss_scale_growth)
