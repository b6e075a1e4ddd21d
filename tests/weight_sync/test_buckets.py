"""The trainer's end of a push: what lies in the buckets is what transformers has, bit for bit."""

import dataclasses
import itertools
import math

import jax
import numpy as np
import pytest
from weight_sync_helpers import (
    FAMILIES,
    LAYER_BLOCKS,
    NUM_LAYERS,
    NUMPY_DTYPES,
    VOCAB,
    checksums_by_hand,
    mesh_of,
    raw,
    unpack,
)

from grpo_jax.config import LoraSection, RolloutSection
from grpo_jax.model.hf import stored_tensors
from grpo_jax.model.lora import abstract_trained, join
from grpo_jax.model.peft import PREFIX, adapter_specs, with_adapters
from grpo_jax.rollout.vllm.cargo import make_cargos
from grpo_jax.weight_sync import buckets
from grpo_jax.weight_sync.buckets import make_push_plan, pack_buckets, packing_programs, senders
from grpo_jax.weight_sync.wire import BLOCK_BYTES, piece_checksums

ROW_BYTES = 32 * 4  # of the embedding, float32
LONE = 5000  # below the 8,192 bytes of gate, up and down: those travel alone
SPLIT = 6 * BLOCK_BYTES  # less than the 15 blocks of a Qwen2 layer
SEVERAL = 3 * LAYER_BLOCKS * BLOCK_BYTES  # three of five layers, then two
ALL = 2**20  # MiB: all layers in one bucket


# One device, against transformers


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_buckets_hold_what_transformers_has(models, family, dtype):
    model = models(family)
    plan, flats, _ = model.push(SPLIT, dtype)
    assert plan.layout.dtype == dtype
    assert unpack(plan.layout, flats) == model.expected(dtype)


@pytest.mark.parametrize("bucket_bytes", [LONE, SEVERAL, ALL])
def test_whatever_the_size_of_the_buckets(models, bucket_bytes):
    model = models("qwen2-untied")
    plan, flats, _ = model.push(bucket_bytes)
    assert unpack(plan.layout, flats) == model.expected("float32")


def test_bfloat16_rows_and_several_layers(models):
    """Two-byte elements: other sizes, other paddings, two elements in each word of the checksums."""
    model = models("qwen3")
    plan, flats, blocks = model.push(SEVERAL // 2, "bfloat16")
    assert max(len(pieces) for pieces in plan.layout.buckets) > LAYER_BLOCKS
    assert unpack(plan.layout, flats) == model.expected("bfloat16")
    for flat, sums, pieces in zip(flats, blocks, plan.layout.buckets, strict=True):
        assert piece_checksums(np.asarray(sums), pieces) == checksums_by_hand(raw(flat), pieces)


# Adapters


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_adapters_arrive_within_their_kernels(models, dtype, sizes):
    """The sum in float32 by NumPy, rounded once; checksums are of what arrives. Two orders of summing 4 products:
    1e-6 of the largest, or the next number of bfloat16."""
    model, mesh = models("qwen2-untied"), mesh_of(*sizes)
    plain = dataclasses.replace(model.config, dtype=NUMPY_DTYPES[dtype])
    config = with_adapters(plain, LoraSection(rank=4, alpha=6.0))
    frozen = jax.tree.map(lambda x: x.astype(config.dtype), model.params(*sizes))
    draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapters = jax.tree.map(draw, abstract_trained(config))
    plan = make_push_plan(config, SEVERAL)
    assert plan.layout == make_push_plan(plain, SEVERAL).layout
    packed = list(pack_buckets(join(frozen, adapters), plan, mesh))
    got = unpack(plan.layout, [flat for _, flat, _ in packed])
    for bucket, flat, sums in packed:
        assert piece_checksums(np.asarray(sums), bucket.pieces) == checksums_by_hand(raw(flat), bucket.pieces)
    before = model.expected(dtype)
    matrices = stored_tensors(adapters, adapter_specs(config), config, np.dtype(np.float32))
    array = lambda held: np.frombuffer(held[1], NUMPY_DTYPES[dtype]).reshape(held[0]).astype(np.float32)
    for name, held in got.items():
        a = matrices.get(f"{PREFIX}{name.removesuffix('.weight')}.lora_A.weight")
        if a is None:
            assert held == before[name]
            continue
        b = matrices[f"{PREFIX}{name.removesuffix('.weight')}.lora_B.weight"]
        expected = (array(before[name]) + 1.5 * (b @ a)).astype(NUMPY_DTYPES[dtype]).astype(np.float32)
        tolerance = dict(float32=dict(atol=2e-6, rtol=0), bfloat16=dict(rtol=2.0**-7, atol=0))[dtype]
        np.testing.assert_allclose(array(held), expected, **tolerance)
        assert dtype == "float32" or np.mean(array(held) != expected) < 0.01


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_adapters_travel_alone_as_a_folder_would_hold_them(models, sizes):
    model, mesh = models("qwen2-untied"), mesh_of(*sizes)
    section = LoraSection(rank=4, alpha=6.0, push="adapter")
    config = with_adapters(model.config, section)
    draw = lambda x: 0.3 * jax.random.normal(jax.random.key(x.size), x.shape)
    adapters = jax.tree.map(draw, abstract_trained(config))
    before, cargo = make_cargos(RolloutSection(bucket_mb=1, max_lag=1), config, section.push)
    policy = join(model.params(*sizes), adapters)
    got = unpack(cargo.plan.layout, [flat for _, flat, _ in cargo.pack(policy, mesh)])
    matrices = stored_tensors(adapters, adapter_specs(config), config, np.dtype(np.float32))
    assert got == {name: (x.shape, x.tobytes()) for name, x in matrices.items()}
    assert (cargo.adapters.rank, cargo.adapters.alpha, cargo.adapters.num_kept) == (4, 6.0, 3)
    # What comes before them is the model without them.
    held = unpack(before.plan.layout, [flat for _, flat, _ in before.pack(policy, mesh)])
    assert held == model.expected("float32")


# Meshes


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1)])
def test_every_mesh_packs_the_bytes_of_one_device(models, sizes, dtype):
    model = models("qwen2-untied")
    leaf = model.params(*sizes)["layers"]["attention"]["q"]
    assert not leaf.sharding.is_fully_replicated  # otherwise this would show nothing
    (_, alone, sums_alone), (_, flats, sums) = model.push(SPLIT, dtype), model.push(SPLIT, dtype, sizes)
    for one, flat in zip(alone, flats, strict=True):
        np.testing.assert_array_equal(raw(flat), raw(one))
    for one, blocks in zip(sums_alone, sums, strict=True):
        np.testing.assert_array_equal(blocks, one)


@pytest.mark.parametrize("family", ["qwen2-tied", "qwen3", "llama"])
def test_the_other_families_on_eight_devices(models, family):
    model = models(family)
    plan, flats, _ = model.push(SEVERAL, sizes=(2, 2, 2))
    assert unpack(plan.layout, flats) == model.expected("float32")


def test_every_device_holds_every_bucket_whole(models):
    """An engine reads from the card it runs on, whichever that is."""
    _, flats, _ = models("qwen2-untied").push(SPLIT, sizes=(2, 2, 2))
    for flat in flats:
        assert {shard.device for shard in flat.addressable_shards} == set(jax.devices())
        for shard in flat.addressable_shards:
            np.testing.assert_array_equal(raw(shard.data), raw(flat))


# Parts, which devices send together


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("sizes", [(2, 1, 1), (1, 2, 2), (2, 2, 2), (1, 8, 1)], ids=str)
def test_each_device_has_its_part_of_every_bucket(models, sizes, dtype):
    model, devices = models("qwen2-untied"), senders(mesh_of(*sizes))
    count = math.prod(sizes)
    assert devices == jax.devices()[:count]
    plan, flats, blocks = model.push(SEVERAL, dtype, sizes, num_parts=count)
    assert unpack(plan.layout, flats) == model.expected(dtype)
    for flat, sums, bucket in zip(flats, blocks, plan.buckets, strict=True):
        whole = raw(flat)
        held = {shard.device: raw(shard.data) for shard in flat.addressable_shards}
        for device, part in zip(devices, np.split(whole, count), strict=True):
            np.testing.assert_array_equal(held[device], part)
        # The first process alone compares them.
        assert sums.sharding.is_fully_replicated
        assert piece_checksums(np.asarray(sums), bucket.pieces) == checksums_by_hand(whole, bucket.pieces)


def test_part_t_holds_the_t_th_run_of_the_rows_of_every_tensor(models):
    plan = make_push_plan(models("qwen2-tied").config, ALL, num_parts=4)
    [bucket] = [b for b in plan.buckets if any("layers.4." in piece.name for piece in b.pieces)]
    runs = lambda name: [(p.first_row, p.num_rows) for p in bucket.pieces if p.name == name]
    assert runs("model.layers.4.mlp.gate_proj.weight") == [(0, 12), (12, 12), (24, 12), (36, 12)]  # 48 rows
    part = bucket.num_bytes // 4
    for piece in bucket.pieces:  # in the part that its rows belong to
        assert piece.offset // part == (piece.offset + piece.num_bytes - 1) // part
    # 130 rows of the vocabulary: 33, 33, 33 and what is left.
    pieces = [p for b in plan.buckets for p in b.pieces if p.name == "model.embed_tokens.weight"]
    assert [(p.first_row, p.num_rows) for p in pieces] == [(0, 33), (33, 33), (66, 33), (99, 31)]


def test_a_tensor_of_few_rows_is_in_the_first_parts(models):
    """The key's bias has 16 elements: runs of 3 fill five of seven parts and a third of the sixth."""
    plan = make_push_plan(models("qwen2-tied").config, ALL, num_parts=7)
    name = "model.layers.0.self_attn.k_proj.bias"
    rows = plan.layout.tensors[name][0]
    pieces = [p for b in plan.buckets for p in b.pieces if p.name == name]
    most = -(-rows // 7)
    expected = [(start, min(most, rows - start)) for start in range(0, rows, most)]
    assert [(p.first_row, p.num_rows) for p in pieces] == expected
    assert plan.layout.bucket_bytes % (7 * BLOCK_BYTES) == 0


def test_devices_beyond_the_most_that_send_have_copies(models, monkeypatch):
    """Six of eight would not divide them, nor would five: four send, every other one."""
    monkeypatch.setattr(buckets, "MOST_SENDERS", 6)
    assert senders(mesh_of(2, 2, 2)) == jax.devices()[::2]
    plan, flats, _ = models("qwen3").push(SPLIT, sizes=(2, 2, 2), num_parts=4)
    assert unpack(plan.layout, flats) == models("qwen3").expected("float32")
    for flat in flats:
        held = {shard.device: raw(shard.data) for shard in flat.addressable_shards}
        for device, part in zip(jax.devices()[::2], np.split(raw(flat), 4), strict=True):
            np.testing.assert_array_equal(held[device], part)


def test_no_device_gathers_a_whole_bucket(models):
    """What is gathered is the checksums, and what the sharding of a tensor needs; joined, tensors are parts."""
    model, mesh = models("qwen2-untied"), mesh_of(1, 8, 1)
    plan = make_push_plan(model.config, SEVERAL, num_parts=8)
    for function, arguments, static in packing_programs(model.params(1, 8, 1), plan, mesh):
        flat, _ = function.lower(*arguments, **static).out_info
        compiled = function.lower(*arguments, **static).compile()
        assert compiled.output_shardings[0].shard_shape(flat.shape) == (flat.size // 8,)
        assert f"[{flat.size}]" not in compiled.as_text()


def test_buckets_are_made_one_at_a_time(models):
    """All at once they would be a second model."""
    model = models("llama")
    plan = make_push_plan(model.config, SPLIT)
    params = model.params(1, 1, 1)
    packed = pack_buckets(params, plan, mesh_of(1, 1, 1))
    next(packed)
    held = len(jax.live_arrays())
    for bucket in packed:
        assert len(jax.live_arrays()) <= held + 2  # the new bucket and its sums; the first ones are gone
        del bucket


# What travels together


def names(bucket):
    return [piece.name.removeprefix("model.layers.") for piece in bucket.pieces]


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("bucket_bytes", [1, LONE, SPLIT, SEVERAL, ALL])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_bucket_is_larger_than_asked_except_a_lone_tensor(models, family, bucket_bytes, num_parts):
    config = models(family).config
    plan = make_push_plan(config, bucket_bytes, num_parts=num_parts)
    for bucket in plan.buckets:
        ends = [(piece.offset, piece.offset + piece.num_bytes) for piece in bucket.pieces]
        assert all(start % BLOCK_BYTES == 0 for start, _ in ends)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
        assert bucket.num_bytes % (num_parts * BLOCK_BYTES) == 0
        assert ends[-1][1] <= bucket.num_bytes
        assert bucket.num_bytes <= bucket_bytes or len({piece.name for piece in bucket.pieces}) == 1
    assert plan.layout.buckets == tuple(bucket.pieces for bucket in plan.buckets)
    assert plan.layout.bucket_bytes == max(bucket.num_bytes for bucket in plan.buckets)


def test_a_tensor_larger_than_a_bucket_travels_alone(models):
    plan = make_push_plan(models("qwen2-tied").config, LONE)
    large = [bucket for bucket in plan.buckets if bucket.num_bytes > LONE]
    assert {piece.name.split(".")[-2] for b in large for piece in b.pieces} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }
    assert len(large) == 3 * NUM_LAYERS and all(len(bucket.pieces) == 1 for bucket in large)


def test_a_layer_that_fits_no_bucket_is_split_by_whole_tensors(models):
    plan = make_push_plan(models("qwen2-tied").config, SPLIT)
    layer_one = [names(bucket) for bucket in plan.buckets if names(bucket)[0].startswith("1.")]
    attention, mlp = "1.self_attn.{}", "1.mlp.{}_proj.weight"
    # Six blocks each: 3 + 3 | 1 + 2 + 2 (down, of 2, would be the seventh) | 2 + 1 + 1.
    assert layer_one == [
        [attention.format(f"{n}_proj.{kind}") for kind in ("weight", "bias") for n in "qkv"],
        [attention.format("o_proj.weight"), mlp.format("gate"), mlp.format("up")],
        [mlp.format("down"), "1.input_layernorm.weight", "1.post_attention_layernorm.weight"],
    ]


def test_several_layers_share_a_bucket_where_they_fit(models):
    plan = make_push_plan(models("qwen2-tied").config, SEVERAL)
    layers = [[name.partition(".")[0] for name in names(bucket)] for bucket in plan.buckets]
    stacked = [list(dict.fromkeys(row)) for row in layers if row[0].isdigit()]
    assert stacked == [["0", "1", "2"], ["3", "4"]]


def test_embedding_and_head_are_cut_into_rows_as_equal_as_can_be(models):
    plan = make_push_plan(models("qwen2-untied").config, LONE)
    # (5000 - 4096) // 128 = 7 rows at most, hence 19 runs for 130 rows: 18 of 7 and one of 4.
    most = (LONE - BLOCK_BYTES) // ROW_BYTES
    expected = [(7 * i, 7) for i in range(18)] + [(126, 4)]
    assert most == 7 and sum(count for _, count in expected) == VOCAB
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        pieces = [piece for b in plan.buckets for piece in b.pieces if piece.name == name]
        assert [(piece.first_row, piece.num_rows) for piece in pieces] == expected
        assert [piece.num_bytes for piece in pieces] == [count * ROW_BYTES for _, count in expected]


def test_a_tied_model_sends_no_head(models):
    sent = lambda family: set(make_push_plan(models(family).config, SPLIT).layout.tensors)
    assert sent("qwen2-untied") - sent("qwen2-tied") == {"lm_head.weight"}


# Programs


@pytest.mark.parametrize("bucket_bytes", [LONE, SPLIT, SEVERAL])
def test_more_layers_and_more_rows_need_no_more_programs(models, bucket_bytes):
    small = models("qwen2-untied").config
    # 3 x 10 + 2 layers, so that a rest of two layers is left, as of five; 10 x 126 + 4 rows, likewise.
    large = dataclasses.replace(small, num_layers=32, vocab_size=1264)
    programs = lambda config: {b.program for b in make_push_plan(config, bucket_bytes).buckets}
    few, many = programs(small), programs(large)
    assert (
        len(many) <= len(few) <= 2 * 2 + LAYER_BLOCKS - 3 + 1
    )  # heads, single tensors (3 of two blocks), norm


def test_buckets_that_share_a_program_are_compiled_once(models):
    """One layer a bucket: five buckets differ in nothing but their first layer."""
    plan = make_push_plan(models("qwen2-tied").config, LAYER_BLOCKS * BLOCK_BYTES)
    layers = [bucket for bucket in plan.buckets if names(bucket)[0][0].isdigit()]
    assert [bucket.first_layer for bucket in layers] == list(range(NUM_LAYERS))
    assert len({bucket.program for bucket in layers}) == 1


# Checksums


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)])
def test_checksums_are_those_of_the_formula(models, sizes):
    plan, flats, blocks = models("qwen2-untied").push(SPLIT, sizes=sizes)
    seen = []
    for flat, sums, pieces in zip(flats, blocks, plan.layout.buckets, strict=True):
        assert (sums.dtype, sums.shape) == (np.uint32, (flat.nbytes // BLOCK_BYTES,))
        got = piece_checksums(np.asarray(sums), pieces)
        assert got == checksums_by_hand(raw(flat), pieces)
        seen += got
    assert len(set(seen)) == len(seen)  # no two tensors of a random model have the same
