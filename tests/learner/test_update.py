"""The update against itself on other meshes and micro-batches, and against PyTorch on transformers' model."""

import copy
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import loss_helpers
import numpy as np
import optax
import pytest
import torch
from safetensors.numpy import load_file
from tiny_models import save_tiny_model
from transformers import Qwen2ForCausalLM

from grpo_jax.algorithm import Algorithm
from grpo_jax.algorithm.loss import grpo_loss
from grpo_jax.config import ActorSection, MeshSection, OptimSection
from grpo_jax.learner import optimizer_class
from grpo_jax.learner.batching import add_loss_weights, make_train_batch
from grpo_jax.learner.compiling import programs_compiled
from grpo_jax.learner.forward import inputs_of, make_forward_step, score_rows, to_micro_batches
from grpo_jax.learner.hlo import COLLECTIVES, read_facts
from grpo_jax.learner.offload import LeafState
from grpo_jax.learner.optimizer import make_adamw, make_schedule
from grpo_jax.learner.packing import plan_rows
from grpo_jax.learner.reference import Reference
from grpo_jax.learner.update import make_update_step
from grpo_jax.model.hf import inspect_folder, load_params, param_readers, save_folder
from grpo_jax.model.sharding import make_mesh
from grpo_jax.types import Completion, Prompt, RolloutGroup

VOCAB = 56
TEMPERATURE = 0.8
ALGORITHM = dataclasses.replace(
    loss_helpers.ALGORITHM, clip_high=0.25, dual_clip=3.0, loss_norm=10.0, kl_coef=0.1, entropy_coef=0.01
)
OPTIM = OptimSection(learning_rate=1e-3, beta2=0.99, weight_decay=0.1, max_grad_norm=0.5, offload=False)
ACTOR = ActorSection(micro_batch_size_per_device=100, logits_chunk_tokens=8)
LENGTHS = [(3, 9), (3, 2), (7, 1), (7, 4), (2, 13), (2, 6)]  # prompt and completion of each row: B = 6
COMPLETION_LENGTHS = np.array([n for _, n in LENGTHS])
T = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny Qwen2, every weight random, as transformers' module and as a folder."""
    path = tmp_path_factory.mktemp("qwen2")
    torch_model = save_tiny_model(path, vocab_size=VOCAB, tie_word_embeddings=True, scale=0.2)
    return torch_model, inspect_folder(path)


@pytest.fixture(scope="module")
def batch(model):
    """Six rows of different lengths; old log-probabilities far enough away for both clips to act."""
    rng = np.random.default_rng(0)
    draw = lambda n: tuple(map(int, rng.integers(0, VOCAB, n)))
    groups = []
    for (prompt_length, first), (_, second) in zip(LENGTHS[::2], LENGTHS[1::2], strict=True):
        completions = tuple(Completion(draw(n), (0.0,) * n, "", "stop", 0) for n in (first, second))
        groups.append(RolloutGroup(Prompt("", draw(prompt_length), "", "", "", {}), completions))
    batch = make_train_batch(groups, pad_id=0)
    mask = batch.completion_mask
    assert batch.tokens.shape == (6, T) and mask.sum(axis=1).tolist() == COMPLETION_LENGTHS.tolist()
    logprobs = torch_logprobs(model[0], batch)[0].detach().numpy()
    noise = lambda scale: (scale * rng.normal(size=mask.shape)).astype(np.float32)
    advantages = np.array([1.5, -0.7, 0.4, -1.1, 0.9, -2.0], np.float32)[:, None]
    return batch.replace(
        advantages=advantages * mask,
        old_logprobs=(logprobs + noise(0.6)) * mask,
        ref_logprobs=(logprobs + noise(0.5)) * mask,
        sampler_logprobs=(logprobs + noise(0.1)) * mask,
    )


def torch_logprobs(torch_model, batch):
    """[B, T] log-probabilities and entropies in the convention of `TrainBatch`, by transformers and torch."""
    tokens = torch.tensor(batch.tokens).long()
    attention = torch.tensor(batch.segment_ids)
    logits = torch_model(tokens, attention_mask=attention).logits / TEMPERATURE
    log_p = torch.log_softmax(logits, dim=-1)[:, :-1]
    first = torch.zeros(len(tokens), 1)
    chosen = log_p.gather(2, tokens[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.cat([first, chosen], 1), torch.cat([first, entropy], 1)


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


ONE = (1, 1, 1)


def slow(value):
    """A further case of what the default suite has one of."""
    return pytest.param(value, marks=pytest.mark.slow)


def optimizer_for(config, sizes, optim=OPTIM):
    """With a learning rate of 1e-3; the one that is reported is another, to tell them apart."""
    adamw = make_adamw(optim, make_schedule(optim, 10))
    return optimizer_class(optim)(adamw, lambda step: 0.25, config, mesh_of(*sizes))


def update_step(config, sizes, algorithm, chunk_tokens=8, optim=OPTIM):
    """Compiled once for each set of arguments, however they are given, and shape of batch."""
    return _update_step(config, sizes, algorithm, chunk_tokens, optim)


@functools.cache
def _update_step(config, sizes, algorithm, chunk_tokens, optim):
    return make_update_step(
        config,
        mesh_of(*sizes),
        optimizer_for(config, sizes, optim),
        make_forward_step(config, mesh_of(*sizes), temperature=TEMPERATURE, chunk_tokens=chunk_tokens),
        functools.partial(grpo_loss, algorithm=Algorithm.of(algorithm)),
        optim=optim,
    )


@functools.cache
def _first_state(path, config):
    mesh = mesh_of(*ONE)
    with jax.set_mesh(mesh):
        return on_host(optimizer_for(config, ONE).init_state(load_params(inspect_folder(path), config, mesh)))


def on_host(tree):
    # Copies: a view of a JAX array on the CPU would keep its buffer from being donated.
    return jax.tree.map(np.array, tree)


def place(model, host_state=None, *, sizes=ONE, config=None):
    """A train state on the mesh, from the model's weights or from a state on the host."""
    config = config or model[1].config
    shardings = optimizer_for(config, sizes).shardings()
    return jax.device_put(host_state or _first_state(model[1].path, config), shardings)


def micro(batch, *, sizes=ONE, actor=ACTOR, algorithm=ALGORITHM, shape=None):
    """The micro-batches of a mini-batch, of the shape that `actor` leads to with rows as long as the batch's."""
    if shape is None:
        rows = plan_rows(len(batch.tokens), T, actor, sizes[0] * sizes[1])
        shape = (rows, T)
    weighted = add_loss_weights(batch, algorithm.loss_agg, algorithm.loss_norm)
    return to_micro_batches(weighted, shape, mesh_of(*sizes))[0]


def run(
    model,
    batch,
    *,
    state=None,
    sizes=ONE,
    actor=ACTOR,
    algorithm=ALGORITHM,
    config=None,
    shape=None,
    optim=OPTIM,
):
    """One update; returns the new state and the metrics, both on the host."""
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        state = place(model, state, sizes=sizes, config=config)
        micro_batches = micro(batch, sizes=sizes, actor=actor, algorithm=algorithm, shape=shape)
        step = update_step(config or model[1].config, sizes, algorithm, optim=optim)
        state, metrics = step(state, micro_batches)
    return on_host(state), {name: float(value) for name, value in metrics.items()}


def first_moment(state):
    """AdamW's mu; after the first update it is (1 - beta1) times the clipped gradient."""
    has_mu = lambda part: hasattr(part, "mu")
    return next(part.mu for part in jax.tree.leaves(state.opt_state, is_leaf=has_mu) if has_mu(part))


def gradients(state):
    return jax.tree.map(lambda mu: mu / (1 - OPTIM.beta1), first_moment(state))


def agree(got, expected, atol, rtol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, expected)


def updates_agree(got, expected):
    """Both (state, metrics) of one first update.

    The clipped gradient has norm 0.5 and elements of up to some 0.1, sums of a few hundred terms in float32: they
    may differ by some 1e-7. AdamW's first step has the size of the learning rate, 1e-3, wherever the gradient is
    far above its epsilon of 1e-8; near it, rounding decides. 1e-5 is 1 % of a step.
    """
    (state, metrics), (expected_state, expected_metrics) = got, expected
    agree(gradients(state), gradients(expected_state), atol=1e-6)
    agree(state.params, expected_state.params, atol=1e-5)
    assert metrics == pytest.approx(expected_metrics, rel=1e-5, abs=1e-6)
    assert metrics["actor/grad_norm"] > 0.5 and metrics["actor/skipped_updates"] == 0


# Meshes


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), *map(slow, [(1, 8, 1), (1, 1, 4)])], ids=str)
def test_every_mesh_gives_the_update_of_one_device(model, batch, sizes):
    """Six rows divide neither by 8 nor by 4."""
    updates_agree(run(model, batch, sizes=sizes), run(model, batch))


@pytest.mark.parametrize("sizes", [(1, 2, 2), *map(slow, [(2, 1, 1), (1, 2, 1)])], ids=str)
def test_so_does_one_with_several_rows_on_each_device(model, batch, sizes):
    """Whose number divides by the mesh's once more."""
    updates_agree(run(model, batch, sizes=sizes, shape=(8, T)), run(model, batch))


def test_copies_of_the_parameters_exchange_gradients_once_an_update(model, batch):
    """Not once a micro-batch: with its scores and its gradients, nothing goes from copy to copy."""
    sizes = (2, 1, 1)
    step, optimizer = update_step(model[1].config, sizes, ALGORITHM), optimizer_for(model[1].config, sizes)
    micro_batch = micro(batch, sizes=sizes, shape=(8, T))[0]
    with jax.set_mesh(mesh_of(*sizes)), programs_compiled() as programs:
        step.compile(optimizer, optimizer.abstract_state().params, micro_batch)
    exchanged = {p.name: read_facts(p.compiled.as_text()).traffic.keys() & set(COLLECTIVES) for p in programs}
    nothing = {name: set() for name in ("zeros", "forward_pass", "backward", "apply")}
    assert exchanged == nothing | {"add_up": {"all-reduce"}}


def test_two_devices_in_bfloat16_agree_with_one(model, batch):
    """A metric of some 0.1 to 2 of bfloat16's three digits; the gradients' norm is about 1."""
    config = dataclasses.replace(model[1].config, dtype=jnp.bfloat16)
    one = run(model, batch, config=config, shape=(8, T))
    two = run(model, batch, config=config, sizes=(1, 2, 1), shape=(8, T))
    assert two[1] == pytest.approx(one[1], rel=0.02, abs=0.02)


def test_state_lives_where_its_parameters_do(model, batch):
    sizes = (2, 2, 2)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        step = update_step(model[1].config, sizes, ALGORITHM)
        new, _ = step(place(model, sizes=sizes), micro(batch, sizes=sizes))
    for tree in (new.params, first_moment(new)):
        for name, shape in (
            ("embedding", (28, 8)),
            ("final_norm", (8,)),
        ):  # 56 x 16 and 16, by tensor and fsdp
            [leaf] = jax.tree.leaves(tree[name])
            assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}


# Micro-batches


def hand_weights(loss_agg):
    """The weight of a token in each row, for six completions of 35 tokens in all."""
    assert COMPLETION_LENGTHS.sum() == 35
    return {
        "token-mean": np.full(6, 1 / 35),
        "seq-mean-token-sum": np.full(6, 1 / 6),
        "seq-mean-token-mean": 1 / (6 * COMPLETION_LENGTHS),
        "seq-mean-token-sum-norm": np.full(6, 1 / (6 * 10.0)),
    }[loss_agg]


def torch_token_losses(logprobs, entropy, batch, algorithm):
    """Each token's loss, in plain torch from the papers' formulas."""
    old, ref, advantages = (
        torch.tensor(x) for x in (batch.old_logprobs, batch.ref_logprobs, batch.advantages)
    )
    ratio = torch.exp(logprobs - old)
    clipped = torch.clamp(ratio, 1 - algorithm.clip_low, 1 + algorithm.clip_high)
    surrogate = torch.max(-advantages * ratio, -advantages * clipped)
    surrogate = torch.where(
        advantages < 0, torch.min(surrogate, -advantages * algorithm.dual_clip), surrogate
    )
    kl = torch.exp(ref - logprobs) - (ref - logprobs) - 1
    return surrogate + algorithm.kl_coef * kl - algorithm.entropy_coef * entropy, kl


def torch_update(torch_model, batch, weights, algorithm=ALGORITHM):
    """Loss, norm of its gradient, and the clipped gradient by Hugging Face's names, all by torch."""
    torch_model = copy.deepcopy(torch_model)
    logprobs, entropy = torch_logprobs(torch_model, batch)
    token_losses, _ = torch_token_losses(logprobs, entropy, batch, algorithm)
    loss = (token_losses * torch.tensor(weights[:, None] * batch.completion_mask)).sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(torch_model.parameters(), OPTIM.max_grad_norm)
    return loss.item(), norm.item(), {name: p.grad.numpy() for name, p in torch_model.named_parameters()}


def by_name(tree, model, path):
    """A tree like the parameters, by Hugging Face's names: by way of a folder, as test_hf.py tests it."""
    save_folder(path, tree, model[1].config, files_from=model[1].path, dtype="F32")
    return load_file(path / "model.safetensors")


def first_update_equals_torchs(got, expected, model, path):
    """Two frameworks: log-probabilities, and with them ratios and gradients, differ by some 1e-6 of their size."""
    (state, metrics), (loss, norm, torch_gradients) = got, expected
    assert metrics["actor/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-5)
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-4)
    tensors = by_name(gradients(state), model, path / "gradients")
    assert set(tensors) == set(torch_gradients)
    agree(tensors, torch_gradients, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "loss_agg", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
)
def test_two_micro_batches_give_the_gradient_of_the_whole_in_every_mode(model, batch, tmp_path, loss_agg):
    """Rows of 9 + 2 + 1 and 4 + 13 + 6 tokens: an average of the two micro-batches would be another loss."""
    algorithm = dataclasses.replace(ALGORITHM, loss_agg=loss_agg)
    expected = torch_update(model[0], batch, hand_weights(loss_agg), algorithm)
    actor = dataclasses.replace(ACTOR, micro_batch_size_per_device=3)
    got = run(model, batch, algorithm=algorithm, actor=actor)
    first_update_equals_torchs(got, expected, model, tmp_path)


@pytest.mark.parametrize("rows", [2, slow(1), slow(3)])
def test_micro_batches_equal_one_batch(model, batch, rows):
    actor = dataclasses.replace(ACTOR, micro_batch_size_per_device=rows)
    updates_agree(run(model, batch, actor=actor), run(model, batch))


def test_micro_batches_by_tokens_equal_one_batch(model, batch):
    actor = dataclasses.replace(ACTOR, micro_batch_tokens_per_device=2 * T)
    updates_agree(run(model, batch, actor=actor), run(model, batch))


@pytest.mark.parametrize("sizes", [slow(ONE), (2, 2, 2)], ids=str)
def test_packed_rows_give_the_update_of_one_completion_a_row(model, batch, sizes):
    """Rows of 96 tokens hold three sequences each, and each is computed as if it were alone."""
    updates_agree(run(model, batch, sizes=sizes, shape=(4, 6 * T)), run(model, batch))
    assert np.asarray(micro(batch, shape=(4, 6 * T))[0].segment_ids).max() == 3


def test_accumulators_of_half_precision_stay_near(model, batch):
    """bfloat16 keeps 8 bits: a sum of six terms is off by some 0.4 % of its largest term."""
    actor = dataclasses.replace(ACTOR, micro_batch_size_per_device=1)
    got, _ = run(model, batch, actor=actor, optim=dataclasses.replace(OPTIM, accumulator_dtype="bfloat16"))
    expected, _ = run(model, batch, actor=actor)
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    a, b = flat(gradients(got)), flat(gradients(expected))
    assert 1e-5 < np.linalg.norm(a - b) / np.linalg.norm(b) < 0.01


def test_rows_of_padding_weigh_nothing(model, batch, tmp_path):
    """Five rows in micro-batches of three: one row of padding. Their 29 tokens alone make the mean."""
    five = jax.tree.map(lambda x: x[:5], batch)
    actor = dataclasses.replace(ACTOR, micro_batch_size_per_device=3)
    assert [part.tokens.shape for part in micro(five, actor=actor)] == [(3, T), (3, T)]
    expected = torch_update(model[0], five, np.full(5, 1 / 29))
    first_update_equals_torchs(run(model, five, actor=actor), expected, model, tmp_path)


@pytest.mark.parametrize(
    ("rows", "tokens", "sizes", "shape"),
    [
        (100, 0, ONE, (1, 6, T)),
        (4, 0, ONE, (2, 3, T)),  # evenly, and not 4 + 2
        (100, 2 * T, ONE, (3, 2, T)),
        (100, 3 * T - 1, ONE, (3, 2, T)),  # 47 tokens hold two rows of 16
        (1, 100 * T, ONE, (1, 6, T)),  # tokens count where they are set
        (100, T - 1, ONE, (6, 1, T)),  # at least one row
        (1, 0, (2, 2, 2), (2, 4, T)),  # 6 rows over 4 data shards: 8
        (100, 0, (8, 1, 1), (1, 8, T)),
    ],
)
def test_shapes_of_micro_batches(batch, rows, tokens, sizes, shape):
    actor = dataclasses.replace(ACTOR, micro_batch_size_per_device=rows, micro_batch_tokens_per_device=tokens)
    placed = micro(batch, sizes=sizes, actor=actor)
    assert (len(placed), *placed[0].tokens.shape) == shape
    order = np.argsort(-(batch.segment_ids > 0).sum(axis=1), kind="stable")  # the longest come first
    for name in ("tokens", "completion_mask", "advantages", "old_logprobs"):
        field = np.concatenate([getattr(part, name) for part in placed])
        host = np.where(batch.segment_ids > 0, getattr(batch, name), 0)
        np.testing.assert_array_equal(field[:6], host[order])
        assert not field[6:].any()
    data_shards = sizes[0] * sizes[1]
    for part in placed:
        assert {s.data.shape for s in part.tokens.addressable_shards} == {(shape[1] // data_shards, T)}


def test_the_logits_of_all_tokens_never_exist(model, batch):
    """In the whole update as it is handed to the compiler; 6 rows x 16 columns x 56 words."""
    folder, mesh = model[1], mesh_of(*ONE)

    def largest_over_vocabulary(chunk_tokens):
        with jax.set_mesh(mesh):
            step = update_step(folder.config, ONE, ALGORITHM, chunk_tokens)
            params, part = place(model).params, micro(batch)[0]
            scores, kept = step.forward(params, part)
            text = step.forward.step.lower(params, inputs_of(part)).as_text()
            text += step.backward.lower(params, kept, scores, step.zeros(params, part), part, None).as_text()
        shapes = [
            [int(n) for n in dims.split("x")[:-1]] for dims in re.findall(r"tensor<([\dx]+x)f32>", text)
        ]
        return max(math.prod(shape) for shape in shapes if shape[-1] == VOCAB and len(shape) > 2)

    assert largest_over_vocabulary(6 * T) == 6 * T * VOCAB
    assert largest_over_vocabulary(12) == 6 * 2 * VOCAB


# Scores


@pytest.mark.parametrize("length", [T, 6 * T])  # one sequence a row, and up to three
@pytest.mark.parametrize("sizes", [ONE, (2, 2, 2)], ids=str)
def test_scores_equal_transformers(model, batch, sizes, length):
    folder, mesh = model[1], mesh_of(*sizes)
    rows = 2 * sizes[0] * sizes[1]
    with jax.set_mesh(mesh):
        score = make_forward_step(folder.config, mesh, temperature=TEMPERATURE, chunk_tokens=8)
        got = score_rows(score, load_params(folder, folder.config, mesh), batch, (rows, length), mesh)
    expected = torch_logprobs(model[0], batch)[0].detach().numpy() * batch.completion_mask
    assert got.dtype == np.float32 and got.shape == (6, T)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert not got[batch.completion_mask == 0].any()


# Updates that must not happen


@pytest.mark.parametrize(
    ("field", "poison"),
    [("advantages", np.nan), ("advantages", np.inf), ("old_logprobs", np.nan), ("ref_logprobs", np.nan)],
)
def test_a_loss_that_is_not_finite_changes_nothing(model, batch, field, poison):
    state, _ = run(model, batch)  # moments that are not zero
    values = np.array(getattr(batch, field))
    row, column = 3, 7 + 2  # the third completion token of row 3, whose prompt has 7
    assert batch.completion_mask[row, column] == 1
    values[row, column] = poison
    after, metrics = run(model, batch.replace(**{field: values}), state=state)
    jax.tree.map(np.testing.assert_array_equal, after, state)
    assert (after.step, metrics["actor/skipped_updates"]) == (1, 1)
    assert not np.isfinite(metrics["actor/loss"])
    # The next update goes on as if nothing had been.
    again, metrics = run(model, batch, state=after)
    assert (again.step, metrics["actor/skipped_updates"]) == (2, 0)
    expected, _ = run(model, batch, state=state)
    jax.tree.map(np.testing.assert_array_equal, again, expected)


def test_a_gradient_that_is_not_finite_changes_nothing(model, batch):
    """The loss may be finite where its gradient is not: 35 advantages of 1e37 sum up, their squares do not."""
    huge = batch.replace(advantages=batch.completion_mask * np.float32(1e37))
    after, metrics = run(model, huge)
    assert np.isfinite(metrics["actor/loss"]) and not np.isfinite(metrics["actor/grad_norm"])
    assert (after.step, metrics["actor/skipped_updates"]) == (0, 1)
    jax.tree.map(np.testing.assert_array_equal, after, on_host(place(model)))


def test_what_lies_outside_the_completions_is_not_read(model, batch):
    outside = batch.completion_mask == 0
    fields = ("advantages", "old_logprobs", "ref_logprobs", "sampler_logprobs")
    poisoned = batch.replace(**{f: np.where(outside, np.float32(np.nan), getattr(batch, f)) for f in fields})
    state, metrics = run(model, poisoned)
    expected, expected_metrics = run(model, batch)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert metrics == expected_metrics


# The optimizer


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1, 5: 1, 1000: 1}),
        ("constant", 4, {0: 1 / 4, 1: 2 / 4, 3: 1, 4: 1, 9: 1}),
        ("constant", 1, {0: 1, 1: 1}),
        ("linear", 0, {0: 1, 5: 1 / 2, 9: 1 / 10, 10: 0, 12: 0}),
        (
            "linear",
            4,
            {0: 1 / 4, 2: 3 / 4, 3: 1, 4: 1, 7: 1 / 2, 10: 0},
        ),  # six updates of decay: 7 is half way
        ("cosine", 0, {0: 1, 5: 1 / 2, 2.5: (1 + math.sqrt(0.5)) / 2, 10: 0}),
        ("cosine", 4, {0: 1 / 4, 3: 1, 4: 1, 6: 3 / 4, 7: 1 / 2, 8: 1 / 4, 10: 0}),  # cos 60 degrees = 1/2
    ],
)
def test_schedules_by_hand(schedule, warmup, expected):
    section = dataclasses.replace(OPTIM, learning_rate=0.02, schedule=schedule, warmup_steps=warmup)
    rate = make_schedule(section, num_updates=10)
    for update, share in expected.items():
        assert float(rate(update)) == pytest.approx(0.02 * share, abs=1e-8), update


def test_a_run_shorter_than_its_warm_up_has_a_schedule():
    section = dataclasses.replace(OPTIM, schedule="cosine", warmup_steps=8)
    assert float(make_schedule(section, num_updates=3)(2)) == pytest.approx(1e-3 * 3 / 8)


def test_the_optimizer_equals_torchs():
    """Three steps of given gradients, clipped as the update does it; the learning rate falls linearly."""
    rng = np.random.default_rng(0)
    section = dataclasses.replace(OPTIM, schedule="linear", learning_rate=0.03)
    values = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    optimizer = make_adamw(section, make_schedule(section, 4))
    params = {name: jnp.asarray(value) for name, value in values.items()}
    opt_state = optimizer.init(params)
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values.items()}
    adamw = torch.optim.AdamW(theirs.values(), lr=0.03, betas=(0.9, 0.99), weight_decay=0.1)
    clipped = []
    for step, scale in enumerate((1.0, 0.01, 3.0)):
        gradients = {
            name: (scale * rng.normal(size=v.shape)).astype(np.float32) for name, v in values.items()
        }
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        given = {name: jnp.asarray(g * min(1, 0.5 / norm)) for name, g in gradients.items()}
        updates, opt_state = optimizer.update(given, opt_state, params)
        params = optax.apply_updates(params, updates)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradients[name])
        clipped.append(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)) > 0.5)
        adamw.param_groups[0]["lr"] = 0.03 * (1 - step / 4)
        adamw.step()
        for name, parameter in theirs.items():
            np.testing.assert_allclose(params[name], parameter.detach(), rtol=0, atol=1e-6)
    assert clipped == [True, False, True]


def test_the_learning_rate_is_reported(model, batch):
    _, metrics = run(model, batch)
    assert metrics["actor/lr"] == 0.25  # what the schedule of these tests says


# The whole update


def test_the_update_equals_plain_pytorch(model, batch, tmp_path):
    """Two updates: same loss, same gradient norm, same parameters. The parameters' tolerance is 1 % of a step of
    AdamW, whose size is the learning rate: float32 rounding decides where a gradient is near its epsilon.
    """
    folder = model[1]
    torch_model = Qwen2ForCausalLM.from_pretrained(folder.path).eval()
    names = dict(torch_model.named_parameters())
    adamw = torch.optim.AdamW(names.values(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
    mask = torch.tensor(batch.completion_mask)
    mesh = mesh_of(*ONE)
    with jax.set_mesh(mesh):
        state = place(model)
        step = update_step(folder.config, ONE, ALGORITHM)
        for number in range(2):
            state, metrics = step(state, micro(batch))

            logprobs, entropy = torch_logprobs(torch_model, batch)
            token_losses, kl = torch_token_losses(logprobs, entropy, batch, ALGORITHM)
            mean = lambda x: (x * mask).sum() / mask.sum()
            loss = mean(token_losses)
            adamw.zero_grad()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(names.values(), 0.5)
            adamw.step()

            ratio = torch.exp(logprobs - torch.tensor(batch.old_logprobs))
            advantages = torch.tensor(batch.advantages)
            clipped = ((advantages > 0) & (ratio > 1.25)) | ((advantages < 0) & (ratio < 0.8))
            dual = (advantages < 0) & (ratio > 3)
            assert 0 < mean(clipped.float()) < 1 and mean(dual.float()) > 0 and norm > 0.5
            expected = {
                "actor/loss": loss,
                "actor/grad_norm": norm,
                "actor/entropy": mean(entropy),
                "kl/mean": mean(kl),
                "actor/pg_clipfrac": mean(clipped.float()),
                "actor/pg_clipfrac_lower": mean(dual.float()),
                "actor/ppo_kl": mean(torch.tensor(batch.old_logprobs) - logprobs),
            }
            for name, value in expected.items():
                assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-4, abs=1e-5), (number, name)
    saved = by_name(state.params, model, tmp_path / "saved")
    assert set(saved) == set(names)
    start = load_file(folder.path / "model.safetensors")
    for name, parameter in names.items():
        np.testing.assert_allclose(saved[name], parameter.detach(), rtol=0, atol=1e-5, err_msg=name)
        assert np.abs(saved[name] - start[name]).max() > 1e-3, name  # two steps of up to 1e-3 each


def test_the_first_update_needs_no_old_log_probabilities(model, batch, tmp_path):
    """They are those of the policy itself: ratio 1 everywhere, nothing clipped."""
    logprobs = torch_logprobs(model[0], batch)[0].detach().numpy() * batch.completion_mask
    filled = batch.replace(old_logprobs=logprobs)
    expected = torch_update(model[0], filled, hand_weights("token-mean"))
    state, metrics = run(model, batch.replace(old_logprobs=None))
    first_update_equals_torchs((state, metrics), expected, model, tmp_path)
    assert metrics["actor/pg_clipfrac"] == metrics["actor/ppo_kl"] == 0


# Donation, precision


def test_the_state_is_donated_and_a_copy_survives(model, batch):
    mesh = mesh_of(*ONE)
    state = place(model)
    before = on_host(state.params)
    copies = []
    for dtype in (jnp.float32, jnp.bfloat16):
        section = dataclasses.replace(ALGORITHM, ref_offload=False)
        reference = Reference(section, dataclasses.replace(model[1].config, dtype=dtype), mesh)
        reference.copy_from(state.params)
        copies.append(reference.params)
    with jax.set_mesh(mesh):
        step = update_step(model[1].config, ONE, ALGORITHM)
        new, _ = step(state, micro(batch))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
    jax.tree.map(np.testing.assert_array_equal, copies[0], before)
    jax.tree.map(lambda h, b: np.testing.assert_array_equal(h, b.astype(jnp.bfloat16)), copies[1], before)
    jax.tree.map(
        lambda after, before: np.testing.assert_array_compare(np.not_equal, after, before), new.params, before
    )


def test_bfloat16_activations_stay_near_float32(model, batch):
    """bfloat16 rounds to 2^-9 = 0.2 %, some twenty times in a row. Without old log-probabilities, since a ratio
    that crosses a clipping bound changes the gradient by a jump.
    """
    config = dataclasses.replace(model[1].config, dtype=jnp.bfloat16)
    first = batch.replace(old_logprobs=None)
    expected, expected_metrics = run(model, first)
    state, metrics = run(model, first, config=config)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}
    for name in ("actor/loss", "actor/grad_norm", "actor/entropy", "kl/mean"):
        assert metrics[name] == pytest.approx(expected_metrics[name], rel=0.05), name
        assert metrics[name] != expected_metrics[name]  # it is not float32 after all
    flat = lambda tree: np.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)])
    got, want = flat(gradients(state)), flat(gradients(expected))
    assert got @ want / (np.linalg.norm(got) * np.linalg.norm(want)) > 0.99


# Optimizer state on the host


OFFLOADED = dataclasses.replace(OPTIM, offload=True)


def run_several(model, batches, sizes, dtype=jnp.float32, optim=OFFLOADED):
    """Updates with the state where `optim` says; the last state, and the metrics of each."""
    config = dataclasses.replace(model[1].config, dtype=dtype)
    mesh = mesh_of(*sizes)
    with jax.set_mesh(mesh):
        # As a model's folder in bfloat16 would have them: the masters begin with what the devices hold.
        rounded = load_params(model[1], optimizer_class(OFFLOADED).stored_model(config), mesh)
        optimizer = optimizer_for(config, sizes, optim)
        state = optimizer.init_state(
            jax.tree.map(lambda x: x.astype(optimizer.stored_model(config).param_dtype), rounded)
        )
        step, metrics = update_step(config, sizes, ALGORITHM, optim=optim), []
        for batch in batches:
            state, summary = step(state, micro(batch, sizes=sizes))
            metrics.append({name: float(value) for name, value in summary.items()})
    return state, metrics


def parts_of(state, name):
    """A part of the offloaded state, as a tree like the parameters."""
    part = {"master": lambda s: s.master, "mu": lambda s: s.inner[0].mu, "nu": lambda s: s.inner[0].nu}[name]
    return jax.tree.map(part, state.opt_state, is_leaf=lambda x: isinstance(x, LeafState))


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((1, 1, 1), jnp.bfloat16),
        pytest.param((2, 4, 1), jnp.bfloat16, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), jnp.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_where_the_optimizers_state_lives_changes_nothing(model, batch, sizes, dtype):
    """Three updates, the second of which is skipped: the same metrics, parameters and moments."""
    broken = batch.replace(advantages=np.full_like(batch.advantages, np.nan))
    batches = (batch, broken, batch)
    there, their_metrics = run_several(model, batches, sizes, dtype)
    here, metrics = run_several(model, batches, sizes, dtype, optim=OPTIM)
    for ours, theirs in zip(metrics, their_metrics, strict=True):
        assert theirs == pytest.approx(ours, rel=1e-6, abs=1e-7, nan_ok=True)
    assert [m["actor/skipped_updates"] for m in metrics] == [0, 1, 0]
    assert int(there.step) == int(here.step) == 2
    masters = there.params if dtype == jnp.float32 else parts_of(there, "master")
    agree(on_host(masters), on_host(here.params), atol=1e-6)
    agree(on_host(parts_of(there, "mu")), on_host(first_moment(here)), atol=1e-7)
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(dtype), np.float32), here.params)
    agree(jax.tree.map(lambda x: np.asarray(x, np.float32), there.params), rounded, atol=1e-6, rtol=2**-7)


def test_offloaded_state_is_pinned_on_the_host_and_split_like_its_parameter(model, batch):
    state, _ = run_several(model, [batch], (1, 4, 2))
    for name in ("mu", "nu"):
        for moment, param in zip(
            jax.tree.leaves(parts_of(state, name)), jax.tree.leaves(state.params), strict=True
        ):
            assert moment.sharding.memory_kind == "pinned_host"
            assert moment.sharding.spec == param.sharding.spec
            assert param.sharding.memory_kind == "device"


@pytest.mark.parametrize(
    ("dtype", "param_dtype", "moments"),
    [
        (jnp.float32, jnp.float32, "bfloat16"),
        (jnp.bfloat16, jnp.float32, "bfloat16"),
        (jnp.bfloat16, jnp.bfloat16, "float32"),
        (jnp.float32, jnp.bfloat16, "float32"),
    ],
)
def test_offloaded_state_in_other_dtypes(model, batch, dtype, param_dtype, moments):
    """Devices hold the narrower of both dtypes; there is a master only where that is not the parameters' own."""
    optim = dataclasses.replace(OFFLOADED, moments_dtype=moments)
    config = dataclasses.replace(model[1].config, dtype=dtype, param_dtype=param_dtype)
    mesh, optimizer = mesh_of(*ONE), optimizer_for(config, ONE, optim)
    with jax.set_mesh(mesh):
        params = load_params(model[1], optimizer.stored_model(config), mesh)
        start = on_host(params)
        state = optimizer.init_state(params)
        step = update_step(config, ONE, ALGORITHM, optim=optim)
        state, _ = step(state, micro(batch.replace(advantages=np.full_like(batch.advantages, np.nan))))
        jax.tree.map(np.testing.assert_array_equal, on_host(state.params), start)  # nor rounded
        state, metrics = step(state, micro(batch))
    narrow = jnp.bfloat16 if jnp.bfloat16 in (dtype, param_dtype) else jnp.float32
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(narrow)}
    assert {x.dtype for x in jax.tree.leaves(parts_of(state, "nu"))} == {jnp.dtype(moments)}
    masters = jax.tree.leaves(parts_of(state, "master"))
    assert {x.dtype for x in masters} == ({jnp.dtype(jnp.float32)} if narrow != param_dtype else set())
    assert metrics["actor/skipped_updates"] == 0 and metrics["actor/grad_norm"] > 0.5


def test_masters_are_what_the_folder_holds_and_not_what_the_device_computes_with(model, tmp_path):
    """A float32 folder goes through a bfloat16 run without an update and comes out as it was."""
    config = dataclasses.replace(model[1].config, dtype=jnp.bfloat16)
    optimizer, mesh = optimizer_for(config, (1, 8, 1), OFFLOADED), mesh_of(1, 8, 1)
    with jax.set_mesh(mesh):
        state = optimizer.init_state(param_readers(model[1], config, mesh))
        assert {x.dtype for x in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.bfloat16)}
        masters = optimizer.masters(state)
        assert {x.sharding.memory_kind for x in jax.tree.leaves(masters)} == {"pinned_host"}
        save_folder(tmp_path / "out", masters, config, files_from=model[1].path, dtype="F32")
    stored, saved = (load_file(path / "model.safetensors") for path in (model[1].path, tmp_path / "out"))
    assert stored.keys() == saved.keys()
    for name in stored:
        np.testing.assert_array_equal(saved[name], stored[name])


def test_the_first_state_is_never_whole_on_a_device(model, monkeypatch):
    """Not even before it is put away: the embedding [28, 16] is split by 8 over fsdp, and so are its moments."""
    seen, put = [], jax.device_put
    monkeypatch.setattr(jax, "device_put", lambda x, *args: seen.append(x) or put(x, *args))
    config, sizes = model[1].config, (1, 8, 1)
    optimizer, mesh = optimizer_for(config, sizes, OFFLOADED), mesh_of(*sizes)
    with jax.set_mesh(mesh):
        optimizer.init_state(load_params(model[1], optimizer.stored_model(config), mesh))
    embeddings = [x.inner[0] for x in seen if isinstance(x, LeafState) and x.inner[0].mu.shape == (VOCAB, 16)]
    assert len(embeddings) == 1
    for moment in (embeddings[0].mu, embeddings[0].nu):
        assert moment.addressable_shards[0].data.shape == (VOCAB, 2)


def test_the_streamed_update_begins_with_the_smallest_parameter_and_gives_gradients_back(model, monkeypatch):
    """What `grpo_jax.plan` counts on."""
    config, mesh = model[1].config, mesh_of(*ONE)
    optimizer, seen, put = optimizer_for(config, ONE, OFFLOADED), [], jax.device_put
    with jax.set_mesh(mesh):
        state = optimizer.init_state(load_params(model[1], optimizer.stored_model(config), mesh))
        sizes = sorted(x.size for x in jax.tree.leaves(state.params))
        grads = jax.tree.map(lambda x: jnp.ones(x.shape, jnp.float32), state.params)
        apply = optimizer.make_apply(lambda total, step, scale: (jnp.float32(1), jnp.bool_(True), {}))

        def noted(x, *args):
            if isinstance(x, LeafState) and x.inner[0].mu.sharding.memory_kind == "pinned_host":
                alive = sum(grad.size for grad in jax.tree.leaves(grads) if not grad.is_deleted())
                seen.append((x.inner[0].mu.size, alive))
            return put(x, *args)

        monkeypatch.setattr(jax, "device_put", noted)
        apply(state, (grads, None))
    assert seen == [(size, sum(sizes[i:])) for i, size in enumerate(sizes)] and sizes[0] < sizes[-1]
    assert all(grad.is_deleted() for grad in jax.tree.leaves(grads))


@pytest.mark.parametrize("is_offloaded", [False, True])
def test_gradients_below_the_clipping_norm_stay_as_they_are(model, batch, is_offloaded):
    """mu is (1 - beta1) times the gradient, whose norm is the one reported."""
    optim = dataclasses.replace(OPTIM, max_grad_norm=1e3, offload=is_offloaded)
    state, metrics = run_several(model, [batch], ONE, optim=optim)
    moments = parts_of(state, "mu") if is_offloaded else first_moment(state)
    norm = float(optax.tree.norm(on_host(moments))) / (1 - OPTIM.beta1)
    assert norm == pytest.approx(metrics[0]["actor/grad_norm"], rel=1e-5) and norm > 0.5


def test_moments_are_stored_in_the_dtype_that_is_configured():
    """After one update mu is (1 - beta1) times the gradient; bfloat16 keeps 8 of its 24 bits."""
    section = dataclasses.replace(OPTIM, moments_dtype="bfloat16")
    optimizer = make_adamw(section, lambda step: 1e-3)
    params = {"w": jnp.ones(3, jnp.float32)}
    grads = {"w": jnp.asarray([0.1, -0.2, 1.0], jnp.float32)}
    updates, state = optimizer.update(grads, optimizer.init(params), params)
    adam = state[0]
    assert adam.mu["w"].dtype == adam.nu["w"].dtype == jnp.bfloat16 and adam.count.dtype == jnp.int32
    np.testing.assert_allclose(np.asarray(adam.mu["w"], np.float32), [0.01, -0.02, 0.1], rtol=2**-8)
    # The step itself is made before they are rounded: sign of the gradient, and weight decay of 0.1.
    np.testing.assert_allclose(updates["w"], [-1.1e-3, 0.9e-3, -1.1e-3], rtol=1e-5)
