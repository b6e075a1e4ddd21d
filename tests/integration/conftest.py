"""Shared by the whole-loop tests: folders that several tests read."""

import integration_helpers as helpers
import jax
import pytest


@pytest.fixture(scope="session")
def reward_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("reward") / "my_reward.py"
    path.write_text(helpers.REWARD_FILE)
    return path


@pytest.fixture(scope="session")
def whole_run_overrides(reward_file):
    """Two epochs of three steps, two updates a step, a reference model; what is free to differ differs."""
    return {
        "reward.function": f"{reward_file}:score",
        "algorithm.kl_coef": 0.1,
        "actor.num_minibatches": 2,
        "trainer.total_epochs": 2,
        "eval.before_training": True,
        "eval.every_steps": 2,
        "checkpoint.every_steps": 4,
        "checkpoint.hf_every_epochs": 1,
        "logging.num_text_samples": 2,
        "logging.save_rollouts": True,
    }


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, whole_run_overrides):
    """A finished run that tests read and must not change: (workdir, what was printed)."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    return workdir, helpers.train_ok(workdir, whole_run_overrides)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A Hugging Face folder with a tiny random Qwen2-shaped model, and a tokenizer for arithmetic problems."""
    from grpo_jax.config import MeshSection, RandomModelSection
    from grpo_jax.data import arithmetic
    from grpo_jax.model import random_model
    from grpo_jax.model.sharding import make_mesh

    folder = tmp_path_factory.mktemp("models") / "tiny"
    splits = arithmetic.generate_splits(
        num_train=50, num_val=0, num_sft=0, difficulty=1, direct_share=0.0, seed=0
    )
    texts = [row["prompt"][0]["content"] for row in splits["train"]]
    tokenizer = random_model.make_tokenizer(texts, 300)
    section = RandomModelSection(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, num_kv_heads=1
    )
    mesh = make_mesh(MeshSection(1, 1, 1), jax.devices()[:1])
    random_model.make_random_model(folder, section, tokenizer, seed=0, mesh=mesh)
    return folder
