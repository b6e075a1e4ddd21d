"""The reference model and the coefficient of the KL, both of which may change from step to step.

Where they do, they are part of a checkpoint, so that a run goes on with the very same bits. Parameters that are
frozen anyway are the policy's own: with LoRA, the reference is adapters of another time, at first some that add
nothing.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from grpo_jax.algorithm.kl import adapted_kl_coef
from grpo_jax.config import AlgorithmSection
from grpo_jax.learner.offload import on_host, to_host
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import abstract_trained, trained_shardings
from grpo_jax.model.sharding import abstract_like
from grpo_jax.types import Params


class Reference:
    """The frozen parameters that the KL is measured from, in the dtype of the computation, and its coefficient."""

    def __init__(self, section: AlgorithmSection, model: ModelConfig, mesh: Mesh):
        self.kl_coef = section.kl_coef
        self.params: Params = None
        """Those that are trained; None without a KL term."""
        self._section, self._model = section, model
        self._shardings = trained_shardings(model, mesh)

    @property
    def is_refreshed(self) -> bool:
        """Whether the parameters change during the run and have to be saved."""
        return self._section.ref_refresh_every > 0

    @property
    def is_adaptive(self) -> bool:
        """Whether the coefficient changes during the run."""
        return self._section.kl_target > 0

    def copy_from(self, policy: Params) -> None:
        """Makes a copy of the policy's trained parameters the reference."""
        self.params = None  # frees the old ones before the new ones are made
        if self._section.ref_offload:
            self.params = to_host(policy, self._shardings, self._model.dtype)
        else:
            cast = lambda x: jnp.array(x, self._model.dtype, copy=True)
            copy = lambda params: jax.tree.map(cast, params)
            self.params = jax.jit(copy, out_shardings=self._shardings)(policy)

    def abstract(self) -> Params:
        """Shape, dtype and sharding of the parameters as they are kept."""
        cast = lambda x: jax.ShapeDtypeStruct(x.shape, self._model.dtype)
        shapes = jax.tree.map(cast, abstract_trained(self._model))
        shardings = on_host(self._shardings) if self._section.ref_offload else self._shardings
        return abstract_like(shapes, shardings)

    def on_device(self) -> Params:
        """The parameters to score with, copied to the devices where they are kept on the host."""
        return jax.device_put(self.params, self._shardings) if self._section.ref_offload else self.params

    def adapt(self, kl: float, num_completions: int) -> None:
        """Changes the coefficient, which must be adaptive, for the next step.

        Args: kl: nats a token, of this step; num_completions: of this step.
        """
        target, horizon = self._section.kl_target, self._section.kl_horizon
        self.kl_coef = adapted_kl_coef(
            self.kl_coef, kl, target=target, horizon=horizon, num_completions=num_completions
        )

    def refresh(self, policy: Params, steps_done: int) -> bool:
        """Makes the policy the reference where that is due after so many steps; returns whether it was.

        The reference must be one that is refreshed.
        """
        if steps_done % self._section.ref_refresh_every:
            return False
        self.copy_from(policy)
        return True
