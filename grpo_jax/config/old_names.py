"""What verl and TRL call a setting, and which key of ours it is, for those who write its name out of habit.

docs/from_verl.md and docs/from_trl.md say more, also of values that have other names.
"""

OLD_NAME = "is a name of verl or TRL"
ROOT = "actor_rollout_ref."

VERL = {
    "data.filter_overlong_prompts": "data.overlong_prompts",
    "data.truncation": "data.overlong_prompts",
    "data.apply_chat_template_kwargs": "data.chat_template_args",
    "data.seed": "trainer.seed",
    "model.enable_gradient_checkpointing": "model.remat",
    "model.lora_rank": "lora.rank",
    "model.lora_alpha": "lora.alpha",
    "model.target_modules": "lora.targets",
    "model.lora_adapter_path": "lora.path",
    "actor.ppo_mini_batch_size": "actor.num_minibatches",
    "actor.ppo_micro_batch_size_per_gpu": "actor.micro_batch_size_per_device",
    "actor.ppo_max_token_len_per_gpu": "actor.micro_batch_tokens_per_device",
    "actor.use_dynamic_bsz": "actor.micro_batch_tokens_per_device",
    "actor.ppo_epochs": "actor.num_epochs",
    "actor.optim.lr": "optim.learning_rate",
    "actor.optim.lr_warmup_steps": "optim.warmup_steps",
    "actor.optim.weight_decay": "optim.weight_decay",
    "actor.grad_clip": "optim.max_grad_norm",
    "actor.clip_ratio_low": "algorithm.clip_low",
    "actor.clip_ratio_high": "algorithm.clip_high",
    "actor.clip_ratio_c": "algorithm.dual_clip",
    "actor.loss_agg_mode": "algorithm.loss_agg",
    "actor.use_kl_loss": "algorithm.kl_in",
    "actor.kl_loss_coef": "algorithm.kl_coef",
    "actor.kl_loss_type": "algorithm.kl_estimator",
    "actor.entropy_coeff": "algorithm.entropy_coef",
    "actor.policy_loss.loss_mode": "algorithm.policy_loss",
    "actor.fsdp_config.optimizer_offload": "optim.offload",
    "ref.log_prob_micro_batch_size_per_gpu": "actor.micro_batch_size_per_device",
    "ref.fsdp_config.param_offload": "algorithm.ref_offload",
    "rollout.name": "rollout.engine",
    "rollout.n": "algorithm.group_size",
    "rollout.tensor_model_parallel_size": "rollout.tensor_parallel_size",
    "rollout.free_cache_engine": "rollout.sleep",
    "rollout.max_num_batched_tokens": "rollout.engine_args",
    "rollout.log_prob_micro_batch_size_per_gpu": "actor.micro_batch_size_per_device",
    "rollout.checkpoint_engine.backend": "rollout.weight_sync",
    "rollout.checkpoint_engine.update_weights_bucket_megabytes": "rollout.bucket_mb",
    "rollout.val_kwargs.temperature": "eval.temperature",
    "rollout.val_kwargs.n": "eval.num_samples",
    "algorithm.norm_adv_by_std_in_grpo": "algorithm.adv_estimator",
    "algorithm.use_kl_in_reward": "algorithm.kl_in",
    "algorithm.kl_penalty": "algorithm.kl_estimator",
    "algorithm.kl_ctrl.kl_coef": "algorithm.kl_coef",
    "algorithm.kl_ctrl.target_kl": "algorithm.kl_target",
    "algorithm.kl_ctrl.horizon": "algorithm.kl_horizon",
    "algorithm.rollout_correction.rollout_is": "algorithm.rollout_is",
    "algorithm.rollout_correction.rollout_is_threshold": "algorithm.rollout_is_threshold",
    "algorithm.rollout_correction.bypass_mode": "algorithm.old_logprobs",
    "algorithm.filter_groups.enable": "algorithm.dynamic_sampling_rounds",
    "algorithm.filter_groups.max_num_gen_batches": "algorithm.dynamic_sampling_rounds",
    "reward_model.overlong_buffer.len": "reward.overlong_buffer",
    "reward_model.overlong_buffer.penalty_factor": "reward.overlong_penalty",
    "custom_reward_function.path": "reward.function",
    "trainer.total_training_steps": "trainer.num_steps",
    "trainer.logger": "logging.loggers",
    "trainer.project_name": "logging.project_name",
    "trainer.experiment_name": "logging.experiment_name",
    "trainer.save_freq": "checkpoint.every_steps",
    "trainer.test_freq": "eval.every_steps",
    "trainer.val_before_train": "eval.before_training",
    "trainer.max_actor_ckpt_to_keep": "checkpoint.max_to_keep",
    "trainer.resume_mode": "checkpoint.resume",
    "trainer.log_val_generations": "logging.num_text_samples",
    "trainer.rollout_data_dir": "logging.save_rollouts",
}
"""verl's name, without `ROOT` -> key."""

TRL = {
    "per_device_train_batch_size": "data.train_batch_size",
    "gradient_accumulation_steps": "actor.micro_batch_size_per_device",
    "steps_per_generation": "actor.num_minibatches",
    "num_generations": "algorithm.group_size",
    "num_iterations": "actor.num_epochs",
    "max_completion_length": "data.max_response_length",
    "beta": "algorithm.kl_coef",
    "epsilon": "algorithm.clip_low",
    "epsilon_high": "algorithm.clip_high",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "importance_sampling_level": "algorithm.policy_loss",
    "loss_type": "algorithm.loss_agg",
    "ref_model_sync_steps": "algorithm.ref_refresh_every",
    "scale_rewards": "algorithm.adv_estimator",
    "chat_template_kwargs": "data.chat_template_args",
    "lr_scheduler_type": "optim.schedule",
    "adam_beta1": "optim.beta1",
    "adam_beta2": "optim.beta2",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "gradient_checkpointing": "model.remat",
    "reward_funcs": "reward.function",
    "reward_weights": "reward.weights",
    "vllm_mode": "rollout.placement",
    "use_vllm": "rollout.engine",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization",
    "vllm_tensor_parallel_size": "rollout.tensor_parallel_size",
    "vllm_enable_sleep_mode": "rollout.sleep",
    "vllm_importance_sampling_mode": "algorithm.rollout_is",
    "vllm_importance_sampling_cap": "algorithm.rollout_is_threshold",
    "num_train_epochs": "trainer.total_epochs",
    "max_steps": "trainer.num_steps",
    "eval_steps": "eval.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.max_to_keep",
    "run_name": "logging.experiment_name",
    "report_to": "logging.loggers",
    "log_completions": "logging.num_text_samples",
    "full_determinism": "trainer.deterministic",
}
"""TRL's name -> key."""


def key_of(name: str) -> str:
    """The key of ours that verl or TRL call `name`, whatever section it is written in; "": none is known."""
    name = name.removeprefix(ROOT)
    last = name.rpartition(".")[2]
    if name in VERL or last in TRL:
        return VERL.get(name) or TRL[last]
    parts = (f".{name}", f".{last}") if "_" in last else (f".{name}",)  # a `name` or `n` may be anything's
    ends = {key for old, key in VERL.items() if old.endswith(parts)}
    return ends.pop() if len(ends) == 1 else ""
