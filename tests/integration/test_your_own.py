"""docs/your_own.md: its example trains, its functions do what they say, and mistakes end in one line."""

import re

import integration_helpers as helpers
import numpy as np
import pytest

from grpo_jax.algorithm import Algorithm, load_algorithm, try_functions
from grpo_jax.algorithm.policy_losses import POLICY_LOSSES, PolicyLoss
from grpo_jax.config import AlgorithmSection, Config, ConfigError


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    page = (helpers.ROOT / "docs" / "your_own.md").read_text()
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(re.search(r"```python\n(.*?)```", page, re.S)[1])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["sign", "discounted"])
def test_a_step_with_everything_of_the_users_own(tmp_path, file, estimator):
    overrides = {
        "algorithm.adv_estimator": f"{file}:{estimator}",
        "algorithm.policy_loss": f"{file}:one_sided",
        "algorithm.kl_estimator": f"{file}:huber",
        "algorithm.kl_coef": 0.1,
        "reward.function": f"{file}:short",
        "actor.num_minibatches": 2,
        "logging.save_rollouts": True,
        "trainer.num_steps": 2,
    }
    helpers.train_ok(tmp_path / "run", overrides)
    lines = helpers.read_lines(tmp_path / "run")
    records = helpers.read_jsonl(tmp_path / "run" / "rollouts" / "step-000001.jsonl")
    expected = [float(r["ground_truth"] in r["completion"]) - len(r["completion"]) / 1000 for r in records]
    assert [r["reward"] for r in records] == pytest.approx(expected, abs=1e-6)
    assert lines[1]["kl/mean"] > 0 and np.isfinite([line["actor/loss"] for line in lines]).all()
    assert all(line["actor/grad_norm"] > 0 for line in lines)


def of(file, **names):
    return Algorithm.of(AlgorithmSection(**{key: f"{file}:{name}" for key, name in names.items()}))


def test_the_estimators_by_hand(file):
    rewards = np.array([[0.0, 0.0, 3.0]])
    assert of(file, adv_estimator="sign").estimator(rewards, None).tolist() == [[-1, -1, 1]]
    per_token = of(file, adv_estimator="discounted").estimator
    mask = np.array([[0, 1, 1, 1, 0]], np.float32)
    got = per_token(np.array([[0, -1, 0, 2, 0]], np.float32), mask)
    assert per_token.is_per_token
    np.testing.assert_allclose(got, [[0, -1 + 0.81 * 2, 0.9 * 2, 2, 0]], rtol=1e-6)


def test_a_loss_may_say_which_configurations_it_goes_with(tmp_path):
    path = tmp_path / "losses.py"
    path.write_text(
        "from grpo_jax.algorithm.policy_losses import PolicyLoss, gspo_surrogate\n"
        "whole = PolicyLoss(gspo_surrogate, is_per_completion=True)\n"
    )
    section = AlgorithmSection(policy_loss=f"{path}:whole")
    assert isinstance(Algorithm.of(section).policy_loss, PolicyLoss)
    with pytest.raises(ConfigError, match="must be seq-mean-token-mean with"):
        load_algorithm(Config(algorithm=section))


@pytest.mark.parametrize("key", ["adv_estimator", "policy_loss", "kl_estimator"])
def test_mistakes_name_the_key(key, file, tmp_path):
    (tmp_path / "bad.py").write_text("1 / 0\n")
    for value, complaint in (
        ("absent.py:f", "there is no file absent.py"),
        (f"{tmp_path}/bad.py:f", r"cannot be loaded: ZeroDivisionError: .*\(bad.py:1\)"),
        (f"{file}:hubert", r"there is no 'hubert' in it \(did you mean huber\?\)"),
        ("no_such_name", "must be one of .*, or FILE.py:NAME"),
    ):
        with pytest.raises(ConfigError, match=complaint) as caught:
            Algorithm.of(AlgorithmSection(**{key: value}))
        assert (caught.value.key, caught.value.value) == (f"algorithm.{key}", value)


def test_a_misspelt_loss_names_the_nearest():
    with pytest.raises(ConfigError, match=r"clip, gspo, cispo, .*did you mean cispo\?"):
        Algorithm.of(AlgorithmSection(policy_loss="cipso"))
    assert next(iter(POLICY_LOSSES)) == AlgorithmSection().policy_loss


@pytest.mark.parametrize(
    ("key", "function", "complaint"),
    [
        (
            "policy_loss",
            "lambda tokens: tokens",
            r"fails: TypeError: .* 1 positional argument but 2 were given",
        ),
        ("policy_loss", "lambda t, a: t.logprob", r"fails: AttributeError: .*'logprob' \(mine.py:1\)"),
        ("policy_loss", "lambda t, a: t.mask", r"must return shape \(2, 8\) and .*, returns \(2, 8\)$"),
        (
            "policy_loss",
            "lambda t, a: (t.mask.sum(), t.mask, t.mask)",
            r"returns \(\) and \(2, 8\) and \(2, 8\)$",
        ),
        (
            "kl_estimator",
            "lambda p, q: (p - q).sum()",
            r"must return shape \(2, 8\) for \(2, 8\), returns \(\)$",
        ),
        ("adv_estimator", "lambda rewards, lengths: rewards[0]", r"returns \(8,\)$"),
        ("adv_estimator", "lambda rewards: rewards", r"fails: TypeError: .* 2 were given"),
    ],
)
def test_a_function_that_cannot_be_used_is_refused_before_anything_is_computed(
    tmp_path, key, function, complaint
):
    path = tmp_path / "mine.py"
    path.write_text(f"f = {function}\n")
    with pytest.raises(ConfigError, match=complaint) as caught:
        try_functions(Algorithm.of(AlgorithmSection(**{key: f"{path}:f"})))
    assert (caught.value.key, caught.value.value) == (f"algorithm.{key}", f"{path}:f")


def test_every_function_of_the_page_can_be_used(file):
    for estimator in ("sign", "discounted"):
        try_functions(of(file, adv_estimator=estimator, policy_loss="one_sided", kl_estimator="huber"))


def test_a_file_that_ends_the_process_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("import sys; sys.exit(0)\n")
    with pytest.raises(ConfigError, match=r"cannot be loaded: SystemExit: 0 \(mine.py:1\)"):
        of(tmp_path / "mine.py", policy_loss="f")


def test_a_file_runs_once_for_all_the_keys_that_name_it(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("runs = []\ndef f(*args): return runs\ndef g(*args): return runs\n")
    found = of(path, policy_loss="f", kl_estimator="g")
    assert found.policy_loss.function() is found.kl()


def test_a_file_that_failed_is_read_again(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        of(path, policy_loss="f")
    path.write_text("def f(tokens, algorithm): return 3\n")
    assert of(path, policy_loss="f").policy_loss.function(None, None) == 3


def test_files_of_one_name_in_two_folders_are_two(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"def f(*args): return {name!r}\n")
    found = of(tmp_path / "a" / "mine.py", kl_estimator="f"), of(tmp_path / "b" / "mine.py", kl_estimator="f")
    assert [algorithm.kl() for algorithm in found] == ["a", "b"]
