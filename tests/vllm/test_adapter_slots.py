"""Versions of an adapter in vLLM's own layers and their slots, without an engine: the second of two ranks."""

import math
from types import SimpleNamespace

import pytest
import torch

from grpo_jax.rollout.vllm.adapters import adapter_request
from grpo_jax.weight_sync.wire import BLOCK_BYTES, Layout, Piece, WeightSyncError

pytestmark = pytest.mark.vllm

RANK, ALPHA, SCALE = 4, 6.0, 1.5
MAX_RANK = 8
WIDTH, HEAD = 12, 5
Q, KV = 4 * HEAD, 2 * HEAD  # four heads, two of them for keys and values

SHAPES = {
    "split.q_proj": (WIDTH, Q),
    "split.k_proj": (WIDTH, KV),
    "split.v_proj": (WIDTH, KV),
    "fused.qkv_proj": (WIDTH, Q + 2 * KV),
    "out.o_proj": (2 * WIDTH, 7),
}
"""Layer -> (inputs, outputs) on both ranks together."""


def make_layers(num_slots):
    """vLLM's layers over all of `SHAPES`, and one without an adapter; what is in their slots means nothing."""
    from vllm.lora import layers

    ranks = dict(tp_size=2, tp_rank=1, weight=torch.zeros(1), input_size=WIDTH)
    heads = dict(head_size=HEAD, total_num_heads=4, num_heads=2, total_num_kv_heads=2, num_kv_heads=1)
    columns = SimpleNamespace(**ranks, **heads, num_kv_head_replicas=1, output_sizes=[Q, KV, KV])
    columns.output_size_per_partition = (Q + 2 * KV) // 2
    rows = SimpleNamespace(**ranks, input_size_per_partition=WIDTH, output_size=7)
    made = {
        "split.qkv_proj": (layers.MergedQKVParallelLinearWithLoRA(columns), [Q // 2, KV // 2, KV // 2]),
        "fused.qkv_proj": (layers.QKVParallelLinearWithLoRA(columns), [(Q + 2 * KV) // 2]),
        "out.o_proj": (layers.RowParallelLinearWithLoRA(rows), [7]),
        "out.idle": (layers.RowParallelLinearWithLoRA(rows), [7]),
    }
    for layer, outputs in made.values():
        layer.lora_a_stacked = tuple(torch.full((num_slots, 1, MAX_RANK, WIDTH), 7.0) for _ in outputs)
        layer.lora_b_stacked = tuple(torch.full((num_slots, 1, n, MAX_RANK), 7.0) for n in outputs)
    return {name: layer for name, (layer, _) in made.items()}


def make_lora_manager(num_slots, num_kept):
    """vLLM's bookkeeping over `make_layers`."""
    from vllm.lora.model_manager import AdapterLRUCache, LRUCacheLoRAModelManager
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

    manager = object.__new__(LRUCacheLoRAModelManager)
    manager.lora_config = SimpleNamespace(max_loras=num_slots, max_cpu_loras=num_kept)
    manager._registered_adapters = AdapterLRUCache(num_kept, manager.deactivate_adapter)
    manager._active_adapters = AdapterLRUCache(num_slots, manager._deactivate_adapter)
    manager.lora_index_to_id = [None] * num_slots
    manager.is_pooling_model = manager._is_non_gated_moe = False
    manager._enable_mixed_moe_lora_format = manager._enable_moe_shared_loras = False
    manager.packed_modules = {"split.qkv_proj": ["split.q_proj", "split.k_proj", "split.v_proj"]}
    manager.modules = make_layers(num_slots)
    lora_manager = object.__new__(LRUCacheWorkerLoRAManager)
    lora_manager._adapter_manager = manager
    return lora_manager


def make_layout():
    """Two buckets. The fused B comes as three runs of rows, as from a trainer that holds three kernels."""
    tensors, buckets, sizes = {}, [], []
    for names in (["split.q_proj", "split.k_proj", "split.v_proj"], ["fused.qkv_proj", "out.o_proj"]):
        pieces, offset = [], 0
        for name in names:
            inputs, outputs = SHAPES[name]
            for which, shape in (("A", (RANK, inputs)), ("B", (outputs, RANK))):
                long = f"base_model.model.{name}.lora_{which}.weight"
                tensors[long] = shape
                runs = [Q, KV, KV] if (name, which) == ("fused.qkv_proj", "B") else [shape[0]]
                for i, num_rows in enumerate(runs):
                    num_bytes = num_rows * shape[1] * 4
                    pieces.append(Piece(long, sum(runs[:i]), num_rows, offset, num_bytes))
                    offset += math.ceil(num_bytes / BLOCK_BYTES) * BLOCK_BYTES
        buckets.append(tuple(pieces))
        sizes.append(offset)
    return Layout("float32", tensors, tuple(buckets), tuple(sizes))


def flat_of(tensors, layout):
    """The buckets of an adapter one after the other, [n] float32."""
    flat = []
    for pieces in layout.buckets:
        for piece in pieces:
            rows = tensors[piece.name][piece.first_row : piece.first_row + piece.num_rows].reshape(-1)
            padding = -rows.numel() % (BLOCK_BYTES // 4)
            flat.append(torch.nn.functional.pad(rows, (0, padding)))
    return torch.cat(flat)


def expected_slots(tensors):
    """Layer -> its A's and its B's as this rank computes with them, the scale in B."""
    a = {name: tensors[f"base_model.model.{name}.lora_A.weight"] for name in SHAPES}
    b = {name: tensors[f"base_model.model.{name}.lora_B.weight"] * SCALE for name in SHAPES}
    split = ["split.q_proj", "split.k_proj", "split.v_proj"]
    fused = b["fused.qkv_proj"].split([Q, KV, KV])
    second = lambda x: x[len(x) // 2 :]
    return {
        "split.qkv_proj": ([a[name] for name in split], [second(b[name]) for name in split]),
        "fused.qkv_proj": ([a["fused.qkv_proj"]], [torch.cat([second(part) for part in fused])]),
        "out.o_proj": ([a["out.o_proj"][:, WIDTH:]], [b["out.o_proj"]]),
        "out.idle": ([torch.zeros(0, 0)], [torch.zeros(0, 0)]),
    }


def assert_filled(layers, index, tensors):
    """Slot `index` of every layer holds the adapter, and 0 beside it."""
    for name, (a, b) in expected_slots(tensors).items():
        stacked = *layers[name].lora_a_stacked, *layers[name].lora_b_stacked
        for slot, x in zip(stacked, [*a, *b], strict=True):
            whole = torch.zeros_like(slot[index, 0])
            whole[: x.shape[0], : x.shape[1]] = x
            assert torch.equal(slot[index, 0], whole), name


@pytest.fixture
def versions():
    """Number -> tensors of an adapter."""
    generator = torch.Generator().manual_seed(0)
    shapes = make_layout().tensors
    draw = lambda: {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {number: draw() for number in (1, 2, 3)}


def test_one_slot_takes_each_version_with_one_scale(versions):
    """A version that comes back to the slot is scaled once; one that vLLM has dropped is there to be loaded."""
    from grpo_jax.rollout.vllm.adapter_slots import AdapterSlots

    lora_manager, layout = make_lora_manager(num_slots=1, num_kept=2), make_layout()
    layers = lora_manager._adapter_manager.modules
    slots = AdapterSlots(lora_manager, layout, RANK, ALPHA)
    for number in (1, 2):
        slots.keep(number, flat_of(versions[number], layout), num_kept=2)
        lora_manager.add_adapter(adapter_request(number))
        assert_filled(layers, 0, versions[number])
    for number in (1, 2, 1):
        lora_manager.add_adapter(adapter_request(number))
        assert_filled(layers, 0, versions[number])
    slots.keep(3, flat_of(versions[3], layout), num_kept=2)
    lora_manager.add_adapter(adapter_request(3))
    assert lora_manager.list_adapters() == {1, 3}  # the last ones that were asked for
    lora_manager.add_adapter(adapter_request(2))  # the last ones that were sent are 2 and 3
    assert_filled(layers, 0, versions[2])


def test_versions_lie_side_by_side(versions):
    from grpo_jax.rollout.vllm.adapter_slots import AdapterSlots

    lora_manager, layout = make_lora_manager(num_slots=2, num_kept=2), make_layout()
    layers = lora_manager._adapter_manager.modules
    slots = AdapterSlots(lora_manager, layout, RANK, ALPHA)
    for number in (1, 2, 3):
        slots.keep(number, flat_of(versions[number], layout), num_kept=2)
        lora_manager.add_adapter(adapter_request(number))
    assert_filled(layers, 0, versions[3])
    assert_filled(layers, 1, versions[2])


def test_a_tensor_without_a_layer_is_named():
    from grpo_jax.rollout.vllm.adapter_slots import AdapterSlots

    lora_manager, layout = make_lora_manager(num_slots=1, num_kept=1), make_layout()
    del lora_manager._adapter_manager.modules["out.o_proj"]
    slots = AdapterSlots(lora_manager, layout, RANK, ALPHA)
    slots.keep(1, torch.zeros(sum(len(pieces) for pieces in layout.buckets) * BLOCK_BYTES), num_kept=1)
    with pytest.raises(WeightSyncError, match=r"no place for base_model\.model\.out\.o_proj\.lora_A\.weight"):
        lora_manager.add_adapter(adapter_request(1))
