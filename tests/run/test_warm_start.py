"""A warm start that trains nothing, or less than it was asked to, says so."""

import logging

import pytest
from config_helpers import gsm8k

from grpo_jax.run import warm_start


def test_all_updates_skipped_is_a_failure():
    config = gsm8k(**{"model.dtype": "float16"})
    with pytest.raises(
        FloatingPointError, match=r"3 of 3 updates .* nothing was trained; lower optim.loss_scale"
    ):
        warm_start._check_lost(3, 3, config)
    with pytest.raises(FloatingPointError, match=r"lower sft.learning_rate"):
        warm_start._check_lost(3, 3, gsm8k())


@pytest.mark.parametrize(("num_lost", "says"), [(0, ""), (1, "1 of 3 updates of the warm start")])
def test_some_are_a_warning(num_lost, says, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo_jax"), "propagate", True)
    warm_start._check_lost(num_lost, 3, gsm8k())
    assert says in caplog.text and bool(caplog.text) == bool(says)
