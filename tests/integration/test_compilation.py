"""A run compiles its steps once, before the first of them."""

import integration_helpers as helpers

from grpo_jax import train
from grpo_jax.rollout.local import LocalEngine


def test_steps_of_any_length_share_one_program(tmp_path, whole_run_overrides, monkeypatch):
    """Completions of up to 24 tokens: every step has other lengths, and another number of packed rows."""
    kept = []
    begin = train._run_steps

    def run_steps(stages, *args):
        kept.append((stages, sizes(stages)))
        return begin(stages, *args)

    def sizes(stages):
        update = stages.update
        return [step._cache_size() for step in (update.zeros, update.accumulate, update.apply)]

    monkeypatch.setattr(train, "_run_steps", run_steps)
    changes = {"data.max_response_length": 24, "actor.micro_batch_size_per_device": 2, "trainer.num_steps": 3}
    helpers.train_ok(tmp_path / "run", whole_run_overrides | changes)
    [(stages, before)] = kept
    assert before == sizes(stages) == [1, 1, 1]
    lines = helpers.read_lines(tmp_path / "run")[1:]
    assert len({line["response_length/mean"] for line in lines}) == 3  # the lengths did differ


def test_the_engine_gives_up_its_memory_before_an_update_is_tried_out(
    tmp_path, whole_run_overrides, monkeypatch
):
    """With rollout.sleep both do not fit side by side, before the first step as little as in it."""
    seen = []

    def noted(name, function):
        return lambda *args, **options: (seen.append(name), function(*args, **options))[1]

    monkeypatch.setattr(LocalEngine, "sleep", noted("sleep", LocalEngine.sleep))
    monkeypatch.setattr(LocalEngine, "load_weights", noted("weights", LocalEngine.load_weights))
    monkeypatch.setattr(train, "run_updates", noted("updates", train.run_updates))
    helpers.train_ok(tmp_path / "run", whole_run_overrides | {"trainer.num_steps": 1})
    assert seen == ["sleep", "updates", "weights", "sleep", "updates", "weights"]
