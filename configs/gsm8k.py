"""GRPO on GSM8K with Qwen2.5-7B-Instruct: the run of the verl quickstart. Every key there is stands here.

    python -m grpo_jax.data.gsm8k --local_dir=data/gsm8k
    hf download Qwen/Qwen2.5-7B-Instruct --local-dir models/Qwen2.5-7B-Instruct
    python -m grpo_jax.train --config=configs/gsm8k.py

As a smoke test, on any machine and with no model (a tiny random one is made; minutes on two CPU cores):

    python -m grpo_jax.train --config=configs/gsm8k.py:smoke

Any key can be overridden on the command line, as in `--config.algorithm.group_size=8`.
The rules that the values must obey are checked in grpo_jax/config.py before a device is touched.
"""

from ml_collections import config_dict


def get_config(variant: str = "") -> config_dict.ConfigDict:
    """Returns the configuration; `variant` is "" (the real run) or "smoke"."""
    config = config_dict.ConfigDict(
        dict(
            model=dict(
                path="models/Qwen2.5-7B-Instruct",  # Hugging Face folder, or "random": made from random_model
                dtype="bfloat16",  # of the computation: float32, bfloat16
                param_dtype="float32",  # of the policy parameters that the optimizer changes: float32, bfloat16
                remat="dots",  # recomputed for gradients: none, dots (all but matmuls, attention), attention, full
                scan_layers=True,  # True: one compiled layer, quick to compile; False: unrolled
                attention="auto",  # cudnn (NVIDIA, bfloat16), splash (TPU), plain (any); auto: what the device has
            ),
            random_model=dict(  # read when model.path is "random": a Qwen2-shaped model, its own tokenizer
                vocab_size=512,  # tokens, >= 260 (the bytes and the special tokens)
                hidden_size=64,  # D
                intermediate_size=192,  # F
                num_layers=2,
                num_heads=4,
                num_kv_heads=2,  # divides num_heads
            ),
            data=dict(
                train_files=("data/gsm8k/train.parquet",),  # Parquet in verl's schema; several are joined
                val_files=("data/gsm8k/test.parquet",),
                train_batch_size=256,  # P, prompts a step, >= 1
                max_prompt_length=512,  # tokens, chat template included
                max_response_length=512,  # tokens, >= 1
                overlong_prompts="filter",  # longer prompts: filter, truncate (their left end is cut)
                shuffle=True,  # anew each epoch, from trainer.seed
            ),
            arithmetic=dict(  # num_train > 0: word problems are generated, and data.*_files stay unread
                num_train=0,  # problems
                num_val=0,  # problems, none of them in the training set
                num_sft=0,  # worked examples for the warm start, none of them in the validation set
                difficulty=1,  # steps of a problem, 1 to 4
                direct_share=0.0,  # share of worked examples that only state the answer, 0 to 1
            ),
            sft=dict(  # supervised warm start before GRPO
                num_steps=0,  # updates; 0: none
                train_files=(),  # Parquet with extra_info.answer as the response; arithmetic makes its own
                batch_size=64,  # examples an update
                learning_rate=1e-3,  # peak, > 0; warmed up over a tenth of the steps, then cosine to 0
            ),
            algorithm=dict(
                adv_estimator="grpo",  # one of docs/algorithms.md, or FILE.py:NAME
                group_size=4,  # G, completions a prompt, >= 2
                policy_loss="clip",  # clip, gspo, cispo, geo_mean, sapo, policy_gradient
                clip_low=0.2,  # ratio is clipped to [1 - clip_low, 1 + clip_high]; 0 < clip_low < 1
                clip_high=0.2,  # > 0
                dual_clip=3.0,  # clip: bound on the ratio where the advantage is negative, > 1; 0: off
                sapo_tau_positive=1.0,  # sapo: sharpness of the gate for positive advantages, > 0
                sapo_tau_negative=1.05,  # sapo: for the others, > 0
                loss_agg="token-mean",  # seq-mean-token-sum, seq-mean-token-mean, seq-mean-token-sum-norm
                loss_norm=0.0,  # divisor of seq-mean-token-sum-norm, tokens; 0: data.max_response_length
                mask_truncated=False,  # True: completions cut at the limit are compared, but not trained
                dynamic_sampling_rounds=0,  # most rounds to fill a batch with groups that have spread; 0: off
                kl_coef=0.001,  # >= 0; 0: no reference model is held
                kl_estimator="k3",  # k1, k2, k3, abs; in the loss also k1+, k3+, abs+ (gradient of k2)
                kl_in="loss",  # loss, reward
                kl_target=0.0,  # nats a token that an adaptive kl_coef aims at; 0: kl_coef is fixed
                kl_horizon=10000.0,  # completions in which it changes by a fifth, at most
                ref_refresh_every=0,  # steps after which the policy becomes the reference; 0: never
                ref_offload=True,  # True: the reference waits in the host's memory until it scores
                entropy_coef=0.0,  # >= 0, bonus for entropy
                old_logprobs="trainer",  # denominator of the ratio: trainer (its own), sampler (the engine's)
                rollout_is="none",  # weights sampler -> trainer: none, token, sequence, token_mask, sequence_mask
                rollout_is_threshold=2.0,  # largest weight, > 0: cut there; with _mask, 0 beyond
                rollout_is_low=0.5,  # smallest weight with _mask, > 0: 0 below
                rollout_rs="none",  # rejects completions by their ratio: none, seq_sum_k1, seq_mean_k1
                rollout_rs_low=0.5,  # smallest ratio that is kept, > 0
                rollout_rs_high=2.0,  # largest
            ),
            optim=dict(  # AdamW
                learning_rate=1e-6,  # peak, > 0
                schedule="constant",  # constant, linear, cosine (to 0 over the run), after the warm-up
                warmup_steps=0,  # updates, >= 0
                beta1=0.9,  # [0, 1)
                beta2=0.999,  # [0, 1)
                weight_decay=0.01,  # >= 0
                max_grad_norm=1.0,  # global norm, > 0
                accumulator_dtype="float32",  # of the gradients summed over micro-batches: float32, bfloat16
                moments_dtype="float32",  # of Adam's moments: float32, bfloat16 (with beta2 <= 0.99)
                offload=True,  # True: float32 parameters and moments in the host's memory, streamed in an update
            ),
            actor=dict(
                num_minibatches=1,  # updates a pass over the batch; divides P * G
                num_epochs=1,  # passes over the batch
                micro_batch_size_per_device=4,  # completions of full length at once on one data shard, >= 1
                micro_batch_tokens_per_device=0,  # tokens instead; 0: the key above counts
                logits_chunk_tokens=1024,  # tokens a device projects to the vocabulary at once, >= 1
            ),
            rollout=dict(
                engine="vllm",  # vllm: Ray-managed vLLM on NVIDIA GPUs; local: the jitted JAX sampler, anywhere
                temperature=0.6,  # > 0
                top_p=1.0,  # (0, 1]; below 1 the trainer's distribution differs from the sampled one
                top_k=0,  # 0: off
                stop_token_ids=(),  # ends a completion, beside the model's own EOS
                batch_size=256,  # local: completions decoded at once, >= 1
                # The rest is for vllm.
                max_lag=0,  # batches sampled ahead, with weights so many steps old; 0: on-policy and exact
                update_weights="between",  # with max_lag: between (batches), during (in the middle of one)
                placement="colocated",  # colocated: on the trainer's GPUs; separate: on the last ones of the host
                num_replicas=0,  # engines; 0: as many as the trainer's GPUs hold (separate: one)
                tensor_parallel_size=1,  # GPUs of one engine, >= 1
                gpu_memory_utilization=0.4,  # share of a GPU for vLLM, (0, 1); colocated: JAX gets what is left
                max_num_seqs=1024,  # completions that one engine decodes at once, >= 1
                enforce_eager=False,  # True: no compilation, no CUDA graphs; quicker to start, slower
                sleep=False,  # True: colocated engines give up their memory while the trainer works
                engine_args=(),  # any other vLLM engine argument, as ("max_num_batched_tokens=16384",)
                python="",  # interpreter of an environment with vLLM; "": the trainer's own
                ray_address="",  # of a running Ray cluster, or "auto"; "": one is started
                weight_sync="auto",  # ipc (colocated), nccl (separate), host (any); auto: the one that fits
                bucket_mb=192,  # MiB of weights that travel at once, >= 1; four times that is taken for it
                probe_every=10,  # pushes between two comparisons of log-probabilities; 0: after the first only
                probe_threshold=0.1,  # nats a token that engine and trainer may differ on average, > 0
                start_timeout_s=900.0,  # seconds until an engine must be ready, > 0
                timeout_s=300.0,  # seconds without any answer until an engine counts as dead, > 0
                max_restarts=3,  # of one engine in a run, >= 0
                api_port=0,  # the live policy answers OpenAI requests on this port of 127.0.0.1; 0: none
            ),
            reward=dict(
                function="gsm8k",  # gsm8k, gsm8k_flexible, gsm8k_format, think_format, math, or FILE.py:NAME
                extra_functions=(),  # others, of the same kinds; rewards are added up
                weights=(),  # one for each function, the first for `function`; (): 1 each
                overlong_buffer=0,  # tokens before max_response_length in which a penalty grows; 0: no penalty
                overlong_penalty=1.0,  # at max_response_length, >= 0
                num_workers=2,  # processes, for math and FILE.py:NAME
                timeout_s=10.0,  # seconds for one completion, > 0
                on_error="stop",  # an exception, a NaN, a hang: stop, zero (counted, reward 0)
            ),
            mesh=dict(  # devices along each axis; one of them may be -1: all that are left
                data=1,  # batch is split, parameters are copied
                fsdp=-1,  # batch and parameters are split
                tensor=1,  # heads, MLP and vocabulary are split
            ),
            eval=dict(
                before_training=True,
                every_epochs=1,  # 0: never
                every_steps=0,  # 0: never
                num_prompts=0,  # of the validation set; 0: all
                temperature=0.0,  # 0: greedy
                num_samples=1,  # completions a prompt; more need a temperature
            ),
            checkpoint=dict(
                every_epochs=1,  # Orbax; 0: only at the end
                every_steps=0,  # 0: never
                max_to_keep=2,  # >= 1
                hf_every_epochs=1,  # Hugging Face folder checkpoint-epoch-N; 0: only at the end
                resume="auto",  # auto: go on if the workdir holds this config's run; force: whatever it holds
            ),
            logging=dict(
                loggers=("console", "tensorboard"),  # metrics.jsonl and train.log are always written
                project_name="grpo_jax",
                experiment_name="gsm8k",  # workdir: outputs/PROJECT/EXPERIMENT
                num_text_samples=3,  # completions to TensorBoard a step, >= 0
                save_rollouts=False,  # every completion to rollouts/step-NNNNNN.jsonl
            ),
            trainer=dict(
                total_epochs=3,  # >= 1
                num_steps=0,  # stop after so many steps; 0: after total_epochs
                seed=0,  # >= 0
                deterministic=False,  # True: the same bits from the trainer every time on a GPU too; slower
                compile_cache="~/.cache/grpo_jax/xla",  # keeps programs for accelerators; "": nowhere
                max_nonfinite_updates=3,  # skipped in a row before the run stops, >= 1
                flat_reward_steps=5,  # steps without any spread of rewards before the loud warning, >= 1
            ),
        )
    )
    if variant == "smoke":
        _shrink(config)
    elif variant:
        raise ValueError(f"configs/gsm8k.py:{variant}: the only variant is 'smoke'")
    return config


def _shrink(config: config_dict.ConfigDict) -> None:
    """The same loop on real GSM8K with a tiny random model: shows that it runs, learns nothing."""
    config.model.path = "random"
    config.model.dtype = "float32"
    config.model.remat = "none"
    config.data.train_batch_size = 4
    config.data.max_prompt_length = 256
    config.data.max_response_length = 32
    config.rollout.update(engine="local", temperature=1.0)
    config.eval.num_prompts = 16
    config.trainer.total_epochs = 1
    config.trainer.num_steps = 2
    config.logging.experiment_name = "gsm8k-smoke"
