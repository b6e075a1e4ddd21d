"""What a person is told where memory is short: Qwen2.5-1.5B and 7B on cards of 80 GB."""

import dataclasses
import logging
import re

import jax
import jax.numpy as jnp
import pytest
from config_helpers import gsm8k

from grpo_jax.config import CheckpointSection, ConfigError
from grpo_jax.learner.memory import abstract_mesh
from grpo_jax.model.config import parse_hf_config
from grpo_jax.rollout import trainer_share
from grpo_jax.run import memory
from grpo_jax.run.checkpoint import Checkpointer
from grpo_jax.run.memory import Budget, DoesNotFit, asked_bytes
from grpo_jax.run.metrics import Timers
from grpo_jax.run.stopping import reported_failure

H100 = 81_559 * 2**20
QWEN_1_5B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN_7B = QWEN_1_5B | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
}
N = 1.543714  # thousand million parameters
ON_DEVICE = {"optim.offload": False, "algorithm.ref_offload": False}
W1 = ON_DEVICE | {
    "data.train_batch_size": 64,
    "algorithm.group_size": 8,
    "data.max_prompt_length": 128,
    "actor.logits_chunk_tokens": 2048,
    "actor.micro_batch_size_per_device": 16,
}


def budget(limit=None, *, hf=QWEN_1_5B, base=W1, memory=H100, **changes):
    """A run on one device. Args: limit: bytes for the trainer; None: its share of `memory`."""
    config = gsm8k(**base | changes)
    model = dataclasses.replace(parse_hf_config(hf, config.model), attention="cudnn")
    return Budget(config, model, abstract_mesh(1, 1, 1), limit or trainer_share(config.rollout) * memory)


def test_a_run_that_cannot_fit_is_refused_with_what_it_needs_and_what_would_help():
    with pytest.raises(ConfigError) as error:
        budget().check_plan()
    text = error.value.rule
    assert "phase update needs 51.2 GB of a device that has 45.3 GB for the trainer" in text
    # 4, 8, 2, 2, 4 and 2 bytes of each of 1.544 thousand million parameters
    for part in (
        "parameters 6.2 GB", "Adam's moments 12.3 GB", "reference 3.1 GB", "parameters to compute with 3.1 GB",
        "sums of gradients 6.2 GB", "gradients of a micro-batch 3.1 GB",
    ):  # fmt: skip
        assert part in text
    # On the host instead: 4 + 8 bytes, and the copy becomes what is held.
    assert "It fits with optim.offload=True (18.5 GB back, 18.5 GB more on the host) or with" in text
    assert "\n" not in text


def test_the_advised_micro_batch_fits_and_one_more_row_does_not():
    with pytest.raises(ConfigError) as error:
        budget().check_plan()
    rows = int(re.search(r"micro_batch_size_per_device=(\d+)", error.value.rule)[1])
    key = "actor.micro_batch_size_per_device"
    # As many sequences as fill the micro-batches, which are not made smaller then.
    peak = lambda rows: budget(**{key: rows, "data.train_batch_size": rows}).plan.peak
    assert 1 < rows < 16 and peak(rows) <= budget().limit < peak(rows + 1)
    in_tokens = budget(**{"actor.micro_batch_tokens_per_device": 16 * 640}).advice("update")
    assert f"actor.micro_batch_tokens_per_device={rows * 640} (" in in_tokens


@pytest.mark.parametrize(("over", "is_refused"), [(0.95, False), (1.05, False), (1.12, True)])
def test_within_a_tenth_it_is_a_warning(over, is_refused, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("grpo_jax"), "propagate", True)
    run = budget(budget().plan.peak / over)
    if is_refused:
        with pytest.raises(ConfigError, match=r"model.path='models/Qwen.*': does not fit: phase update"):
            run.check_plan()
    else:
        run.check_plan()
    assert ("Memory may be short: phase update needs" in caplog.text) == (over == 1.05)


def test_where_what_is_held_is_too_much_it_is_refused():
    """14 bytes a parameter, with everything on the device."""
    held = sum(budget().plan.held.values())
    assert held == pytest.approx(14e9 * N, rel=1e-6)
    with pytest.raises(ConfigError):
        budget(held - 1).check_plan()


def test_several_settings_where_one_is_not_enough_and_none_for_nothing():
    run = budget(hf=QWEN_7B, base=ON_DEVICE)
    with pytest.raises(ConfigError) as error:
        run.check_plan()
    text = error.value.rule.partition("It fits with all of ")[2]
    named = dict(re.findall(r"([a-z_.]+)=(\w+) \(", text))
    assert {"optim.offload", "rollout.sleep"} <= named.keys()
    values = {key: int(value) if value.isdigit() else value == "True" for key, value in named.items()}
    assert run.after(values).plan.peak <= run.after(values).limit
    for key in values:
        others = {other: value for other, value in values.items() if other != key}
        assert run.after(others).plan.peak > run.after(others).limit, key


def test_a_setting_that_gives_back_next_to_nothing_is_not_named():
    """Two kilobytes of logits: of 20 GB that are missing, nobody wants to hear of them."""
    rows = {"actor.micro_batch_size_per_device": 1, "actor.logits_chunk_tokens": 513, "optim.offload": True}
    run = budget(2e9, hf=QWEN_7B, base={}, **rows)
    gain = lambda way: run.excess("update", 1.0) - run.after(way).excess("update", 1.0)
    fewer = {"actor.logits_chunk_tokens": 512}
    assert 0 < gain(fewer) < 2e6
    ways = list(run.ways("update"))
    assert ways and fewer not in ways and all(gain(way) > 2e6 for way in ways)
    assert " 0.0 " not in run.advice("update")
    nearly = run.plan.peak - gain(fewer) / 2
    assert fewer in budget(nearly, hf=QWEN_7B, base={}, **rows).ways("update")  # there it is enough


def test_a_model_that_no_setting_saves():
    text = budget(2e9, hf=QWEN_7B, base={}).advice("update")
    assert text.startswith("Even with ") and text.endswith(
        "it does not: take more devices or a smaller model."
    )


def test_nothing_is_advised_that_a_rule_forbids_or_that_another_setting_rules_out():
    """float16 needs sums in float32; an engine that sleeps is on the trainer's GPUs."""
    keys = {key for way in budget(**{"model.dtype": "float16"}).ways("update") for key in way}
    assert "rollout.sleep" in keys and "optim.accumulator_dtype" not in keys
    text = budget(2e9, hf=QWEN_7B, base={"model.dtype": "float16"}).advice("update")
    assert "rollout.sleep=True" in text and "rollout.placement" not in text
    assert "-" not in re.sub(r"[a-z]-[a-z]", "", text)  # nothing is given back that is less than nothing


def test_what_is_set_already_is_not_advised():
    keys = lambda run: [next(iter(way)) for way in run.ways("update")]
    assert keys(budget(**{"algorithm.kl_coef": 0.0})) == [
        "optim.offload", "actor.micro_batch_size_per_device", "actor.logits_chunk_tokens", "model.remat",
        "rollout.sleep", "rollout.placement", "mesh.fsdp", "optim.accumulator_dtype",
    ]  # fmt: skip
    set_already = {
        "optim.offload": True, "algorithm.ref_offload": True, "actor.micro_batch_size_per_device": 1,
        "actor.logits_chunk_tokens": 512, "model.remat": "full", "rollout.engine": "local",
        "optim.accumulator_dtype": "bfloat16",
    }  # fmt: skip
    assert keys(budget(**set_already)) == ["mesh.fsdp"]


def test_the_share_of_the_engine_is_memory_too():
    """Asleep, vLLM leaves all but 7 % instead of all but 47 %: 0.4 of 85.5 GB."""
    run = budget()
    assert run.after({"rollout.sleep": True}).limit - run.limit == pytest.approx(0.4 * H100)
    assert "rollout.sleep=True (34.2 GB back)" in run._described({"rollout.sleep": True}, "update", 1.0)


def test_what_the_compiler_says_stops_the_run_before_its_first_step():
    run = budget()
    run.check_compiled({"update": 900, "optimizer": int(run.limit)})
    Budget(run.config, run.model, run.mesh, None).check_compiled({"update": 10**12})
    with pytest.raises(DoesNotFit) as error:
        run.check_compiled({"optimizer": 62 * 10**9})
    text = str(error.value)
    assert text.startswith(
        "phase optimizer needs 62.0 GB of a device that has 45.3 GB for the trainer, as the"
    )
    assert "the plan counted 30.9 GB: parameters 6.2 GB" in text  # 20 bytes a parameter
    # The optimizer takes twice its plan; fewer rows do not change that.
    assert "It fits with optim.offload=True (" in text and "micro_batch" not in text


def test_what_xla_could_not_allocate():
    assert (
        asked_bytes("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 29.47GiB.") == 29.47 * 2**30
    )
    assert asked_bytes("RESOURCE_EXHAUSTED: Out of memory allocating 281474976710656 bytes.") == 2**48
    assert asked_bytes("trying to allocate 512.0KiB") == 2**19
    assert asked_bytes("RESOURCE_EXHAUSTED: no more") == 0


def test_a_failed_allocation_is_told_in_words():
    """XLA's real error, on whatever device this is."""
    with pytest.raises(jax.errors.JaxRuntimeError) as error:
        jnp.zeros((2**46,)).block_until_ready()
    text = budget().explain(error.value, "update_actor")
    assert "JAX asked for 281475.0 GB more, with 45.3 GB in all. The plan counts 51.2 GB for update: " in text
    assert "It fits with optim.offload=True (" in text
    # While completions are sampled, the plan knows what is held, and promises nothing.
    text = budget().explain(error.value, "gen")
    assert "What is held from step to step is 21.6 GB: parameters 6.2 GB" in text and "It fits" not in text
    # Parameters in half of the bytes, 3.1 GB, and 12.3 GB of moments; the reference, 3.1.
    assert (
        "given back by optim.offload=True (15.4 GB back, 18.5 GB more on the host), algorithm.ref_off" in text
    )


def test_other_errors_keep_their_own_words():
    run = budget()
    assert run.explain(ValueError("RESOURCE_EXHAUSTED"), "gen") is None
    assert run.explain(jax.errors.JaxRuntimeError("INTERNAL: broken"), "gen") is None
    assert run.explain(DoesNotFit("as it says"), "start") is None
    unknown = Budget(run.config, run.model, run.mesh, None)
    assert unknown.explain(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: more"), "gen") is None


def test_the_host_has_parts_too():
    pinned = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of host memory allocating 9 bytes")
    for error in (pinned, MemoryError("Unable to allocate 3 GiB")):
        text = budget(**{"optim.offload": True}).explain(error, "start")
        assert "the host has no memory left; of the run's arrays it holds master parameters 6.2 GB, " in text


def test_the_last_line_of_a_failed_run(tmp_path, capsys):
    timers = Timers()
    checkpointer = Checkpointer(tmp_path / "checkpoints", CheckpointSection(), is_offloaded=False)
    failing = reported_failure(timers, checkpointer, budget().explain, lambda: None)
    with pytest.raises(SystemExit) as stop, failing, timers("ref"):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9.00GiB."
        )
    checkpointer.close()
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 1
    assert last.startswith("error: phase ref: a device's memory is full: JAX asked for 9.7 GB more")
    assert "GB for score: parameters 6.2 GB" in last and last.endswith("; there is no checkpoint yet")


# What a device gives to JAX


@pytest.mark.parametrize(
    ("stats", "share", "expected"),
    [
        ({"bytes_limit": 5_000}, "0.93", 5_000),
        ({"bytes_limit": 0}, "0.93", 74_400),  # as CUDA's own allocator has it
        ({"bytes_limit": 0}, None, 60_000),  # three quarters
        ({}, "0.93", None),  # a CPU
    ],
)
def test_the_limit_of_an_allocator_that_does_not_know_its_own(monkeypatch, stats, share, expected):
    monkeypatch.setattr(memory, "device_stats", lambda: stats)
    monkeypatch.setattr(memory.cuda, "device_bytes", lambda ordinal: 80_000)
    if share is None:
        monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    else:
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", share)
    assert memory.memory_limit() == expected
