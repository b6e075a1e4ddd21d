"""Whole runs in float16, and with a distribution that is cut."""

import integration_helpers as helpers
import pytest
from tiny_models import save_tiny_model


def of_steps(workdir, name):
    return [line[name] for line in helpers.read_lines(workdir) if name in line]


@pytest.mark.slow
def test_the_loss_scale_goes_through_an_interruption(tmp_path, whole_run_overrides):
    """Doubled by every update that does not overflow, two in a step; the model is the same to the last bit."""
    overrides = whole_run_overrides | {
        "model.dtype": "float16",
        "optim.loss_scale": 2.0,
        "optim.loss_scale_growth": 1,
        "checkpoint.hf_every_epochs": 0,
    }
    helpers.train_ok(tmp_path / "whole", overrides | {"trainer.num_steps": 4})
    for steps in (2, 4):
        helpers.train_ok(tmp_path / "pieces", overrides | {"trainer.num_steps": steps})
    for workdir in (tmp_path / "whole", tmp_path / "pieces"):
        # The mean of a step's two updates: (2 + 4) / 2, (8 + 16) / 2, ...
        assert of_steps(workdir, "actor/loss_scale") == [3, 12, 48, 192]
        assert of_steps(workdir, "actor/overflows") == [0, 0, 0, 0]
    models = [helpers.tree_digest(tmp_path / name / "checkpoint-final") for name in ("whole", "pieces")]
    assert models[0] == models[1]


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [0, 6])
def test_a_cut_distribution_is_the_trainers_too(tmp_path, whole_run_overrides, dynamic):
    """Sampler and trainer in float32 agree on every token, before the first update; leftover groups as well."""
    overrides = whole_run_overrides | {"rollout.top_p": 0.7, "rollout.top_k": 40, "actor.num_minibatches": 1}
    if dynamic:
        overrides |= {"algorithm.dynamic_sampling_rounds": dynamic, "algorithm.rollout_is": "token"}
    for steps in (2, 3):
        helpers.train_ok(tmp_path / "run", overrides | {"trainer.num_steps": steps})
    assert max(of_steps(tmp_path / "run", "training/rollout_probs_diff_max")) < (1e-4 if not dynamic else 1)
    assert of_steps(tmp_path / "run", "kl/mean")[0] == 0  # the reference's distribution is cut likewise
    assert all(entropy < 3.69 for entropy in of_steps(tmp_path / "run", "actor/entropy"))  # log 40


@pytest.mark.slow
def test_a_model_that_overflows_is_refused_by_the_layer(tmp_path, whole_run_overrides, model_folder):
    """Layer 1 of 2 adds a million times what it should."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = save_tiny_model(tmp_path / "model", vocab_size=len(tokenizer), tie_word_embeddings=True)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight *= 1e6
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    overrides = whole_run_overrides | {"model.path": tmp_path / "model", "model.dtype": "float16"}
    result = helpers.run_train(tmp_path / "run", overrides)
    assert result.code == 2 and result.err.count("\n") == 1, result.err
    for words in ("model.dtype='float16'", "layer 1 (of 2", "65,504", "bfloat16"):
        assert words in result.err
