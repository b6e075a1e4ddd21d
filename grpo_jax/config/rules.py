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
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

from grpo_jax.config.old_names import OLD_NAME, key_of
from grpo_jax.config.sections import KEYS, SECTIONS, Config, Key


class ConfigError(ValueError):
    """A value that a rule forbids. The commands print it as one line and exit with 2."""

    def __init__(self, key: str, value: Any, rule: str):
        super().__init__(f"{key}={_in_short(value)}: {rule}")
        self.key, self.value, self.rule = key, value, rule


LONGEST_SHOWN = 300
"""Characters of a value that a message shows; of a longer one, both ends."""


OWN_ENGINE_ARGS = (
    "load_format", "generation_config", "logprobs_mode", "disable_log_stats", "skip_tokenizer_init",
    "scheduler_cls", "worker_extension_cls", "weight_transfer_config",
)  # fmt: skip
"""vLLM engine arguments that `rollout/vllm/server.py` needs to be what it sets them to."""

MOST_ADAPTER_RANK = 512
"""Of vLLM's adapters."""

NO_SECTION = "must be a section, with keys of its own"


def _in_short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # more digits than Python turns into text
        return "a number of too many digits"
    if len(text) <= LONGEST_SHOWN:
        return text
    half = LONGEST_SHOWN // 2
    return f"{text[:half]} ... {text[-half:]} ({len(text)} characters)"


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
        check_value(name, key, parsed.get(name))
    _check_combinations(parsed)
    return parsed


def _parse_section(section: str, values: Mapping[str, Any]) -> Any:
    if not hasattr(values, "items"):  # a ConfigDict is no Mapping
        raise ConfigError(section, values, NO_SECTION)
    siblings = {field.name: f"{section}.{field.name}" for field in dataclasses.fields(SECTIONS[section])}
    for key in values:
        if key not in siblings:
            if known := key_of(f"{section}.{key}"):
                raise ConfigError(f"{section}.{key}", values[key], f"{OLD_NAME}: here it is {known}")
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
        if abs(value) > FLOAT32_MAX:  # Python could not turn it into a float
            raise ConfigError(key, value, NO_FLOAT32)
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(key, value, f"must be of type {hint.__name__}, is {type(value).__name__}")
    return value


# ---- one key ----


FLOAT32_MAX = 3.4028234e38
NO_FLOAT32 = "must be a number that float32 can hold"
INT32_LIMIT = 2**31
LONGEST_NAME, LONGEST_PATH = 255, 4095
"""Bytes, of Linux."""


def check_value(name: str, key: Key, value: Any) -> None:
    """Checks the rules for every value, and those that stand in the line of a key.

    Args:   name: of the key or of a flag that stands for it.
    Raises: ConfigError: one is broken.
    """
    for item in value if isinstance(value, tuple) else (value,):
        if (broken := _broken_by_type(item)) is not None:
            raise ConfigError(name, item, broken)
    if isinstance(value, tuple):
        for item in value:
            if key.choices and item not in key.choices:
                raise ConfigError(name, item, f"must be among {', '.join(key.choices)}")
    elif key.choices and value not in key.choices:
        rule = f"must be one of {', '.join(key.choices)}{nearest(value, key.choices)}"
        raise ConfigError(name, value, rule)
    elif (broken := _broken_bound(key, value)) is not None:
        raise ConfigError(name, value, broken)


def _broken_by_type(value: Any) -> str | None:
    """What every value of its type must be, if `value` is not."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, float) and abs(value) > FLOAT32_MAX:
        return NO_FLOAT32
    if isinstance(value, int) and not -INT32_LIMIT <= value < INT32_LIMIT:
        return (
            f"must be below {shown(INT32_LIMIT)}" if value > 0 else f"must be at least -{shown(INT32_LIMIT)}"
        )
    return broken_text(value) if isinstance(value, str) else None


def broken_text(value: str) -> str | None:
    """What text must be that may name a file and is printed in one line, if `value` is not."""
    if any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in value):
        return "must be text without control characters"
    if max(len(part.encode()) for part in value.split("/")) > LONGEST_NAME and "=" not in value:
        return f"is no name of a file: at most {LONGEST_NAME} bytes can stand between two /"
    if len(value.encode()) > LONGEST_PATH:
        return f"must have at most {LONGEST_PATH} bytes, as a path has"
    return None


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
    return {2**31: "2**31", 2**24: "2**24"}.get(int(bound), str(bound))


# ---- keys that nothing reads ----

TERM = re.compile(r"([a-z_.]+)(=|!=|>)(.+)")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys that differ, and both values. Args: as from `Config.to_dict`; where one lacks a key, it is None."""
    flat = lambda config: {f"{s}.{k}": value for s, values in config.items() for k, value in values.items()}
    a, b = flat(one), flat(other)
    return {key: (a.get(key), b.get(key)) for key in a | b if a.get(key) != b.get(key)}


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

Rules = Iterator[tuple[bool, str, str]]
"""(whether it is broken, the key to name, what it asks for) of each rule, in the order of checking."""


def _check_combinations(config: Config) -> None:
    """The rules that look at several keys."""
    for rules in (
        _sizes,
        _lora,
        _kl,
        _correction,
        _reward,
        _rollout,
        _sleep_and_sync,
        _data,
        _rollbacks,
        _names,
    ):
        for is_broken, key, rule in rules(config):
            if is_broken:
                raise ConfigError(key, config.get(key), rule)
    for argument in config.rollout.engine_args:
        name, equals, _ = argument.partition("=")
        if not equals or not name.isidentifier():
            rule = "must be like 'NAME=VALUE', a vLLM engine argument"
            raise ConfigError("rollout.engine_args", argument, rule)
        if name in OWN_ENGINE_ARGS:
            raise ConfigError("rollout.engine_args", argument, f"{name} is set by grpo_jax itself")
    axes = dataclasses.asdict(config.mesh)
    if list(axes.values()).count(-1) > 1:
        raise ConfigError("mesh", axes, "only one axis may be -1")


def _sizes(config: Config) -> Rules:
    yield not config.model.path, "model.path", "must be a Hugging Face folder, or 'random'"
    hidden, heads = config.random_model.hidden_size, config.random_model.num_heads
    is_odd = bool(hidden % heads or hidden // heads % 2)
    rule = f"must divide num_heads={heads}"
    yield heads % config.random_model.num_kv_heads > 0, "random_model.num_kv_heads", rule
    yield is_odd, "random_model.hidden_size", f"must be num_heads={heads} times an even head width"
    rule = f"must divide the {config.completions_per_step} completions of a step (data.train_batch_size="
    rule += f"{config.data.train_batch_size} x algorithm.group_size={config.algorithm.group_size})"
    yield config.completions_per_step % config.actor.num_minibatches > 0, "actor.num_minibatches", rule
    is_greedy = config.eval.temperature == 0
    rule = "must be 1 while eval.temperature is 0 (greedy)"
    yield is_greedy and config.eval.num_samples > 1, "eval.num_samples", rule
    is_coarse = config.optim.moments_dtype == "bfloat16" and config.optim.beta2 > 0.99
    rule = "needs optim.beta2 of 0.99 or less: a smaller change is lost in rounding the second moment"
    yield is_coarse, "optim.moments_dtype", rule
    rule = "must be float32 with model.dtype=float16, whose 11 bits it would round away"
    is_float16 = config.model.dtype == "float16"
    for key in ("model.param_dtype", "optim.accumulator_dtype"):
        yield is_float16 and config.get(key) != "float32", key, rule


def _lora(config: Config) -> Rules:
    has_adapters = config.lora.rank > 0
    yield has_adapters and not config.lora.targets, "lora.targets", "must name at least one set or layer"
    if has_adapters and config.lora.push == "adapter":
        rollout = config.rollout
        rule = "is for rollout.engine=vllm: the local engine computes with the adapters"
        yield rollout.engine != "vllm", "lora.push", rule
        rule = "needs rollout.sleep=False: an engine that sleeps forgets the model that they belong to"
        yield rollout.sleep, "lora.push", rule
        rule = "needs rollout.api_port=0: its server answers without adapters"
        yield bool(rollout.api_port), "lora.push", rule
        rule = f"vLLM takes ranks up to {MOST_ADAPTER_RANK}: choose merged"
        yield config.lora.rank > MOST_ADAPTER_RANK, "lora.push", rule
    rule = "needs lora.rank above 0: that of the folder"
    yield bool(config.lora.path) and not has_adapters, "lora.path", rule


def _kl(config: Config) -> Rules:
    algorithm, without = config.algorithm, not config.uses_reference
    is_in_reward = algorithm.kl_in == "reward"
    yield is_in_reward and without, "algorithm.kl_in", "needs algorithm.kl_coef above 0"
    rule = "needs algorithm.kl_coef above 0: without it there is no reference"
    yield without and algorithm.kl_target > 0, "algorithm.kl_target", rule
    yield without and algorithm.ref_refresh_every > 0, "algorithm.ref_refresh_every", rule
    rule = "differs from the estimator without + in its gradient only, and a reward has none"
    yield is_in_reward and algorithm.kl_estimator.endswith("+"), "algorithm.kl_estimator", rule
    rule = f"must be above a fifth of the {config.completions_per_step} completions of a step, "
    rule += "or one step could make the coefficient 0"
    is_short = algorithm.kl_horizon <= config.completions_per_step / 5
    yield is_short and algorithm.kl_target > 0, "algorithm.kl_horizon", rule


def _correction(config: Config) -> Rules:
    algorithm, is_of_sampler = config.algorithm, config.algorithm.old_logprobs == "sampler"
    rule = (
        "must be none while algorithm.old_logprobs is sampler: the ratio is against the sampler already, and "
    )
    weighs, rejects = algorithm.rollout_is != "none", algorithm.rollout_rs != "none"
    yield is_of_sampler and weighs, "algorithm.rollout_is", rule + "every weight would be 1"
    yield is_of_sampler and rejects, "algorithm.rollout_rs", rule + "nothing would be rejected"
    low, high = algorithm.rollout_is_low, algorithm.rollout_is_threshold
    rule = f"must be below algorithm.rollout_is_threshold={high}"
    yield algorithm.rollout_is.endswith("_mask") and low >= high, "algorithm.rollout_is_low", rule
    low, high = algorithm.rollout_rs_low, algorithm.rollout_rs_high
    rule = f"must be below algorithm.rollout_rs_high={high}"
    yield rejects and low >= high, "algorithm.rollout_rs_low", rule


def _reward(config: Config) -> Rules:
    weights, num_functions = config.reward.weights, 1 + len(config.reward.extra_functions)
    rule = f"must be empty, or hold one weight for each of the {num_functions} reward functions"
    yield bool(weights) and len(weights) != num_functions, "reward.weights", rule
    limit = config.data.max_response_length
    rule = f"must be at most data.max_response_length={limit}"
    yield config.reward.overlong_buffer > limit, "reward.overlong_buffer", rule


def _rollout(config: Config) -> Rules:
    rollout, is_ahead = config.rollout, config.rollout.max_lag > 0
    is_unknown = config.cuts_distribution and not config.knows_drawable and not config.corrects_sampler
    rule = f"cuts the distribution where rollout.engine={rollout.engine} does not tell the trainer: needs "
    rule += "algorithm.rollout_is=token or algorithm.old_logprobs=sampler, or rollout.engine=local, whose cut the "
    rule += "trainer takes over"
    yield is_unknown and rollout.top_p < 1, "rollout.top_p", rule
    yield is_unknown and rollout.top_k > 0, "rollout.top_k", rule
    rule = f"must be 0 with rollout.engine={rollout.engine}, which samples on the trainer's own devices"
    yield is_ahead and "rollout.max_lag" in unread_keys(config), "rollout.max_lag", rule
    needs = "needs algorithm.rollout_is=token or algorithm.old_logprobs=sampler"
    rule = f"samples with old weights: {needs}"
    yield is_ahead and not config.corrects_sampler, "rollout.max_lag", rule
    is_dynamic = config.algorithm.dynamic_sampling_rounds > 0
    rule = f"keeps surplus groups for the next step, when they are of older weights: {needs}"
    yield is_dynamic and not config.corrects_sampler, "algorithm.dynamic_sampling_rounds", rule
    rule = "needs rollout.max_lag above 0: without it nothing is sampled while weights change"
    yield rollout.update_weights == "during" and not is_ahead, "rollout.update_weights", rule


def _sleep_and_sync(config: Config) -> Rules:
    rollout, is_separate = config.rollout, config.rollout.placement == "separate"
    for is_against, needed in (
        (rollout.api_port > 0, "rollout.api_port=0: an engine that sleeps cannot answer"),
        (is_separate, "rollout.placement=colocated: on other GPUs the trainer gains nothing"),
        (rollout.max_lag > 0, "rollout.max_lag=0: an engine that samples cannot sleep"),
    ):
        yield rollout.sleep and is_against, "rollout.sleep", f"needs {needed}"
    rule = "needs rollout.placement=colocated: memory is shared within one GPU"
    yield rollout.weight_sync == "ipc" and is_separate, "rollout.weight_sync", rule
    rule = "needs rollout.placement=separate: NCCL joins different GPUs"
    yield rollout.weight_sync == "nccl" and not is_separate, "rollout.weight_sync", rule


def _data(config: Config) -> Rules:
    data, arithmetic, warms_up = config.data, config.arithmetic, config.sft.num_steps > 0
    is_generated = arithmetic.num_train > 0
    rule = "must be above 0 where arithmetic.num_train is"
    yield is_generated and not arithmetic.num_val, "arithmetic.num_val", rule
    rule = "must be above 0 where sft.num_steps is"
    yield is_generated and warms_up and not arithmetic.num_sft, "arithmetic.num_sft", rule
    rule = "must name at least one Parquet file"
    yield not is_generated and not data.train_files, "data.train_files", rule
    yield not is_generated and not data.val_files, "data.val_files", rule
    rule = "must name a Parquet file where sft.num_steps is above 0"
    yield not is_generated and warms_up and not config.sft.train_files, "sft.train_files", rule


def _rollbacks(config: Config) -> Rules:
    section = config.checkpoint
    has_checkpoints = section.every_epochs or section.every_steps or section.every_minutes
    rule = "needs checkpoints to go back to: one of checkpoint.every_epochs, every_steps, every_minutes"
    yield config.trainer.max_rollbacks > 0 and not has_checkpoints, "trainer.max_rollbacks", rule


def _names(config: Config) -> Rules:
    for key in ("logging.project_name", "logging.experiment_name"):
        path = PurePath(config.get(key))
        yield (
            path.is_absolute() or ".." in path.parts,
            key,
            "must be a name of a folder below outputs: no .., no / in front",
        )
