"""What a push carries: the whole model, or once the model that adapters belong to and then the adapters alone."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
from jax.sharding import Mesh

from grpo_jax.config import RolloutSection
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.lora import split
from grpo_jax.model.peft import adapter_specs
from grpo_jax.model.tensors import tensor_specs
from grpo_jax.rollout.vllm.adapters import Adapters
from grpo_jax.rollout.vllm.options import num_adapters
from grpo_jax.types import Params
from grpo_jax.weight_sync.buckets import Bucket, PushPlan, make_push_plan, pack_buckets


@dataclasses.dataclass(frozen=True)
class Cargo:
    """One kind of push."""

    method: str
    """Of `EngineActor`: what takes it."""
    plan: PushPlan
    part: Callable[[Params], Params]
    """The policy's parameters -> those that travel."""
    adapters: Adapters | None = None
    """What the tensors are; None: those of the model."""

    def pack(self, params: Params, mesh: Mesh) -> Iterator[tuple[Bucket, jax.Array, jax.Array]]:
        """As `pack_buckets`. Args: params: all of the policy's."""
        return pack_buckets(self.part(params), self.plan, mesh)


def make_cargos(
    section: RolloutSection, config: ModelConfig, push: str, num_parts: int = 1
) -> tuple[Cargo | None, Cargo]:
    """What an engine gets before its first push, if anything, and with each push.

    Args:
        push: "merged" or "adapter", as `lora.push`; without adapters both carry the model.
        num_parts: see `weight_sync.num_parts`.
    """
    plan = functools.partial(make_push_plan, config, section.bucket_mb * 2**20, num_parts=num_parts)
    if push != "adapter" or config.lora is None:
        return None, Cargo("push", plan(), lambda params: params)
    lora = config.lora
    about = Adapters(lora.rank, lora.scale * lora.rank, num_adapters(section))
    base = Cargo("push_base", plan(tensor_specs(config)), lambda params: split(params)[0])
    return base, Cargo("push_adapter", plan(adapter_specs(config)), lambda params: split(params)[1], about)
