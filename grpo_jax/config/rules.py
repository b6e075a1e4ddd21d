"""Configuration: an `ml_collections.ConfigDict` goes in, frozen dataclasses come out, every rule checked.

`configs/gsm8k.py` lists every key with its unit and range; nothing here has a default. What needs a file,
a tokenizer or a device to be checked is checked by the stage that reads it, with the same `ConfigError`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any


class ConfigError(ValueError):
    """A value that a rule forbids. The commands print it as one line and exit with 2."""

    def __init__(self, key: str, value: Any, rule: str):
        super().__init__(f"{key}={value!r}: {rule}")
        self.key, self.value, self.rule = key, value, rule


@dataclasses.dataclass(frozen=True)
class ModelSection:
    path: str
    dtype: str
    param_dtype: str
    remat: str
    scan_layers: bool
    attention: str


@dataclasses.dataclass(frozen=True)
class RandomModelSection:
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int


@dataclasses.dataclass(frozen=True)
class DataSection:
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]
    train_batch_size: int
    max_prompt_length: int
    max_response_length: int
    overlong_prompts: str
    shuffle: bool


@dataclasses.dataclass(frozen=True)
class ArithmeticSection:
    num_train: int
    num_val: int
    num_sft: int
    difficulty: int
    direct_share: float


@dataclasses.dataclass(frozen=True)
class SftSection:
    num_steps: int
    train_files: tuple[str, ...]
    batch_size: int
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class AlgorithmSection:
    adv_estimator: str
    group_size: int
    policy_loss: str
    clip_low: float
    clip_high: float
    dual_clip: float
    sapo_tau_positive: float
    sapo_tau_negative: float
    loss_agg: str
    loss_norm: float
    mask_truncated: bool
    dynamic_sampling_rounds: int
    kl_coef: float
    kl_estimator: str
    kl_in: str
    kl_target: float
    kl_horizon: float
    ref_refresh_every: int
    ref_offload: bool
    entropy_coef: float
    old_logprobs: str
    rollout_is: str
    rollout_is_threshold: float
    rollout_is_low: float
    rollout_rs: str
    rollout_rs_low: float
    rollout_rs_high: float


@dataclasses.dataclass(frozen=True)
class OptimSection:
    learning_rate: float
    schedule: str
    warmup_steps: int
    beta1: float
    beta2: float
    weight_decay: float
    max_grad_norm: float
    accumulator_dtype: str
    moments_dtype: str
    offload: bool


@dataclasses.dataclass(frozen=True)
class ActorSection:
    num_minibatches: int
    num_epochs: int
    micro_batch_size_per_device: int
    micro_batch_tokens_per_device: int
    logits_chunk_tokens: int


@dataclasses.dataclass(frozen=True)
class RolloutSection:
    engine: str
    temperature: float
    top_p: float
    top_k: int
    stop_token_ids: tuple[int, ...]
    batch_size: int
    max_lag: int
    update_weights: str
    placement: str
    num_replicas: int
    tensor_parallel_size: int
    gpu_memory_utilization: float
    max_num_seqs: int
    enforce_eager: bool
    sleep: bool
    engine_args: tuple[str, ...]
    python: str
    ray_address: str
    weight_sync: str
    bucket_mb: int
    probe_every: int
    probe_threshold: float
    start_timeout_s: float
    timeout_s: float
    max_restarts: int
    api_port: int


@dataclasses.dataclass(frozen=True)
class RewardSection:
    function: str
    extra_functions: tuple[str, ...]
    weights: tuple[float, ...]
    overlong_buffer: int
    overlong_penalty: float
    num_workers: int
    timeout_s: float
    on_error: str


@dataclasses.dataclass(frozen=True)
class MeshSection:
    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class EvalSection:
    before_training: bool
    every_epochs: int
    every_steps: int
    num_prompts: int
    temperature: float
    num_samples: int


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
    every_epochs: int
    every_steps: int
    max_to_keep: int
    hf_every_epochs: int
    resume: str


@dataclasses.dataclass(frozen=True)
class LoggingSection:
    loggers: tuple[str, ...]
    project_name: str
    experiment_name: str
    num_text_samples: int
    save_rollouts: bool


@dataclasses.dataclass(frozen=True)
class TrainerSection:
    total_epochs: int
    num_steps: int
    seed: int
    deterministic: bool
    compile_cache: str
    max_nonfinite_updates: int
    flat_reward_steps: int


@dataclasses.dataclass(frozen=True)
class Config:
    """The whole configuration, every rule checked. One field a section of `configs/gsm8k.py`."""

    model: ModelSection
    random_model: RandomModelSection
    data: DataSection
    arithmetic: ArithmeticSection
    sft: SftSection
    algorithm: AlgorithmSection
    optim: OptimSection
    actor: ActorSection
    rollout: RolloutSection
    reward: RewardSection
    mesh: MeshSection
    eval: EvalSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    trainer: TrainerSection

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

    @property
    def uses_reference(self) -> bool:
        return self.algorithm.kl_coef > 0

    @property
    def corrects_sampler(self) -> bool:
        """Whether the loss knows which distribution the tokens came from."""
        return self.algorithm.rollout_is != "none" or self.algorithm.old_logprobs == "sampler"

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

    def to_dict(self) -> dict[str, Any]:
        """Nested dictionary that `json` can write; tuples become lists."""
        return {
            section: {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
            for section, values in dataclasses.asdict(self).items()
        }


CHOICES: dict[str, tuple[str, ...]] = {
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "attention", "full"),
    "model.attention": ("auto", "cudnn", "splash", "plain"),
    "data.overlong_prompts": ("filter", "truncate"),
    "algorithm.policy_loss": ("clip", "gspo", "cispo", "geo_mean", "sapo", "policy_gradient"),
    "algorithm.loss_agg": (
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ),
    "algorithm.kl_estimator": ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"),
    "algorithm.kl_in": ("loss", "reward"),
    "algorithm.old_logprobs": ("trainer", "sampler"),
    "algorithm.rollout_is": ("none", "token", "sequence", "token_mask", "sequence_mask"),
    "algorithm.rollout_rs": ("none", "seq_sum_k1", "seq_mean_k1"),
    "optim.schedule": ("constant", "linear", "cosine"),
    "optim.accumulator_dtype": ("float32", "bfloat16"),
    "optim.moments_dtype": ("float32", "bfloat16"),
    "rollout.engine": ("vllm", "local"),
    "rollout.update_weights": ("between", "during"),
    "rollout.placement": ("colocated", "separate"),
    "rollout.weight_sync": ("auto", "ipc", "nccl", "host"),
    "reward.on_error": ("stop", "zero"),
    "checkpoint.resume": ("auto", "force"),
}

ADV_ESTIMATORS = (
    "grpo", "grpo_no_std", "rloo", "rloo_std", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"
)  # fmt: skip
"""`algorithm.adv_estimator` is one of these, or FILE.py:NAME."""

SEQUENCE_LOSSES = ("gspo", "geo_mean")
"""Policy losses whose ratio is that of a whole completion."""

# key -> (lower bound, whether the bound itself is allowed)
LOWER_BOUNDS: dict[str, tuple[float, bool]] = {
    "random_model.vocab_size": (260, True),
    "random_model.hidden_size": (1, True),
    "random_model.intermediate_size": (1, True),
    "random_model.num_layers": (1, True),
    "random_model.num_heads": (1, True),
    "random_model.num_kv_heads": (1, True),
    "data.train_batch_size": (1, True),
    "data.max_prompt_length": (1, True),
    "data.max_response_length": (1, True),
    "arithmetic.num_train": (0, True),
    "arithmetic.num_val": (0, True),
    "arithmetic.num_sft": (0, True),
    "sft.num_steps": (0, True),
    "sft.batch_size": (1, True),
    "sft.learning_rate": (0, False),
    "algorithm.clip_low": (0, False),
    "algorithm.clip_high": (0, False),
    "algorithm.sapo_tau_positive": (0, False),
    "algorithm.sapo_tau_negative": (0, False),
    "algorithm.loss_norm": (0, True),
    "algorithm.dynamic_sampling_rounds": (0, True),
    "algorithm.kl_coef": (0, True),
    "algorithm.kl_target": (0, True),
    "algorithm.kl_horizon": (0, False),
    "algorithm.ref_refresh_every": (0, True),
    "algorithm.entropy_coef": (0, True),
    "algorithm.rollout_is_threshold": (0, False),
    "algorithm.rollout_is_low": (0, False),
    "algorithm.rollout_rs_low": (0, False),
    "algorithm.rollout_rs_high": (0, False),
    "optim.learning_rate": (0, False),
    "optim.warmup_steps": (0, True),
    "optim.beta1": (0, True),
    "optim.beta2": (0, True),
    "optim.weight_decay": (0, True),
    "optim.max_grad_norm": (0, False),
    "actor.num_minibatches": (1, True),
    "actor.num_epochs": (1, True),
    "actor.micro_batch_size_per_device": (1, True),
    "actor.micro_batch_tokens_per_device": (0, True),
    "actor.logits_chunk_tokens": (1, True),
    "rollout.temperature": (0, False),
    "rollout.top_p": (0, False),
    "rollout.top_k": (0, True),
    "rollout.batch_size": (1, True),
    "rollout.max_lag": (0, True),
    "rollout.num_replicas": (0, True),
    "rollout.tensor_parallel_size": (1, True),
    "rollout.gpu_memory_utilization": (0, False),
    "rollout.max_num_seqs": (1, True),
    "rollout.bucket_mb": (1, True),
    "rollout.probe_every": (0, True),
    "rollout.probe_threshold": (0, False),
    "rollout.start_timeout_s": (0, False),
    "rollout.timeout_s": (0, False),
    "rollout.max_restarts": (0, True),
    "rollout.api_port": (0, True),
    "reward.overlong_buffer": (0, True),
    "reward.overlong_penalty": (0, True),
    "reward.num_workers": (1, True),
    "reward.timeout_s": (0, False),
    "eval.every_epochs": (0, True),
    "eval.every_steps": (0, True),
    "eval.num_prompts": (0, True),
    "eval.temperature": (0, True),
    "eval.num_samples": (1, True),
    "checkpoint.every_epochs": (0, True),
    "checkpoint.every_steps": (0, True),
    "checkpoint.max_to_keep": (1, True),
    "checkpoint.hf_every_epochs": (0, True),
    "logging.num_text_samples": (0, True),
    "trainer.total_epochs": (1, True),
    "trainer.num_steps": (0, True),
    "trainer.seed": (0, True),
    "trainer.max_nonfinite_updates": (1, True),
    "trainer.flat_reward_steps": (1, True),
}

LOGGERS = ("console", "tensorboard")

OWN_ENGINE_ARGS = (
    "load_format", "generation_config", "logprobs_mode", "disable_log_stats", "skip_tokenizer_init",
    "scheduler_cls", "worker_extension_cls", "weight_transfer_config",
)  # fmt: skip
"""vLLM engine arguments that `rollout/vllm_server.py` needs to be what it sets them to."""


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the name of `names` that is most like `name`, or ""."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def known_keys() -> tuple[str, ...]:
    """Every key of a configuration, dotted: ("model.path", "model.dtype", ...)."""
    return tuple(
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(typing.cast(Any, section.type))
    )


def parse_config(config: Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` (or nested dict) into a checked `Config`.

    Raises:
        ConfigError: an unknown or missing key, a wrong type, or a broken rule; the first one found.
    """
    sections = {}
    names = {field.name: field.type for field in dataclasses.fields(Config)}
    for name in config:
        if name not in names:
            raise ConfigError(name, "...", f"there is no such section{nearest(name, names)}")
    for name, section_type in names.items():
        if name not in config:
            raise ConfigError(name, None, "this section is missing; configs/gsm8k.py lists them all")
        sections[name] = _parse_section(name, typing.cast(Any, section_type), config[name])
    parsed = Config(**sections)
    _check_values(parsed)
    _check_combinations(parsed)
    return parsed


def _parse_section(section: str, section_type: Any, values: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(section_type)
    for key in values:
        if key not in hints:
            # The key's own name decides: with the section's name before it, anything in the section is near.
            siblings = {name: f"{section}.{name}" for name in hints}
            close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
            hint = f" (did you mean {siblings[close[0]]}?)" if close else nearest(key, known_keys())
            raise ConfigError(f"{section}.{key}", values[key], f"there is no such key{hint}")
    for key in hints:
        if key not in values:
            raise ConfigError(
                f"{section}.{key}", None, "this key is missing; configs/gsm8k.py lists them all"
            )
    return section_type(**{key: _typed(f"{section}.{key}", values[key], hint) for key, hint in hints.items()})


def _typed(key: str, value: Any, hint: Any) -> Any:
    """Returns `value` as the type `hint` wants, where that loses nothing."""
    if isinstance(hint, types.GenericAlias):
        element = typing.get_args(hint)[0]
        if isinstance(value, str) or not isinstance(value, (list, tuple)):
            raise ConfigError(key, value, f"must be a tuple of {element.__name__}, as in ('a', 'b')")
        return tuple(_typed(key, item, element) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(key, value, f"must be of type {hint.__name__}, is {type(value).__name__}")
    return value


def _get(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_values(config: Config) -> None:
    """The rules that look at one key."""
    for key in known_keys():
        value = _get(config, key)
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ConfigError(key, value, "must be a finite number")
    for key, choices in CHOICES.items():
        value = _get(config, key)
        if value not in choices:
            raise ConfigError(key, value, f"must be one of {', '.join(choices)}{nearest(value, choices)}")
    for key, (bound, inclusive) in LOWER_BOUNDS.items():
        value = _get(config, key)
        if value < bound or (value == bound and not inclusive):
            raise ConfigError(key, value, f"must be {'at least' if inclusive else 'greater than'} {bound}")
    for logger in config.logging.loggers:
        if logger not in LOGGERS:
            raise ConfigError("logging.loggers", logger, f"must be among {', '.join(LOGGERS)}")
    _check_upper_bounds(config)


def _check_upper_bounds(config: Config) -> None:
    algorithm = config.algorithm
    if algorithm.group_size < 2:
        raise ConfigError(
            "algorithm.group_size",
            algorithm.group_size,
            "must be at least 2: an advantage compares the completions of one prompt",
        )
    if algorithm.clip_low >= 1:
        raise ConfigError("algorithm.clip_low", algorithm.clip_low, "must be below 1")
    if algorithm.dual_clip != 0 and algorithm.dual_clip <= 1:
        raise ConfigError("algorithm.dual_clip", algorithm.dual_clip, "must be above 1, or 0 for none")
    for key in ("optim.beta1", "optim.beta2"):
        if _get(config, key) >= 1:
            raise ConfigError(key, _get(config, key), "must be below 1")
    if config.optim.moments_dtype == "bfloat16" and config.optim.beta2 > 0.99:
        rule = "needs optim.beta2 of 0.99 or less: a smaller change is lost in rounding the second moment"
        raise ConfigError("optim.moments_dtype", "bfloat16", rule)
    if config.rollout.top_p > 1:
        raise ConfigError("rollout.top_p", config.rollout.top_p, "must be at most 1")
    if config.rollout.gpu_memory_utilization >= 1:
        utilization = config.rollout.gpu_memory_utilization
        raise ConfigError("rollout.gpu_memory_utilization", utilization, "must be below 1")
    if config.rollout.api_port >= 2**16:
        raise ConfigError("rollout.api_port", config.rollout.api_port, "must be below 65536")
    if not 0 <= config.arithmetic.direct_share <= 1:
        raise ConfigError("arithmetic.direct_share", config.arithmetic.direct_share, "must be from 0 to 1")
    if not 1 <= config.arithmetic.difficulty <= 4:
        raise ConfigError("arithmetic.difficulty", config.arithmetic.difficulty, "must be from 1 to 4")
    if config.trainer.seed >= 2**31:
        raise ConfigError("trainer.seed", config.trainer.seed, "must be below 2**31")


def _check_combinations(config: Config) -> None:
    """The rules that look at several keys."""
    if not config.model.path:
        raise ConfigError("model.path", config.model.path, "must be a Hugging Face folder, or 'random'")
    sizes = config.random_model
    if sizes.num_heads % sizes.num_kv_heads:
        raise ConfigError(
            "random_model.num_kv_heads", sizes.num_kv_heads, f"must divide num_heads={sizes.num_heads}"
        )
    if sizes.hidden_size % sizes.num_heads or (sizes.hidden_size // sizes.num_heads) % 2:
        raise ConfigError(
            "random_model.hidden_size",
            sizes.hidden_size,
            f"must be num_heads={sizes.num_heads} times an even head width",
        )
    if config.completions_per_step % config.actor.num_minibatches:
        raise ConfigError(
            "actor.num_minibatches",
            config.actor.num_minibatches,
            f"must divide the {config.completions_per_step} completions of a step "
            f"(data.train_batch_size={config.data.train_batch_size} x "
            f"algorithm.group_size={config.algorithm.group_size})",
        )
    if config.eval.num_samples > 1 and config.eval.temperature == 0:
        raise ConfigError(
            "eval.num_samples", config.eval.num_samples, "must be 1 while eval.temperature is 0 (greedy)"
        )
    _check_policy_loss(config)
    _check_kl(config)
    _check_correction(config.algorithm)
    _check_reward(config)
    _check_rollout(config)
    _check_mesh(config.mesh)
    _check_data(config)


def split_file_name(value: str) -> tuple[str, str] | None:
    """Returns FILE.py and NAME of "FILE.py:NAME", a function of the user's own; None for anything else."""
    path, colon, name = value.rpartition(":")
    return (path, name) if colon and path.endswith(".py") and name.isidentifier() else None


def _check_policy_loss(config: Config) -> None:
    algorithm, estimator = config.algorithm, config.algorithm.adv_estimator
    if estimator not in ADV_ESTIMATORS and split_file_name(estimator) is None:
        rule = (
            f"must be one of {', '.join(ADV_ESTIMATORS)}, or FILE.py:NAME{nearest(estimator, ADV_ESTIMATORS)}"
        )
        raise ConfigError("algorithm.adv_estimator", estimator, rule)
    if algorithm.policy_loss in SEQUENCE_LOSSES and algorithm.loss_agg != "seq-mean-token-mean":
        rule = f"must be seq-mean-token-mean with algorithm.policy_loss={algorithm.policy_loss}: "
        raise ConfigError(
            "algorithm.loss_agg", algorithm.loss_agg, rule + "its loss is one number a completion"
        )
    if algorithm.policy_loss in SEQUENCE_LOSSES and algorithm.adv_estimator == "reinforce_plus_plus":
        rule = "has an advantage for each token, "
        rule += f"algorithm.policy_loss={algorithm.policy_loss} wants one for each completion"
        raise ConfigError("algorithm.adv_estimator", algorithm.adv_estimator, rule)
    if algorithm.policy_loss == "policy_gradient" and config.updates_per_step > 1:
        rule = "needs one update a step (actor.num_minibatches=1, actor.num_epochs=1): it has no ratio, and later "
        raise ConfigError("algorithm.policy_loss", "policy_gradient", rule + "updates would be off-policy")
    if algorithm.policy_loss == "policy_gradient" and algorithm.old_logprobs == "sampler":
        rule = (
            "has no ratio that algorithm.old_logprobs=sampler could enter; use algorithm.rollout_is instead"
        )
        raise ConfigError("algorithm.policy_loss", "policy_gradient", rule)


def _check_kl(config: Config) -> None:
    algorithm = config.algorithm
    if not config.uses_reference:
        if algorithm.kl_in == "reward":
            raise ConfigError("algorithm.kl_in", "reward", "needs algorithm.kl_coef above 0")
        for key in ("kl_target", "ref_refresh_every"):
            if getattr(algorithm, key):
                rule = "needs algorithm.kl_coef above 0: without it there is no reference"
                raise ConfigError(f"algorithm.{key}", getattr(algorithm, key), rule)
    if algorithm.kl_in == "reward" and algorithm.kl_estimator.endswith("+"):
        rule = "differs from the estimator without + in its gradient only, and a reward has none"
        raise ConfigError("algorithm.kl_estimator", algorithm.kl_estimator, rule)
    if algorithm.kl_target and algorithm.kl_horizon <= config.completions_per_step / 5:
        rule = f"must be above a fifth of the {config.completions_per_step} completions of a step, "
        rule += "or one step could make the coefficient 0"
        raise ConfigError("algorithm.kl_horizon", algorithm.kl_horizon, rule)


def _check_correction(algorithm: AlgorithmSection) -> None:
    for key, does in (("rollout_is", "every weight would be 1"), ("rollout_rs", "nothing would be rejected")):
        value = getattr(algorithm, key)
        if value != "none" and algorithm.old_logprobs == "sampler":
            rule = "must be none while algorithm.old_logprobs is sampler: the ratio is against the sampler "
            raise ConfigError(f"algorithm.{key}", value, f"{rule}already, and {does}")
    if algorithm.policy_loss in SEQUENCE_LOSSES and algorithm.rollout_is in ("token", "token_mask"):
        rule = f"weighs tokens, but algorithm.policy_loss={algorithm.policy_loss} is of whole completions: "
        rule += f"use {algorithm.rollout_is.replace('token', 'sequence')}"
        raise ConfigError("algorithm.rollout_is", algorithm.rollout_is, rule)
    if algorithm.rollout_is.endswith("_mask") and algorithm.rollout_is_low >= algorithm.rollout_is_threshold:
        rule = f"must be below algorithm.rollout_is_threshold={algorithm.rollout_is_threshold}"
        raise ConfigError("algorithm.rollout_is_low", algorithm.rollout_is_low, rule)
    if algorithm.rollout_rs != "none" and algorithm.rollout_rs_low >= algorithm.rollout_rs_high:
        rule = f"must be below algorithm.rollout_rs_high={algorithm.rollout_rs_high}"
        raise ConfigError("algorithm.rollout_rs_low", algorithm.rollout_rs_low, rule)


def _check_reward(config: Config) -> None:
    reward, num_functions = config.reward, 1 + len(config.reward.extra_functions)
    if reward.weights and len(reward.weights) != num_functions:
        rule = f"must be empty, or hold one weight for each of the {num_functions} reward functions"
        raise ConfigError("reward.weights", reward.weights, rule)
    if reward.overlong_buffer > config.data.max_response_length:
        rule = f"must be at most data.max_response_length={config.data.max_response_length}"
        raise ConfigError("reward.overlong_buffer", reward.overlong_buffer, rule)


def _check_rollout(config: Config) -> None:
    rollout = config.rollout
    if rollout.max_lag and rollout.engine == "local":
        rule = "must be 0 with rollout.engine=local, which samples on the trainer's own devices"
        raise ConfigError("rollout.max_lag", rollout.max_lag, rule)
    if rollout.max_lag and not config.corrects_sampler:
        rule = "samples with old weights: needs algorithm.rollout_is=token or algorithm.old_logprobs=sampler"
        raise ConfigError("rollout.max_lag", rollout.max_lag, rule)
    if config.algorithm.dynamic_sampling_rounds and not config.corrects_sampler:
        rule = "keeps surplus groups for the next step, when they are of older weights: needs "
        rule += "algorithm.rollout_is=token or algorithm.old_logprobs=sampler"
        key, value = "algorithm.dynamic_sampling_rounds", config.algorithm.dynamic_sampling_rounds
        raise ConfigError(key, value, rule)
    if rollout.update_weights == "during" and not rollout.max_lag:
        rule = "needs rollout.max_lag above 0: without it nothing is sampled while weights change"
        raise ConfigError("rollout.update_weights", "during", rule)
    against_sleep = {
        "rollout.api_port=0: an engine that sleeps cannot answer": rollout.api_port > 0,
        "rollout.placement=colocated: on other GPUs the trainer gains nothing": rollout.placement
        == "separate",
        "rollout.max_lag=0: an engine that samples cannot sleep": rollout.max_lag > 0,
    }
    for needed, is_missing in against_sleep.items():
        if rollout.sleep and is_missing:
            raise ConfigError("rollout.sleep", True, f"needs {needed}")
    if rollout.weight_sync == "ipc" and rollout.placement == "separate":
        rule = "needs rollout.placement=colocated: memory is shared within one GPU"
        raise ConfigError("rollout.weight_sync", "ipc", rule)
    if rollout.weight_sync == "nccl" and rollout.placement == "colocated":
        rule = "needs rollout.placement=separate: NCCL joins different GPUs"
        raise ConfigError("rollout.weight_sync", "nccl", rule)
    for argument in rollout.engine_args:
        name, equals, _ = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ConfigError(
                "rollout.engine_args", argument, "must be like 'NAME=VALUE', a vLLM engine argument"
            )
        if name in OWN_ENGINE_ARGS:
            raise ConfigError("rollout.engine_args", argument, f"{name} is set by grpo_jax itself")


def _check_mesh(mesh: MeshSection) -> None:
    axes = dataclasses.asdict(mesh)
    for name, size in axes.items():
        if size == 0 or size < -1:
            raise ConfigError(f"mesh.{name}", size, "must be at least 1, or -1 for all devices that are left")
    if list(axes.values()).count(-1) > 1:
        raise ConfigError("mesh", axes, "only one axis may be -1")


def _check_data(config: Config) -> None:
    arithmetic = config.arithmetic
    if arithmetic.num_train:
        if not arithmetic.num_val:
            raise ConfigError("arithmetic.num_val", 0, "must be above 0 where arithmetic.num_train is")
        if config.sft.num_steps and not arithmetic.num_sft:
            raise ConfigError("arithmetic.num_sft", 0, "must be above 0 where sft.num_steps is")
        return
    for key in ("train_files", "val_files"):
        if not getattr(config.data, key):
            raise ConfigError(f"data.{key}", (), "must name at least one Parquet file")
    if config.sft.num_steps and not config.sft.train_files:
        raise ConfigError("sft.train_files", (), "must name a Parquet file where sft.num_steps is above 0")
