"""Functions of the user's own, named FILE.py:NAME, that run in the trainer's process."""

from pathlib import Path

from grpo_jax.algorithm.advantages import ADVANTAGE_ESTIMATORS, Estimator
from grpo_jax.config import ConfigError
from grpo_jax.rewards.worker import check_function, describe, load_module


def load_estimator(name: str) -> Estimator:
    """Returns the function that `algorithm.adv_estimator` names: one of ours, or NAME of FILE.py.

    Raises: ConfigError: there is no such file, it cannot be imported, or it lacks the function.
    """
    if name in ADVANTAGE_ESTIMATORS:
        return ADVANTAGE_ESTIMATORS[name]
    path, _, attribute = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError("algorithm.adv_estimator", name, f"there is no file {path}")
    file = str(Path(path).resolve())
    try:
        module = load_module(file)
        check_function(module, attribute)
    except Exception as error:  # the file is the user's, and so is whatever it raises
        raise ConfigError(
            "algorithm.adv_estimator", name, f"cannot be loaded: {describe(error, file)}"
        ) from None
    return getattr(module, attribute)
