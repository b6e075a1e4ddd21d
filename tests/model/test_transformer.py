"""Properties of the decoder; its values are compared with transformers in test_hf.py."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from tiny_models import tiny_config

from grpo_jax.config import MeshSection
from grpo_jax.model.attention import causal_segment_mask
from grpo_jax.model.rope import RopeScaling, apply_rope, rope_frequencies
from grpo_jax.model.sharding import batch_sharding, make_mesh, partition_spec
from grpo_jax.model.transformer import (
    abstract_params,
    bucket_length,
    forward,
    forward_cached,
    head_matrix,
    init_cache,
    init_params,
    look_up,
    num_params,
)

CONFIG = tiny_config(vocab_size=40, head_dim=6, rope_theta=100.0)


def make_params(config=CONFIG):
    """Every parameter random, biases and norms too, and large enough for attention to choose."""
    shapes, _ = abstract_params(config)
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        return jnp.asarray(1 + 0.3 * noise if "scale" in jax.tree_util.keystr(path) else 0.4 * noise)

    return jax.tree_util.tree_map_with_path(fill, shapes)


PARAMS = make_params()


def run(tokens, positions=None, segment_ids=None, *, config=CONFIG, params=PARAMS):
    tokens = np.asarray(tokens, np.int32)
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    if segment_ids is None:
        segment_ids = np.ones(tokens.shape, np.int32)
    arguments = [jnp.asarray(x, jnp.int32) for x in (tokens, positions, segment_ids)]
    return np.asarray(jax.jit(forward, static_argnums=1)(params, config, *arguments))


def close(got, expected):
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


# What a token may depend on


def test_a_state_depends_on_its_token_and_those_before_it_alone():
    """Through gradients: token t has row t of the embedding to itself, so a row's gradient is its influence."""
    length = 8
    tokens, ones = jnp.arange(length)[None], jnp.ones((1, length), jnp.int32)

    def states(embedding):
        return forward(PARAMS | {"embedding": embedding}, CONFIG, tokens, tokens, ones)[0].sum(axis=1)

    influence = np.abs(jax.jit(jax.jacrev(states))(PARAMS["embedding"])[:, :length]).sum(
        axis=2
    )  # [state, token]
    np.testing.assert_array_equal(influence > 0, np.tril(np.ones((length, length), bool)))


def test_a_changed_token_changes_no_state_before_it():
    tokens = np.arange(24).reshape(2, 12)
    changed = tokens.copy()
    changed[0, 7] = 39
    difference = np.abs(run(tokens) - run(changed)).max(axis=2)
    assert (difference[0, 7:] > 1e-3).all()
    assert not difference[0, :7].any() and not difference[1].any()


def test_mask_by_hand():
    mask = causal_segment_mask(jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]]))
    expected = np.zeros((2, 1, 4, 4), bool)
    for b, query, key in [(0, 0, 0), (0, 1, 0), (0, 1, 1), (0, 2, 2), (1, 0, 0)]:
        expected[b, 0, query, key] = True
    np.testing.assert_array_equal(mask, expected)


def test_packed_sequences_equal_unpacked_ones():
    first, second, third = [3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]
    packed = run(
        [first + second + third + [0, 0]],
        [[*range(5), *range(3), *range(4), 0, 0]],
        [[1] * 5 + [2] * 3 + [3] * 4 + [0, 0]],
    )[0]
    for start, sequence in ((0, first), (5, second), (8, third)):
        close(packed[start : start + len(sequence)], run([sequence])[0])


def test_padding_cannot_influence_real_tokens():
    sequence = [7, 3, 9, 9, 1, 20]
    alone = run([sequence])[0]
    for filler, width in ((0, 8), (39, 8), (5, 13)):
        rows = [sequence + [filler] * (width - 6), [filler] * width]
        segment_ids = [[1] * 6 + [0] * (width - 6), [0] * width]  # the second row is padding only
        positions = np.where(np.array(segment_ids) > 0, np.arange(width), 0)
        hidden = run(rows, positions, segment_ids)
        close(hidden[0, :6], alone)
        assert np.isfinite(hidden).all()  # a NaN would poison gradients even where the loss is masked


def test_positions_are_relative():
    """RoPE: only differences of positions count."""
    tokens = [[3, 1, 4, 1, 5, 9]]
    close(run(tokens, [np.arange(6) + 11]), run(tokens))
    assert np.abs(run(tokens, [2 * np.arange(6)]) - run(tokens)).max() > 1e-2


# Layers


def test_scanned_layers_equal_unrolled_ones():
    tokens = np.arange(20).reshape(2, 10)
    close(run(tokens, config=dataclasses.replace(CONFIG, scan_layers=False)), run(tokens))


def gradients_and_residual_bytes(config):
    """Gradients of some loss, and how many bytes the forward pass keeps for the backward pass."""
    tokens = jnp.arange(32).reshape(2, 16)
    positions = jnp.broadcast_to(jnp.arange(16)[None], (2, 16))
    weights = jnp.sin(jnp.arange(2.0 * 16 * 16)).reshape(2, 16, 16)

    def loss(params):
        return jnp.sum(forward(params, config, tokens, positions, jnp.ones_like(tokens)) * weights)

    pullback = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], PARAMS)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))
    return jax.jit(jax.grad(loss))(PARAMS), kept


def test_rematerialization_keeps_gradients_and_saves_memory():
    gradients, none = gradients_and_residual_bytes(CONFIG)
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 1
    kept = [none]
    for remat in ("dots", "full"):
        other, bytes_kept = gradients_and_residual_bytes(dataclasses.replace(CONFIG, remat=remat))
        # Sums in another order: float32 rounding of gradients of some 10 after 3 layers.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), gradients, other)
        kept.append(bytes_kept)
    none, dots, full = kept
    assert none > dots > full


@pytest.mark.parametrize(("qkv_bias", "qk_norm", "tied"), [(True, False, True), (False, True, False)])
def test_parameters_by_hand(qkv_bias, qk_norm, tied):
    config = dataclasses.replace(CONFIG, qkv_bias=qkv_bias, qk_norm=qk_norm, tie_embeddings=tied)
    attention = 16 * 4 * 6 + 2 * (16 * 2 * 6) + 4 * 6 * 16  # q; k and v; o
    bias = (4 + 2 + 2) * 6 if qkv_bias else 0
    norm = 2 * 6 if qk_norm else 0
    layer = attention + bias + norm + 3 * 16 * 24 + 2 * 16
    assert num_params(config) == 3 * layer + (1 if tied else 2) * 40 * 16 + 16
    params, _ = abstract_params(config)
    assert head_matrix(params) is params["embedding" if tied else "lm_head"]
    assert head_matrix(params).shape == (40, 16)


def test_random_parameters_are_the_same_wherever_they_live():
    config = dataclasses.replace(CONFIG, num_layers=1)
    meshes = [
        make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)]) for sizes in ((1, 1, 1), (2, 2, 2))
    ]
    one, eight = (init_params(config, jax.random.key(1), mesh) for mesh in meshes)
    jax.tree.map(np.testing.assert_array_equal, one, eight)
    assert len(eight["embedding"].sharding.device_set) == 8
    assert np.std(one["embedding"]) == pytest.approx(0.02, rel=0.1)  # 640 draws: a standard error of 3 %


# The embedding


@pytest.mark.parametrize("sizes", [(1, 8, 1), (4, 2, 1), (8, 1, 1), (2, 2, 2)])
def test_rows_are_looked_up_wherever_their_parts_lie(sizes):
    """Tokens 0 to 39 twice in rows of 10, and their gradient: one cotangent of each place a token stands at."""
    mesh = make_mesh(MeshSection(*sizes))
    table = np.arange(40 * 16, dtype=np.float32).reshape(40, 16)
    tokens = np.tile(np.arange(40, dtype=np.int32), 2).reshape(8, 10)
    split = NamedSharding(mesh, partition_spec(("vocab", "embed"), table.shape, mesh))
    with jax.set_mesh(mesh):
        placed = jax.device_put(table, split), jax.device_put(tokens, batch_sharding(mesh))
        found, pull = jax.vjp(lambda table: jax.jit(look_up)(table, placed[1]), placed[0])
        (gradient,) = pull(found)
    np.testing.assert_array_equal(found, table[tokens])
    np.testing.assert_array_equal(gradient, 2 * table)


def test_many_tokens_of_one_kind_are_summed_in_float32():
    """4,096 times 1 is 4,096; a sum in bfloat16 stops at 256, where 1 is half of a step."""
    mesh = make_mesh(MeshSection(1, 8, 1))
    tokens = jax.device_put(np.full((8, 512), 3, np.int32), batch_sharding(mesh))
    table = jax.device_put(jnp.ones((40, 16), jnp.bfloat16), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    with jax.set_mesh(mesh):
        gradient = jax.jit(jax.grad(lambda table: look_up(table, tokens).astype(jnp.float32).sum()))(table)
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_array_equal(gradient[3].astype(np.float32), np.full(16, 4096.0))


def test_the_table_is_not_gathered():
    """No device of eight that share its width ever has more than its eighth of 40 x 16 numbers."""
    mesh = make_mesh(MeshSection(1, 8, 1))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    table = jax.ShapeDtypeStruct((40, 16), jnp.float32, sharding=split)
    tokens = jax.ShapeDtypeStruct((8, 3), jnp.int32, sharding=batch_sharding(mesh))
    with jax.set_mesh(mesh):
        text = jax.jit(look_up).lower(table, tokens).compile().as_text()
    assert "f32[40,2]" in text and "[40,16]" not in text


# Rotary embeddings


def test_rope_frequencies_by_hand():
    # Eight channels, theta 16: frequencies 16^(0, -1/4, -2/4, -3/4) = 1, 1/2, 1/4, 1/8.
    plain = [1, 1 / 2, 1 / 4, 1 / 8]
    np.testing.assert_allclose(rope_frequencies(8, 16.0, None), plain, rtol=1e-6)
    linear = RopeScaling("linear", factor=4.0)
    np.testing.assert_allclose(rope_frequencies(8, 16.0, linear), np.divide(plain, 4), rtol=1e-6)
    # 40 original positions: 40 f / 2 pi = 6.37, 3.18, 1.59 and 0.80 turns. Kept above 4, divided by 4 below 1.
    llama3 = RopeScaling("llama3", 4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=40)
    mixed = []
    for frequency in plain[1:3]:
        smooth = (40 * frequency / (2 * math.pi) - 1) / (4 - 1)
        mixed.append((1 - smooth) * frequency / 4 + smooth * frequency)
    np.testing.assert_allclose(rope_frequencies(8, 16.0, llama3), [1, *mixed, 1 / 32], rtol=1e-6)


def test_rope_turns_channel_pairs_by_hand():
    # Four channels: (0, 2) and (1, 3) are pairs. Angles of 90 and 180 degrees.
    x = jnp.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    angles = jnp.array([math.pi / 2, math.pi]).reshape(1, 1, 1, 2)
    turned = apply_rope(x, jnp.cos(angles), jnp.sin(angles))
    np.testing.assert_allclose(turned.ravel(), [-3, -2, 1, -4], atol=1e-6)


# The cache


def test_cached_steps_equal_the_whole_forward():
    """Prompts of 5 and 3 tokens, padded on their left, read at once; then four tokens one by one."""
    rng = np.random.default_rng(1)
    sequences = [rng.integers(0, 40, 9), rng.integers(0, 40, 7)]
    expected = [run([sequence])[0] for sequence in sequences]
    lengths, columns, new = np.array([5, 3]), 5, 4
    total = columns + new
    first = (columns - lengths)[:, None]
    slots = np.arange(total)[None]

    def step(cache, tokens, positions, mask, column):
        return jax.jit(forward_cached, static_argnums=1)(
            PARAMS,
            CONFIG,
            jnp.asarray(tokens, jnp.int32),
            jnp.asarray(positions),
            jnp.asarray(mask),
            cache,
            column,
        )

    prompt = np.zeros((2, columns), np.int32)
    for row, sequence in enumerate(sequences):
        prompt[row, first[row, 0] :] = sequence[: lengths[row]]
    positions = np.maximum(np.arange(columns)[None] - first, 0)
    mask = (slots <= np.arange(columns)[:, None])[None] & (slots >= first)[:, None]
    cache = init_cache(CONFIG, 2, total)
    assert cache.keys.size == cache.values.size == 3 * 2 * 9 * 2 * 6  # N, B, S, K, Dh
    hidden, cache = step(cache, prompt, positions, mask[:, None], 0)
    for row in range(2):
        close(hidden[row, first[row, 0] :], expected[row][: lengths[row]])
    for t in range(new):
        tokens = np.array(
            [[sequence[length + t]] for sequence, length in zip(sequences, lengths, strict=True)]
        )
        mask = (slots >= first) & (slots <= columns + t)
        hidden, cache = step(cache, tokens, (lengths + t)[:, None], mask[:, None, None], columns + t)
        for row in range(2):
            close(hidden[row, 0], expected[row][lengths[row] + t])


def test_bfloat16_stays_near_float32():
    tokens = np.arange(20).reshape(2, 10)
    half = run(tokens, config=dataclasses.replace(CONFIG, dtype=jnp.bfloat16))
    full = run(tokens)
    assert half.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: each of some 20 roundings in a row costs up to 2^-9 of values of about 1.
    assert np.sqrt(np.mean((half.astype(np.float32) - full) ** 2)) < 0.05 * np.sqrt(np.mean(full**2))


# Lengths


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, 16),
        (16, 16),
        (17, 32),
        (128, 128),
        (129, 160),
        (161, 192),
        (250, 256),
        (256, 256),
        (257, 320),
        (1024, 1024),
        (1025, 1280),
        (2048, 2048),
    ],
)
def test_bucket_length(n, expected):
    assert bucket_length(n) == expected


def test_few_lengths_with_little_padding():
    lengths = {n: bucket_length(n) for n in range(1, 5000)}
    assert len({length for n, length in lengths.items() if n <= 2048}) == 24
    assert all(0 <= length - n <= max(15, n / 4) for n, length in lengths.items())
    assert all(bucket_length(length) == length for length in lengths.values())
