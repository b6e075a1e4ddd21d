"""Against the dense computation in float64 numpy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from grpo_jax.model.logprobs import _num_chunks, pack_bits, token_logprobs, unpack_bits

B, T, D, V = 3, 12, 5, 61
TEMPERATURE = 0.7


def inputs():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(B, T, D)).astype(np.float32)
    head = rng.normal(size=(V, D)).astype(np.float32)
    tokens = rng.integers(0, V, (B, T)).astype(np.int32)
    weights = rng.normal(size=(2, B, T)).astype(np.float32)
    return hidden, head, tokens, weights


def dense(hidden, head, tokens, temperature=TEMPERATURE):
    """Log-probabilities [B, T], entropy [B, T], and log-softmax [B, T, V] before the shift, all float64."""
    logits = hidden.astype(np.float64) @ head.astype(np.float64).T / temperature
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    logprobs, entropy = np.zeros((B, T)), np.zeros((B, T))
    for b in range(B):
        for t in range(1, T):  # column t is about token t, which the state of column t - 1 predicts
            logprobs[b, t] = log_p[b, t - 1, tokens[b, t]]
            entropy[b, t] = -np.sum(np.exp(log_p[b, t - 1]) * log_p[b, t - 1])
    return logprobs, entropy, log_p


def dense_gradients(hidden, head, tokens, weights):
    """Of sum(w0 * logprobs + w1 * entropy), from d log p_c / d z = [v = c] - p and dH / d z = -p (log p + H)."""
    _, entropy, log_p = dense(hidden, head, tokens)
    p = np.exp(log_p)
    by_logits = np.zeros((B, T, V))
    for b in range(B):
        for t in range(T - 1):
            chosen = np.eye(V)[tokens[b, t + 1]]
            by_logits[b, t] = weights[0, b, t + 1] * (chosen - p[b, t])
            by_logits[b, t] -= weights[1, b, t + 1] * p[b, t] * (log_p[b, t] + entropy[b, t + 1])
    by_logits /= TEMPERATURE
    return by_logits @ head, np.einsum("btv,btd->vd", by_logits, hidden)


def weighted(hidden, head, tokens, weights, chunk_columns):
    logprobs, entropy = token_logprobs(
        hidden, head, tokens, temperature=TEMPERATURE, chunk_columns=chunk_columns
    )
    return jnp.sum(weights[0] * logprobs + weights[1] * entropy)


@functools.partial(jax.jit, static_argnums=4)
def values_and_gradients(hidden, head, tokens, weights, chunk_columns):
    """In one program, so that each number of chunks is compiled once."""
    values = token_logprobs(hidden, head, tokens, temperature=TEMPERATURE, chunk_columns=chunk_columns)
    return values, jax.grad(weighted, argnums=(0, 1))(hidden, head, tokens, weights, chunk_columns)


CHUNKS = [1, 2, 5, 6, T, 1000]  # 5 does not divide 12: chunks of 4


@pytest.mark.parametrize("chunk_columns", CHUNKS)
def test_equals_the_dense_computation(chunk_columns):
    hidden, head, tokens, weights = inputs()
    (logprobs, entropy), _ = values_and_gradients(hidden, head, tokens, weights, chunk_columns)
    expected_logprobs, expected_entropy, _ = dense(hidden, head, tokens)
    assert logprobs.dtype == entropy.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected_logprobs, rtol=0, atol=1e-5)
    np.testing.assert_allclose(entropy, expected_entropy, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunk_columns", CHUNKS)
def test_gradients_equal_the_dense_ones(chunk_columns):
    hidden, head, tokens, weights = inputs()
    _, gradients = values_and_gradients(hidden, head, tokens, weights, chunk_columns)
    for got, expected in zip(gradients, dense_gradients(hidden, head, tokens, weights), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5)


def test_column_zero_is_zero_and_no_column_sees_its_own_state():
    hidden, head, tokens, _ = inputs()
    both = lambda hidden: token_logprobs(hidden, head, tokens, temperature=1.0, chunk_columns=4)
    for before, after in zip(both(hidden), both(hidden * (np.arange(T) == 5)[None, :, None]), strict=True):
        assert not before[:, 0].any()
        changed = np.asarray(before != after).any(axis=0)
        assert changed.tolist() == [t not in (0, 6) for t in range(T)]  # state 5 tells about token 6 only


def test_two_tokens_by_hand():
    # Logits (0, log 3) / 0.5 = (0, log 9): probabilities 1/10 and 9/10.
    hidden = jnp.array([[[1.0], [7.0]]])
    head = jnp.log(jnp.array([[1.0], [3.0]]))
    logprobs, entropy = token_logprobs(hidden, head, jnp.array([[1, 0]]), temperature=0.5, chunk_columns=1)
    np.testing.assert_allclose(logprobs, [[0, np.log(0.1)]], rtol=1e-6)
    np.testing.assert_allclose(entropy, [[0, -0.1 * np.log(0.1) - 0.9 * np.log(0.9)]], rtol=1e-6)


def test_logits_are_float32_under_bfloat16():
    """Rounding the logits to bfloat16 would cost up to 2^-8 of the largest, some 0.1 here."""
    hidden, head, tokens, _ = inputs()
    hidden, head = (jnp.asarray(4 * x, jnp.bfloat16) for x in (hidden, head))
    logprobs, _ = token_logprobs(hidden, head, tokens, temperature=TEMPERATURE, chunk_columns=4)
    expected, _, _ = dense(np.asarray(hidden, np.float32), np.asarray(head, np.float32), tokens)
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("length", "chunk_columns", "expected"),
    [(12, 12, 1), (12, 5, 3), (12, 1, 12), (12, 0, 12), (7, 3, 7), (1, 1, 1), (1024, 100, 16)],
)
def test_number_of_chunks_by_hand(length, chunk_columns, expected):
    assert _num_chunks(length, chunk_columns) == expected


def largest_array(text):
    """Elements of the largest array that a compiled program names, as in `f32[3,12,61]`."""
    shapes = re.findall(r"\b(?:f32|bf16|f64|pred|s32)\[([\d,]+)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",")])) for shape in shapes)


@pytest.mark.parametrize("what", ["value", "gradient"])
def test_the_logits_of_all_tokens_never_exist(what):
    arguments = inputs()
    function = {"value": weighted, "gradient": jax.grad(weighted, argnums=(0, 1))}[what]
    compiled = {
        columns: jax.jit(function, static_argnums=4).lower(*arguments, columns).compile().as_text()
        for columns in (2, T)
    }
    # In any layout: chunks that pile up for the backward pass would be an array of as many elements.
    assert largest_array(compiled[T]) >= B * T * V
    assert largest_array(compiled[2]) <= 2 * B * 2 * V


# A distribution over some of the tokens


def test_bits_by_hand():
    """61 words are two of 32: words 0 and 33 set bit 0 of the first and bit 1 of the second."""
    is_set = np.zeros((2, V), bool)
    is_set[0, [0, 33]] = is_set[1, 60] = True
    np.testing.assert_array_equal(pack_bits(is_set), np.array([[1, 2], [0, 2**28]], np.uint32))
    np.testing.assert_array_equal(unpack_bits(pack_bits(is_set), V), is_set)


@pytest.mark.parametrize("chunk_columns", [4, 12])
def test_the_distribution_over_drawable_tokens_equals_a_written_out_softmax(chunk_columns):
    """Value and gradients, by the softmax over each column's own list of 7 tokens, the chosen one first."""
    hidden, head, tokens, weights = inputs()
    rng = np.random.default_rng(1)
    lists = {
        (b, t): [tokens[b, t], *rng.choice(np.setdiff1d(np.arange(V), tokens[b, t]), 6, replace=False)]
        for b in range(B)
        for t in range(1, T)
    }
    is_drawable = np.zeros((B, T, V), bool)
    for (b, t), words in lists.items():
        is_drawable[b, t, words] = True

    def written_out(hidden, head):
        total = 0.0
        for (b, t), words in lists.items():
            log_p = jax.nn.log_softmax(hidden[b, t - 1] @ head[jnp.array(words)].T / TEMPERATURE)
            total += weights[0, b, t] * log_p[0] - weights[1, b, t] * jnp.sum(jnp.exp(log_p) * log_p)
        return total

    def ours(hidden, head):
        drawable = pack_bits(jnp.asarray(is_drawable))
        logprobs, entropy = token_logprobs(
            hidden, head, tokens, drawable, temperature=TEMPERATURE, chunk_columns=chunk_columns
        )
        return jnp.sum((weights[0] * logprobs + weights[1] * entropy)[:, 1:])

    expected = jax.jit(jax.value_and_grad(written_out, (0, 1)))(hidden, head)
    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(hidden, head)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_a_soft_cap_equals_the_dense_computation():
    """c tanh(z / c) before the temperature divides: values and gradients, by differentiating what is dense."""
    hidden, head, tokens, weights = inputs()
    cap = 2.0

    def of_dense(hidden, head):
        logits = cap * jnp.tanh(hidden @ head.T / cap) / TEMPERATURE
        log_p = jax.nn.log_softmax(logits[:, :-1])
        chosen = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=2)[..., 0]
        entropy = -jnp.sum(jnp.exp(log_p) * log_p, axis=2)
        return jnp.sum(weights[0, :, 1:] * chosen + weights[1, :, 1:] * entropy)

    def of_chunks(hidden, head):
        logprobs, entropy = token_logprobs(
            hidden, head, tokens, temperature=TEMPERATURE, chunk_columns=3, soft_cap=cap
        )
        return jnp.sum(weights[0] * logprobs + weights[1] * entropy)

    expected, got = (jax.value_and_grad(f, argnums=(0, 1))(hidden, head) for f in (of_dense, of_chunks))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
