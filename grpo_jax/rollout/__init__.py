"""Rollout engines: where completions come from."""

from typing import TYPE_CHECKING, Any

from grpo_jax.config import RolloutSection
from grpo_jax.rollout.base import RolloutEngine, SamplingParams, eval_sampling, rollout_sampling

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from grpo_jax.model.transformer import ModelConfig

__all__ = ["RolloutEngine", "SamplingParams", "eval_sampling", "make_engine", "rollout_sampling"]


def make_engine(
    section: RolloutSection,
    *,
    model: "ModelConfig",
    mesh: "Mesh",
    tokenizer: Any,
    eos_token_ids: tuple[int, ...],
) -> RolloutEngine:
    """The engine that `section.engine` names; "local" is the only one of this version.

    Args:
        tokenizer: decodes completions; its own EOS stops them too.
        eos_token_ids: of the model.
    """
    from grpo_jax.rollout.local import LocalEngine

    stops = {*eos_token_ids, *section.stop_token_ids}
    stops |= {tokenizer.eos_token_id} - {None}
    return LocalEngine(model, mesh, tokenizer, tuple(sorted(stops)), section.batch_size)
