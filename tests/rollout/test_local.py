"""The local engine against transformers' greedy decoding, the softmax in numpy, and the trainer."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import torch
from family_models import LLAMA3_ROPE
from tiny_models import save_tiny_model

from grpo_jax.config import MeshSection
from grpo_jax.learner.batching import make_train_batch
from grpo_jax.learner.forward import make_forward_step, score_rows
from grpo_jax.model.hf import ModelFolder, inspect_folder, load_params
from grpo_jax.model.logprobs import unpack_bits
from grpo_jax.model.sharding import make_mesh
from grpo_jax.rollout import SamplingParams, make_engine
from grpo_jax.rollout.local import LocalEngine, gumbel_noise, sample_completions, sample_token
from grpo_jax.types import Prompt

VOCAB = 48
KEYS = dict(vocab_size=VOCAB, tie_word_embeddings=False, eos_token_id=None, pad_token_id=0)
FAMILIES = {
    "qwen2": ("qwen2", KEYS),
    "qwen3": ("qwen3", dict(KEYS, head_dim=8)),
    "llama3": ("llama", dict(KEYS, head_dim=8, rope_parameters=LLAMA3_ROPE)),
}


class Model:
    """One random model in both frameworks."""

    def __init__(self, torch_model, folder):
        self.torch_model, self.folder, self.config = torch_model, folder, folder.config
        self._params = {}

    def params(self, *sizes):
        if sizes not in self._params:
            self._params[sizes] = load_params(self.folder, self.config, mesh_of(*sizes))
        return self._params[sizes]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Returns `model(family)`: every weight random, biases and norms too, so that greedy text is varied."""
    made = {}

    def model(family):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            kind, keys = FAMILIES[family]
            torch_model = save_tiny_model(path, kind, seed=3, scale=0.4, **keys)
            made[family] = Model(torch_model, inspect_folder(path))
        return made[family]

    return model


def mesh_of(*sizes):
    return make_mesh(MeshSection(*sizes), jax.devices()[: math.prod(sizes)])


def make_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Prompt(f"test/{i}", tuple(map(int, rng.integers(0, VOCAB, n))), "", "", "test", {})
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def sample(models, tokenizer):
    """Returns `sample(prompts, ...)`: groups from a fresh engine, greedy unless told otherwise."""

    def sample(
        prompts, *, family="qwen2", stops=(), batch_size=64, sizes=(1, 1, 1), seed=0, scan=True, **sampling
    ):
        model = models(family)
        config = dataclasses.replace(model.config, scan_layers=scan)
        engine = LocalEngine(config, mesh_of(*sizes), tokenizer, tuple(stops), batch_size)
        engine.load_weights(model.params(*sizes), 0)
        defaults = dict(num_samples=1, temperature=0.0, max_tokens=12)
        return engine.generate(prompts, SamplingParams(**(defaults | sampling)), seed=seed)

    return sample


def ids(groups):
    return [[list(completion.token_ids) for completion in group.completions] for group in groups]


def transformers_greedy(model, prompt, max_tokens, stops=()):
    """One prompt at a time: nothing that padding could change."""
    inputs = torch.tensor([prompt.token_ids])
    output = model.torch_model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=max_tokens,
        do_sample=False,
        eos_token_id=list(stops) or None,
        pad_token_id=0,
    )
    return output[0, inputs.shape[1] :].tolist()


def probabilities(model, token_ids, temperature=1.0):
    """Softmax of transformers' logits after `token_ids`, float64 [V]."""
    with torch.no_grad():
        logits = model.torch_model(torch.tensor([token_ids])).logits[0, -1].double().numpy() / temperature
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


# Greedy

LENGTHS = (3, 20, 7, 17, 1)  # not in order, and in two buckets of columns


@pytest.mark.parametrize(
    ("family", "lengths", "scan"),
    [
        ("qwen2", LENGTHS, True),
        ("qwen3", (3, 14, 7, 11, 1), True),
        ("qwen3", (3, 14, 7, 11, 1), False),
        ("llama3", (3, 14, 7, 11, 1), True),
    ],
)
def test_greedy_equals_transformers_token_by_token(models, sample, family, lengths, scan):
    prompts = make_prompts(*lengths)
    expected = [[transformers_greedy(models(family), prompt, 12)] for prompt in prompts]
    assert len({token for [row] in expected for token in row}) > 10  # it does not say the same all the time
    groups = sample(prompts, family=family, scan=scan, batch_size=2)  # three batches, the last one filled up
    assert ids(groups) == expected
    assert [group.prompt for group in groups] == prompts
    assert {c.finish_reason for group in groups for c in group.completions} == {"length"}


def test_greedy_log_probabilities_are_the_models_own(models, sample):
    prompts = make_prompts(*LENGTHS)
    group = sample(prompts, batch_size=2)[2]
    [completion] = group.completions
    text = list(group.prompt.token_ids)
    for token, logprob in zip(completion.token_ids, completion.sampler_logprobs, strict=True):
        assert logprob == pytest.approx(math.log(probabilities(models("qwen2"), text)[token]), abs=1e-4)
        text.append(token)


@pytest.mark.parametrize(
    ("sizes", "scan"),
    [((8, 1, 1), True), ((1, 8, 1), True), ((2, 2, 2), True), ((2, 2, 2), False), ((1, 1, 4), True)],
)
def test_every_mesh_gives_the_greedy_tokens_of_one_device(models, sample, sizes, scan):
    """Five prompts divide by none of the meshes' 8 or 4 batch shards."""
    prompts = make_prompts(*LENGTHS)
    expected = [[transformers_greedy(models("qwen2"), prompt, 12)] for prompt in prompts]
    assert ids(sample(prompts, sizes=sizes, scan=scan)) == expected


# Stopping


def test_stop_tokens_end_a_completion_and_belong_to_it(models, sample):
    prompts = make_prompts(*LENGTHS)
    model = models("qwen2")
    free = [transformers_greedy(model, prompt, 12) for prompt in prompts]
    # Tokens that these prompts say by themselves: the fifth of one of them and the third of another.
    stops = (free[0][4], free[1][2])
    expected = [transformers_greedy(model, prompt, 12, stops) for prompt in prompts]
    assert len({len(row) for row in expected}) > 2 and {12} < {len(row) for row in expected}
    groups = sample(prompts, stops=stops)
    assert ids(groups) == [[row] for row in expected]
    for group, row in zip(groups, expected, strict=True):
        [completion] = group.completions
        assert completion.finish_reason == ("stop" if row[-1] in stops else "length")
        assert len(completion.sampler_logprobs) == len(row)


def test_a_first_token_that_stops_makes_a_completion_of_one_token(models, sample):
    prompts = make_prompts(4, 9)
    first = transformers_greedy(models("qwen2"), prompts[0], 1)
    for max_tokens in (12, 1):
        group, other = sample(prompts, stops=first, max_tokens=max_tokens)
        assert ids([group]) == [[first]]
        assert group.completions[0].finish_reason == "stop"
        assert len(group.completions[0].sampler_logprobs) == 1
    assert ids([other]) == [[transformers_greedy(models("qwen2"), prompts[1], 1)]]
    assert other.completions[0].finish_reason == "length"


def test_a_stop_token_on_the_last_place_is_a_stop(models, sample):
    [prompt] = make_prompts(4)
    row = transformers_greedy(models("qwen2"), prompt, 12)
    length = next(n for n in range(2, 12) if row[n - 1] not in row[: n - 1])
    [group] = sample([prompt], stops=[row[length - 1]], max_tokens=length)
    assert ids([group]) == [[row[:length]]]
    assert group.completions[0].finish_reason == "stop"


def test_completions_do_not_depend_on_a_limit_that_they_do_not_reach(models, sample):
    prompts = make_prompts(3, 5)
    rows = [transformers_greedy(models("qwen2"), prompt, 12) for prompt in prompts]
    stops = (rows[0][3], rows[1][5])
    short, long = (sample(prompts, stops=stops, max_tokens=n) for n in (6, 300))
    assert ids(short) == ids(long)
    assert {c.finish_reason for group in long for c in group.completions} == {"stop"}


def test_sampling_ends_when_all_rows_have_stopped(models):
    """A step writes the log-probability of its token in every row, so columns of zeros are steps not taken."""
    model = models("qwen2")
    prompts = make_prompts(3, 5)
    rows = [transformers_greedy(model, prompt, 12) for prompt in prompts]
    stops = (rows[0][3], rows[1][5])
    lengths = [next(n for n, token in enumerate(row, 1) if token in stops) for row in rows]
    tokens = np.zeros((4, 16), np.int32)  # two prompts and two empty rows, which must not keep it going
    for row, prompt in enumerate(prompts):
        tokens[row, 16 - len(prompt.token_ids) :] = prompt.token_ids
    with jax.set_mesh(mesh_of(1, 1, 1)):
        _, logprobs, counts, stopped, _ = sample_completions(
            model.params(1, 1, 1),
            jnp.asarray(tokens),
            jnp.array([3, 5, 0, 0]),
            jnp.arange(4),
            jax.random.key(0),
            config=model.config,
            sampling=SamplingParams(num_samples=1, temperature=0.0, max_tokens=50),
            stop_token_ids=stops,
        )
    assert counts.tolist() == [*lengths, 0, 0]
    assert stopped.all()
    steps = np.asarray(logprobs[:2] != 0).any(axis=0)
    assert steps.tolist() == [t < max(lengths) for t in range(50)]


def test_the_factory_gathers_every_stop_token(models, tokenizer, rollout_section):
    section = rollout_section(engine="local", temperature=1.0, batch_size=8, stop_token_ids=(41, 7))
    model = models("qwen2")
    mesh = mesh_of(1, 1, 1)
    folder = ModelFolder(Path("unread"), model.config, {}, "F32", eos_token_ids=(5, 7))
    engine = make_engine(section, folder=folder, mesh=mesh, tokenizer=tokenizer, max_model_len=70)
    assert isinstance(engine, LocalEngine)
    engine.load_weights(model.params(1, 1, 1), 3)
    assert tokenizer.eos_token_id == 2
    prompts = make_prompts(*[6] * 40)
    groups = engine.generate(prompts, SamplingParams(1, 1.0, 64), seed=0)
    seen = set()
    for completion in (c for group in groups for c in group.completions):
        *before, last = completion.token_ids
        assert not {2, 5, 7, 41} & set(before)
        assert (completion.finish_reason == "stop") == (last in {2, 5, 7, 41})
        assert completion.policy_version == 3
        assert completion.text == tokenizer.decode(completion.token_ids, skip_special_tokens=True)
        seen.add(last)
    assert {2, 5, 7, 41} <= seen  # each of them ended a completion


def test_no_stop_token_at_all_is_logged(models, tokenizer, caplog):
    LocalEngine(models("qwen2").config, mesh_of(1, 1, 1), tokenizer, (), 8)
    assert "EOS" in caplog.text


# Sampling

DRAWS = 6000
TEMPERATURE = 0.7


@pytest.fixture(scope="module")
def many(sample):
    """One prompt, thousands of completions of two tokens."""
    [group] = sample(
        make_prompts(5), num_samples=DRAWS, batch_size=DRAWS, temperature=TEMPERATURE, max_tokens=2
    )
    return group


def fits(counts, expected_probabilities):
    """The p-value of Pearson's chi-square test; outcomes that are expected less than 5 times are one outcome."""
    expected = expected_probabilities * counts.sum()
    rare = expected < 5
    observed = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    keep = expected > 0
    return scipy.stats.chisquare(observed[keep], expected[keep]).pvalue


def test_sampled_frequencies_fit_the_softmax(models, many):
    prompt = many.prompt.token_ids
    first = np.array([completion.token_ids[0] for completion in many.completions])
    counts = np.bincount(first, minlength=VOCAB)
    assert fits(counts, probabilities(models("qwen2"), prompt, TEMPERATURE)) > 1e-3
    # The test can tell: without the temperature it would not fit.
    assert fits(counts, probabilities(models("qwen2"), prompt, 1.0)) < 1e-6


def test_second_tokens_fit_the_softmax_given_the_first(models, many):
    first, second = np.array([completion.token_ids for completion in many.completions]).T
    checked = 0
    for token in range(VOCAB):
        counts = np.bincount(second[first == token], minlength=VOCAB)
        if counts.sum() < 500:
            continue
        expected = probabilities(models("qwen2"), (*many.prompt.token_ids, token), TEMPERATURE)
        assert fits(counts, expected) > 1e-4
        checked += 1
    assert checked >= 2


def test_log_probabilities_are_those_of_the_sampled_distribution(models, many):
    model, prompt = models("qwen2"), many.prompt.token_ids
    expected = np.log(probabilities(model, prompt, TEMPERATURE))
    for completion in many.completions[:25]:
        first, second = completion.token_ids
        after = np.log(probabilities(model, (*prompt, first), TEMPERATURE))
        np.testing.assert_allclose(completion.sampler_logprobs, [expected[first], after[second]], atol=1e-4)


def truncated(p, top_k, top_p):
    """The documented rule, on float64 probabilities: the top_k most likely, then the fewest that reach top_p."""
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    within = p[kept] / p[kept].sum()
    needed = next(n for n in range(1, len(kept) + 1) if n == len(kept) or within[:n].sum() >= top_p)
    result = np.zeros_like(p)
    result[kept[:needed]] = p[kept[:needed]] / p[kept[:needed]].sum()
    return result


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (0, 0.8), (6, 0.7), (1, 1.0), (0, 1e-6)])
def test_truncated_distributions(models, top_k, top_p):
    temperature, num = 1.3, 1500
    [prompt] = make_prompts(5)
    full = probabilities(models("qwen2"), prompt.token_ids, temperature)
    expected = truncated(full, top_k, top_p)
    if (top_k, top_p) == (6, 0.7):  # both rules act; top-p first, or top-p of the whole, would keep more
        assert np.count_nonzero(expected) < min(6, np.count_nonzero(truncated(full, 0, top_p)))
    logits = jnp.tile(temperature * jnp.log(jnp.asarray(full, jnp.float32))[None], (num, 1))
    keys = jax.random.split(jax.random.key(0), num)
    sampling = SamplingParams(1, temperature, 1, top_p=top_p, top_k=top_k)
    sampled = jax.jit(sample_token, static_argnums=2)(logits, keys, sampling)
    tokens, logprobs, drawable = map(np.asarray, sampled)
    np.testing.assert_array_equal(unpack_bits(drawable, VOCAB), np.tile(expected > 0, (num, 1)))
    assert expected[expected > 0].min() * num > 15  # missed by chance: e^-15
    assert set(tokens) == set(np.flatnonzero(expected))
    assert len(set(tokens)) == 1 or fits(np.bincount(tokens, minlength=VOCAB), expected) > 1e-3
    np.testing.assert_allclose(logprobs, np.log(expected[tokens]), rtol=0, atol=1e-5)


def test_the_engine_truncates_after_every_token(models, sample):
    groups = sample(
        make_prompts(5), num_samples=200, batch_size=200, temperature=1.3, max_tokens=3, top_k=6, top_p=0.7
    )
    for completion in groups[0].completions[:15]:
        text = list(groups[0].prompt.token_ids)
        for token, logprob in zip(completion.token_ids, completion.sampler_logprobs, strict=True):
            expected = truncated(probabilities(models("qwen2"), text, 1.3), 6, 0.7)
            assert logprob == pytest.approx(math.log(expected[token]), abs=1e-4)  # log 0 would raise
            text.append(token)


def test_truncation_by_hand():
    # Probabilities 0.5, 0.25, 0.15, 0.1. Top-p 0.7 needs two of them, 0.8 three; top-k 3 then 0.8 needs two,
    # as 0.5 and 0.25 are 0.83 of the three.
    logits = jnp.log(jnp.tile(jnp.array([[0.15, 0.5, 0.1, 0.25]]), (400, 1)))
    keys = jax.random.split(jax.random.key(0), 400)
    for top_k, top_p, expected in [
        (0, 0.4, {1: 1.0}),
        (0, 0.7, {1: 2 / 3, 3: 1 / 3}),
        (0, 0.8, {1: 5 / 9, 3: 2.5 / 9, 0: 1.5 / 9}),
        (3, 0.8, {1: 2 / 3, 3: 1 / 3}),
        (2, 1.0, {1: 2 / 3, 3: 1 / 3}),
        (9, 1.0, {0: 0.15, 1: 0.5, 2: 0.1, 3: 0.25}),  # more than there are
    ]:
        sampling = SamplingParams(1, 1.0, 1, top_p=top_p, top_k=top_k)
        tokens, logprobs, _ = sample_token(logits, keys, sampling)
        got = dict(zip(tokens.tolist(), np.exp(logprobs).tolist(), strict=True))
        assert got == pytest.approx(expected, abs=1e-6)


@pytest.mark.slow
def test_gumbel_noise_has_its_whole_tail():
    """-log(-log u) ends at 16.6 where u has 24 bits. The largest of n is log n, here 18, give or take 1.3."""
    largest = jax.jit(lambda key: jnp.max(gumbel_noise(key[None], 2**22)))
    assert max(float(largest(key)) for key in jax.random.split(jax.random.key(0), 16)) > 16.7


def test_temperature_comes_before_top_p_by_hand():
    # Probabilities 0.5, 0.3, 0.2 at temperature 0.5 are proportional to 25, 9, 4: 0.66 reach top_p 0.6 alone.
    logits = jnp.log(jnp.tile(jnp.array([[0.5, 0.3, 0.2]]), (200, 1)))
    tokens, logprobs, _ = sample_token(
        logits, jax.random.split(jax.random.key(0), 200), SamplingParams(1, 0.5, 1, top_p=0.6)
    )
    assert set(tokens.tolist()) == {0}
    np.testing.assert_allclose(logprobs, 0, atol=1e-6)


def draws(sample, prompts, **changes):
    return sample(prompts, num_samples=3, temperature=TEMPERATURE, max_tokens=12, stops=(1, 2), **changes)


@pytest.mark.parametrize("cut", [{}, {"top_k": 6, "top_p": 0.7}], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_log_probabilities_equal_the_trainers(models, sample, sizes, cut):
    """Where the sampler cuts its distribution, the trainer's is cut at the same tokens."""
    model, mesh = models("qwen2"), mesh_of(*sizes)
    groups = draws(sample, make_prompts(*LENGTHS), sizes=sizes, **cut)
    assert len({len(completion.token_ids) for group in groups for completion in group.completions}) > 2
    batch = make_train_batch(groups, pad_id=0)
    with jax.set_mesh(mesh):
        score = make_forward_step(model.config, mesh, temperature=TEMPERATURE, chunk_tokens=16)
        logprobs = score_rows(score, model.params(*sizes), batch, (4, batch.tokens.shape[1]), mesh)
    is_certain = batch.sampler_logprobs == 0  # nothing else could be drawn
    assert is_certain[batch.completion_mask > 0].any() == bool(cut)
    assert np.count_nonzero(logprobs) == (batch.completion_mask * ~is_certain).sum() > 50
    np.testing.assert_allclose(batch.sampler_logprobs, logprobs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "scan", "batch_size"), [((1, 1, 1), False, 4), ((2, 2, 2), True, 64)], ids=str
)
def test_given_completions_are_scored_by_the_whole_distribution(
    models, sample, tokenizer, sizes, scan, batch_size
):
    """Against transformers; 5 prompts with 2 completions fill batches of 4 and 4 batch shards up."""
    model = models("qwen2")
    groups = sample(
        make_prompts(*LENGTHS), num_samples=2, temperature=TEMPERATURE, top_k=3, max_tokens=9, stops=(1,)
    )
    config = dataclasses.replace(model.config, scan_layers=scan)
    engine = LocalEngine(config, mesh_of(*sizes), tokenizer, (), batch_size)
    engine.load_weights(model.params(*sizes), 0)
    scores = engine.score(groups, temperature=TEMPERATURE)
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    for (prompt, completion), ours in zip(pairs, scores, strict=True):
        assert len(ours) == len(completion.token_ids) and ours.dtype == np.float32
        text = list(prompt.token_ids)
        for token, logprob in zip(completion.token_ids, ours, strict=True):
            assert logprob == pytest.approx(
                math.log(probabilities(model, text, TEMPERATURE)[token]), abs=1e-4
            )
            text.append(token)


# Seeds


def test_the_seed_decides_whatever_the_batch_size_and_the_mesh(sample):
    prompts = make_prompts(*LENGTHS)
    whole = ids(draws(sample, prompts))
    assert ids(draws(sample, prompts)) == whole
    for batch_size in (1, 7):
        assert ids(draws(sample, prompts, batch_size=batch_size)) == whole
    assert ids(draws(sample, prompts, sizes=(2, 2, 2))) == whole
    other = ids(draws(sample, prompts, seed=1))
    assert all(a != b for a, b in zip(whole, other, strict=True))


def test_samples_of_a_group_and_equal_prompts_differ(sample):
    [prompt] = make_prompts(20)
    rows = [tuple(row) for group in ids(draws(sample, [prompt] * 5)) for row in group]
    assert len(set(rows)) == 15


def test_a_completion_depends_on_its_place_and_not_on_its_neighbours(sample):
    prompts = make_prompts(*LENGTHS)
    whole = ids(draws(sample, prompts))
    for lengths in ((30, 1, 1, 25, 12), (9, 1, 1, 2, 16)):  # the second in fewer columns
        neighbours = make_prompts(*lengths, seed=5)
        neighbours[2] = prompts[2]
        assert ids(draws(sample, neighbours))[2] == whole[2]
    moved = ids(draws(sample, [prompts[1], prompts[0], *prompts[2:]]))
    assert moved[0] != whole[1] and moved[1] != whole[0] and moved[2:] == whole[2:]


# Cost


def test_compilations_are_few_over_varying_prompt_lengths(models, tokenizer):
    model, mesh = models("qwen2"), mesh_of(1, 1, 1)
    engine = LocalEngine(model.config, mesh, tokenizer, (2,), 4)
    engine.load_weights(model.params(1, 1, 1), 0)
    sampling = SamplingParams(num_samples=2, temperature=1.0, max_tokens=3)
    before = sample_completions._cache_size()
    for longest in range(5, 33, 3):
        engine.generate(make_prompts(longest, 2, longest - 4, 3, 5), sampling, seed=longest)
    # Lengths up to 32 are padded to 16 or 32 columns; five prompts by two make batches of two, the last one too.
    assert sample_completions._cache_size() - before == 2
    engine.generate(make_prompts(33, 33), sampling, seed=0)
    assert sample_completions._cache_size() - before == 3
