"""Every key of a configuration, one line each: type, default, meaning, unit, bounds or choices, and

    resume=    whether it may differ when a run goes on: FREE, LENGTH, ARRAYS; if not given, it may not.
    only=      the condition under which a run reads it; if not given, every run does. Terms are "SECTION.KEY=a|b" (one
               of these values, or a FILE.py:NAME; of a tuple, one element), "SECTION.KEY!=a" and "SECTION.KEY>0". They
               are joined by " or ", and what is joined by that by " and ".

`rules.py` checks the values. docs/configuration_tables.py makes the tables of docs/configuration.md from these lines.
"""

import dataclasses
from typing import Any

FREE = "free"
"""May differ: it changes what is reported, or how long it takes, and not what is computed."""
LENGTH = "length"
"""May differ while `optim.schedule` is constant: another schedule depends on the length of the run."""
ARRAYS = "arrays"
"""Decides which arrays a checkpoint holds, and in which dtypes: not even checkpoint.resume=force can change it."""
FIXED = "fixed"


@dataclasses.dataclass(frozen=True)
class Key:
    """The facts of one key."""

    default: Any
    meaning: str
    unit: str = ""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    besides: tuple[float, str] | None = None
    """A value out of bounds that is allowed, and what it stands for."""
    why: str = ""
    """The reason for the lower bound."""
    choices: tuple[str, ...] = ()
    rule: str = ""
    """The range in words, where it is checked by whoever reads the key."""
    resume: str = FIXED
    only: str = ""
    type: Any = None
    """Of the value, as the field is annotated; set in `KEYS`."""


def key(default: Any, meaning: str, *, choices: str = "", **facts: Any) -> Any:
    """Returns the dataclass field of a key. Args: choices: separated by spaces; facts: other fields of `Key`."""
    known = Key(default, meaning, choices=tuple(choices.split()), **facts)
    return dataclasses.field(default=default, metadata={"key": known})


DTYPES = "float32 bfloat16"
"""Of what is kept; computed is also in float16."""
NAMED = "a name in docs/algorithms.md, or `FILE.py:NAME`"
"""Of functions: `algorithm.load_algorithm` checks them."""
LOGGERS = "console tensorboard wandb mlflow trackio"
LOSS_AGGS = "token-mean seq-mean-token-sum seq-mean-token-mean seq-mean-token-sum-norm"
REWARDS = "`gsm8k`, `gsm8k_flexible`, `gsm8k_format`, `think_format`, `math`, `FILE.py:NAME`"
TARGETS = "`all-linear`, `attention`, `mlp`, names as `q_proj`, patterns"
ALL_LEFT = (-1, "all devices that are left")

# What `only` says of several keys.
RANDOM, FLOAT16, FLOAT32 = "model.path=random", "model.dtype=float16", "model.dtype=float32"
LORA = "lora.rank>0"
FILES, GENERATED = "arithmetic.num_train=0", "arithmetic.num_train>0"
SFT = "sft.num_steps>0"
CLIP, SAPO = "algorithm.policy_loss=clip", "algorithm.policy_loss=sapo"
RATIO_CLIP = "algorithm.policy_loss=clip|gspo|cispo|geo_mean"
SUM_NORM = "algorithm.loss_agg=seq-mean-token-sum-norm"
KL, ADAPTIVE = "algorithm.kl_coef>0", "algorithm.kl_target>0"
WEIGHTED, MASKED = "algorithm.rollout_is!=none", "algorithm.rollout_is=token_mask|sequence_mask"
REJECTS = "algorithm.rollout_rs!=none"
STALE = "rollout.max_lag>0 or algorithm.dynamic_sampling_rounds>0"
BY_ROWS = "actor.micro_batch_tokens_per_device=0"
LOCAL, VLLM = "rollout.engine=local", "rollout.engine=vllm"
TELL_DRAWABLE = ("local",)
"""Engines whose completions say which tokens could be drawn."""
SHOW_TEXT = "logging.loggers=tensorboard|wandb|mlflow|trackio"
IN_WORKERS = "reward.function=math or reward.extra_functions=math"

# fmt: off

@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str = key("", "Hugging Face folder, or `random`: a model is made from the `random_model` section", rule="not empty")
    dtype: str = key("bfloat16", "dtype of activations and products, in trainer and engine", choices=f"{DTYPES} float16", resume=ARRAYS)
    float32_products: str = key("full", "NVIDIA GPUs: in full, or with 10 bits (TF32), faster", choices="full tf32", only=FLOAT32)
    param_dtype: str = key("float32", "dtype of the policy parameters that the optimizer changes", choices=DTYPES, resume=ARRAYS)
    remat: str = key("dots", "what the backward pass computes again", choices="none dots attention full")
    scan_layers: bool = key(True, "True: one compiled layer, quick to compile; False: unrolled, which can run faster")
    allow_beyond_max_position: bool = key(False, "True: sequences may exceed `max_position_embeddings`, as RoPE can extrapolate", resume=FREE)
    attention: str = key("auto", "the trainer's attention kernel; `auto`: what the devices have", choices="auto cudnn splash plain")
    experts: str = key("auto", "experts compute the tokens that chose them, or all; `auto`: grouped on NVIDIA GPUs", choices="auto grouped dense")


@dataclasses.dataclass(frozen=True)
class LoraSection:
    """Adapters beside frozen parameters (docs/lora.md)."""

    rank: int = key(0, "r, width of the adapters; 0: none, every parameter is trained", at_least=0, resume=ARRAYS)
    alpha: float = key(32.0, "what an adapter adds is multiplied by alpha / rank", above=0, only=LORA)
    targets: tuple[str, ...] = key(("all-linear",), "layers that get one", rule=TARGETS, resume=ARRAYS, only=LORA)
    push: str = key("merged", "what vLLM gets: merged kernels, or the adapters alone", choices="merged adapter", only=LORA)
    path: str = key("", "PEFT folder to begin with; empty: adapters that add nothing yet", rule="a folder of this rank", only=LORA)


@dataclasses.dataclass(frozen=True)
class RandomModelSection:
    """A random Qwen2-shaped model with a tokenizer of its own."""

    vocab_size: int = key(512, "size of the vocabulary; also what its tokenizer is trained to", unit="tokens", at_least=260, only=RANDOM)
    hidden_size: int = key(64, "width, D", at_least=1, only=RANDOM)
    intermediate_size: int = key(192, "width of the MLP, F", at_least=1, only=RANDOM)
    num_layers: int = key(2, "layers", at_least=1, only=RANDOM)
    num_heads: int = key(4, "query heads", at_least=1, only=RANDOM)
    num_kv_heads: int = key(2, "key and value heads", at_least=1, only=RANDOM)


@dataclasses.dataclass(frozen=True)
class DataSection:
    train_files: tuple[str, ...] = key((), "Parquet in verl's schema; several are joined in order", rule="at least one", only=FILES)
    val_files: tuple[str, ...] = key((), "the same for validation", rule="at least one", only=FILES)
    train_batch_size: int = key(128, "P, prompts a step", unit="prompts", at_least=1)
    max_prompt_length: int = key(512, "longest prompt, chat template included", unit="tokens", at_least=1, below=2**24)
    max_response_length: int = key(512, "a completion is cut there, in validation too", unit="tokens", at_least=1, below=2**24)
    overlong_prompts: str = key("filter", "prompts that are too long: leave out, or cut their left end", choices="filter truncate")
    chat_template_args: tuple[str, ...] = key((), "for the chat template, as `enable_thinking=False`", rule='`"NAME=VALUE"` each')
    shuffle: bool = key(True, "anew each epoch, from `trainer.seed`")


@dataclasses.dataclass(frozen=True)
class ArithmeticSection:
    """Word problems that are generated, in place of files."""

    num_train: int = key(0, "training problems; above 0, `data.train_files` and `val_files` are not read", unit="problems", at_least=0)
    num_val: int = key(0, "validation problems, none of them in the training set", unit="problems", at_least=0, only=GENERATED)
    num_sft: int = key(0, "worked examples, none of them in the validation set", unit="problems", at_least=0, only=GENERATED)
    difficulty: int = key(1, "steps of a problem", at_least=1, at_most=4, only=GENERATED)
    direct_share: float = key(0.0, "share of worked examples that only state the answer", at_least=0, at_most=1, only=GENERATED)


@dataclasses.dataclass(frozen=True)
class SftSection:
    """A supervised warm start before GRPO."""

    num_steps: int = key(0, "updates of the warm start; 0: none", unit="updates", at_least=0)
    train_files: tuple[str, ...] = key((), "Parquet with `extra_info.answer`, the response", rule="at least one", only=f"{SFT} and {FILES}")
    batch_size: int = key(64, "examples an update", unit="examples", at_least=1, only=SFT)
    learning_rate: float = key(1e-3, "peak; warmed up over a tenth of the updates, then cosine to 0", above=0, only=SFT)


@dataclasses.dataclass(frozen=True)
class AlgorithmSection:
    adv_estimator: str = key("grpo", "from rewards to advantages", rule=NAMED)
    group_size: int = key(4, "G, completions a prompt", at_least=2, why="an advantage compares the completions of one prompt")
    policy_loss: str = key("clip", "the loss of a token", rule=NAMED)
    clip_low: float = key(0.2, "the ratio is clipped from below at 1 - this", above=0, below=1, only=RATIO_CLIP)
    clip_high: float = key(0.2, "and from above at 1 + this", above=0, only=RATIO_CLIP)
    dual_clip: float = key(3.0, "bound on the ratio where the advantage is negative; 0: off", above=1, besides=(0, "none"), only=CLIP)
    sapo_tau_positive: float = key(1.0, "sharpness of the gate for positive advantages", above=0, only=SAPO)
    sapo_tau_negative: float = key(1.05, "sharpness of the gate for the others", above=0, only=SAPO)
    loss_agg: str = key("token-mean", "how token losses become one number", choices=LOSS_AGGS)
    loss_norm: float = key(0.0, "divisor; 0: `data.max_response_length`", unit="tokens", at_least=0, only=SUM_NORM)
    mask_truncated: bool = key(False, "True: completions cut at the limit are compared, but not trained")
    dynamic_sampling_rounds: int = key(0, "most rounds to fill a batch with groups that have spread; 0: off", unit="rounds", at_least=0)
    kl_coef: float = key(0.0, "weight of the KL term; 0: no reference model is held", at_least=0)
    kl_estimator: str = key("k3", "estimator of the KL; with + the gradient is that of k2", rule=NAMED, only=KL)
    kl_in: str = key("loss", "where the KL goes: added to the loss, or taken off the reward", choices="loss reward", only=KL)
    kl_target: float = key(0.0, "what an adaptive `kl_coef` aims at; 0: it is fixed", unit="nats a token", at_least=0, only=KL)
    kl_horizon: float = key(1e4, "completions in which it changes by a fifth, at most", unit="completions", above=0, only=f"{KL} and {ADAPTIVE}")
    ref_refresh_every: int = key(0, "steps after which the policy becomes the reference; 0: never", unit="steps", at_least=0, resume=ARRAYS, only=KL)
    ref_offload: bool = key(True, "True: the reference waits in the host's memory until it scores", resume=FREE, only=KL)
    entropy_coef: float = key(0.0, "bonus for entropy in the loss", at_least=0)
    old_logprobs: str = key("trainer", "whose log-probabilities are the denominator of the ratio", choices="trainer sampler")
    rollout_is: str = key("none", "importance weights from sampler to trainer", choices="none token sequence token_mask sequence_mask")
    rollout_is_threshold: float = key(2.0, "largest weight: cut there, or, with `_mask`, 0 beyond", above=0, only=WEIGHTED)
    rollout_is_low: float = key(0.5, "smallest weight: 0 below", above=0, only=MASKED)
    rollout_rs: str = key("none", "which ratio of a completion leads to its rejection", choices="none seq_sum_k1 seq_mean_k1")
    rollout_rs_low: float = key(0.5, "smallest ratio that is kept", above=0, only=REJECTS)
    rollout_rs_high: float = key(2.0, "largest ratio that is kept", above=0, only=REJECTS)
    max_token_age: int = key(-1, "tokens of weights more steps older do not weigh; -1: all do", unit="steps", at_least=-1, only=STALE)


@dataclasses.dataclass(frozen=True)
class OptimSection:
    """AdamW."""

    learning_rate: float = key(1e-6, "peak", above=0)
    schedule: str = key("constant", "after the warm-up: as it is, or down to 0 at the end of the run", choices="constant linear cosine")
    warmup_steps: int = key(0, "updates of the linear warm-up", unit="updates", at_least=0)
    beta1: float = key(0.9, "decay of the first moment", at_least=0, below=1)
    beta2: float = key(0.999, "decay of the second moment", at_least=0, below=1)
    weight_decay: float = key(0.01, "on every parameter", at_least=0)
    max_grad_norm: float = key(1.0, "gradients are clipped to this global norm", above=0)
    accumulator_dtype: str = key("float32", "dtype of the gradients summed over micro-batches", choices=DTYPES)
    moments_dtype: str = key("float32", "dtype of Adam's moments", choices=DTYPES, resume=ARRAYS)
    loss_scale: float = key(2.0**16, "what the loss is multiplied by at first", at_least=1, at_most=2**24, only=FLOAT16)
    loss_scale_growth: int = key(100, "updates without overflow until it doubles; 0: it stays", unit="updates", at_least=0, below=2**31, only=FLOAT16)
    offload: bool = key(True, "True: parameters and moments live in the host's memory, streamed in an update", resume=ARRAYS)


@dataclasses.dataclass(frozen=True)
class ActorSection:
    num_minibatches: int = key(1, "updates in one pass over the batch", at_least=1)
    num_epochs: int = key(1, "passes over the batch", at_least=1)
    micro_batch_size_per_device: int = key(4, "packed rows in memory at once on one data shard", unit="rows", at_least=1, only=BY_ROWS)
    micro_batch_tokens_per_device: int = key(0, "the same in tokens, padding included; 0: counted in rows", unit="tokens", at_least=0)
    logits_chunk_tokens: int = key(1024, "tokens that a device projects to the vocabulary at once", unit="tokens", at_least=1)


@dataclasses.dataclass(frozen=True)
class RolloutSection:
    engine: str = key("vllm", "vLLM on NVIDIA GPUs, or the JAX sampler on the trainer's devices", choices="vllm local")
    temperature: float = key(1.0, "divides the logits, in the sampler and in the trainer", above=0)
    top_p: float = key(1.0, "nucleus; with the local engine, the trainer's distribution is cut likewise", above=0, at_most=1)
    top_k: int = key(0, "0: off; above 0 as for `top_p`", at_least=0)
    stop_token_ids: tuple[int, ...] = key((), "they end a completion, beside the EOS of model and tokenizer")
    batch_size: int = key(256, "completions decoded at once, on all devices together", unit="completions", at_least=1, only=LOCAL, resume=FREE)
    max_lag: int = key(0, "batches sampled ahead, with weights so many steps old; 0: on-policy and exact", at_least=0, only=VLLM)
    update_weights: str = key("between", "when new weights come: between two batches, or during one", choices="between during", only=VLLM)
    placement: str = key("colocated", "on the trainer's GPUs, or on the last ones of the host", choices="colocated separate", only=VLLM, resume=FREE)
    num_replicas: int = key(0, "engines; 0: as many as the trainer's GPUs hold (`separate`: one)", at_least=0, only=VLLM, resume=FREE)
    tensor_parallel_size: int = key(1, "GPUs of one engine", unit="GPUs", at_least=1, only=VLLM, resume=FREE)
    gpu_memory_utilization: float = key(0.5, "share of a GPU's memory for vLLM", above=0, below=1, only=VLLM, resume=FREE)
    max_num_seqs: int = key(1024, "completions that one engine decodes at once", unit="completions", at_least=1, only=VLLM, resume=FREE)
    enforce_eager: bool = key(False, "True: no compilation, no CUDA graphs; quicker to start, slower", only=VLLM, resume=FREE)
    sleep: bool = key(False, "True: colocated engines give up their memory while the trainer works", only=VLLM, resume=FREE)
    engine_args: tuple[str, ...] = key((), "any other vLLM engine arguments", rule='`"NAME=VALUE"` each', only=VLLM)
    python: str = key("", "interpreter of an environment with vLLM; empty: the trainer's own", rule="a file", only=VLLM, resume=FREE)
    ray_address: str = key("", "address of a running Ray cluster, or `auto`; empty: one is started", only=VLLM, resume=FREE)
    weight_sync: str = key("auto", "how weights travel; `auto`: the way that fits", choices="auto ipc nccl host", only=VLLM, resume=FREE)
    bucket_mb: int = key(192, "weights that travel at once; four times that is taken for it", unit="MiB", at_least=1, only=VLLM, resume=FREE)
    probe_every: int = key(10, "pushes between two comparisons of log-probabilities; 0: the first only", at_least=0, only=VLLM, resume=FREE)
    probe_threshold: float = key(0.1, "largest mean difference of engine and trainer", unit="nats a token", above=0, only=VLLM, resume=FREE)
    start_timeout_s: float = key(900.0, "time until an engine must be ready", unit="seconds", above=0, at_most=10**6, only=VLLM, resume=FREE)
    timeout_s: float = key(300.0, "time without an answer until an engine is dead", unit="seconds", above=0, at_most=10**6, only=VLLM, resume=FREE)
    max_restarts: int = key(3, "restarts of one engine in a run", at_least=0, only=VLLM, resume=FREE)
    api_port: int = key(0, "port of 127.0.0.1 for OpenAI requests to the policy; 0: none", at_least=0, below=2**16, only=VLLM, resume=FREE)


@dataclasses.dataclass(frozen=True)
class RewardSection:
    function: str = key("gsm8k", "the rule; it decides what counts as correct", rule=REWARDS)
    extra_functions: tuple[str, ...] = key((), "others, added to it", rule="the same, each name once")
    weights: tuple[float, ...] = key((), "the first is for `function`; none: 1 each", rule="one for each function")
    overlong_buffer: int = key(0, "tokens before the limit in which a penalty grows; 0: no penalty", unit="tokens", at_least=0)
    overlong_penalty: float = key(1.0, "taken off at the limit", at_least=0, only="reward.overlong_buffer>0")
    num_workers: int = key(2, "processes, for `math` and `FILE.py:NAME`", unit="processes", at_least=1, only=IN_WORKERS, resume=FREE)
    timeout_s: float = key(10.0, "time for one completion, in those processes", unit="seconds", above=0, at_most=10**6, only=IN_WORKERS, resume=FREE)
    on_error: str = key("stop", "after an exception, a NaN or a hang: end the run, or count reward 0", choices="stop zero", only=IN_WORKERS)


@dataclasses.dataclass(frozen=True)
class MeshSection:
    """Devices along each axis."""

    data: int = key(1, "the batch is split, parameters are copied", unit="devices", at_least=1, besides=ALL_LEFT)
    fsdp: int = key(-1, "batch and parameters are split", unit="devices", at_least=1, besides=ALL_LEFT)
    tensor: int = key(1, "heads, MLP and vocabulary are split", unit="devices", at_least=1, besides=ALL_LEFT)


@dataclasses.dataclass(frozen=True)
class EvalSection:
    before_training: bool = key(True, "validate at step 0", resume=FREE)
    every_epochs: int = key(1, "epochs between validations, and one at the end; 0: never", unit="epochs", at_least=0, resume=FREE)
    every_steps: int = key(0, "the same in steps; 0: never", unit="steps", at_least=0, resume=FREE)
    num_prompts: int = key(0, "the first so many validation prompts; 0: all", unit="prompts", at_least=0, resume=FREE)
    temperature: float = key(0.0, "0: greedy", at_least=0, resume=FREE)
    num_samples: int = key(1, "completions a prompt, for pass@k; more need a temperature", at_least=1, resume=FREE)


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    every_epochs: int = key(1, "epochs between Orbax checkpoints; 0: only at the end", unit="epochs", at_least=0, resume=FREE)
    every_steps: int = key(0, "the same in steps; 0: never", unit="steps", at_least=0, resume=FREE)
    max_to_keep: int = key(2, "older checkpoints are deleted", at_least=1, resume=FREE)
    every_minutes: float = key(0.0, "the same in minutes since the last; 0: never", unit="minutes", at_least=0, resume=FREE)
    keep_every_epochs: int = key(0, "after each so many one is made that stays for ever; 0: none", unit="epochs", at_least=0, resume=FREE)
    keep_best: str = key("none", "whenever it is best, a checkpoint is made, and stays until a better one", choices="none val/accuracy", resume=FREE)
    hf_every_epochs: int = key(1, "epochs between folders `checkpoint-epoch-N`; 0: only at the end", unit="epochs", at_least=0, resume=FREE)
    resume: str = key("auto", "go on if the workdir holds this run, or whatever it holds", choices="auto force", resume=FREE)


@dataclasses.dataclass(frozen=True)
class LoggingSection:
    loggers: tuple[str, ...] = key(("console", "tensorboard"), "where metrics are shown", choices=LOGGERS, resume=FREE)
    project_name: str = key("grpo_jax", "the workdir is `outputs/PROJECT/EXPERIMENT`", rule="below `outputs`: no `..`", resume=FREE)
    experiment_name: str = key("default", "as above", rule="the same", resume=FREE)
    num_text_samples: int = key(3, "completions shown a step and a validation", at_least=0, only=SHOW_TEXT, resume=FREE)
    save_rollouts: bool = key(False, "every completion to `rollouts/step-NNNNNN.jsonl`, its tokens to `.parquet`", resume=FREE)
    save_rollouts_every: int = key(1, "of every how many steps", unit="steps", at_least=1, resume=FREE)
    report_every_s: float = key(300.0, "until `report.html` is made again; 0: at the end", unit="seconds", at_least=0, at_most=1e6, resume=FREE)


@dataclasses.dataclass(frozen=True)
class TrainerSection:
    total_epochs: int = key(1, "passes over the prompts", unit="epochs", at_least=1, resume=LENGTH)
    num_steps: int = key(0, "stop after so many steps; 0: after `total_epochs`", unit="steps", at_least=0, resume=LENGTH)
    seed: int = key(0, "of everything random: data, models, shuffling, sampling", at_least=0, below=2**31)
    deterministic: bool = key(False, "True: kernels that always give the same bits, on GPUs too; slower")
    compile_cache: str = key("~/.cache/grpo_jax/xla", "keeps programs for accelerators; empty: nowhere", rule="a folder", resume=FREE)
    max_nonfinite_updates: int = key(3, "updates skipped in a row before the run stops", unit="updates", at_least=1)
    phase_timeout_s: float = key(7200.0, "time until a phase counts as hanging; 0: never", unit="seconds", at_least=0, at_most=10**6, resume=FREE)
    join_timeout_s: float = key(600.0, "for all processes of a run to come (docs/hosts.md)", unit="seconds", above=0, at_most=10**6, resume=FREE)
    flat_reward_steps: int = key(5, "useless steps in a row before the alarm (docs/alarms.md)", unit="steps", at_least=1, resume=FREE)
    max_rollbacks: int = key(0, "times that a run that diverges goes back to a good checkpoint; 0: never", at_least=0, resume=FREE)


# fmt: on
@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration. `parse_config` makes one with every rule checked."""

    model: ModelSection = ModelSection()
    lora: LoraSection = LoraSection()
    random_model: RandomModelSection = RandomModelSection()
    data: DataSection = DataSection()
    arithmetic: ArithmeticSection = ArithmeticSection()
    sft: SftSection = SftSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    optim: OptimSection = OptimSection()
    actor: ActorSection = ActorSection()
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    mesh: MeshSection = MeshSection()
    eval: EvalSection = EvalSection()
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    trainer: TrainerSection = TrainerSection()

    @property
    def completions_per_step(self) -> int:
        """B = P * G."""
        return self.data.train_batch_size * self.algorithm.group_size

    @property
    def completions_per_update(self) -> int:
        """Of one mini-batch."""
        return self.completions_per_step // self.actor.num_minibatches

    @property
    def updates_per_step(self) -> int:
        return self.actor.num_minibatches * self.actor.num_epochs

    def num_steps(self, steps_per_epoch: int) -> int:
        """Of the whole run."""
        num_steps = self.trainer.total_epochs * steps_per_epoch
        return min(num_steps, self.trainer.num_steps or num_steps)

    @property
    def uses_reference(self) -> bool:
        return self.algorithm.kl_coef > 0

    @property
    def cuts_distribution(self) -> bool:
        """Whether some tokens cannot be drawn."""
        return self.rollout.top_p < 1 or self.rollout.top_k > 0

    @property
    def knows_drawable(self) -> bool:
        """Whether completions say which tokens could be drawn, so that the trainer's distribution is the same."""
        return self.cuts_distribution and self.rollout.engine in TELL_DRAWABLE

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss knows which distribution the tokens came from."""
        return self.algorithm.rollout_is != "none" or self.algorithm.old_logprobs == "sampler"

    def saves_rollouts(self, step: int) -> bool:
        """Whether the completions of a step, counted from 1, are saved."""
        return self.logging.save_rollouts and step % self.logging.save_rollouts_every == 0

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the trainer scores the batch before the first update.

        False where the sampler's stand for the old ones, and where the only update of a step finds the
        policy as it sampled: old and current are one.
        """
        if self.algorithm.old_logprobs == "sampler":
            return False
        return self.updates_per_step > 1 or self.algorithm.kl_in == "reward"

    @property
    def loss_norm(self) -> float:
        """Divisor of seq-mean-token-sum-norm, tokens."""
        return self.algorithm.loss_norm or float(self.data.max_response_length)

    def get(self, name: str) -> Any:
        """The value of "SECTION.KEY"."""
        section, _, field = name.partition(".")
        return getattr(getattr(self, section), field)

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary that `json` can write; tuples become lists."""
        return {
            section: {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }


SECTIONS: dict[str, Any] = {section.name: section.type for section in dataclasses.fields(Config)}
"""Name -> class."""

KEYS: dict[str, Key] = {
    f"{name}.{field.name}": dataclasses.replace(field.metadata["key"], type=field.type)
    for name, section in SECTIONS.items()
    for field in dataclasses.fields(section)
}
"""Every key: "SECTION.KEY" -> its facts."""
