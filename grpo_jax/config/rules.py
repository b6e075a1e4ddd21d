"""The rules: an `ml_collections.ConfigDict` goes in, a checked `Config` comes out; what nothing reads is named.

What a single key must obey stands in its line of `sections.py`. What needs a file, a tokenizer or a device to be
checked is checked by whoever reads it, with the same `ConfigError`.
"""

import collections
import dataclasses
import difflib
import math
import operator
import re
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from grpo_jax.config.sections import KEYS, SECTIONS, AlgorithmSection, Config, Key, MeshSection


class ConfigError(ValueError):
    """A value that a rule forbids. The commands print it as one line and exit with 2."""

    def __init__(self, key: str, value: Any, rule: str):
        super().__init__(f"{key}={value!r}: {rule}")
        self.key, self.value, self.rule = key, value, rule


OWN_ENGINE_ARGS = (
    "load_format", "generation_config", "logprobs_mode", "disable_log_stats", "skip_tokenizer_init",
    "scheduler_cls", "worker_extension_cls", "weight_transfer_config",
)  # fmt: skip
"""vLLM engine arguments that `rollout/vllm/server.py` needs to be what it sets them to."""

NO_SECTION = "must be a section, with keys of its own"


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns " (did you mean X?)" for the name of `names` that is most like `name`, or ""."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def split_file_name(value: str) -> tuple[str, str] | None:
    """Returns FILE.py and NAME of "FILE.py:NAME", a function of the user's own; None for anything else."""
    path, colon, name = value.rpartition(":")
    return (path, name) if colon and path.endswith(".py") and name.isidentifier() else None


def parse_config(config: Mapping[str, Any]) -> Config:
    """Turns a `ConfigDict` (or nested dict) into a checked `Config`. What it leaves out has its default.

    Raises:
        ConfigError: an unknown key, a wrong type, or a broken rule; the first one found.
    """
    for name in config:
        if name not in SECTIONS:
            raise ConfigError(name, "...", f"there is no such section{nearest(name, SECTIONS)}")
    parsed = Config(**{name: _parse_section(name, values) for name, values in config.items()})
    for name, key in KEYS.items():
        _check_value(name, key, parsed.get(name))
    _check_combinations(parsed)
    return parsed


def _parse_section(section: str, values: Mapping[str, Any]) -> Any:
    if not hasattr(values, "items"):  # a ConfigDict is no Mapping
        raise ConfigError(section, values, NO_SECTION)
    siblings = {field.name: f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])}
    for key in values:
        if key not in siblings:
            # The key's own name decides: with the section's name before it, anything in the section is near.
            close = difflib.get_close_matches(key, siblings, n=1, cutoff=0.5)
            hint = f" (did you mean {siblings[close[0]]}?)" if close else nearest(key, KEYS)
            raise ConfigError(f"{section}.{key}", values[key], f"there is no such key{hint}")
    typed = {key: _typed(siblings[key], value, KEYS[siblings[key]].type) for key, value in values.items()}
    return SECTIONS[section](**typed)


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


# ---- one key ----


def _check_value(name: str, key: Key, value: Any) -> None:
    """The rules that stand in the line of a key."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(name, value, "must be a finite number")
    if isinstance(value, tuple):
        for item in value:
            if key.choices and item not in key.choices:
                raise ConfigError(name, item, f"must be among {', '.join(key.choices)}")
    elif key.choices and value not in key.choices:
        rule = f"must be one of {', '.join(key.choices)}{nearest(value, key.choices)}"
        raise ConfigError(name, value, rule)
    elif (broken := _broken_bound(key, value)) is not None:
        raise ConfigError(name, value, broken)


def _broken_bound(key: Key, value: Any) -> str | None:
    """What the bounds of a key ask for, if `value` is beyond one of them."""
    besides = "" if key.besides is None else f", or {key.besides[0]} for {key.besides[1]}"
    if key.besides is not None and value == key.besides[0]:
        return None
    for bound, is_beyond, words in (
        (key.at_least, operator.lt, "at least"),
        (key.above, operator.le, "above" if besides else "greater than"),
        (key.at_most, operator.gt, "at most"),
        (key.below, operator.ge, "below"),
    ):
        if bound is not None and is_beyond(value, bound):
            if key.at_least is not None and key.at_most is not None:
                return f"must be from {key.at_least} to {key.at_most}"
            return f"must be {words} {shown(bound)}{besides}{f': {key.why}' if key.why else ''}"
    return None


def shown(bound: float) -> str:
    """A bound as one reads it best."""
    return "2**31" if bound == 2**31 else str(bound)


# ---- keys that nothing reads ----

TERM = re.compile(r"([a-z_.]+)(=|!=|>)(.+)")


def unread_keys(config: Config) -> dict[str, str]:
    """Returns the keys that nothing reads in a run of `config`, and why: key -> "SECTION.KEY=VALUE"."""
    found = {}
    for name, key in KEYS.items():
        for clause in key.only.split(" and ") if key.only else ():
            terms = [split_term(term) for term in clause.split(" or ")]
            if not any(_holds(config.get(other), *term) for other, *term in terms):
                found[name] = " and ".join(f"{other}={config.get(other)}" for other, *_ in terms)
                break
    return found


def unread_warning(config: Config) -> str:
    """Returns one line that names the keys which are not at their defaults and which nothing reads, or ""."""
    settings = collections.defaultdict(list)
    for name, why in unread_keys(config).items():
        if config.get(name) != KEYS[name].default:
            settings[why].append(f"{name}={config.get(name)!r}")
    texts = [f"{', '.join(of_why)} ({why})" for why, of_why in settings.items()]
    return f"Nothing in this run reads {'; '.join(texts)}" if texts else ""


def split_term(term: str) -> tuple[str, str, str]:
    """Returns key, comparison and value of a term of `only`."""
    match = TERM.fullmatch(term)
    assert match is not None, term
    key, comparison, wanted = match.groups()
    return key, comparison, wanted


def _holds(value: Any, comparison: str, wanted: str) -> bool:
    if comparison == ">":
        return value > float(wanted)
    if comparison == "!=":
        return value != wanted
    values = value if isinstance(value, tuple) else (value,)
    # A function of the user's own may read whatever one of ours reads.
    return any(str(v) in wanted.split("|") or split_file_name(str(v)) is not None for v in values)


# ---- several keys ----


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
    if config.optim.moments_dtype == "bfloat16" and config.optim.beta2 > 0.99:
        rule = "needs optim.beta2 of 0.99 or less: a smaller change is lost in rounding the second moment"
        raise ConfigError("optim.moments_dtype", "bfloat16", rule)
    _check_kl(config)
    _check_correction(config.algorithm)
    _check_reward(config)
    _check_rollout(config)
    _check_mesh(config.mesh)
    _check_data(config)


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
    if rollout.max_lag and "rollout.max_lag" in unread_keys(config):
        rule = f"must be 0 with rollout.engine={rollout.engine}, which samples on the trainer's own devices"
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
    is_separate = rollout.placement == "separate"
    against_sleep = [
        (rollout.api_port > 0, "rollout.api_port=0: an engine that sleeps cannot answer"),
        (is_separate, "rollout.placement=colocated: on other GPUs the trainer gains nothing"),
        (rollout.max_lag > 0, "rollout.max_lag=0: an engine that samples cannot sleep"),
    ]
    for is_against, needed in against_sleep:
        if rollout.sleep and is_against:
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
