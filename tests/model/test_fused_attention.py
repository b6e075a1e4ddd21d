"""Fused kernels against the plain computation, sequence by sequence."""

import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config

from grpo_jax.config import ConfigError
from grpo_jax.model import fused_attention
from grpo_jax.model.attention import attend, causal_segment_mask, within_window
from grpo_jax.model.fused_attention import (
    DEVICE_KINDS,
    choose_kernel,
    find_sequences,
    local_device_kind,
    max_sequences,
    mesh_device_kind,
)
from grpo_jax.model.transformer import REMAT_POLICIES, abstract_params, forward

IS_GPU = os.environ.get("GRPO_JAX_TEST_GPU") == "1"


def test_sequences_are_found_padding_included():
    segment_ids = np.zeros((3, 64), np.int32)
    segment_ids[0, :10], segment_ids[0, 10:30] = 1, 2  # and 34 columns of padding
    segment_ids[1] = 1
    found = find_sequences(jnp.asarray(segment_ids))
    assert max_sequences(64) == 2 and found.starts.shape == (3, 3)
    assert found.starts.tolist() == [[0, 10, 30], [0, -1, -1], [0, -1, -1]]
    assert found.lengths.tolist() == [[10, 20, 34], [64, -1, -1], [64, -1, -1]]


@pytest.mark.parametrize(
    ("length", "most"), [(16, 1), (32, 1), (63, 1), (64, 2), (256, 8), (640, 16), (4224, 16)]
)
def test_max_sequences(length, most):
    assert max_sequences(length) == most


def random_inputs(heads, kv_heads, width, dtype, lengths, length):
    """q, k, v, the cotangent of the output, and segment ids [rows, length]; `lengths`: of each row's sequences."""
    rng = np.random.default_rng(0)
    draw = lambda n: jnp.asarray(rng.normal(size=(len(lengths), length, n, width)), dtype)
    segment_ids = np.zeros((len(lengths), length), np.int32)
    for row, sizes in enumerate(lengths):
        ends = np.cumsum(sizes)
        for number, (size, end) in enumerate(zip(sizes, ends, strict=True), start=1):
            segment_ids[row, end - size : end] = number
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), jnp.asarray(segment_ids)


def value_and_gradients(function, q, k, v, cotangent, is_token):
    """Of the tokens alone: what padding gets is nobody's business, but it must be finite."""
    out, vjp = jax.vjp(function, q, k, v)
    pull = (cotangent * is_token[:, :, None, None]).astype(out.dtype)
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in (out, *vjp(pull)))
    keep = lambda x: np.asarray(x, np.float32)[np.asarray(is_token)]
    return [keep(x) for x in (out, *vjp(pull))]


def plain(q, k, v, segment_ids, window=0, divisor=None):
    heads_first = lambda x: jnp.swapaxes(x.astype(jnp.float32), 1, 2)
    mask = within_window(causal_segment_mask(segment_ids), jnp.int32(window), 0)
    return attend(q.astype(jnp.float32), heads_first(k), heads_first(v), mask, divisor)


def compare(function, inputs, tolerance, **masking):
    *arrays, segment_ids = inputs
    is_token = segment_ids > 0
    reference = functools.partial(plain, segment_ids=segment_ids, **masking)
    expected = value_and_gradients(reference, *arrays, is_token)
    sequences = find_sequences(segment_ids)
    function = functools.partial(function, **masking)
    got = value_and_gradients(lambda q, k, v: jax.jit(function)(q, k, v, sequences), *arrays, is_token)
    for a, b in zip(got, expected, strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, rtol=0, atol=tolerance)


LENGTHS = [(100, 60, 1, 70), (256,), (30, 226), (1, 2, 3)]


@pytest.mark.parametrize(("remat", "passes"), [("dots", 2), ("attention", 2), ("full", 3)])
def test_splash_does_not_attend_again_where_its_results_are_kept(remat, passes):
    """Forward and backward; "full" has another one forward. Lowered for a TPU that need not be there."""
    q = jax.ShapeDtypeStruct((2, 256, 2, 128), jnp.float32)
    sequences = find_sequences(jnp.ones((2, 256), jnp.int32))

    def layer(q, k, v):
        return jnp.sin(fused_attention._splash(q, k, v, sequences)).sum()

    layer = jax.checkpoint(layer, policy=REMAT_POLICIES[remat])
    traced = jax.jit(jax.value_and_grad(layer, argnums=(0, 1, 2))).trace(q, q, q)
    lowered = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert lowered.count("call @_splash_attention") == passes


@pytest.mark.parametrize(("length", "block"), [(160, 32), (640, 128), (1024, 512), (1280, 256), (4224, 384)])
def test_splash_takes_the_largest_blocks_that_divide_a_row(length, block):
    kernel = fused_attention._splash_kernel(1, length, True)
    assert kernel.fwd_mask_info.block_mask.shape[-1] == length // block


def test_splash_is_traced_again_and_again_without_remat():
    """Its tables of blocks must be constants: numbers of the first trace would be unknown to the next."""
    fused_attention._splash_kernel.cache_clear()
    config = tiny_config(head_dim=128, attention="splash")
    tokens = jax.ShapeDtypeStruct((2, 128), jnp.int32)
    for _ in range(2):
        states = lambda params, tokens: forward(params, config, tokens, tokens, tokens)
        assert jax.eval_shape(states, abstract_params(config)[0], tokens).shape == (
            2,
            128,
            config.hidden_size,
        )


@pytest.mark.slow
def test_splash_equals_plain_in_the_interpreter():
    inputs = random_inputs(2, 1, 128, jnp.float32, [(70, 1, 40), (128,)], 128)  # 17 columns of padding
    for masking in ({}, {"window": 9, "divisor": 8.0}):
        compare(functools.partial(fused_attention._splash, interpret=True), inputs, 1e-5, **masking)


@pytest.mark.gpu
@pytest.mark.skipif(not IS_GPU, reason="needs an NVIDIA GPU: set GRPO_JAX_TEST_GPU=1")
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 2, 128), (4, 4, 64), (28, 4, 128)])
@pytest.mark.parametrize("length", [256, 640])
def test_cudnn_equals_plain(heads, kv_heads, width, length):
    inputs = random_inputs(heads, kv_heads, width, jnp.bfloat16, LENGTHS, length)
    for masking in ({}, {"divisor": 8.0}):
        compare(fused_attention._cudnn, inputs, 2e-2, **masking)


def test_windows_by_hand():
    """Three queries from column 2 of a cache on: each sees itself and the one before it; with 0, all."""
    mask = jnp.ones((1, 1, 3, 5), bool)
    seen = within_window(mask, jnp.int32(2), 2)[0, 0].astype(int).tolist()
    assert seen == [
        [0, 1, 1, 1, 1],
        [0, 0, 1, 1, 1],
        [0, 0, 0, 1, 1],
    ]  # what comes later is the mask's to hide
    assert within_window(mask, jnp.int32(0), 2).all()


def test_kernels_that_the_device_lacks_are_refused():
    if jax.default_backend() != "cpu":
        pytest.skip("only where there is no accelerator")
    here = mesh_device_kind(jax.make_mesh((8,), ("data",)))
    assert here == local_device_kind()
    assert choose_kernel("auto", "bfloat16", 128, here) == "plain"
    assert choose_kernel("plain", "float32", 7, here) == "plain"
    with pytest.raises(ValueError, match="needs an NVIDIA GPU"):
        choose_kernel("cudnn", "bfloat16", 128, here)
    with pytest.raises(ValueError, match="needs a TPU"):
        choose_kernel("splash", "bfloat16", 128, here)


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "kernel"),
    [
        ("h100", "bfloat16", 128, "cudnn"),
        ("b200", "float16", 64, "cudnn"),
        ("h200", "float32", 128, "plain"),
        ("h200", "bfloat16", 100, "plain"),  # not a multiple of 8
        ("a100", "bfloat16", 128, "plain"),
        ("tpu-v5p", "float32", 128, "splash"),
        ("tpu-v5p", "bfloat16", 64, "plain"),
    ],
)
def test_kernels_of_devices_that_need_not_be_there(device, dtype, head_dim, kernel):
    assert choose_kernel("auto", dtype, head_dim, DEVICE_KINDS[device]) == kernel


def test_windows_do_not_go_through_cudnn():
    kernel = lambda wanted, device: choose_kernel(wanted, "bfloat16", 128, DEVICE_KINDS[device], True)
    assert (kernel("auto", "h100"), kernel("auto", "tpu-v5p")) == ("plain", "splash")
    with pytest.raises(ConfigError, match=r"model.attention='cudnn': is not used for models with sliding"):
        kernel("cudnn", "h100")


@pytest.mark.parametrize("wanted", ["auto", "splash", "plain"])
def test_tpus_do_not_compute_in_float16(wanted):
    with pytest.raises(ConfigError, match=r"model.dtype='float16': needs an NVIDIA GPU"):
        choose_kernel(wanted, "float16", 128, DEVICE_KINDS["tpu-v5e"])


def test_a_kernel_that_a_named_device_lacks_is_refused():
    with pytest.raises(
        ConfigError, match=r"model.attention='cudnn': needs compute capability 9.0 .* has 8.9"
    ):
        choose_kernel("cudnn", "bfloat16", 128, DEVICE_KINDS["l40s"])
    with pytest.raises(ConfigError, match=r"model.attention='cudnn': needs model.dtype=bfloat16"):
        choose_kernel("cudnn", "float32", 128, DEVICE_KINDS["h100"])
