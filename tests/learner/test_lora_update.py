"""Updates of adapters: on every mesh, with every optimizer, and next to training all parameters."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from tiny_models import save_tiny_model

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.loss import nll_loss
from grpo_jax.config import Config, LoraSection, MeshSection, OptimSection
from grpo_jax.learner import make_optimizer
from grpo_jax.learner.batching import add_loss_weights, make_sft_batch
from grpo_jax.learner.forward import inputs_of, make_forward_step, to_micro_batches, token_scores
from grpo_jax.learner.learner import Learner
from grpo_jax.learner.memory import plan_memory
from grpo_jax.learner.offload import device_bytes
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.hf import inspect_folder, load_params
from grpo_jax.model.lora import init_adapters, join, num_trained, split, trained_shardings
from grpo_jax.model.peft import with_adapters
from grpo_jax.model.sharding import make_mesh
from grpo_jax.model.transformer import num_params, param_shardings
from grpo_jax.run.metrics import Timers

VOCAB, WIDTH = 56, 16
OPTIM = OptimSection(learning_rate=1e-2, weight_decay=0.0, max_grad_norm=1e9, offload=False)
FULL = LoraSection(rank=WIDTH, alpha=float(WIDTH), targets=("q", "k", "v", "o", "gate", "up"))
"""Of the kernels with 16 inputs, which A = 1 gives every matrix that there is; scale 1."""
LEARNED = 20


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen3", vocab_size=VOCAB, tie_word_embeddings=False, scale=0.2, head_dim=4)
    return inspect_folder(path)


def examples():
    rng = np.random.default_rng(3)
    draw = lambda n: rng.integers(0, VOCAB, n).tolist()
    return [(draw(3), draw(5 + i % 3)) for i in range(8)]


def train(config, params, num_updates, *, sizes=(1, 1, 1), optim=OPTIM):
    """Updates on the same examples. Returns: what was trained, on the host, and losses. Args: params: all."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        frozen, trained = split(jax.device_put(params, shardings_of(config, mesh)))
        optimizer = make_optimizer(optim, config, mesh, num_updates)
        forward = make_forward_step(config, mesh, temperature=1.0, chunk_tokens=8)
        update = make_update_step(config, mesh, optimizer, forward, nll_loss, optim=optim)
        state, losses = optimizer.init_state(trained), []
        batch = add_loss_weights(make_sft_batch(examples(), pad_id=0), "token-mean", 1.0)
        micro_batches = to_micro_batches(batch, (8, 16), mesh)[0]
        for _ in range(num_updates):
            state, metrics = update(state, micro_batches, frozen)
            losses.append(float(metrics["actor/loss"]))
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(frozen))
        return jax.tree.map(np.array, optimizer.masters(state)), losses


def shardings_of(config, mesh):
    return param_shardings(config, mesh)


def first_params(folder, config, *, is_identity=False):
    """On the host. Args: is_identity: A = 1 for adapters of full rank."""
    mesh = mesh_of(1, 1, 1)
    trained = init_adapters(config, jax.random.key(0), mesh)
    if is_identity:
        one = lambda path, x: (
            np.broadcast_to(np.eye(WIDTH, dtype=np.float32).reshape(x.shape[1:]), x.shape)
            if path[-1].key.endswith("_a")
            else x
        )
        trained = jax.tree_util.tree_map_with_path(one, trained)
    return jax.tree.map(np.array, join(load_params(folder, config, mesh), trained))


# ---- meshes ----


def test_eight_devices_give_the_update_of_one(folder):
    """Sums of float32 in another order: 1e-5 of the loss. Where a gradient is near 0, rounding decides Adam's
    step: up to a tenth of one of 1e-2."""
    config = with_adapters(folder.config, LoraSection(rank=4))
    params = first_params(folder, config)
    one, losses = train(config, params, 3)
    many, losses_of_many = train(config, params, 3, sizes=(2, 2, 2))
    assert losses_of_many == pytest.approx(losses, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), many, one)
    spread = trained_shardings(config, mesh_of(2, 2, 2))["layers"]["attention"]["q_lora_a"]
    assert not spread.is_fully_replicated


# ---- next to training everything ----


def test_at_full_rank_the_first_update_is_that_of_the_kernels(folder):
    """With A = 1 and B = 0 the gradient of B is the kernel's, and that of A is 0: Adam does the same to both."""
    config = with_adapters(folder.config, FULL)
    params = first_params(folder, config, is_identity=True)
    adapters, _ = train(config, params, 1)
    whole, _ = train(folder.config, split(params)[0], 1)
    for module, names in (("attention", "qkvo"), ("mlp", ("gate", "up"))):
        before, after = params["layers"][module], whole["layers"][module]
        for name in names:
            shape = before[name].shape
            change = adapters["layers"][module][f"{name}_lora_b"].reshape(shape)
            np.testing.assert_allclose(change, after[name] - before[name], atol=1e-6)
            assert np.abs(change).max() == pytest.approx(OPTIM.learning_rate, rel=1e-2)


def train_kernels(config, params, num_updates):
    """AdamW, by optax alone, on the kernels of `FULL` themselves; returns the losses."""
    frozen, kernels = {}, {}
    for path, leaf in flatten_dict(params).items():
        (kernels if path[-1] in FULL.targets else frozen)[path] = leaf
    mesh, adamw = mesh_of(1, 1, 1), optax.adamw(OPTIM.learning_rate, weight_decay=0.0)
    batch = add_loss_weights(make_sft_batch(examples(), pad_id=0), "token-mean", 1.0)
    [micro] = to_micro_batches(batch, (8, 16), mesh)[0]

    @jax.jit
    def update(kernels, state):
        def loss(kernels):
            scores = token_scores(
                unflatten_dict(frozen | kernels), config, inputs_of(micro), temperature=1.0, chunk_columns=1
            )
            return nll_loss(*scores, micro)[0]

        value, grads = jax.value_and_grad(loss)(kernels)
        changes, state = adamw.update(grads, state, kernels)
        return optax.apply_updates(kernels, changes), state, value

    state, losses = adamw.init(kernels), []
    for _ in range(num_updates):
        kernels, state, loss = update(kernels, state)
        losses.append(float(loss))
    return losses


def test_at_full_rank_it_learns_what_training_the_kernels_learns(folder):
    config = with_adapters(folder.config, FULL)
    params = first_params(folder, config, is_identity=True)
    _, with_lora = train(config, params, LEARNED)
    whole = train_kernels(folder.config, split(params)[0], LEARNED)
    assert with_lora[:2] == pytest.approx(whole[:2], rel=1e-4)  # until A has moved
    assert whole[0] - whole[-1] > 2.0  # nats a token
    assert with_lora[0] - with_lora[-1] > 0.9 * (whole[0] - whole[-1])


# ---- optimizers and dtypes ----


@pytest.mark.slow
def test_the_state_on_the_host_gives_the_same_updates(folder):
    config = with_adapters(folder.config, LoraSection(rank=4))
    params = first_params(folder, config)
    there, losses = train(config, params, 3, optim=dataclasses.replace(OPTIM, offload=True))
    here, losses_here = train(config, params, 3)
    assert losses == pytest.approx(losses_here, rel=1e-6)  # a program for each parameter, and not one for all
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), there, here)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "offload"), [("bfloat16", True), ("float16", False)])
def test_masters_stay_float32(folder, dtype, offload):
    """The base is in the dtype of the computation; an update of 1e-5 would be lost in it, and is not."""
    config = dataclasses.replace(folder.config, dtype=jnp.dtype(dtype))
    config = with_adapters(config, LoraSection(rank=4))
    params = first_params(folder, config)
    optim = dataclasses.replace(OPTIM, learning_rate=1e-5, offload=offload)
    adapters, losses = train(config, params, 2, optim=optim)
    before = split(params)[1]["layers"]["mlp"]["up_lora_a"]
    after = adapters["layers"]["mlp"]["up_lora_a"]
    assert after.dtype == np.float32 and np.isfinite(losses).all()
    assert 0 < np.abs(after - before).max() < 3e-5


# ---- memory ----


def small_run(rank):
    base = Config()
    return dataclasses.replace(
        base,
        lora=LoraSection(rank=rank),
        data=dataclasses.replace(base.data, train_batch_size=4, max_prompt_length=24, max_response_length=40),
        algorithm=dataclasses.replace(base.algorithm, kl_coef=0.1, ref_offload=False),
        optim=OPTIM,
        rollout=dataclasses.replace(base.rollout, engine="local"),
    )


def test_the_learner_holds_what_is_frozen_once(folder):
    """Reference, sums of gradients and optimizer are of the adapters alone; the plan counts the same bytes."""
    config = small_run(4)
    plain = dataclasses.replace(folder.config, dtype=jnp.dtype("bfloat16"))
    model, mesh = with_adapters(plain, config.lora), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        learner = Learner(config, Algorithm.of(config.algorithm), model, mesh, num_steps=1, timer=Timers())
        sizes = learner.compile()
        trained, frozen = num_trained(model), num_params(plain)
        assert device_bytes(learner.frozen) == 2 * frozen
        assert device_bytes(learner.reference.abstract()) == 2 * trained
        state = learner.optimizer.abstract_state()
        assert device_bytes(state.params) == 4 * trained
        assert device_bytes(state.opt_state) == 8 * trained + 8  # and two counts
    plan = plan_memory(config, model, mesh)
    held = {"frozen parameters": 2 * frozen, "parameters": 4 * trained, "Adam's moments": 8 * trained}
    assert plan.held == held | {"reference": 2 * trained}
    assert plan.beside["update"]["sums of gradients"] == 4 * trained
    # Frozen and computed copy wait beside the optimizer, and the program itself has state, gradients and scratch.
    assert 2 * frozen + 18 * trained < sizes["optimizer"] < 2 * frozen + 40 * trained


@pytest.mark.slow
def test_policy_and_reference_share_what_is_frozen(folder):
    config = small_run(4)
    model, mesh = with_adapters(folder.config, config.lora), mesh_of(1, 1, 1)
    with jax.set_mesh(mesh):
        learner = Learner(config, Algorithm.of(config.algorithm), model, mesh, num_steps=1, timer=Timers())
        params = jax.device_put(first_params(folder, model), shardings_of(model, mesh))
        state = learner.init(params)
        assert learner.params(state)["embedding"] is params["embedding"] is learner.frozen["embedding"]
        assert split(learner.reference.params)[1].keys() == {"layers"}
        batch = make_sft_batch(examples(), pad_id=0)
        reference = join(learner.frozen, learner.reference.on_device())
        np.testing.assert_array_equal(
            learner.score(learner.params(state), batch), learner.score(reference, batch)
        )
