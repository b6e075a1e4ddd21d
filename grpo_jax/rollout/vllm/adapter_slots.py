"""Where vLLM keeps adapters, filled all at once: the worker's part of `lora.push="adapter"`."""

import dataclasses
from typing import Any

import torch
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.peft_helper import PEFTHelper

from grpo_jax.rollout.vllm.worker import Copy, CopyRecorder, LoadPlan, place_copies
from grpo_jax.weight_sync.wire import Layout, WeightSyncError


class AdapterSlots:
    """The versions of an adapter that a worker keeps, and vLLM's slots for them.

    vLLM reads an adapter from a folder, and has each of its layers fill the slot tensor by tensor: for a model of
    28 blocks a thousand operations on the device, which take longer to launch than to run. Here a version is one
    flat tensor, as it has arrived, and what the layers copy into a slot is recorded once, as it is for a model.
    vLLM counts on which version is in which slot, and finds this one layer in the place of all.
    """

    NAME = "grpo_jax"
    """Of the one layer."""

    def __init__(self, lora_manager: Any, layout: Layout, rank: int, alpha: float):
        """Takes the place of vLLM's layers. Args: lora_manager: the worker's; rank, alpha: of `lora`."""
        self._layout, self._rank, self._scale = layout, rank, alpha / rank
        self._dtype = getattr(torch, layout.dtype)
        self._plans: dict[int, tuple[list[Copy], list[torch.Tensor]]] = {}
        """Slot -> what `_record` returned for it."""
        self._kept: dict[int, torch.Tensor] = {}
        self._manager = lora_manager._adapter_manager
        self._layers, self._manager.modules = self._manager.modules, {self.NAME: self}
        lora_manager._load_adapter = self._load

    def keep(self, number: int, adapter: torch.Tensor, num_kept: int) -> None:
        """Keeps a version beside the last others, before vLLM is asked to add it. Args: adapter: [n], its own."""
        self._kept[number] = adapter
        for old in sorted(self._kept)[:-num_kept]:
            del self._kept[old]

    def _load(self, request: Any) -> LoRAModel:
        """In the place of vLLM's function that reads a folder."""
        adapter = self._kept[request.lora_int_id]
        # With a scale of 1: any other, vLLM would multiply into what is kept.
        layer = LoRALayerWeights(self.NAME, self._rank, self._rank, adapter, adapter)
        return LoRAModel(request.lora_int_id, self._rank, {self.NAME: layer})

    def set_lora(self, index: int, lora_a: torch.Tensor, lora_b: torch.Tensor) -> None:
        """Fills a slot, as vLLM's layers do. Args: lora_a, lora_b: [n], the same version."""
        if index not in self._plans:
            self._plans[index] = self._record(index)
        copies, scaled = self._plans[index]
        views = [lora_a.as_strided(copy.size, copy.stride, copy.offset) for copy in copies]
        torch._foreach_copy_([copy.target for copy in copies], views)
        torch._foreach_mul_(scaled, self._scale)

    def _record(self, index: int) -> tuple[list[Copy], list[torch.Tensor]]:
        """Has vLLM's layers fill a slot from tensors without data: they set it to 0, once and for all.

        Returns: (the copies out of a version into the slot, their targets that are scaled).

        Raises: WeightSyncError: vLLM has no layer for one of the tensors.
        """
        shapes = self._layout.tensors
        sources = {
            name: torch.empty(shape, dtype=self._dtype, device="meta") for name, shape in shapes.items()
        }
        unscaled = PEFTHelper(r=self._rank, lora_alpha=self._rank, target_modules=[])
        lora = LoRAModel.from_lora_tensors(1, sources, unscaled, device="meta")
        self._manager._create_merged_loras_inplace(lora)
        with CopyRecorder(sources) as recorder:
            for name, layer in self._layers.items():
                if weights := lora.get_lora(name):
                    layer.set_lora(index, weights.lora_a, weights.lora_b)
                else:
                    layer.reset_lora(index)
        if missing := [name for name, copies in recorder.plan.items() if not copies]:
            raise WeightSyncError(f"the engine has no place for {missing[0]} of the adapter")
        scaled = [copy.target for name in shapes if ".lora_B." in name for copy in recorder.plan[name]]
        return self._place(recorder.plan), scaled

    def _place(self, plan: LoadPlan) -> list[Copy]:
        """Returns the copies out of a version, in which the buckets lie one after the other."""
        placed, start = [], 0
        for pieces, num_bytes in zip(self._layout.buckets, self._layout.sizes, strict=True):
            for piece in pieces:
                piece = dataclasses.replace(piece, offset=start + piece.offset)
                shape = self._layout.tensors[piece.name]
                placed += place_copies(plan, piece, shape, self._dtype.itemsize)
            start += num_bytes
        return placed
