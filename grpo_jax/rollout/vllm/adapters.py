"""Adapters as vLLM knows them: a request of vLLM's names one by its number. Runs in the engine's environment."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Adapters:
    """Of a run whose engines get adapters and not the model's weights."""

    rank: int
    alpha: float
    num_kept: int
    """How many versions an engine holds."""


def adapter_number(version: int) -> int:
    """vLLM's number of the adapter of a version of the weights; versions begin at 0, numbers at 1."""
    return version + 1


def adapter_request(number: int) -> Any:
    """What tells vLLM to use an adapter. It wants a path; nothing is read from there."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(f"policy-{number}", number, "in memory")
