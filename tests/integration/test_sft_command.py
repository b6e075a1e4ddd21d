"""The warm start: it learns, train uses what `python -m grpo_jax.sft` made, and would have made the same."""

import re
import shutil

import integration_helpers as helpers
import pyarrow.parquet as pq
import pytest
import torch

from grpo_jax import sft

OVERRIDES = {
    "sft.num_steps": 25,
    "arithmetic.direct_share": 1.0,  # answers as short as "#### 12", which fit 8 tokens
    "trainer.num_steps": 1,
}


@pytest.fixture(scope="module")
def overrides(whole_run_overrides):
    return whole_run_overrides | OVERRIDES


@pytest.fixture(scope="module")
def warm_started(tmp_path_factory, overrides):
    """A workdir after `python -m grpo_jax.sft`, and what that printed."""
    workdir = tmp_path_factory.mktemp("sft") / "run"
    result = helpers.call(sft.main, helpers.train_argv(workdir, overrides))
    assert result.code == 0, result.err
    return workdir, result.out


def mean_nll(folder, rows):
    """Nats a token of the answers (and EOS) under a model, computed by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = [*tokenizer(row["extra_info"]["answer"])["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt_ids + answer_ids])
        with torch.no_grad():
            logprobs = model(ids).logits[0].log_softmax(-1)
        for t in range(len(prompt_ids), ids.shape[1]):
            total -= float(logprobs[t - 1, ids[0, t]])
            count += 1
    return total / count


def test_the_loss_falls(warm_started):
    workdir, out = warm_started
    lines = re.findall(r"^  update (\d+)/25: loss=([\d.]+)$", out, re.M)
    assert [int(step) for step, _ in lines] == [5, 10, 15, 20, 25]
    reported = [float(loss) for _, loss in lines]
    assert reported == sorted(reported, reverse=True)
    rows = pq.read_table(workdir / "data" / "sft.parquet").to_pylist()
    assert len(rows) == 40
    before, after = (mean_nll(workdir / name, rows) for name in ("random-model", "sft-model"))
    assert 5 < before < 6.5  # an untrained model knows nothing: log 300 = 5.7
    assert after < before / 2
    assert after == pytest.approx(reported[-1], rel=0.25)  # of the last batch, the learning rate near 0


def test_it_leaves_a_model_and_no_run(warm_started):
    workdir, _ = warm_started
    assert str(workdir / "sft-model") in warm_started[1]
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "lock", "config.json", "beginning.json", "train.log", "data", "random-model", "sft-model"
    }  # fmt: skip


def test_it_does_not_overwrite_its_model(warm_started, overrides):
    workdir, _ = warm_started
    before = helpers.tree_digest(workdir)
    result = helpers.call(sft.main, helpers.train_argv(workdir, overrides))
    assert result.code == 2 and result.err.count("\n") == 1
    assert "--workdir" in result.err and "already holds sft-model" in result.err
    assert helpers.tree_digest(workdir) == before


def test_train_uses_it_and_would_have_made_the_same(warm_started, overrides, tmp_path):
    before_train = tmp_path / "before"
    shutil.copytree(warm_started[0], before_train)
    out = helpers.train_ok(before_train, overrides)
    assert "warm start" not in out and str(before_train / "sft-model") in out
    by_train = tmp_path / "by_train"
    out = helpers.train_ok(by_train, overrides)
    assert "warm start: 25 updates of 16 examples" in out
    for name in ("random-model", "sft-model", "data", "rollouts", "checkpoint-final"):
        assert helpers.tree_digest(before_train / name) == helpers.tree_digest(by_train / name), name
    assert helpers.read_checkpoint(before_train, 1) == helpers.read_checkpoint(by_train, 1)
    # And it is the warm-started model that GRPO began with, and changed.
    tensors = [helpers.read_tensors(by_train / n) for n in ("random-model", "sft-model", "checkpoint-final")]
    assert tensors[0] != tensors[1] != tensors[2]


def test_a_warm_start_that_was_interrupted_is_made_again(warm_started, overrides, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(warm_started[0], workdir)
    (workdir / "sft-model").rename(workdir / "sft-model.tmp")  # as it is called while it is written
    (workdir / "sft-model.tmp" / "model.safetensors").unlink()
    result = helpers.call(sft.main, helpers.train_argv(workdir, overrides))
    assert result.code == 0, result.err
    assert helpers.tree_digest(workdir / "sft-model") == helpers.tree_digest(warm_started[0] / "sft-model")
    assert not (workdir / "sft-model.tmp").exists()
