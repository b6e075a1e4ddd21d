"""A run compiles its steps once, before the first of them."""

import logging
import re

import integration_helpers as helpers
import jax
import pytest

from grpo_jax.rollout.local import LocalEngine

STEPS = ("forward_pass", "zeros", "backward", "apply", "tokens_clipped")


@pytest.fixture
def compiled():
    """(name of a jitted function, time), as JAX logs that it compiles it."""
    records = []

    class Handler(logging.Handler):
        def emit(self, record):
            if found := re.match(r"Compiling (?:jit\()?(\w+)", record.getMessage()):
                records.append((found[1], record.created))

    handler, log = Handler(), logging.getLogger("jax._src.interpreters.pxla")
    log.addHandler(handler)
    log.propagate = False  # thousands of lines that nobody reads
    jax.config.update("jax_log_compiles", True)
    yield records
    jax.config.update("jax_log_compiles", False)
    log.propagate = True
    log.removeHandler(handler)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"algorithm.kl_in": "reward"}, marks=pytest.mark.slow),
        {"algorithm.kl_target": 0.1},
    ],
    ids=str,
)
def test_steps_of_any_length_share_one_program(tmp_path, whole_run_overrides, compiled, changes):
    """Completions of up to 24 tokens: every step has other lengths, and another number of packed rows."""
    changes |= {
        "data.max_response_length": 24,
        "actor.micro_batch_size_per_device": 2,
        "trainer.num_steps": 3,
    }
    helpers.train_ok(tmp_path / "run", whole_run_overrides | changes)
    before, *lines = helpers.read_lines(tmp_path / "run")
    of_steps = [(name, when) for name, when in compiled if name in STEPS]
    assert sorted(name for name, _ in of_steps) == sorted(STEPS)
    assert (
        max(when for _, when in of_steps) < before["time"]
    )  # when the validation before the first step was done
    assert len({line["response_length/mean"] for line in lines}) == 3  # the lengths did differ


@pytest.mark.slow
def test_an_offloaded_state_has_its_programs_compiled_before_too(tmp_path, whole_run_overrides, compiled):
    changes = {"optim.offload": True, "model.dtype": "bfloat16", "trainer.num_steps": 2}
    helpers.train_ok(tmp_path / "run", whole_run_overrides | changes)
    before = helpers.read_lines(tmp_path / "run")[0]["time"]
    names = ("forward_pass", "zeros", "backward", "check", "_changed")
    of_steps = [(name, when) for name, when in compiled if name in names]
    assert {name for name, _ in of_steps} == set(names)
    assert max(when for _, when in of_steps) < before


def test_the_engine_gives_up_its_memory_before_it_gets_weights_and_after_each_batch(
    tmp_path, whole_run_overrides, monkeypatch
):
    """With rollout.sleep both do not fit side by side, before the first step as little as in it."""
    seen = []

    def noted(name, function):
        return lambda *args, **options: (seen.append(name), function(*args, **options))[1]

    monkeypatch.setattr(LocalEngine, "sleep", noted("sleep", LocalEngine.sleep))
    monkeypatch.setattr(LocalEngine, "load_weights", noted("weights", LocalEngine.load_weights))
    helpers.train_ok(tmp_path / "run", whole_run_overrides | {"trainer.num_steps": 1})
    assert seen == ["sleep", "weights", "sleep", "weights"]
