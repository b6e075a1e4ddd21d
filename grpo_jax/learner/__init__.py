"""What a step computes on the trainer's devices: scores, advantages, updates, the reference. No files, no clocks.

The factory of the optimizer stands here: the one place that asks whether `optim.offload` is set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh, Mesh

    from grpo_jax.config import OptimSection
    from grpo_jax.learner.optimizer import Optimizer
    from grpo_jax.model.config import ModelConfig


def optimizer_class(section: OptimSection) -> type[Optimizer]:
    """The class of the configured optimizer, for what can be known of it without a device."""
    from grpo_jax.learner.offload import HostOptimizer
    from grpo_jax.learner.optimizer import DeviceOptimizer

    return HostOptimizer if section.offload else DeviceOptimizer


def make_optimizer(
    section: OptimSection, model: ModelConfig, mesh: Mesh | AbstractMesh, num_updates: int
) -> Optimizer:
    """The configured optimizer. Args: num_updates: of the whole run, for the schedule of the learning rate."""
    from grpo_jax.learner.loss_scale import make_loss_scaling
    from grpo_jax.learner.optimizer import make_adamw, make_schedule

    schedule, scaling = make_schedule(section, num_updates), make_loss_scaling(section, model.dtype)
    return optimizer_class(section)(make_adamw(section, schedule), schedule, model, mesh, scaling)
