"""When a run says that a number is not 0 which should be."""

import logging

import pytest
from config_helpers import gsm8k

from grpo_jax.run.stopping import RunWatch, not_zero_warning

ZERO = {"kl/mean": 0.0, "actor/ppo_kl": 0.0, "actor/skipped_updates": 0}


@pytest.mark.parametrize(
    ("changes", "update", "named"),
    [
        ({}, {}, ()),
        ({}, {"kl/mean": 1e-6, "actor/ppo_kl": -1e-5}, ()),
        ({}, {"kl/mean": 6.4e-4}, ("kl/mean=0.00064",)),
        ({}, {"kl/mean": -2e-6}, ("kl/mean=-2e-06",)),  # k1 has either sign
        ({}, {"actor/ppo_kl": -2e-5}, ("actor/ppo_kl=-2e-05",)),
        ({}, {"kl/mean": 0.1, "actor/ppo_kl": 0.1}, ("kl/mean=0.1", "actor/ppo_kl=0.1")),
        ({"algorithm.kl_in": "reward"}, {"kl/mean": 0.1}, ()),
        ({"algorithm.kl_estimator": "mine.py:kl"}, {"kl/mean": 0.1}, ()),
        # There pi_old is the sampler's, which is another program.
        ({"algorithm.old_logprobs": "sampler"}, {"actor/ppo_kl": 0.1}, ()),
    ],
)
def test_zero_means_zero(changes, update, named):
    warning = not_zero_warning(ZERO | update, gsm8k(**changes))
    assert bool(warning) is bool(named) and all(name in warning for name in named)


@pytest.fixture
def warnings_of(monkeypatch):
    """Returns `warnings_of(steps, is_new)`: what a watch logs of the updates of each step, one list a step."""

    def run(steps, is_new):
        logged = []
        logger = logging.getLogger("grpo_jax.run.stopping")
        monkeypatch.setattr(logger, "warning", lambda text, *args: logged[-1].append(text % args))
        watch = RunWatch(gsm8k(), is_new=is_new)
        for updates in steps:
            logged.append([])
            watch.note(updates)
        return logged

    return run


def test_only_the_first_update_of_a_new_run_must_find_zero(warnings_of):
    still, moved = [ZERO, ZERO | {"kl/mean": 1.0}], [ZERO | {"kl/mean": 0.01}, ZERO]
    assert [len(step) for step in warnings_of([moved, moved], is_new=True)] == [1, 0]
    assert [len(step) for step in warnings_of([moved, moved], is_new=False)] == [0, 0]
    assert [len(step) for step in warnings_of([still, moved], is_new=True)] == [0, 0]
