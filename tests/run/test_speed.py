"""Predicted seconds: against every figure of docs/performance.md, and parts worked out by hand."""

import dataclasses

import pytest
from config_helpers import gsm8k
from test_budget import ON_DEVICE, QWEN_1_5B, QWEN_7B, W1
from tiny_models import tiny_config

from grpo_jax import plan
from grpo_jax.learner.memory import abstract_mesh
from grpo_jax.learner.speed import (
    Shapes,
    find_shapes,
    grouped_seconds,
    optimizer_seconds,
    score_seconds,
    update_seconds,
)
from grpo_jax.model.cards import CARDS, find_card
from grpo_jax.model.config import parse_hf_config
from grpo_jax.model.counts import (
    active_weights,
    cache_bytes,
    dense_weights,
    grouped_weights,
    head_weights,
    layer_weights,
)
from grpo_jax.model.transformer import num_params
from grpo_jax.rollout.vllm.speed import decode_seconds, gen_seconds
from grpo_jax.run.speed import Speed, steady
from grpo_jax.types import Workload

W1_H200 = W1 | {"actor.micro_batch_size_per_device": 26}
ONE = {"data": 1, "fsdp": 1, "tensor": 1}
CARD = CARDS["h200"]


def speed(hf=QWEN_1_5B, card="h200", mesh=(1, 1, 1), **changes):
    config = gsm8k(**changes)
    model = dataclasses.replace(parse_hf_config(hf, config.model), attention="cudnn")
    return Speed(config, model, abstract_mesh(*mesh), card)


@pytest.mark.parametrize(
    ("run", "measured"),
    [
        (
            speed(**W1_H200),
            {"gen": 4.0, "ref": 1.7, "update_actor": 7.0, "update_weights": 0.055},
        ),
        (
            speed(QWEN_7B),
            {"gen": 23.4, "ref": 26.9, "update_actor": 97.1, "update_weights": 0.198},
        ),
        (
            speed(card="h100", **W1 | {"optim.offload": True}),
            {"gen": 5.7, "ref": 2.33, "update_actor": 8.38, "update_weights": 0.061},
        ),
    ],
    ids=["W1, H200", "7B, H200", "W1, H100, offload"],
)
def test_steps_that_were_measured(run, measured):
    """Within a fifth in every phase, a tenth in all."""
    expected = run.expected(run.planned_work())
    assert list(expected) == list(measured)
    for phase, seconds in measured.items():
        assert expected[phase] == pytest.approx(seconds, rel=0.2), phase
    assert sum(expected.values()) == pytest.approx(sum(measured.values()), rel=0.1)


@pytest.mark.parametrize(
    ("card", "rows", "length", "remat", "mesh", "update", "score"),
    [
        ("h200", 26, 640, "dots", (1, 1, 1), 48_092, None),
        ("h200", 16, 640, "dots", (1, 1, 1), 46_287, None),
        ("h200", 16, 640, "none", (1, 1, 1), 41_856, None),
        ("h200", 32, 640, "dots", (1, 1, 1), 48_211, None),
        ("h200", 4, 4_224, "dots", (1, 1, 1), 43_882, None),
        ("h200", 26, 640, "dots", (2, 1, 1), 89_496, None),
        ("h200", 26, 640, "dots", (1, 2, 1), 88_200, None),
        ("h100", 16, 640, "dots", (1, 2, 1), 79_843, None),
        ("h100", 16, 640, "dots", (2, 1, 1), 80_186, None),
        ("h100", 16, 640, "dots", (1, 1, 1), 44_680, 129_137),
    ],
)
def test_tokens_a_second_of_the_tables(card, rows, length, remat, mesh, update, score):
    """163,840 tokens of full rows, all in one update; within a tenth. Older rates of scoring: another program."""
    num = round(163_840 / length / 2)
    changes = {
        "data.train_batch_size": num,
        "algorithm.group_size": 2,
        "data.max_prompt_length": length // 4,
        "data.max_response_length": length - length // 4,
        "actor.micro_batch_size_per_device": rows,
        "actor.logits_chunk_tokens": 2048,
        "model.remat": remat,
    }
    run = speed(card=card, mesh=mesh, **ON_DEVICE | changes)
    split, work = dict(run.mesh.shape), run.planned_work()
    shapes = find_shapes(run.config, mesh[0] * mesh[1], work)
    tokens = 2 * num * length
    seconds = update_seconds(run.config, run.model, CARDS[card], shapes, split)
    assert tokens / seconds == pytest.approx(update, rel=0.1)
    if score:
        assert tokens / score_seconds(run.model, CARDS[card], shapes, split) == pytest.approx(score, rel=0.1)


@pytest.mark.parametrize(("num", "context", "ms"), [(128, 2176, 4.6), (512, 384, 7.8), (1024, 384, 14.0)])
def test_steps_of_decoding(num, context, ms):
    assert decode_seconds(speed().model, CARD, num, context) == pytest.approx(ms / 1e3, rel=0.05)


def test_the_counts_of_qwen_1_5b():
    model = speed().model
    # 28 layers of q and o, 1,536 x 1,536; k and v, 1,536 x 256; three of 1,536 x 8,960
    assert layer_weights(model) == 28 * (2 * 1536 * 1536 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert head_weights(model) == 151936 * 1536
    assert cache_bytes(model) == 2 * 28 * 2 * 128 * 2  # keys and values, 2 heads of 128, 2 bytes


def test_the_counts_of_experts():
    """Two of six experts make a token's result; the trainer multiplies by all of them, and the router by each."""
    model = tiny_config(num_experts=6, experts_per_token=2)
    attention = 16 * (2 * 4 * 4 + 2 * 2 * 4)
    assert layer_weights(model) == 3 * (attention + 6 * 3 * 16 * 24 + 16 * 6)
    assert active_weights(model) == 3 * (attention + 2 * 3 * 16 * 24 + 16 * 6)
    assert (dense_weights(model), grouped_weights(model)) == (layer_weights(model), 0)
    grouped = dataclasses.replace(model, experts="grouped")
    assert grouped_weights(grouped) == 3 * 2 * 3 * 16 * 24
    assert dense_weights(grouped) == 3 * (attention + 16 * 6)
    assert active_weights(tiny_config()) == layer_weights(tiny_config()) == 3 * (attention + 3 * 16 * 24)


@pytest.mark.parametrize(("tokens", "ms"), [(16384, 19.3), (4096, 10.1)])
def test_grouped_experts(tokens, ms):
    """A layer's forward pass, that again, and the backward pass, which is two (benchmarks/experts.py, H200)."""
    model = tiny_config(
        hidden_size=2048, intermediate_size=768, num_experts=128, experts_per_token=8, num_layers=1,
        experts="grouped", dtype="bfloat16",
    )  # fmt: skip
    shapes = Shapes(num_micro=1, rows=1, length=tokens, sequence=tokens)
    assert 4 * grouped_seconds(model, CARD, shapes) == pytest.approx(ms / 1e3, rel=0.05)
    assert grouped_seconds(dataclasses.replace(model, experts="dense"), CARD, shapes) == 0


def test_a_step_of_decoding_reads_the_weights_at_least():
    """Of one sequence without a context: all weights once, and what was measured."""
    model = speed().model
    weights = layer_weights(model) + head_weights(model)
    fixed = 28 * 50e-6 + 4.8e-6
    assert decode_seconds(model, CARD, 1, 0) == pytest.approx(2 * weights / (0.9 * 4.8e12) + fixed)


def test_waves_where_the_engine_takes_fewer_at_once():
    work = Workload(64, 8, 128, 512)
    of = lambda most: gen_seconds(
        speed(**W1 | {"rollout.max_num_seqs": most}).config.rollout, speed().model, CARD, work
    )
    prompts = 2 * layer_weights(speed().model) * 64 * 128 / (0.82 * 755e12)
    a_step = lambda num: decode_seconds(speed().model, CARD, num, 128 + 256)
    assert of(512) == pytest.approx(prompts + 512 * a_step(512))
    assert of(128) == pytest.approx(prompts + 4 * 512 * a_step(128))
    # 0.02 of 150.8 GB holds no cache: one sequence at a time.
    tiny = speed(**W1 | {"rollout.gpu_memory_utilization": 0.02}).config.rollout
    assert gen_seconds(tiny, speed().model, CARD, work) == pytest.approx(prompts + 512 * 512 * a_step(1))


def test_rows_hold_several_short_sequences():
    """They fill 95 % of 640 tokens; no more than 16 share them, and one of 640 has them for itself."""
    config = speed(**W1_H200).config
    shapes = find_shapes(config, 1, Workload(64, 8, 60, 100))
    assert (shapes.rows, shapes.length, shapes.sequence) == (26, 640, 160)
    assert shapes.num_micro == 6  # 512 sequences, 3.8 a row: 134.7 rows
    assert find_shapes(config, 1, Workload(64, 8, 100, 300)).num_micro == 13  # 1.52 a row: 336.8 rows
    assert find_shapes(config, 1, Workload(64, 8, 10, 10)).num_micro == 2  # 32 rows
    assert find_shapes(config, 1, Workload(64, 8, 128, 512)).num_micro == 20
    on_two = find_shapes(config, 2, Workload(64, 8, 128, 512))
    assert (on_two.num_micro, on_two.rows) == (10, 26)  # those of each device


def test_an_offloaded_state_crosses_the_bus_twice():
    """24 bytes a parameter, and in the device's memory it is read and written too, as without."""
    here, there = (speed(**W1 | {"optim.offload": value}) for value in (False, True))
    of = lambda run, **split: optimizer_seconds(run.config, run.model, CARD, ONE | split)
    n = num_params(here.model)
    assert of(here) == pytest.approx((2 * 12 + 2 * 4) * n / (0.9 * 4.8e12))
    assert of(there) == pytest.approx((2 * 14 + 2 * 4) * n / (0.9 * 4.8e12) + 24 * n / 55e9)
    assert of(there, fsdp=2) == pytest.approx(of(there) / 2)


def test_what_recomputation_costs():
    """`attention` computes the layers' products again: 2 FLOPs a number and token, and keeps less."""
    of = lambda remat: speed(**W1_H200 | {"model.remat": remat})
    seconds = {r: of(r).expected(of(r).planned_work())["update_actor"] for r in ("dots", "attention", "full")}
    products = 2 * layer_weights(speed().model) * 512 * 640 / (0.82 * 755e12)
    assert seconds["dots"] < seconds["attention"] < seconds["dots"] + 1.1 * products
    assert seconds["attention"] < seconds["full"]


def test_several_updates_score_once_and_update_often():
    run = speed(**W1_H200 | {"actor.num_epochs": 2})
    once, twice = (r.expected(r.planned_work()) for r in (speed(**W1_H200), run))
    assert list(twice) == ["gen", "old_log_prob", "ref", "update_actor", "update_weights"]
    assert twice["update_actor"] == pytest.approx(2 * once["update_actor"], rel=0.1)
    # What the host does not wait for is taken from one of them only.
    assert twice["old_log_prob"] > twice["ref"] == pytest.approx(once["ref"])


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"rollout.engine": "local"}, {"gen", "update_weights"}),
        ({"rollout.sleep": True}, {"gen", "update_weights"}),
        ({"rollout.placement": "separate"}, {"gen", "update_weights"}),
        ({"rollout.tensor_parallel_size": 2}, {"gen", "update_weights"}),
        ({"rollout.weight_sync": "host"}, {"update_weights"}),
        ({"algorithm.dynamic_sampling_rounds": 3, "algorithm.old_logprobs": "sampler"}, {"gen"}),
        ({"algorithm.kl_coef": 0.0}, {"ref"}),
        ({"model.dtype": "float32"}, {"gen", "ref", "update_actor", "update_weights"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_what_nobody_measured_is_not_predicted(changes, missing):
    run = speed(**W1 | changes)
    assert set(run.expected(run.planned_work())) == {"gen", "ref", "update_actor", "update_weights"} - missing


def test_unknown_cards_and_split_layers():
    run = speed(card="")
    assert run.expected(run.planned_work()) == {} == dict.fromkeys(run.compared([LINE]))
    run = speed(mesh=(1, 1, 2))
    assert set(run.expected(run.planned_work())) == {"gen", "update_weights"}


def test_tpus_have_the_rates_of_their_data_sheets():
    """Times what an H100 reaches of its own: 0.77 of 197 and 459 TFLOP/s."""
    assert [CARDS[name].matmul for name in ("tpu-v5e", "tpu-v5p")] == pytest.approx([151.69e12, 353.43e12])
    assert not CARDS["tpu-v5e"].is_measured


def test_cards_by_what_jax_calls_them():
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-40GB": "a100-40",
        "NVIDIA H100 PCIe": "",  # a third less of everything
        "cpu": "",
        "TPU v5 lite": "tpu-v5e",
        "TPU v5": "tpu-v5p",
    }
    assert {kind: find_card(kind) for kind in names} == names


LINE = {
    "step": 3, "prompt_length/mean": 128.0, "response_length/mean": 256.0, "timing_s/step": 9.0,
    "timing_s/gen": 2.0, "timing_s/ref": 1.7, "timing_s/update_actor": 7.5, "timing_s/update_weights": 0.05,
}  # fmt: skip


def test_expected_beside_measured():
    run = speed(**W1_H200)
    head, *rows = run.compared([LINE | {"timing_s/gen": 99.0}, LINE, LINE])  # medians
    assert head.startswith("Seconds of a step, expected of 1 x h200 / measured (docs/performance.md")
    assert [row.split()[0] for row in rows] == ["gen", "ref", "update_actor", "update_weights"]
    # Half of the steps, in a shorter context, and 512 x 384 tokens in rows that are 95 % full.
    work = Workload(64, 8, 128, 256)
    gen = gen_seconds(run.config.rollout, run.model, CARD, work)
    assert rows[0].split()[1:] == [f"{gen:.3g}", "/", "2"] and 1.7 < gen < 2.0
    update = run.expected(work)["update_actor"]
    assert rows[2].split()[1:4] == [f"{update:.3g}", "/", "7.5"]
    assert 7.0 * 384 / 640 / 0.95 * 0.9 < update < 7.0 * 384 / 640 / 0.95 * 1.15
    assert rows[2].endswith(f"   {7.5 / update:.1f} times as long") and "times" not in rows[0]
    assert run.compared([]) == []
    assert "expected of 1 x l40s, by its data sheet / measured" in speed(card="l40s").compared([LINE])[0]


def test_steps_that_compiled_are_left_out():
    lines = [{"step": 0, "val/accuracy": 0.5}, *({"step": n, "timing_s/step": 1.0} for n in range(1, 6))]
    assert [line["step"] for line in steady(lines, 0)] == [3, 4, 5]
    assert [line["step"] for line in steady(lines, 2)] == [5]  # begun again after step 2


def test_the_command_prints_seconds(capsys):
    run = speed(**W1_H200)
    plan.print_seconds(run.config, run.model, "h200", (1, 1, 1))
    head, *rows = capsys.readouterr().out.splitlines()
    assert "on 1 x h200 (rates measured on one; every prompt of 128 tokens, every completion of 512;" in head
    seconds = [float(row.split()[-1]) for row in rows]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.02) and rows[-1].split()[0] == "together"
    plan.print_seconds(speed(**W1 | {"rollout.engine": "local"}).config, run.model, "h200", (1, 1, 1))
    assert "not predicted" in capsys.readouterr().out.splitlines()[1]
    plan.print_seconds(run.config, run.model, "80", (1, 1, 1))
    reason = "the rates of this device are not known"
    assert capsys.readouterr().out == f"Expected seconds of a step: not said, since {reason}\n"
