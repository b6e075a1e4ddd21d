"""What may differ when a run goes on: what the lines of the keys say, as a workdir applies it."""

import dataclasses
import datetime
import json
import logging

import pytest

from grpo_jax.config import KEYS, Config, ConfigError, parse_config
from grpo_jax.config.sections import ARRAYS, FIXED, FREE, LENGTH
from grpo_jax.run.workdir import Beginning, Workdir

FREE_SECTIONS = {"eval", "checkpoint", "logging"}
FREE_KEYS = {
    "trainer.flat_reward_steps", "trainer.max_rollbacks", "trainer.phase_timeout_s",
    "trainer.join_timeout_s", "trainer.compile_cache",
    "reward.num_workers", "reward.timeout_s", "algorithm.ref_offload", "model.allow_beyond_max_position",
}  # fmt: skip
FIXED_OF_ROLLOUT = {
    "engine", "temperature", "top_p", "top_k", "stop_token_ids", "max_lag", "update_weights", "engine_args"
}  # fmt: skip
OF_ARRAYS = {
    "model.dtype", "model.param_dtype", "optim.moments_dtype", "optim.offload", "algorithm.ref_refresh_every",
    "lora.rank", "lora.targets",
}  # fmt: skip


def test_which_keys_may_differ():
    """Written out once more: whoever makes a key free by mistake lets a run go on with another algorithm."""
    for name, key in KEYS.items():
        section, _, field = name.partition(".")
        is_free = section in FREE_SECTIONS or name in FREE_KEYS
        is_free |= section == "rollout" and field not in FIXED_OF_ROLLOUT
        expected = FREE if is_free else ARRAYS if name in OF_ARRAYS else FIXED
        if name in ("trainer.total_epochs", "trainer.num_steps"):
            expected = LENGTH
        assert key.resume == expected, name


def configured(**changes):
    """A configuration of generated problems; changes: section__key=value."""
    values = {"model": {"path": "random"}, "arithmetic": {"num_train": 10, "num_val": 2}}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        values.setdefault(section, {})[key] = value
    return parse_config(values)


def held(folder, config):
    """A workdir that holds a run of `config`."""
    workdir = Workdir(folder)
    workdir.record(config)
    return workdir


def test_a_free_key_may_differ_and_a_fixed_one_not(tmp_path):
    workdir = held(tmp_path, configured())
    workdir.check(configured(eval__every_steps=3, rollout__num_replicas=2))
    with pytest.raises(
        ConfigError, match=r"optim\.beta1=0\.5: the run in .* has 0\.9; choose another --workdir"
    ):
        workdir.check(configured(optim__beta1=0.5))


def test_the_length_may_differ_while_nothing_depends_on_it(tmp_path):
    held(tmp_path, configured()).check(configured(trainer__num_steps=7))
    workdir = held(tmp_path, configured(optim__schedule="cosine"))
    with pytest.raises(ConfigError, match=r"trainer\.num_steps=7: the run in"):
        workdir.check(configured(optim__schedule="cosine", trainer__num_steps=7))


def test_arrays_may_not_differ_even_by_force(tmp_path):
    workdir = held(tmp_path, configured(algorithm__kl_coef=0.1))
    force = dict(checkpoint__resume="force", algorithm__kl_coef=0.1, optim__beta1=0.5)
    workdir.check(configured(**force, model__dtype="float32"))  # nothing was saved yet
    (workdir.checkpoints / "3").mkdir(parents=True)
    workdir.check(configured(**force))
    for change in (
        {"model__dtype": "float32"},
        {"optim__offload": False},
        {"algorithm__ref_refresh_every": 2},
    ):
        with pytest.raises(ConfigError, match="hold other arrays"):
            workdir.check(configured(**force, **change))
    workdir = held(tmp_path, configured(algorithm__kl_coef=0.1, algorithm__ref_refresh_every=2))
    workdir.check(configured(**force, algorithm__ref_refresh_every=5))  # the reference is there


def test_what_neither_run_reads_may_differ(tmp_path):
    """The quickstart once said where GSM8K lies, beside its generated problems."""
    workdir = held(tmp_path, configured(data__train_files=("data/gsm8k/train.parquet",), sft__batch_size=3))
    workdir.check(configured())
    with pytest.raises(ConfigError, match=r"random_model\.num_layers=3"):
        workdir.check(configured(random_model__num_layers=3))
    with pytest.raises(ConfigError, match=r"algorithm\.loss_norm=0\.0: the run in .* has 9\.0"):
        norm = dict(algorithm__loss_agg="seq-mean-token-sum-norm")
        held(tmp_path, configured(**norm, algorithm__loss_norm=9.0)).check(configured(**norm))


def test_a_config_of_an_older_version_has_the_default_of_a_new_key(tmp_path):
    values = configured().to_dict()
    del values["trainer"]["deterministic"], values["reward"]
    workdir = Workdir(tmp_path)
    workdir.config.write_text(json.dumps(values))
    workdir.check(configured())
    with pytest.raises(ConfigError, match=r"trainer\.deterministic=True: the run in .* has False"):
        workdir.check(configured(trainer__deterministic=True))


def test_the_log_begins_with_what_nothing_reads(tmp_path):
    logger = logging.getLogger("grpo_jax")
    before = list(logger.handlers), logger.level, logger.propagate
    try:
        beginning = Beginning(datetime.datetime(2026, 1, 31), "")
        config = configured(sft__batch_size=3, data__val_files=("a",))
        with Workdir(tmp_path / "run").hold(config):
            Workdir(tmp_path / "run").open(config, beginning)
        (line,) = (tmp_path / "run" / "train.log").read_text().splitlines()
        with Workdir(tmp_path / "other").hold(configured()):
            Workdir(tmp_path / "other").open(configured(), beginning)
    finally:
        for handler in list(logger.handlers):
            handler.close()
        logger.handlers[:], logger.propagate = before[0], before[2]
        logger.setLevel(before[1])
    assert line.endswith(
        "WARNING Nothing in this run reads data.val_files=('a',) (arithmetic.num_train=10); "
        "sft.batch_size=3 (sft.num_steps=0)"
    )
    assert (tmp_path / "other" / "train.log").read_text() == ""


def test_sections_are_hashable_and_frozen():
    """They are arguments of cached functions, and shared by everybody."""
    assert hash(Config()) == hash(Config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.path = "m"
