"""Experts on a CPU, with weights that stay as they are loaded.

vLLM's kernel for CPUs keeps them in a layout of its own, made once when the model is loaded: a push would go into
it row by row, and checksums would not notice. Engines on CPUs are for tests, so their experts are plain products.
"""

from typing import Any

import torch
from torch.nn import functional
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts


def keep_experts_as_loaded() -> None:
    """Takes the place of vLLM's kernel. Called before a model is made."""
    CPUUnquantizedExperts.process_weights_after_loading = lambda self, layer: None
    CPUUnquantizedExperts.apply = _apply


def _apply(
    self: Any,
    output: torch.Tensor,
    hidden_states: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *rest: Any,
    **others: Any,
) -> None:
    """The signature of vLLM's method, of which SwiGLU experts need the beginning.

    Args:
        output, hidden_states: [T, D].
        w1: [E, 2 F, D], gate and up; w2: [E, D, F].
        topk_weights, topk_ids: [T, K], what the router chose.
    """
    output.zero_()
    for expert in range(len(w1)):
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
        result = functional.linear(functional.silu(gate) * up, w2[expert])
        output.index_add_(0, tokens, (result * topk_weights[tokens, places, None]).to(output.dtype))
