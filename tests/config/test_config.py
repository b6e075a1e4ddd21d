import json
import math
import pathlib

import pytest

from grpo_jax.algorithm import load_algorithm
from grpo_jax.config import KEYS, Config, ConfigError, load_config, parse_config
from grpo_jax.config.sections import SECTIONS

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
RECIPES = sorted(CONFIGS.glob("*.py"))


def changed(changes):
    """Returns configs/gsm8k.py as nested dictionaries, with dotted keys changed."""
    values = load_config(CONFIGS / "gsm8k.py").to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        values[section][name] = value
    return values


def refusal(changes):
    """Returns the error that the changed configuration is refused with."""
    with pytest.raises(ConfigError) as caught:
        load_algorithm(parse_config(changed(changes)))
    return caught.value


def keys_with(*facts):
    """The names of the keys in whose line one of the facts stands."""
    return [name for name, key in KEYS.items() if any(getattr(key, fact) not in (None, ()) for fact in facts)]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path):
    parsed = parse_config(load_config(path))
    again = parse_config(json.loads(json.dumps(parsed.to_dict())))  # as config.json holds it
    assert again == parsed


def test_the_smoke_variant_loads_and_a_misspelt_one_does_not():
    assert parse_config(load_config(CONFIGS / "gsm8k.py", "smoke")).model.path == "random"
    with pytest.raises(ValueError, match="smoky"):
        load_config(CONFIGS / "gsm8k.py", "smoky")


def test_derived_sizes():
    parsed = parse_config(
        changed({"data.train_batch_size": 6, "actor.num_minibatches": 3, "actor.num_epochs": 2})
    )
    assert (parsed.completions_per_step, parsed.updates_per_step) == (
        24,
        6,
    )  # 6 x 4 completions, 3 x 2 updates
    assert parsed.uses_reference
    assert not parse_config(changed({"algorithm.kl_coef": 0.0})).uses_reference


def test_old_logprobs_are_scored_where_the_update_cannot_know_them():
    several, penalty = {"actor.num_minibatches": 2}, {"algorithm.kl_in": "reward"}
    needed = lambda changes: parse_config(changed(changes)).needs_old_logprobs
    assert not needed({})
    assert not needed({"algorithm.rollout_is": "token"})  # the weight is against the update's own
    assert needed(several) and needed(penalty) and needed({"actor.num_epochs": 2})
    for changes in (several, penalty, several | penalty):
        assert not needed(changes | {"algorithm.old_logprobs": "sampler"})


# Keys


def test_an_unknown_key_names_the_nearest():
    error = refusal({"algorithm.grup_size": 8})
    assert (error.key, error.value) == ("algorithm.grup_size", 8)
    assert "did you mean algorithm.group_size?" in str(error)


def test_an_unknown_section_names_the_nearest():
    with pytest.raises(ConfigError, match=r"algoritm.*did you mean algorithm\?"):
        parse_config(changed({}) | {"algoritm": {}})


def test_a_choice_like_no_other_gets_no_hint():
    assert "did you mean" not in refusal({"rollout.engine": "zzzz"}).rule


ASKED_FOR = ("model.path", "data.train_files", "data.val_files")
"""What every run has to say."""


@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_left_out_has_its_default(key):
    values = changed({})
    section, name = key.split(".")
    del values[section][name]
    if key in ASKED_FOR:
        with pytest.raises(ConfigError) as caught:
            parse_config(values)
        assert (caught.value.key, caught.value.value) == (key, KEYS[key].default)
    else:
        default = getattr(SECTIONS[section](), name)
        assert parse_config(values).get(key) == default == KEYS[key].default
        assert type(default) is getattr(KEYS[key].type, "__origin__", KEYS[key].type)


@pytest.mark.parametrize("section", SECTIONS)
def test_a_section_that_is_left_out_has_its_defaults(section):
    values = changed({})
    del values[section]
    if section in ("model", "data"):
        with pytest.raises(ConfigError) as caught:
            parse_config(values)
        assert caught.value.key in ASKED_FOR
    else:
        assert getattr(parse_config(values), section) == getattr(Config(), section)


def test_a_section_is_no_value():
    with pytest.raises(ConfigError, match="algorithm='grpo': must be a section"):
        parse_config(changed({}) | {"algorithm": "grpo"})


def test_the_defaults_alone_lack_what_every_run_has_to_say():
    with pytest.raises(ConfigError, match=r"model\.path=''.*Hugging Face folder"):
        parse_config({})
    parsed = parse_config({"model": {"path": "m"}, "data": {"train_files": ["a"], "val_files": ["b"]}})
    assert parsed.algorithm == Config().algorithm and parsed.data.train_files == ("a",)


# Types


@pytest.mark.parametrize("key", KEYS)
def test_a_wrong_type_is_refused(key):
    wrong = {
        int: [True, "1", 1.5, None],
        float: [True, "0.1", None],
        str: [1, None],
        bool: [1, "true", None],
    }.get(KEYS[key].type, ["abc", 1, None, (object(),)])
    for value in wrong:
        error = refusal({key: value})
        assert error.key == key
        assert "must be" in error.rule


def test_an_int_is_a_float_but_a_string_is_no_tuple():
    parsed = parse_config(changed({"optim.max_grad_norm": 2, "data.train_files": ["a", "b"]}))
    assert isinstance(parsed.optim.max_grad_norm, float) and parsed.optim.max_grad_norm == 2
    assert parsed.data.train_files == ("a", "b")
    assert "tuple of str" in refusal({"data.train_files": "a.parquet"}).rule
    assert "tuple of int" in refusal({"rollout.stop_token_ids": "12"}).rule
    assert "type int" in refusal({"rollout.stop_token_ids": (1, True)}).rule


@pytest.mark.parametrize("key", [name for name, key in KEYS.items() if key.type is float])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_are_finite(key, value):
    error = refusal({key: value})
    assert (error.key, error.rule) == (key, "must be a finite number")


# Rules


@pytest.mark.parametrize("key", keys_with("choices"))
def test_what_is_no_choice_is_refused(key):
    choices = KEYS[key].choices
    if KEYS[key].type is not str:
        error = refusal({key: (choices[0], choices[-1] + "x")})
    else:
        error = refusal({key: choices[-1] + "x"})
        assert f"did you mean {choices[-1]}?" in error.rule
    assert (error.key, error.value) == (key, choices[-1] + "x")
    assert all(name in error.rule for name in choices)


@pytest.mark.parametrize("key", keys_with("at_least", "above"))
def test_what_is_below_its_bound_is_refused(key):
    known = KEYS[key]
    below = known.type(known.at_least - 1) if known.above is None else known.type(known.above)
    if known.besides is not None and below == known.besides[0]:
        below = known.type(below - 1)
    error = refusal({key: below})
    assert (error.key, error.value) == (key, below)
    assert str(known.at_least if known.above is None else known.above) in error.rule


@pytest.mark.parametrize("key", keys_with("at_most", "below"))
def test_what_is_above_its_bound_is_refused(key):
    known = KEYS[key]
    above = known.type(known.at_most + 1) if known.below is None else known.type(known.below)
    error = refusal({key: above})
    assert (error.key, error.value) == (key, above)
    assert "must be" in error.rule


CORRECTED = {"algorithm.rollout_is": "token"}  # samples with old weights are allowed

GSPO = {"algorithm.policy_loss": "gspo", "algorithm.loss_agg": "seq-mean-token-mean"}
MASKED = {"algorithm.rollout_is": "token_mask"}

RULES = [  # changes, the key that is named, part of the rule
    ({"algorithm.adv_estimator": "grpo_nostd"}, "algorithm.adv_estimator", "did you mean grpo_no_std?"),
    ({"algorithm.adv_estimator": "mine.py:"}, "algorithm.adv_estimator", "FILE.py:NAME"),
    ({"algorithm.adv_estimator": "mine:f"}, "algorithm.adv_estimator", "FILE.py:NAME"),
    (GSPO | {"algorithm.loss_agg": "token-mean"}, "algorithm.loss_agg", "algorithm.policy_loss=gspo"),
    ({"algorithm.policy_loss": "geo_mean"}, "algorithm.loss_agg", "must be seq-mean-token-mean"),
    (
        GSPO | {"algorithm.adv_estimator": "reinforce_plus_plus"},
        "algorithm.adv_estimator",
        "wants one for each",
    ),
    (GSPO | {"algorithm.rollout_is": "token"}, "algorithm.rollout_is", "use sequence"),
    (GSPO | MASKED, "algorithm.rollout_is", "use sequence_mask"),
    (
        {"algorithm.policy_loss": "policy_gradient", "actor.num_minibatches": 2},
        "algorithm.policy_loss",
        "one update a step",
    ),
    (
        {"algorithm.policy_loss": "policy_gradient", "algorithm.old_logprobs": "sampler"},
        "algorithm.policy_loss",
        "use algorithm.rollout_is instead",
    ),
    (
        {"algorithm.rollout_rs": "seq_mean_k1", "algorithm.old_logprobs": "sampler"},
        "algorithm.rollout_rs",
        "nothing would be rejected",
    ),
    (MASKED | {"algorithm.rollout_is_low": 2.0}, "algorithm.rollout_is_low", "rollout_is_threshold=2.0"),
    (
        {"algorithm.rollout_rs": "seq_sum_k1", "algorithm.rollout_rs_low": 3.0},
        "algorithm.rollout_rs_low",
        "rollout_rs_high=2.0",
    ),
    (
        {"algorithm.kl_in": "reward", "algorithm.kl_estimator": "k1+"},
        "algorithm.kl_estimator",
        "a reward has none",
    ),
    (
        {"algorithm.kl_target": 0.1, "algorithm.kl_coef": 0.0},
        "algorithm.kl_target",
        "algorithm.kl_coef above 0",
    ),
    (
        {"algorithm.ref_refresh_every": 5, "algorithm.kl_coef": 0.0},
        "algorithm.ref_refresh_every",
        "algorithm.kl_coef above 0",
    ),
    (
        {"optim.moments_dtype": "bfloat16", "optim.beta2": 0.991},
        "optim.moments_dtype",
        "optim.beta2 of 0.99 or less",
    ),
    # 1,024 completions a step: a relative change of 0.2 * 1,024 / 204.8 = 1 would end at 0.
    (
        {"algorithm.kl_target": 0.1, "algorithm.kl_horizon": 204.8},
        "algorithm.kl_horizon",
        "a fifth of the 1024 completions",
    ),
    (
        {"algorithm.dynamic_sampling_rounds": 3},
        "algorithm.dynamic_sampling_rounds",
        "algorithm.rollout_is=token or algorithm.old_logprobs=sampler",
    ),
    (
        {"trainer.max_rollbacks": 1, "checkpoint.every_epochs": 0},
        "trainer.max_rollbacks",
        "one of checkpoint.every_epochs, every_steps, every_minutes",
    ),
    ({"reward.weights": (1.0, 2.0)}, "reward.weights", "each of the 1 reward functions"),
    (
        {"reward.extra_functions": ("math",), "reward.weights": (1.0,)},
        "reward.weights",
        "each of the 2 reward functions",
    ),
    ({"reward.overlong_buffer": 513}, "reward.overlong_buffer", "data.max_response_length=512"),
    ({"algorithm.group_size": 1}, "algorithm.group_size", "at least 2"),
    ({"algorithm.clip_low": 1.0}, "algorithm.clip_low", "below 1"),
    ({"algorithm.dual_clip": 1.0}, "algorithm.dual_clip", "above 1"),
    ({"algorithm.dual_clip": -3.0}, "algorithm.dual_clip", "above 1"),
    ({"optim.beta1": 1.0}, "optim.beta1", "below 1"),
    ({"optim.beta2": 1.0}, "optim.beta2", "below 1"),
    ({"rollout.top_p": 1.01}, "rollout.top_p", "at most 1"),
    ({"rollout.top_p": 0.9, "rollout.engine": "vllm"}, "rollout.top_p", "algorithm.rollout_is=token"),
    ({"rollout.top_k": 20, "rollout.engine": "vllm"}, "rollout.top_k", "rollout.engine=local"),
    (
        {"model.dtype": "float16", "model.param_dtype": "bfloat16"},
        "model.param_dtype",
        "float32 with model.dtype",
    ),
    (
        {"model.dtype": "float16", "optim.accumulator_dtype": "bfloat16"},
        "optim.accumulator_dtype",
        "11 bits",
    ),
    ({"optim.loss_scale": 0.5}, "optim.loss_scale", "from 1 to"),
    ({"rollout.gpu_memory_utilization": 1.0}, "rollout.gpu_memory_utilization", "below 1"),
    ({"rollout.api_port": 2**16}, "rollout.api_port", "below 65536"),
    (
        CORRECTED | {"rollout.max_lag": 1, "rollout.engine": "local"},
        "rollout.max_lag",
        "0 with rollout.engine=local",
    ),
    (
        {"rollout.max_lag": 1},
        "rollout.max_lag",
        "algorithm.rollout_is=token or algorithm.old_logprobs=sampler",
    ),
    ({"rollout.update_weights": "during"}, "rollout.update_weights", "rollout.max_lag above 0"),
    (CORRECTED | {"rollout.max_lag": 1, "rollout.sleep": True}, "rollout.sleep", "rollout.max_lag=0"),
    (
        {"rollout.placement": "separate", "rollout.sleep": True},
        "rollout.sleep",
        "rollout.placement=colocated",
    ),
    (
        {"rollout.weight_sync": "ipc", "rollout.placement": "separate"},
        "rollout.weight_sync",
        "rollout.placement=colocated",
    ),
    ({"rollout.weight_sync": "nccl"}, "rollout.weight_sync", "rollout.placement=separate"),
    ({"rollout.engine_args": ("seed=1", "max_num_seqs")}, "rollout.engine_args", "NAME=VALUE"),
    ({"rollout.engine_args": ("--max-num-seqs=3",)}, "rollout.engine_args", "NAME=VALUE"),
    ({"rollout.engine_args": ("max-num-seqs=3",)}, "rollout.engine_args", "NAME=VALUE"),
    ({"rollout.engine_args": ("load_format=auto",)}, "rollout.engine_args", "set by grpo_jax itself"),
    ({"rollout.engine_args": ("=3",)}, "rollout.engine_args", "NAME=VALUE"),
    ({"arithmetic.direct_share": 1.5}, "arithmetic.direct_share", "from 0 to 1"),
    ({"arithmetic.direct_share": -0.5}, "arithmetic.direct_share", "from 0 to 1"),
    ({"arithmetic.difficulty": 5}, "arithmetic.difficulty", "from 1 to 4"),
    ({"arithmetic.difficulty": 0}, "arithmetic.difficulty", "from 1 to 4"),
    ({"trainer.seed": 2**31}, "trainer.seed", "below 2**31"),
    ({"logging.loggers": ("console", "swanlab")}, "logging.loggers", "console, tensorboard"),
    ({"model.path": ""}, "model.path", "Hugging Face folder"),
    ({"random_model.num_kv_heads": 3}, "random_model.num_kv_heads", "divide num_heads=4"),
    ({"random_model.hidden_size": 66}, "random_model.hidden_size", "num_heads=4"),
    ({"random_model.hidden_size": 12}, "random_model.hidden_size", "even head width"),
    ({"actor.num_minibatches": 3}, "actor.num_minibatches", "divide the 1024 completions"),
    ({"eval.num_samples": 2}, "eval.num_samples", "eval.temperature is 0"),
    ({"algorithm.kl_in": "reward", "algorithm.kl_coef": 0.0}, "algorithm.kl_in", "algorithm.kl_coef above 0"),
    (
        {"algorithm.rollout_is": "token", "algorithm.old_logprobs": "sampler"},
        "algorithm.rollout_is",
        "must be none while algorithm.old_logprobs is sampler",
    ),
    ({"algorithm.rollout_is_threshold": -1.0}, "algorithm.rollout_is_threshold", "greater than 0"),
    ({"mesh.tensor": 0}, "mesh.tensor", "at least 1, or -1"),
    ({"mesh.data": -2}, "mesh.data", "at least 1, or -1"),
    ({"mesh.data": -1}, "mesh", "only one axis"),
    ({"data.train_files": ()}, "data.train_files", "at least one Parquet file"),
    ({"data.val_files": ()}, "data.val_files", "at least one Parquet file"),
    ({"arithmetic.num_train": 10}, "arithmetic.num_val", "above 0"),
    (
        {"arithmetic.num_train": 10, "arithmetic.num_val": 5, "sft.num_steps": 1},
        "arithmetic.num_sft",
        "sft.num_steps",
    ),
    ({"sft.num_steps": 1}, "sft.train_files", "sft.num_steps"),
]


@pytest.mark.parametrize(("changes", "key", "rule"), RULES, ids=lambda value: str(value)[:60])
def test_a_broken_rule_names_key_value_and_rule(changes, key, rule):
    error = refusal(changes)
    assert error.key == key
    assert rule in error.rule
    assert str(error) == f"{error.key}={error.value!r}: {error.rule}"


@pytest.mark.parametrize(
    "changes",
    [
        {"algorithm.dual_clip": 0.0},
        {"algorithm.group_size": 2, "actor.num_minibatches": 512},
        {"rollout.top_p": 1.0, "rollout.top_k": 0},
        {"rollout.gpu_memory_utilization": 0.99, "rollout.api_port": 2**16 - 1, "rollout.probe_every": 0},
        CORRECTED | {"rollout.max_lag": 3, "rollout.update_weights": "during"},
        {"algorithm.old_logprobs": "sampler", "rollout.max_lag": 1},
        CORRECTED | {"rollout.max_lag": 0, "rollout.engine": "local"},
        CORRECTED | {"rollout.max_lag": 0, "rollout.sleep": True},
        {"rollout.weight_sync": "ipc", "rollout.placement": "colocated"},
        {"rollout.weight_sync": "nccl", "rollout.placement": "separate"},
        {"rollout.weight_sync": "host", "rollout.placement": "separate"},
        {"rollout.engine_args": ("max_num_seqs=3", "quantization=", "hf_overrides={'a': 1}")},
        {"rollout.max_restarts": 0, "rollout.bucket_mb": 1, "rollout.probe_threshold": 1e-9},
        {"eval.num_samples": 8, "eval.temperature": 1.0},
        {"algorithm.kl_in": "reward"},
        {"algorithm.kl_in": "reward", "algorithm.old_logprobs": "sampler"},
        {"algorithm.rollout_is": "token", "algorithm.rollout_is_threshold": 0.5},
        {"algorithm.rollout_is": "none", "algorithm.old_logprobs": "sampler"},
        {"algorithm.adv_estimator": "folder/mine.py:f"},
        GSPO | {"algorithm.rollout_is": "sequence_mask", "algorithm.rollout_rs": "seq_mean_k1"},
        {"algorithm.policy_loss": "cispo", "algorithm.adv_estimator": "reinforce_plus_plus"} | MASKED,
        {"algorithm.policy_loss": "policy_gradient", "algorithm.rollout_is": "token"},
        {"algorithm.kl_estimator": "k1+"},
        {"algorithm.kl_target": 0.1, "algorithm.kl_horizon": 204.9, "algorithm.ref_refresh_every": 1},
        {"algorithm.kl_coef": 0.0, "algorithm.kl_horizon": 1.0},
        {"algorithm.rollout_is_low": 3.0, "algorithm.rollout_rs_low": 3.0},  # read by nothing
        CORRECTED | {"algorithm.dynamic_sampling_rounds": 1},
        {"algorithm.old_logprobs": "sampler", "algorithm.dynamic_sampling_rounds": 1},
        {"reward.extra_functions": ("math", "mine.py:f"), "reward.weights": (1.0, -0.5, 0.0)},
        {"reward.overlong_buffer": 512},
        {"optim.moments_dtype": "bfloat16", "optim.beta2": 0.99},
        {"mesh.data": -1, "mesh.fsdp": 1},
        {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2},
        {"arithmetic.num_train": 10, "arithmetic.num_val": 5, "data.train_files": (), "data.val_files": ()},
        {"trainer.seed": 2**31 - 1},
        {"trainer.max_rollbacks": 1},
        {"trainer.max_rollbacks": 1, "checkpoint.every_epochs": 0, "checkpoint.every_minutes": 9.0},
    ],
    ids=str,
)
def test_what_is_just_allowed_is_accepted(changes):
    parsed = parse_config(changed(changes)).to_dict()
    for key, value in changes.items():
        section, name = key.split(".")
        assert parsed[section][name] == (list(value) if isinstance(value, tuple) else value)
