"""The configuration of the whole-loop tests: configs/quickstart.py, made so small that a step takes no time."""

from pathlib import Path

from grpo_jax.config import load_config

ROOT = Path(__file__).resolve().parent.parent.parent

TINY = {  # whatever a test relies on stands here
    "model.path": "random",
    "model.dtype": "float32",
    "model.param_dtype": "float32",
    "model.remat": "none",
    "model.scan_layers": False,
    "random_model.vocab_size": 300,
    "random_model.hidden_size": 32,
    "random_model.intermediate_size": 48,
    "random_model.num_layers": 1,
    "random_model.num_heads": 2,
    "random_model.num_kv_heads": 1,
    "data.train_batch_size": 4,
    "data.max_prompt_length": 80,
    "data.max_response_length": 8,
    "data.shuffle": True,
    "arithmetic.num_train": 13,  # 3 steps an epoch; one problem is left over in each
    "arithmetic.num_val": 5,
    "arithmetic.num_sft": 40,
    "arithmetic.difficulty": 1,
    "arithmetic.direct_share": 0.0,
    "sft.num_steps": 0,
    "sft.batch_size": 16,
    "sft.learning_rate": 1e-2,
    "algorithm.adv_estimator": "grpo",
    "algorithm.group_size": 4,
    "algorithm.loss_agg": "token-mean",
    "algorithm.kl_coef": 0.0,
    "algorithm.kl_in": "loss",
    "algorithm.entropy_coef": 0.0,
    "optim.learning_rate": 1e-2,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "actor.num_minibatches": 1,
    "actor.num_epochs": 1,
    "actor.micro_batch_size_per_device": 64,
    "actor.micro_batch_tokens_per_device": 0,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "rollout.top_k": 0,
    "reward.num_workers": 1,
    "reward.on_error": "stop",
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
    "eval.before_training": False,
    "eval.every_epochs": 0,
    "eval.every_steps": 0,
    "eval.num_prompts": 0,
    "eval.temperature": 0.0,
    "eval.num_samples": 1,
    "checkpoint.every_epochs": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.hf_every_epochs": 0,
    "checkpoint.max_to_keep": 2,
    "trainer.total_epochs": 1,
    "trainer.num_steps": 0,
    "trainer.seed": 0,
}


def get_config():
    config = load_config(ROOT / "configs" / "quickstart.py")
    config.update_from_flattened_dict(TINY)
    return config
