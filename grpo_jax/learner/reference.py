"""The reference model and the coefficient of the KL: what of them may change from step to step.

Both are part of a checkpoint where they do change, so that a run goes on with the very same bits.
"""

from typing import Any

import jax

from grpo_jax.algorithm.kl import adapted_kl_coef
from grpo_jax.config import AlgorithmSection
from grpo_jax.learner.offload import to_host
from grpo_jax.learner.update import copy_params
from grpo_jax.types import Params


def make_reference_params(params: Params, section: AlgorithmSection, dtype: Any, shardings: Any) -> Params:
    """The policy as it is now, in `dtype`, where references are kept. Args: shardings: on devices."""
    return to_host(params, shardings, dtype) if section.ref_offload else copy_params(params, dtype)


class Reference:
    """Holds the reference parameters, and `kl_coef` as it is now."""

    def __init__(
        self, params: Params, section: AlgorithmSection, dtype: Any, shardings: Any, *, kl_coef: float
    ):
        """Args: params: None without a KL term; dtype: of refreshed parameters; shardings: of parameters on
        devices; kl_coef: the present one."""
        self.params, self.kl_coef = params, kl_coef
        self._section, self._dtype, self._shardings = section, dtype, shardings

    def on_device(self) -> Params:
        """The parameters to score with, brought over where they are kept on the host."""
        return jax.device_put(self.params, self._shardings) if self._section.ref_offload else self.params

    @property
    def is_refreshed(self) -> bool:
        """Whether the parameters change, and have to be saved therefore."""
        return self._section.ref_refresh_every > 0

    @property
    def is_adaptive(self) -> bool:
        return self._section.kl_target > 0

    def adapt(self, kl: float, num_completions: int) -> None:
        """Changes the coefficient of the next step.

        Args: kl: nats a token, of this step.
        """
        section = self._section
        if self.is_adaptive:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                kl,
                target=section.kl_target,
                horizon=section.kl_horizon,
                num_completions=num_completions,
            )

    def refresh(self, params: Params, steps_done: int) -> bool:
        """Makes the policy the reference where that is due after so many steps; returns whether it did."""
        if not self.is_refreshed or steps_done % self._section.ref_refresh_every:
            return False
        self.params = None  # before the new ones come
        self.params = make_reference_params(params, self._section, self._dtype, self._shardings)
        return True
