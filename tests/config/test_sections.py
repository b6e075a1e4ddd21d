"""The lines of the keys agree with themselves, and with what is made of them: the page, the recipes."""

import ast
import importlib.util
import inspect
import pathlib

import pytest
from ml_collections import ConfigDict

from grpo_jax.algorithm.policy_losses import POLICY_LOSSES
from grpo_jax.config import (
    KEYS,
    Config,
    load_config,
    parse_config,
    rules,
    sections,
    unread_keys,
    unread_warning,
)
from grpo_jax.config.sections import ARRAYS, FIXED, FREE, LENGTH, SECTIONS

ROOT = pathlib.Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
WITH_SMOKE = [
    (path, variant)
    for path in RECIPES
    for variant in ("", "smoke")
    if path.stem != "quickstart" or not variant
]


def ids(value):
    return getattr(value, "stem", value) or "whole"


# Lines


def test_a_key_is_one_line():
    tree = ast.parse(inspect.getsource(sections))
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    for section in SECTIONS.values():
        for node in classes[section.__name__].body:
            if isinstance(node, ast.AnnAssign):
                assert node.lineno == node.end_lineno and node.end_col_offset <= 150, node.target.id
                assert ast.unparse(node.value.func) == "key"


@pytest.mark.parametrize("name", KEYS)
def test_a_line_is_consistent(name):
    key = KEYS[name]
    assert key.meaning and not key.meaning.endswith(".")
    assert key.resume in (FIXED, FREE, LENGTH, ARRAYS)
    chosen = key.default if isinstance(key.default, tuple) else (key.default,)
    assert not key.choices or set(chosen) <= set(key.choices)
    assert len(set(key.choices)) == len(key.choices)
    assert not (key.choices and key.rule)
    assert key.above is None or key.at_least is None
    assert key.at_most is None or key.below is None
    assert rules._broken_bound(key, key.default) is None


@pytest.mark.parametrize("name", [name for name, key in KEYS.items() if key.only])
def test_what_a_key_is_read_with_exists(name):
    """Keys and values that `only` names: a misspelt one would hold always, or never."""
    for clause in KEYS[name].only.split(" and "):
        for term in clause.split(" or "):
            other, comparison, wanted = rules.split_term(term)
            assert other in KEYS and other != name
            if comparison == ">":
                assert KEYS[other].type in (int, float) and wanted == "0"
            elif KEYS[other].type is int:
                assert wanted == "0" and comparison == "="
            elif KEYS[other].choices:
                assert set(wanted.split("|")) <= set(KEYS[other].choices)
            elif other == "algorithm.policy_loss":
                assert set(wanted.split("|")) <= set(POLICY_LOSSES)
            else:
                assert (other, wanted) in {
                    ("model.path", "random"), ("reward.function", "math"), ("reward.extra_functions", "math")
                }  # fmt: skip


# What nothing reads


def unread(**changes):
    """section__key=value: the keys that nothing reads in the shipped run with these changes."""
    config = load_config(ROOT / "configs" / "gsm8k.py")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
    return unread_keys(parse_config(config))


def test_the_shipped_run_reads_what_it_should():
    not_read = set(unread())
    assert {f"random_model.{name}" for name in ("vocab_size", "num_layers")} <= not_read
    assert "rollout.batch_size" in not_read and "rollout.max_num_seqs" not in not_read
    assert "data.train_files" not in not_read and "arithmetic.difficulty" in not_read
    assert "algorithm.kl_estimator" not in not_read and "algorithm.kl_horizon" in not_read
    assert {"algorithm.clip_low", "algorithm.dual_clip"}.isdisjoint(not_read)
    assert {"algorithm.sapo_tau_positive", "algorithm.loss_norm", "reward.overlong_penalty"} <= not_read


@pytest.mark.parametrize(
    ("key", "reads_it", "reads_it_not"),
    [
        ("rollout.sleep", {}, {"rollout__engine": "local"}),
        ("rollout.batch_size", {"rollout__engine": "local"}, {}),
        ("random_model.num_heads", {"model__path": "random"}, {}),
        ("data.val_files", {}, {"arithmetic__num_train": 5, "arithmetic__num_val": 1}),
        ("arithmetic.num_val", {"arithmetic__num_train": 5, "arithmetic__num_val": 1}, {}),
        ("sft.batch_size", {"sft__num_steps": 1, "sft__train_files": ("a",)}, {}),
        (
            "sft.train_files",
            {"sft__num_steps": 1, "sft__train_files": ("a",)},
            {"sft__num_steps": 1, "arithmetic__num_train": 5, "arithmetic__num_val": 1, "arithmetic__num_sft": 1},
        ),
        ("algorithm.kl_estimator", {}, {"algorithm__kl_coef": 0.0}),
        ("algorithm.ref_offload", {}, {"algorithm__kl_coef": 0.0}),
        ("algorithm.kl_horizon", {"algorithm__kl_target": 0.1}, {}),
        ("algorithm.sapo_tau_negative", {"algorithm__policy_loss": "sapo"}, {}),
        ("algorithm.clip_high", {"algorithm__policy_loss": "cispo"}, {"algorithm__policy_loss": "sapo"}),
        ("algorithm.dual_clip", {}, {"algorithm__policy_loss": "cispo"}),
        ("algorithm.loss_norm", {"algorithm__loss_agg": "seq-mean-token-sum-norm"}, {}),
        ("algorithm.rollout_is_threshold", {"algorithm__rollout_is": "token"}, {}),
        ("algorithm.rollout_is_low", {"algorithm__rollout_is": "token_mask"}, {"algorithm__rollout_is": "token"}),
        ("algorithm.rollout_rs_high", {"algorithm__rollout_rs": "seq_sum_k1"}, {}),
        ("actor.micro_batch_size_per_device", {}, {"actor__micro_batch_tokens_per_device": 64}),
        ("reward.overlong_penalty", {"reward__overlong_buffer": 8}, {}),
        ("reward.num_workers", {"reward__function": "math"}, {}),
        ("reward.on_error", {"reward__function": "my.py:f"}, {"reward__function": "think_format"}),
        ("reward.timeout_s", {"reward__extra_functions": ("gsm8k_format", "my.py:f")}, {}),
        ("logging.num_text_samples", {}, {"logging__loggers": ("console",)}),
    ],
)  # fmt: skip
def test_when_a_key_is_read(key, reads_it, reads_it_not):
    assert key not in unread(**reads_it)
    assert key in unread(**reads_it_not)


def test_a_loss_of_ones_own_may_read_every_key_of_the_losses():
    algorithm = Config().algorithm
    own = Config(algorithm=type(algorithm)(policy_loss="my_loss.py:loss"))
    names = {"clip_low", "clip_high", "dual_clip", "sapo_tau_positive", "sapo_tau_negative"}
    assert names.isdisjoint(name.removeprefix("algorithm.") for name in unread_keys(own))


def test_settings_that_nothing_reads_are_named_once_each_with_the_reason():
    config = load_config(ROOT / "configs" / "gsm8k.py")
    config.rollout.update(engine="local", sleep=True)
    config.algorithm.update(rollout_is_low=0.1, sapo_tau_positive=1.0)  # the second one is the default
    assert unread_warning(parse_config(config)) == (
        "Nothing in this run reads algorithm.rollout_is_low=0.1 (algorithm.rollout_is=none); "
        "rollout.gpu_memory_utilization=0.4, rollout.sleep=True (rollout.engine=local)"
    )


# Recipes


@pytest.mark.parametrize(("path", "variant"), WITH_SMOKE, ids=ids)
def test_a_recipe_sets_nothing_that_its_run_does_not_read(path, variant):
    assert unread_warning(parse_config(load_config(path, variant))) == ""


@pytest.mark.parametrize(("path", "variant"), [(p, "") for p in RECIPES] + WITH_SMOKE[1:2], ids=ids)
def test_a_recipe_states_no_default(path, variant, monkeypatch):
    """It sets no key to what the key has already, be it the default or the value of the file that it builds on."""
    idle, set_item = [], ConfigDict.__setitem__

    def record(config, key, value):
        if key in config and config[key] == value:
            idle.append(f"{key}={value}")
        set_item(config, key, value)

    monkeypatch.setattr(ConfigDict, "__setitem__", record)
    load_config(path, variant)
    assert idle == []


# The page


def test_the_page_has_the_tables_of_the_lines():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "configuration_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    page = tables.PAGE.read_text()
    assert [name for _, name, _ in tables.TABLE.findall(page)] == list(SECTIONS)
    assert page == tables.with_tables(page), "run: python docs/configuration_tables.py"
