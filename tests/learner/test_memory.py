"""Memory plans: counts derived by hand, and one that was measured."""

import dataclasses
import logging
import os
from pathlib import Path

import jax.numpy as jnp
import pytest

from grpo_jax import plan
from grpo_jax.config import ConfigError, load_config, parse_config
from grpo_jax.learner.memory import (
    abstract_mesh,
    drawable_bytes,
    experts_bytes,
    gathered_experts,
    kept_for_backward,
    largest_micro_batch,
    plan_memory,
)
from grpo_jax.model import fused_attention
from grpo_jax.model.cards import CARDS, find_slice
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.transformer import num_params
from grpo_jax.rollout import push_bytes, sampling_bytes, trainer_share
from grpo_jax.run.devices import make_room_on_host
from grpo_jax.run.memory import plan_run

ONE = abstract_mesh(1, 1, 1)
ROOT = Path(__file__).resolve().parents[2]
D, F, H, K, DH, V = 64, 160, 4, 2, 16, 512
MODEL = ModelConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_layers=2, num_heads=H, num_kv_heads=K, head_dim=DH,
    rope_theta=1e4, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False,
    dtype=jnp.bfloat16, param_dtype=jnp.float32, attention="cudnn",
)  # fmt: skip
QWEN_1_5B = ModelConfig(
    vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_layers=28, num_heads=12, num_kv_heads=2,
    head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, tie_embeddings=True, qkv_bias=True, qk_norm=False,
    dtype=jnp.bfloat16, param_dtype=jnp.float32, attention="cudnn", remat="dots",
)  # fmt: skip


ON_DEVICE = {"optim.offload": False, "algorithm.ref_offload": False}


def gsm8k(**changes):
    """configs/gsm8k.py as shipped, but for the changes."""
    config = load_config(ROOT / "configs" / "gsm8k.py")
    config.update_from_flattened_dict(changes)
    return parse_config(config)


@pytest.mark.parametrize(
    ("remat", "words"),
    [
        ("full", D),  # the layer's input
        ("attention", D + H * DH + 2 * H * 5),  # and what attention gave, and its sums, for 5 sequences a row
        # and the results of the projections q, k, v, o, gate and up; nothing needs that of down but a sum
        ("dots", D + H * DH + 2 * H * 5 + (H + 2 * K) * DH + D + 2 * F),
    ],
)
def test_what_a_layer_keeps(remat, words):
    """Another layer keeps so many more numbers of 2 bytes for each of 3 x 128 tokens."""
    of = lambda n: kept_for_backward(dataclasses.replace(MODEL, num_layers=n, remat=remat), 3, 128)
    assert of(4) - of(3) == 3 * 128 * words * 2


@pytest.mark.parametrize("remat", ["none", "dots", "attention", "full"])
def test_cudnns_backward_pass_keeps_what_is_counted(monkeypatch, remat):
    """Its real shapes, without a GPU: nothing is run, and only the search for the library is left out."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(cudnn, "check_is_flash_attention", lambda *_, **__: None)
    model = dataclasses.replace(MODEL, remat=remat, num_layers=8, num_kv_heads=H)
    real = kept_for_backward(dataclasses.replace(model, attention=fused_attention._cudnn), 3, 128)
    assert real == pytest.approx(kept_for_backward(model, 3, 128), rel=0.01)


def test_windows_change_nothing_of_what_a_kernel_keeps():
    """Layers with and without one choose between two calls of the kernel, of which one is made."""
    model = dataclasses.replace(MODEL, remat="attention", num_layers=4)
    windowed = dataclasses.replace(model, windows=(0, 16, 0, 16))
    assert kept_for_backward(windowed, 3, 128) == pytest.approx(kept_for_backward(model, 3, 128), rel=0.01)


@pytest.mark.parametrize("experts", ["dense", "grouped"])
@pytest.mark.parametrize("remat", ["none", "dots", "attention"])
def test_nothing_is_kept_of_what_experts_compute(remat, experts):
    """Of each expert more, its scores and shares for 3 x 128 tokens: less than one of the MLP's F numbers each."""
    model = dataclasses.replace(MODEL, remat=remat, experts_per_token=2, experts=experts)
    of = lambda n: kept_for_backward(dataclasses.replace(model, num_experts=n), 3, 128)
    assert 0 <= of(12) - of(6) < 6 * MODEL.num_layers * 3 * 128 * 8 * 4
    assert MODEL.intermediate_size * 2 > 8 * 4


def test_what_grouped_experts_take():
    """256 tokens, each to 3 of 5 experts: 768 rows in blocks of 128, and a block that may not be full for each."""
    model = dataclasses.replace(MODEL, num_experts=5, experts_per_token=3, experts="grouped")
    mesh = abstract_mesh(1, 1, 2)
    assert experts_bytes(model, mesh, 256) == (768 + 5 * 128) * (D + MODEL.intermediate_size // 2) * 2
    assert experts_bytes(dataclasses.replace(model, experts="dense"), mesh, 256) == 0
    assert gathered_experts(model, mesh) == 0
    assert gathered_experts(model, abstract_mesh(1, 2, 2)) == 5 * 3 * D * MODEL.intermediate_size // 2 * 2


def test_without_fused_attention_the_scores_are_kept():
    """Of 3 rows, 4 heads, 128 x 128 scores, the weights at least: 2 bytes each."""
    of = lambda kernel: kept_for_backward(dataclasses.replace(MODEL, attention=kernel), 3, 128)
    assert of("plain") - of("cudnn") >= 2 * 3 * H * 128 * 128 * 2


def test_what_a_layer_keeps_on_a_tpu():
    """Its input, what attention gave, and one float32 sum for each token and head, whatever the sequences."""
    model = dataclasses.replace(MODEL, attention="splash", head_dim=128, remat="attention")
    of = lambda n: kept_for_backward(dataclasses.replace(model, num_layers=n), 3, 128)
    assert of(4) - of(3) == 3 * 128 * (D + H * 128 + 2 * H) * 2


def test_what_is_held():
    n = num_params(MODEL)
    plan = plan_memory(gsm8k(**ON_DEVICE), MODEL, ONE)
    assert plan.held == {"parameters": 4 * n, "Adam's moments": 8 * n, "reference": 2 * n} and not plan.host
    changes = ON_DEVICE | {"algorithm.kl_coef": 0.0, "optim.moments_dtype": "bfloat16", "optim.beta2": 0.99}
    assert plan_memory(gsm8k(**changes), MODEL, ONE).held == {"parameters": 4 * n, "Adam's moments": 4 * n}


def test_what_is_held_on_the_host_instead():
    """bfloat16 parameters stay; for all devices of a mesh, and once for each copy."""
    n = num_params(MODEL)
    plan = plan_memory(gsm8k(), MODEL, ONE)
    assert plan.held == {"parameters": 2 * n}
    assert plan.host == {"master parameters": 4 * n, "Adam's moments": 8 * n, "reference": 2 * n}
    assert plan_memory(gsm8k(), MODEL, abstract_mesh(2, 1, 1)).host["Adam's moments"] == 16 * n
    # Of a model that computes in float32, the parameters are their own masters.
    whole = dataclasses.replace(MODEL, dtype=jnp.float32)
    assert plan_memory(gsm8k(), whole, ONE).host == {"Adam's moments": 8 * n, "reference": 4 * n}


def test_an_update_has_the_state_of_one_parameter_on_the_device():
    """Master and moments, 12 bytes a number, and the new parameter, 2; of the smaller ones no sum is left.

    The embedding comes last and is the largest, but when the first of the three matrices of the MLPs has its turn,
    the sums of all four are there.
    """
    n, mlp = num_params(MODEL), MODEL.num_layers * D * F
    assert mlp < V * D
    assert plan_memory(gsm8k(), MODEL, ONE).phases["optimizer"] == 2 * n + 4 * (3 * mlp + V * D) + 14 * mlp


QWEN_7B = dataclasses.replace(
    QWEN_1_5B, vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_heads=28, num_kv_heads=4,
    tie_embeddings=False,
)  # fmt: skip


def test_jax_may_pin_what_the_host_holds_and_a_little_more(monkeypatch, caplog):
    """7,615,616,512 parameters at 14 bytes and 6 %, 105.3 GiB, rounded up, and 2 for staging."""
    name = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
    monkeypatch.setattr(logging.getLogger("grpo_jax"), "propagate", True)
    monkeypatch.setenv(name, "")  # restored at the end
    host = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 150 * 2**18}
    monkeypatch.setattr(os, "sysconf", host.__getitem__)
    for model, changes, expected in (
        (QWEN_7B, {}, "108"),
        (QWEN_7B, {"mesh.data": 2, "mesh.fsdp": 1}, "213"),
        (QWEN_7B, {"mesh.data": -1, "mesh.fsdp": 1}, "150"),  # all that there is
        (QWEN_7B, ON_DEVICE | {"mesh.data": -1, "mesh.fsdp": 1}, None),
        (QWEN_1_5B, {}, None),  # less than JAX's own limit
        (QWEN_7B, ON_DEVICE, None),
    ):
        monkeypatch.delenv(name, raising=False)
        make_room_on_host(gsm8k(**changes), model)
        assert os.environ.get(name) == expected
    assert "take 213 GB of the host's memory, which has 161 GB" in caplog.text
    monkeypatch.delenv(name, raising=False)
    make_room_on_host(gsm8k(**{"mesh.data": 2, "mesh.fsdp": 1}), QWEN_7B, num_processes=2)
    assert os.environ[name] == "108"  # a copy on each host
    monkeypatch.setenv(name, "77")
    host["SC_PHYS_PAGES"] = 10**7
    make_room_on_host(gsm8k(), QWEN_7B)
    assert os.environ[name] == "77"
    assert "take 107 GB of the host's memory, which has 41 GB" in caplog.text


def test_fsdp_splits_what_is_held_and_data_does_not():
    """Biases are split by heads alone: (H + 2 K) * Dh numbers in each of 2 layers stay whole."""
    n, biases = num_params(MODEL), 2 * (H + 2 * K) * DH
    config = gsm8k(**ON_DEVICE)
    held = lambda *sizes: plan_memory(config, MODEL, abstract_mesh(*sizes)).held["parameters"]
    assert held(1, 2, 1) == 4 * ((n - biases) // 2 + biases)
    assert held(2, 1, 1) == 4 * n


def test_accumulators_of_half_precision_save_their_half():
    of = lambda dtype: plan_memory(gsm8k(**{"optim.accumulator_dtype": dtype}), MODEL, ONE).phases
    assert of("float32")["update"] - of("bfloat16")["update"] == 2 * num_params(MODEL)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    config, limit = gsm8k(**ON_DEVICE), 60e9
    most = largest_micro_batch(config, QWEN_1_5B, ONE, limit)

    def peak(rows):
        actor = dataclasses.replace(config.actor, micro_batch_size_per_device=rows)
        # A step of as many rows as fill its micro-batches, which are not made smaller then.
        data = dataclasses.replace(config.data, train_batch_size=rows)
        return plan_memory(dataclasses.replace(config, actor=actor, data=data), QWEN_1_5B, ONE).peak

    assert 1 < most < 1024 and peak(most) <= limit < peak(most + 1)
    assert largest_micro_batch(config, QWEN_1_5B, ONE, 1e9) == 0


def test_it_agrees_with_a_measured_peak():
    """62.53 GB was the trainer's peak on an H200 with these settings (jax 0.11.2, 2026-11-26)."""
    config = gsm8k(
        **ON_DEVICE
        | {
            "data.train_batch_size": 64,
            "algorithm.group_size": 8,
            "data.max_prompt_length": 128,
            "actor.micro_batch_size_per_device": 26,
            "actor.logits_chunk_tokens": 2048,
        }
    )
    assert plan_memory(config, QWEN_1_5B, ONE).peak == pytest.approx(62.53e9, rel=0.05)


def test_a_push_is_a_phase_where_it_takes_memory():
    """Beside what is held: 2 bytes a parameter, and four buckets of 192 MiB."""
    config = gsm8k()
    assert "weight sync" not in plan_memory(config, MODEL, ONE).phases
    phases = plan_memory(config, MODEL, ONE, push_bytes=push_bytes(config.rollout)).phases
    assert phases["weight sync"] == 2 * num_params(MODEL) + 4 * 192 * 2**20
    assert push_bytes(gsm8k(**{"rollout.engine": "local"}).rollout) == 0


def test_the_parts_of_a_phase_are_what_it_needs():
    """With everything on the device: 2 bytes for the copy, 4 and 2 for gradients, of each parameter."""
    n = num_params(MODEL)
    plan = plan_memory(gsm8k(**ON_DEVICE), MODEL, ONE)
    parts = plan.parts("update")
    assert parts["parameters to compute with"] == 2 * n
    assert parts["sums of gradients"] == 4 * n and parts["gradients of a micro-batch"] == 2 * n
    assert parts["kept for the backward pass"] == kept_for_backward(MODEL, 4, 1024)
    assert plan.need("update") == sum(parts.values()) == plan.phases["update"]
    assert plan.parts("gen") == plan.held  # nobody planned that one
    assert plan.need(plan.fullest) == plan.peak == max(plan.phases.values())


def test_the_kernel_of_a_named_device_is_planned_with():
    sizes = {"model.path": "random", "random_model.hidden_size": 512, "random_model.num_heads": 4}
    config = gsm8k(**{"rollout.engine": "local"} | sizes)
    kernel = lambda device, config=config: plan.read_model(config, device).attention
    assert [kernel(name) for name in ("h200", "a100", "tpu-v5e", "80")] == [
        "cudnn",
        "plain",
        "splash",
        "cudnn",
    ]
    assert kernel("h200", gsm8k(**{"model.path": "random", "model.attention": "plain"})) == "plain"
    with pytest.raises(ConfigError, match=r"model.attention='cudnn': needs an NVIDIA GPU"):
        kernel("tpu-v5e", gsm8k(**{"rollout.engine": "local", "model.attention": "cudnn"} | sizes))
    assert set(fused_attention.DEVICE_KINDS) == set(CARDS)


def test_the_tokens_that_could_be_drawn_take_memory_by_hand():
    """As shipped: 1,024 completions in rows of 1,024 tokens, a bit for each of 152,064 words: 4,752 x 4 bytes."""
    cut = {"rollout.engine": "local", "rollout.top_p": 0.9}
    config = gsm8k(**cut)
    model = dataclasses.replace(MODEL, vocab_size=152_064)
    assert drawable_bytes(config, model, 4, 1024) == 1024 * 1024 * 4752 * 4
    assert drawable_bytes(gsm8k(), model, 4, 1024) == 0


def test_devices_by_name_and_by_size():
    assert plan.device_bytes("h200") == 143_771 * 2**20
    assert plan.device_bytes("80") == 80_000_000_000
    with pytest.raises(
        ConfigError,
        match=r"'h20': must be a number of GB or one of h100, .* \(did you mean h200\?\)",
    ):
        plan.device_bytes("h20")
    for size in ("0", "-5", "inf", "nan"):
        with pytest.raises(ConfigError, match=rf"device='{size}': must be a number of GB"):
            plan.device_bytes(size)
    with pytest.raises(ConfigError, match="cpu does not say its memory: name a device"):
        plan.device_bytes("")


QUICKSTART = "--config=configs/quickstart.py"


def test_where_no_seconds_are_said_a_line_says_why(capsys):
    plan.main([QUICKSTART, "--device=h100"])
    out = capsys.readouterr().out
    assert "Expected seconds of a step: not said, since they are known for bfloat16 and float16" in out
    assert "The most in each phase, MB a device" in out
    plan.main([QUICKSTART, "--device=8"])
    assert "not said, since the rates of this device are not known" in capsys.readouterr().out
    plan.main([QUICKSTART, "--device=h100", "--config.model.dtype=bfloat16"])
    out = capsys.readouterr().out
    assert "gen                             not predicted" in out
    assert "The local engine's sampling is not predicted" in out


def test_a_plan_that_does_not_fit_ends_with_code_1_after_all_of_it(capsys):
    with pytest.raises(SystemExit) as end:
        plan.main([QUICKSTART, "--device=0.07"])
    out = capsys.readouterr().out
    assert end.value.code == 1
    assert "\nPhase update does not fit. It fits with" in out and "Expected seconds" in out


def test_slices_by_name():
    """v5e and v6e are named by chips, v4 and v5p by cores, of which a chip has two."""
    assert plan.find_devices("v5e-16", "") == ("tpu-v5e", 16, 1)
    assert plan.find_devices("v5p-8", "4") == ("tpu-v5p", 4, 1)
    assert plan.find_devices("h100", "") == ("h100", 1, 1) and plan.find_devices("80", "2") == ("80", 2, 1)
    assert plan.find_devices("v5e-16", "48") == ("tpu-v5e", 48, 3)  # three slices
    grids = {
        "v5e-16": "v5e:4x4",
        "v6e-8": "v6e:2x4",
        "v5p-8": "v5p:2x2x1",
        "v5p-128": "v5p:4x4x4",
        "v4-32": "v4:2x2x4",
    }
    assert {name: find_slice(name).topology for name in grids} == grids
    for name in ("v5e-12", "v5p-7", "v7-8", "h100-8", "v5e-", "v5e-²", "v5e-512"):
        assert find_slice(name) is None
    with pytest.raises(ConfigError, match="num_devices='8': must be a multiple of 16"):
        plan.find_devices("v5e-16", "8")
    assert plan.mesh_sizes(gsm8k(**{"mesh.data": 2}), 32, 2) == (2, 16, 1)
    with pytest.raises(ConfigError, match=r"mesh\.data=1: must be a multiple of the 2 slices"):
        plan.mesh_sizes(gsm8k(), 32, 2)


def test_a_tpu_gives_the_trainer_all_of_its_memory():
    config = gsm8k(**{"rollout.engine": "local"})
    limit = lambda name: plan.make_budget(config, MODEL, name, plan.device_bytes(name), (1, 4, 1)).limit
    assert limit("tpu-v5e") == 15.75 * 2**30 and limit("h100") == 0.75 * 81_559 * 2**20


def test_what_the_local_engine_takes_by_hand():
    """256 completions at once: on each of two devices 32 prompts x 4, keys and values of 2 x 16 numbers a layer.

    64 tokens in a prompt, and 31 columns more for completions of 32 tokens, whose last one is never read.
    """
    sizes = {"rollout.batch_size": 256, "data.max_prompt_length": 64, "data.max_response_length": 32}
    config = gsm8k(**ON_DEVICE | sizes | {"rollout.engine": "local"})
    token = 2 * MODEL.num_layers * K * DH * 2
    caches = {"cache of the prompts": 32 * 64 * token, "cache of the completions": 128 * (64 + 31) * token}
    assert sampling_bytes(config, MODEL, abstract_mesh(1, 2, 1)) == caches
    halves = {name: size // 2 for name, size in caches.items()}
    assert sampling_bytes(config, MODEL, abstract_mesh(1, 2, 2)) == halves
    plan = plan_run(config, MODEL, abstract_mesh(1, 2, 1))
    copied = plan.beside["update"]["parameters to compute with"]
    expected = {"parameters to compute with": copied, "the head": 2 * 2 * V * D}
    assert plan.beside["sampling"] == expected | caches
    assert "sampling" not in plan_run(gsm8k(), MODEL, ONE).phases


def test_a_split_head_is_gathered():
    """Its 512 x 64 numbers of 2 bytes, beside what an update of one device needs; for a score twice."""
    one, two = (plan_memory(gsm8k(**ON_DEVICE), dataclasses.replace(MODEL, remat="none"), m)
                for m in (ONE, abstract_mesh(1, 2, 1)))  # fmt: skip
    name = "logits, the head and its gradient"
    assert two.beside["update"][name] - one.beside["update"][name] == 2 * V * D
    logits = one.beside["score"]["logits and the head"]
    assert two.beside["score"]["logits and the head"] == logits + 2 * V * D


def test_the_mesh_is_filled_up():
    assert plan.mesh_sizes(gsm8k(), 8) == (1, 8, 1)
    assert plan.mesh_sizes(gsm8k(**{"mesh.tensor": 2}), 8) == (1, 4, 2)
    with pytest.raises(ConfigError, match="must be a multiple of the mesh's 3"):
        plan.mesh_sizes(gsm8k(**{"mesh.data": 3}), 8)


def test_the_command_prints_a_plan(capsys, monkeypatch):
    argv = ["plan", f"--config={ROOT / 'configs' / 'gsm8k.py'}:smoke", "--device=1", "--num_devices=2"]
    monkeypatch.setattr("sys.argv", argv)
    plan.main()
    out = capsys.readouterr().out
    assert "Mesh            data=1, fsdp=2, tensor=1" in out
    assert "Largest micro-batch that fits: 8 rows" in out  # all 4 x 4 completions, on two shards


def test_a_model_that_is_not_there_is_one_line(capsys, monkeypatch, tmp_path):
    argv = [
        "plan",
        f"--config={ROOT / 'configs' / 'gsm8k.py'}",
        f"--config.model.path={tmp_path}",
        "--device=h200",
    ]
    monkeypatch.setattr("sys.argv", argv)
    with pytest.raises(SystemExit) as stop:
        plan.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("error: model.path=") and err.count("\n") == 1


def test_the_seeds_run_fits_one_h200_and_agrees_with_its_peak():
    """76.04 GB of 79.9 was the trainer's peak: configs/gsm8k.py as shipped (jax 0.11.2, 2026-11-26)."""
    config = gsm8k()
    peak, limit = (
        plan_memory(config, QWEN_7B, ONE, push_bytes=push_bytes(config.rollout)).peak,
        trainer_share(config.rollout) * plan.device_bytes("h200"),
    )
    assert peak == pytest.approx(76.04e9, rel=0.1) and peak < limit
