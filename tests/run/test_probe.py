"""What tells an engine that computes something else: a difference of log-probabilities."""

import functools

import jax
import numpy as np
import pytest
from weight_sync_helpers import VOCAB, Model, mesh_of

from grpo_jax.learner.forward import make_forward_step, score_rows
from grpo_jax.rollout import SamplingParams
from grpo_jax.rollout.local import LocalEngine
from grpo_jax.run.probe import PROBE_PROMPTS, PROBE_TOKENS, make_probe
from grpo_jax.types import Prompt
from grpo_jax.weight_sync.wire import WeightSyncError

TEMPERATURE = 0.7
THRESHOLD = 1e-3  # nats; the same functions on the same parameters differ by about 1e-6


class Digits:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture(scope="module")
def mesh():
    return mesh_of(1, 1, 1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model("qwen3", tmp_path_factory.mktemp("qwen3"))


@pytest.fixture(scope="module")
def engine(model, mesh):
    engine = LocalEngine(model.config, mesh, Digits(), (), 16)
    engine.load_weights(model.params(1, 1, 1), 0)
    return engine


@pytest.fixture(scope="module")
def score(model, mesh):
    step = make_forward_step(model.config, mesh, temperature=TEMPERATURE, chunk_tokens=16)
    return functools.partial(score_rows, step, shape=(4, 48), mesh=mesh)


@pytest.fixture
def probe(score):
    """Returns `probe(...)`: 6 prompts, sampled with 3 completions of 12 tokens in the rollouts."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"test/{i}", tuple(map(int, rng.integers(0, VOCAB, 5))), "", "", "test", {}) for i in range(6)
    ]

    def make(score=score, **sampling):
        sampling = SamplingParams(**(dict(num_samples=3, temperature=TEMPERATURE, max_tokens=12) | sampling))
        return make_probe(prompts, sampling, score, threshold=THRESHOLD, pad_id=0)

    return make


def test_a_probe_is_short(probe):
    made = probe(max_tokens=100)
    assert [prompt.prompt_id for prompt in made.prompts] == [f"test/{i}" for i in range(PROBE_PROMPTS)]
    assert (made.sampling.num_samples, made.sampling.max_tokens) == (1, PROBE_TOKENS)
    assert made.sampling.temperature == TEMPERATURE
    assert probe().sampling.max_tokens == 12  # never longer than rollouts are


def test_the_same_parameters_pass(model, mesh, engine, probe):
    with jax.set_mesh(mesh):
        assert 0 <= probe()(engine, model.params(1, 1, 1)) < THRESHOLD / 10


def test_other_parameters_are_refused(model, mesh, engine, probe):
    params = jax.tree.map(lambda x: 1.05 * x, model.params(1, 1, 1))
    with (
        jax.set_mesh(mesh),
        pytest.raises(WeightSyncError, match=r"rollout\.probe_threshold=0\.001") as caught,
    ):
        probe()(engine, params)
    assert "on 48 tokens" in str(caught.value)  # 4 prompts, 12 tokens each: no EOS ends them
    assert "rollout.engine_args" in str(caught.value)


def test_one_leaf_that_is_old_is_refused(model, mesh, engine, probe):
    params = dict(model.params(1, 1, 1))
    params["final_norm"] = {"scale": params["final_norm"]["scale"] * 1.05}
    with jax.set_mesh(mesh), pytest.raises(WeightSyncError, match="probe_threshold"):
        probe()(engine, params)


def shifted(by_token):
    """A trainer whose log-probabilities differ from the engine's by so much on each token of a completion."""

    def score(params, batch):
        mask = np.asarray(batch.completion_mask)
        number = np.cumsum(mask, axis=1) - 1  # of the token in its completion
        return np.asarray(batch.sampler_logprobs) + np.where(mask > 0, by_token(number), 0)

    return score


@pytest.fixture(scope="module")
def replay(engine):
    """An engine that always says the same, whatever the sampling: nothing is compiled again."""

    class Replay:
        def __init__(self):
            self.groups = []

        def generate(self, prompts, sampling, *, seed):
            self.groups = self.groups or engine.generate(prompts, sampling, seed=seed)
            return self.groups

    return Replay()


def test_the_mean_is_taken_over_the_tokens_of_completions(replay, probe):
    # 0.0006 and 0 in turn: 0.0003 on average over 12 tokens, and much less over the padded rows.
    assert probe(shifted(lambda n: 6e-4 * (n % 2)))(replay, None) == pytest.approx(3e-4, rel=1e-3)
    assert probe(shifted(lambda n: 6e-4 * (-1) ** n))(replay, None) == pytest.approx(
        6e-4, rel=1e-3
    )  # no signs


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_difference_that_is_no_number_is_refused(replay, probe, value):
    with pytest.raises(WeightSyncError, match="probe_threshold"):
        probe(shifted(lambda n: np.where(n == 3, value, 0)))(replay, None)


@pytest.mark.parametrize(
    ("is_stale", "suspect"),
    [(True, "prefix cache holds values of older weights"), (False, "rollout.engine_args")],
)
def test_the_suspect_is_named(engine, probe, is_stale, suspect):
    """A trainer that differs by 0.1 on prompts of 5 tokens, as they are probed, and perhaps on others too."""

    def score(params, batch):
        is_probe = np.asarray(batch.completion_mask)[0].argmax() == 5  # the column where completions begin
        difference = 0.1 if is_probe or not is_stale else 0.0
        return np.asarray(batch.sampler_logprobs) + difference

    with pytest.raises(WeightSyncError) as caught:
        probe(score)(engine, None)
    assert suspect in str(caught.value)
    assert "differ by 0.1 nats" in str(caught.value)
