"""The forward pass that scoring and gradients share, and its distribution over some of the tokens."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import tiny_config

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.loss import grpo_loss
from grpo_jax.config import AlgorithmSection, MeshSection, ModelSection, OptimSection
from grpo_jax.learner import make_optimizer
from grpo_jax.learner.batching import add_advantages, add_loss_weights, make_sft_batch
from grpo_jax.learner.forward import inputs_of, make_forward_step, to_micro_batches
from grpo_jax.learner.memory import kept_for_backward
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.logprobs import pack_bits
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import init_params
from grpo_jax.run.devices import set_products

OPTIM = OptimSection(offload=False)
R, T = 4, 48


def mesh_of_one():
    return make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])


def random_batch(vocab_size, length=T, rows=R):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, vocab_size, n).tolist()
    batch = make_sft_batch([(draw(length // 4), draw(length // 2)) for _ in range(rows)], pad_id=0)
    return add_loss_weights(add_advantages(batch, rng.normal(size=(1, rows))), "token-mean", 1.0)


def first_update(model, batch, shape):
    """The metrics of an update whose old and reference log-probabilities are the policy's own scores."""
    mesh = mesh_of_one()
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(OPTIM, model, mesh, num_updates=1)
        forward = make_forward_step(model, mesh, temperature=0.7, chunk_tokens=16)
        loss = functools.partial(grpo_loss, algorithm=Algorithm.of(AlgorithmSection(kl_coef=0.1)))
        update = make_update_step(model, mesh, optimizer, forward, loss, optim=OPTIM)
        state = optimizer.init_state(init_params(model, jax.random.key(0), mesh))
        params = update.to_compute_dtype(state.params)
        placed = []
        for micro in to_micro_batches(batch, shape, mesh)[0]:
            scores = forward.score(params, micro)
            placed.append(micro.replace(old_logprobs=scores, ref_logprobs=scores, sampler_logprobs=scores))
        return {name: float(value) for name, value in update(state, placed)[1].items()}


def is_exactly_where_it_was(metrics):
    return metrics["kl/mean"] == metrics["actor/ppo_kl"] == metrics["training/rollout_probs_diff_max"] == 0


@pytest.mark.parametrize(
    ("dtype", "remat"),
    [(jnp.bfloat16, "none"), (jnp.bfloat16, "dots"), (jnp.bfloat16, "full"), (jnp.float16, "attention")],
)
def test_zero_is_zero(dtype, remat):
    """Of the same weights, scores and what is differentiated are the same bits: KL 0, ratio 1."""
    model = tiny_config(dtype=dtype, remat=remat)
    metrics = first_update(model, random_batch(model.vocab_size), (R, T))
    assert is_exactly_where_it_was(metrics) and metrics["actor/grad_norm"] > 0


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_what_is_kept_is_what_the_plan_counts_and_holds_no_parameters(remat):
    """Parameters among what is kept would be copied, or given back with it."""
    model, mesh = tiny_config(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, remat=remat), mesh_of_one()
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(0), mesh)
        forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=1)
        [micro] = to_micro_batches(random_batch(model.vocab_size), (R, T), mesh)[0]
        _, kept = forward(params, micro)
    pointers = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(params)}
    assert not pointers & {x.unsafe_buffer_pointer() for x in kept.arrays}
    size = sum(x.nbytes for x in kept.arrays)
    assert kept_for_backward(model, R, T) == pytest.approx(size, rel=0.02)


@pytest.mark.parametrize(("products", "precision"), [("full", "HIGHEST"), ("tf32", "DEFAULT")])
def test_products_of_float32_are_computed_in_full_unless_told_otherwise(products, precision):
    """What the compiler is told of every product; TF32 is NVIDIA's DEFAULT."""
    model, mesh = tiny_config(), mesh_of_one()
    before = jax.config.values["jax_default_matmul_precision"]
    try:
        set_products(ModelSection(dtype="float32", float32_products=products))
        with jax.set_mesh(mesh):
            params = init_params(model, jax.random.key(0), mesh)
            forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=16)
            [micro] = to_micro_batches(random_batch(model.vocab_size), (R, T), mesh)[0]
            text = forward.step.lower(params, inputs_of(micro)).as_text()
    finally:
        jax.config.update("jax_default_matmul_precision", before)
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert len(dots) > 8
    for line in dots:
        assert f"precision = [{precision}, {precision}]" in line, line


def test_only_the_columns_own_tokens_count():
    """Scores over all tokens equal those without a list; over the chosen one alone, its probability is 1."""
    model, mesh = dataclasses.replace(tiny_config(), vocab_size=70), mesh_of_one()
    batch = random_batch(model.vocab_size)
    chosen = jax.nn.one_hot(batch.tokens, model.vocab_size, dtype=bool)
    with jax.set_mesh(mesh):
        params = init_params(model, jax.random.key(0), mesh)
        forward = make_forward_step(model, mesh, temperature=1.0, chunk_tokens=16)
        score = lambda drawable: np.asarray(
            forward.score(params, to_micro_batches(batch.replace(drawable=drawable), (R, T), mesh)[0][0])
        )
        everything = np.asarray(pack_bits(jnp.ones_like(chosen)))
        is_token = batch.segment_ids > 0
        np.testing.assert_allclose(score(everything)[is_token], score(None)[is_token], atol=1e-6)
        alone = score(np.asarray(pack_bits(chosen)))
    np.testing.assert_allclose(alone[is_token], 0, atol=1e-6)
