"""The scores of every program on the same tokens, and what is made of them."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from config_helpers import gsm8k
from tiny_models import save_tiny_model, tiny_torch_model

from grpo_jax.config import MeshSection
from grpo_jax.model.hf import inspect_folder
from grpo_jax.model.sharding import make_mesh
from grpo_jax.run import mismatch, mismatch_report
from grpo_jax.types import Prompt

VOCAB, TOP_K, TEMPERATURE = 61, 5, 0.7


class Digits:
    pad_token_id, eos_token_id = 0, None

    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    save_tiny_model(folder, "qwen2", vocab_size=VOCAB, eos_token_id=None)
    return folder


@pytest.fixture(scope="module")
def compared(model_path):
    """Returns `compared(**changes)`: the groups that were sampled, and the comparison."""
    rng = np.random.default_rng(0)
    prompts = [
        Prompt(f"test/{i}", tuple(map(int, rng.integers(0, VOCAB, 4 + i))), "", "", "test", {})
        for i in range(3)
    ]

    def compare(**changes):
        config = gsm8k(
            **{
                "model.path": str(model_path),
                "model.dtype": "float32",
                "rollout.engine": "local",
                "rollout.temperature": TEMPERATURE,
                "data.max_prompt_length": 8,
                "data.max_response_length": 10,
                "actor.micro_batch_size_per_device": 2,
                "optim.offload": False,
                "algorithm.ref_offload": False,
            }
            | changes
        )
        seen = []
        batch_of = mismatch.make_train_batch

        def spy(groups, **options):
            seen.extend(groups)
            return batch_of(groups, **options)

        folder = inspect_folder(model_path, config.model)
        mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mismatch, "make_train_batch", spy)
            found = mismatch.compare(config, folder, Digits(), prompts, mesh, float32_head=None)
        return config, seen, found

    return compare


@pytest.fixture(scope="module")
def in_float32(compared):
    return compared()


@pytest.fixture(scope="module")
def in_bfloat16(compared):
    return compared(**{"model.dtype": "bfloat16"})


def logits_of(group):
    """transformers' logits for each token of the completion over the temperature, [tokens, V] float64."""
    import torch

    prompt, completion = group.prompt.token_ids, group.completions[0].token_ids
    with torch.no_grad():
        model = tiny_torch_model("qwen2", vocab_size=VOCAB, eos_token_id=None)
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double().numpy()
    return logits[len(prompt) - 1 : -1] / TEMPERATURE


def log_softmax_of(logits, ids):
    return logits[np.arange(len(ids)), ids] - np.log(np.exp(logits).sum(axis=1))


@pytest.mark.slow
def test_in_float32_engine_and_trainer_are_transformers(in_float32):
    _, groups, found = in_float32
    expected = np.concatenate(
        [log_softmax_of(logits_of(g), list(g.completions[0].token_ids)) for g in groups]
    )
    assert expected.shape == (30,)  # one completion of 10 tokens a prompt: no EOS ends them
    assert set(found.logprobs) == {
        mismatch.SAMPLED, mismatch.GIVEN, mismatch.TRAINER, mismatch.GRADIENTS, mismatch.HEAD, mismatch.TRUTH,
        "bfloat16", "float16",
    }  # fmt: skip
    for key in (mismatch.SAMPLED, mismatch.GIVEN, mismatch.TRAINER, mismatch.HEAD, mismatch.TRUTH):
        np.testing.assert_allclose(found.logprobs[key], expected, atol=1e-5, rtol=0, err_msg=key)
    np.testing.assert_array_equal(found.logprobs[mismatch.GRADIENTS], found.logprobs[mismatch.TRAINER])


@pytest.mark.slow
def test_fewer_bits_are_farther_from_float32(in_float32, in_bfloat16):
    truth = in_float32[2].logprobs[mismatch.TRUTH]
    of = lambda dtype: mismatch_report.difference(in_float32[2].logprobs[dtype], truth).nats
    assert 1e-3 < of("bfloat16") < 0.5
    assert of("bfloat16") / 20 < of("float16") < of("bfloat16") / 3  # 3 bits more: about 8 times nearer
    _, _, found = in_bfloat16
    assert "bfloat16" not in found.logprobs  # it is the trainer's own
    own = mismatch_report.difference(found.logprobs[mismatch.TRAINER], found.logprobs[mismatch.TRUTH]).nats
    assert 1e-3 < own < 0.5


def written_out(groups):
    """log p of each token among the `TOP_K` likeliest, and the log of their part of the whole, [tokens] each."""
    cut, mass = [], []
    for group in groups:
        ids, logits = list(group.completions[0].token_ids), logits_of(group)
        kept = np.sort(np.exp(logits), axis=1)[:, -TOP_K:].sum(axis=1)
        cut.append(logits[np.arange(len(ids)), ids] - np.log(kept))
        mass.append(np.log(kept / np.exp(logits).sum(axis=1)))
    return np.concatenate(cut), np.concatenate(mass)


@pytest.fixture(scope="module")
def cut_in_float32(compared):
    return compared(**{"rollout.top_k": TOP_K})


@pytest.mark.slow
def test_where_the_engine_tells_what_it_cut_off_the_trainer_cuts_it_too(cut_in_float32):
    _, groups, found = cut_in_float32
    cut, _ = written_out(groups)
    for key in (mismatch.SAMPLED, mismatch.TRAINER, mismatch.HEAD, mismatch.TRUTH):
        np.testing.assert_allclose(found.logprobs[key], cut, atol=1e-5, err_msg=key)
    assert "whole distribution" in found.missing[mismatch.GIVEN]
    assert not {mismatch.GIVEN, mismatch.UNTRUNCATED, mismatch.TRUNCATED} & set(found.logprobs)


@pytest.fixture(scope="module")
def cut_unseen(compared):
    """As with vLLM, which does not tell."""
    make_train_batch = mismatch.make_train_batch
    forget = lambda groups, **options: dataclasses.replace(make_train_batch(groups, **options), drawable=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mismatch, "make_train_batch", forget)
        return compared(**{"rollout.top_k": TOP_K})


@pytest.mark.slow
def test_what_top_k_cuts_off_is_a_written_out_softmax(cut_unseen):
    _, groups, found = cut_unseen
    cut, mass = written_out(groups)
    np.testing.assert_allclose(found.logprobs[mismatch.TRUNCATED], cut, atol=1e-5)
    np.testing.assert_allclose(found.logprobs[mismatch.SAMPLED], cut, atol=1e-5)
    np.testing.assert_allclose(found.logprobs[mismatch.UNTRUNCATED], cut + mass, atol=1e-5)
    np.testing.assert_allclose(found.logprobs[mismatch.GIVEN], cut + mass, atol=1e-5)
    first, *rest = mismatch_report.budget(found)
    assert first.what == "top_p and top_k" and first.share > 0.99
    assert first.size.nats == pytest.approx(np.abs(mass).mean(), rel=1e-4)
    assert all(step.size.nats < 1e-5 for step in rest)
    # To leave it is the one thing that helps.
    assert mismatch_report.settings(found)[0].setting == "rollout.top_p=1 and rollout.top_k=0"


# What is made of scores, from numbers that are easily worked out


def made_up(dtype="bfloat16", attention="cudnn", **of):
    logprobs = {key: np.log(np.array(p)) for key, p in of.items()}
    return mismatch.Comparison(logprobs, {}, dtype, attention)


NAMES = {
    "sampled": mismatch.SAMPLED, "given": mismatch.GIVEN, "head_given": mismatch.GIVEN_HEAD,
    "trainer": mismatch.TRAINER, "plain": mismatch.PLAIN, "head": mismatch.HEAD,
    "plain_head": mismatch.PLAIN_HEAD, "truth": mismatch.TRUTH,
}  # fmt: skip


def comparison(dtype="bfloat16", attention="cudnn", **of):
    """Args: of: probabilities of the tokens by the keys of `NAMES`, or by the name of a dtype."""
    return made_up(dtype, attention, **{NAMES.get(name, name): p for name, p in of.items()})


def test_the_four_differences():
    d = mismatch_report.difference(np.log([0.5, 0.5]), np.log([0.25, 0.5]))
    assert d.nats == pytest.approx(math.log(2) / 2)
    assert d.prob == pytest.approx(0.125) and d.max_prob == pytest.approx(0.25)
    assert d.factor == pytest.approx((2 + 1) / 2)
    assert d.square == pytest.approx(math.log(2) ** 2 / 2)
    broken = mismatch_report.difference(np.array([np.nan]), np.log([0.5])).to_dict()
    assert set(broken.values()) == {None}


def test_the_budget_goes_by_way_of_float32():
    found = comparison(
        sampled=[0.5],
        given=[0.25],
        head_given=[0.25],
        truth=[0.5],
        plain_head=[0.5],
        plain=[0.5],
        trainer=[0.125],
    )
    steps = mismatch_report.budget(found)
    two = math.log(2)
    assert [step.size.nats for step in steps] == pytest.approx([two, 0, two, 0, 0, 2 * two])
    assert [step.share for step in steps] == pytest.approx([1 / 6, 0, 1 / 6, 0, 0, 4 / 6])
    assert steps[-1].what == "the trainer's cudnn attention"
    assert steps[1].what == "the engine's head in bfloat16"


def test_steps_that_could_not_be_measured_fall_together():
    found = comparison(sampled=[0.5], truth=[0.5], head=[0.5], trainer=[0.25], attention="plain")
    whats = [step.what for step in mismatch_report.budget(found)]
    assert whats[0] == (
        "the engine's way of decoding: token by token, or all at once + the engine's head in bfloat16 + "
        "the engine's bfloat16 and kernels"
    )
    assert whats[1:] == ["the trainer's bfloat16", "the trainer's head in bfloat16"]


def test_the_settings_that_lower_it_most():
    # Engine and trainer are 0.04 apart: 0.03 of the engine's, 0.01 of the trainer's.
    found = comparison(
        sampled=[0.53], given=[0.53], truth=[0.5], trainer=[0.49], plain=[0.48], head=[0.50], float16=[0.501]
    )
    best, second, *rest = mismatch_report.settings(found)
    # Both sides round independently, the engine three times as much: 0.001 x sqrt(1 + 3^2).
    assert best.setting == "model.dtype=float32" and best.prob == 0
    assert second.setting == "model.dtype=float16"
    assert second.prob == pytest.approx(0.001 * math.sqrt(10), rel=1e-5)
    assert [s.setting for s in rest] == ["the trainer's head in float32"]  # plain attention makes it worse
    assert rest[0].prob == pytest.approx(0.03, rel=1e-5)


def test_the_engines_head_is_compared_with_the_engine_given_the_same_tokens():
    # Decoding differs more than being given the tokens does; the head halves the latter.
    found = comparison(sampled=[0.54], given=[0.52], head_given=[0.51], trainer=[0.5], truth=[0.5])
    setting = next(s for s in mismatch_report.settings(found) if "head_dtype" in s.setting)
    assert setting.prob == pytest.approx(0.02, rel=1e-5) and setting.is_estimate


def test_errors_that_cancel_out_have_no_shares():
    """Engine and trainer are both log 2 from float32, in the same direction: the way is 0, and not 1.4 log 2."""
    alike = comparison(sampled=[0.25], truth=[0.5], trainer=[0.25])
    apart = comparison(sampled=[0.25], truth=[0.5], trainer=[0.9])
    says = lambda found: "\n".join(mismatch_report.report_lines(found, gsm8k()))
    assert "cancels out" in says(alike) and "squares about do" not in says(alike)
    assert "squares about do" in says(apart) and "cancels out" not in says(apart)


def test_what_overflows_is_never_advised():
    found = comparison(sampled=[0.53], truth=[0.5], trainer=[0.49], float16=[np.nan])
    assert [s.setting for s in mismatch_report.settings(found)] == ["model.dtype=float32"]
    text = "\n".join(mismatch_report.report_lines(found, gsm8k()))
    assert "nan" in text


def test_the_report_says_what_is_missing_and_what_corrects():
    found = comparison(sampled=[0.53], truth=[0.5], trainer=[0.49])
    found = dataclasses.replace(found, missing={mismatch.GIVEN: "vLLM scores given tokens at temperature 1"})
    text = "\n".join(mismatch_report.report_lines(found, gsm8k()))
    assert "not available: vLLM scores given tokens at temperature 1" in text
    assert "algorithm.rollout_is=token does not lower it" in text and "rollout.max_lag=0 adds none" in text
    changes = {"algorithm.rollout_is": "token", "rollout.max_lag": 2}
    text = "\n".join(mismatch_report.report_lines(found, gsm8k(**changes)))
    assert (
        "The loss corrects what is left" in text
        and "rollout.max_lag=2 adds what up to 2 steps change" in text
    )
    content = mismatch_report.report_json(found, gsm8k())
    assert content["not_available"] == found.missing
    assert content["whole"]["prob"] == pytest.approx(0.04, rel=1e-5)
