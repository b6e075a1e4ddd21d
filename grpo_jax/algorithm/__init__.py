"""The mathematics of a run: advantages, policy losses, KL, corrections, the loss. Pure functions of arrays.

`load_algorithm` turns the names in the configuration into functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_jax.config import AlgorithmSection, Config, ConfigError, nearest, split_file_name
from grpo_jax.config.user_code import describe, load_function

if TYPE_CHECKING:
    from grpo_jax.algorithm.advantages import AdvantageEstimator
    from grpo_jax.algorithm.kl import KLEstimator
    from grpo_jax.algorithm.policy_losses import PolicyLoss


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The `algorithm` section, and the functions that it names: of the package, or of the user's own."""

    section: AlgorithmSection
    estimator: AdvantageEstimator
    policy_loss: PolicyLoss
    kl: KLEstimator

    @classmethod
    def of(cls, section: AlgorithmSection) -> Algorithm:
        """Finds the functions.

        Raises: ConfigError: no function has such a name, or FILE.py:NAME cannot be loaded.
        """
        from grpo_jax.algorithm.advantages import ADVANTAGE_ESTIMATORS, AdvantageEstimator
        from grpo_jax.algorithm.kl import KL_ESTIMATORS
        from grpo_jax.algorithm.policy_losses import POLICY_LOSSES, PolicyLoss

        estimator = _find("algorithm.adv_estimator", section.adv_estimator, ADVANTAGE_ESTIMATORS)
        policy_loss = _find("algorithm.policy_loss", section.policy_loss, POLICY_LOSSES)
        return cls(
            section,
            estimator if isinstance(estimator, AdvantageEstimator) else AdvantageEstimator(estimator),
            policy_loss if isinstance(policy_loss, PolicyLoss) else PolicyLoss(policy_loss),
            _find("algorithm.kl_estimator", section.kl_estimator, KL_ESTIMATORS),
        )


def load_algorithm(config: Config) -> Algorithm:
    """The algorithm of a run, before any device is touched.

    Raises: ConfigError: as `Algorithm.of`, or a function does not go with the rest of the configuration.
    """
    algorithm = Algorithm.of(config.algorithm)
    if algorithm.policy_loss.is_per_completion:
        _check_loss_of_completions(algorithm)
    if not algorithm.policy_loss.has_ratio:
        _check_loss_without_ratio(config)
    return algorithm


def try_functions(algorithm: Algorithm) -> None:
    """Calls the functions of the user's own with small arrays. It comes when devices may be touched.

    Raises: ConfigError: one of them fails, or returns something else than a shipped one would.
    """
    import jax
    import numpy as np

    from grpo_jax.algorithm.policy_losses import PolicyTokens

    section, shape = algorithm.section, (2, 8)
    floats = jax.ShapeDtypeStruct(shape, np.float32)
    arrays: Any = [*[floats] * 4, jax.ShapeDtypeStruct(shape, np.int32)]
    tokens = PolicyTokens(*arrays)
    numbers = np.arange(16, dtype=np.float32).reshape(shape)  # rewards [P, G], or of tokens [B, T]
    for key, function, num_results in (
        ("policy_loss", lambda: jax.eval_shape(lambda t: algorithm.policy_loss(t, section), tokens), 3),
        ("kl_estimator", lambda: jax.eval_shape(algorithm.kl, floats, floats), 1),
        ("adv_estimator", lambda: algorithm.estimator(numbers, np.ones(shape, np.float32)), 1),
    ):
        name = getattr(section, key)
        if named := split_file_name(name):
            _try_function(
                f"algorithm.{key}", name, function, str(Path(named[0]).resolve()), [shape] * num_results
            )


def _try_function(key: str, name: str, function: Callable[[], Any], file: str, shapes: list[Any]) -> None:
    import jax
    import numpy as np

    try:
        got = [np.shape(array) for array in jax.tree.leaves(function())]
    except Exception as error:  # the function is the user's, and so is whatever it raises
        raise ConfigError(key, name, f"fails: {describe(error, file)}") from None
    if got != shapes:
        show = lambda shapes: " and ".join(map(str, shapes)) or "none"
        raise ConfigError(key, name, f"must return shape {show(shapes)} for {shapes[0]}, returns {show(got)}")


def _find(key: str, name: str, functions: Mapping[str, Any]) -> Any:
    if name in functions:
        return functions[name]
    if split_file_name(name) is None:
        rule = f"must be one of {', '.join(functions)}, or FILE.py:NAME{nearest(name, functions)}"
        raise ConfigError(key, name, rule)
    return load_function(key, name)


def _check_loss_of_completions(algorithm: Algorithm) -> None:
    section = algorithm.section
    named = f"algorithm.policy_loss={section.policy_loss}"
    if section.loss_agg != "seq-mean-token-mean":
        rule = f"must be seq-mean-token-mean with {named}: its loss is one number a completion"
        raise ConfigError("algorithm.loss_agg", section.loss_agg, rule)
    if algorithm.estimator.is_per_token:
        rule = f"has an advantage for each token, {named} wants one for each completion"
        raise ConfigError("algorithm.adv_estimator", section.adv_estimator, rule)
    if section.rollout_is in ("token", "token_mask"):
        better = section.rollout_is.replace("token", "sequence")
        rule = f"weighs tokens, but {named} is of whole completions: use {better}"
        raise ConfigError("algorithm.rollout_is", section.rollout_is, rule)


def _check_loss_without_ratio(config: Config) -> None:
    name = config.algorithm.policy_loss
    if config.updates_per_step > 1:
        rule = "needs one update a step (actor.num_minibatches=1, actor.num_epochs=1): it has no ratio, and later "
        raise ConfigError("algorithm.policy_loss", name, rule + "updates would be off-policy")
    if config.algorithm.old_logprobs == "sampler":
        rule = (
            "has no ratio that algorithm.old_logprobs=sampler could enter; use algorithm.rollout_is instead"
        )
        raise ConfigError("algorithm.policy_loss", name, rule)
