"""Writes the tables of docs/scaling.md, from what `grpo_jax.plan` counts: python docs/scaling_tables.py"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from grpo_jax.config import Config, load_config, parse_config
from grpo_jax.learner import speed
from grpo_jax.learner.memory import abstract_mesh, plan_memory
from grpo_jax.model.cards import CARDS, Card
from grpo_jax.model.config import ModelConfig
from grpo_jax.model.transformer import num_params
from grpo_jax.rollout import push_bytes
from grpo_jax.rollout.vllm import CONTEXT_SHARE
from grpo_jax.rollout.vllm.speed import PUSH_RATE, PUSH_S, gen_seconds
from grpo_jax.types import Workload

PAGE = Path(__file__).with_name("scaling.md")
TABLE = re.compile(r"(<!-- table of (\S+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
RECIPE = Path(__file__).resolve().parents[1] / "configs" / "gsm8k.py"
GB = 1e9
COUNTS = (8, 64, 512)
HOST = 8
"""GPUs of a host, which NVLink joins."""
NETWORK = 40e9
"""Bytes/s that a GPU sends to other hosts: 0.8 of 400 Gbit/s, by the data sheet of its adapter. Not measured."""
WORK = Workload(num_prompts=1024, group_size=8, prompt_tokens=512, response_tokens=1536)
MOST_ROWS = 4
"""Of 2,048 tokens, in a micro-batch of a device."""
ENGINE_SHARE = 0.5
"""`rollout.gpu_memory_utilization`."""

common = dict(
    head_dim=128, rope_theta=1e6, rms_norm_eps=1e-6, qk_norm=False, tie_embeddings=False,
    dtype=jnp.dtype("bfloat16"), param_dtype=jnp.dtype("float32"), remat="full",
)  # fmt: skip
MODELS = {
    "7B": ModelConfig(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_layers=28, num_heads=28,
                      num_kv_heads=4, qkv_bias=True, **common),
    "32B": ModelConfig(vocab_size=152064, hidden_size=5120, intermediate_size=27648, num_layers=64, num_heads=40,
                       num_kv_heads=8, qkv_bias=True, **common),
    "70B": ModelConfig(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_layers=80, num_heads=64,
                       num_kv_heads=8, qkv_bias=False, **common),
}  # fmt: skip
ENGINE_GPUS = {"7B": 1, "32B": 2, "70B": 4}
"""`rollout.tensor_parallel_size`: the weights of bfloat16 within the engine's share, with room for a cache."""
HEAD = ["model", "devices", "data x fsdp", "rows", "held", "peak", "of", "sampling", "reference", "update", "push",
        "what limits it first"]  # fmt: skip
UNITS = ["", "", "", "a device", "GB", "GB", "GB", "s", "s", "s", "GB, s", ""]


def with_tables(page: str) -> str:
    """Returns the text of the page with the tables as they are to be."""
    return TABLE.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", page)


def table(card: str) -> str:
    """The table of a card, in Markdown."""
    rows = [row(name, card, count) for name in MODELS for count in COUNTS]
    lines = [HEAD, ["---"] * len(HEAD), UNITS, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(name: str, card: str, count: int) -> list[str]:
    """The cells of one model on so many devices."""
    model = dataclasses.replace(MODELS[name], attention="splash" if card.startswith("tpu-") else "cudnn")
    limit = CARDS[card].memory * (1 if card.startswith("tpu-") else 1 - CONTEXT_SHARE)
    config, mesh, plan = layout(model, count, limit)
    if plan.peak > limit:
        cells = [number(sum(plan.held.values()) / GB), number(plan.peak / GB), number(limit / GB)]
        return [name, str(count), f"1 x {count}", "1", *cells, "", "", "", "", f"memory, in {plan.fullest}"]
    seconds = trainer_seconds(config, model, mesh, card)
    sampling = sampling_seconds(config, model, name, card, count)
    size = 2 * num_params(model)
    push = "" if card.startswith("tpu-") else f", {number(push_seconds(size, count))}"
    rows = config.actor.micro_batch_size_per_device
    return [
        name, str(count), f"{mesh['data']} x {mesh['fsdp']}", str(rows),
        *(number(x / GB) for x in (sum(plan.held.values()), plan.peak, limit)),
        number(sampling) if sampling else "", number(seconds["ref"]), number(seconds["update_actor"]),
        f"{number(size / GB)}{push}", short(config, model, mesh, card, seconds, sampling),
    ]  # fmt: skip


def layout(model: ModelConfig, count: int, limit: float) -> tuple[Config, dict[str, int], Any]:
    """Least fsdp, by hosts, and then most rows, that fit; all devices in fsdp and one row where nothing does."""
    for fsdp in [size for size in (HOST, 64, 512) if size <= count]:
        for rows in range(MOST_ROWS, 0, -1):
            config, sizes = recipe(rows), dict(data=count // fsdp, fsdp=fsdp, tensor=1)
            plan = plan_memory(config, model, abstract_mesh(**sizes), push_bytes=push_bytes(config.rollout))
            if plan.peak <= limit:
                return config, sizes, plan
    return config, sizes, plan


def recipe(rows: int) -> Config:
    """configs/gsm8k.py with the work of this page, and all state on the devices."""
    values = load_config(RECIPE)
    values.update_from_flattened_dict(
        {
            "data.train_batch_size": WORK.num_prompts,
            "algorithm.group_size": WORK.group_size,
            "data.max_prompt_length": WORK.prompt_tokens,
            "data.max_response_length": WORK.response_tokens,
            "model.remat": "full",
            "optim.offload": False,
            "algorithm.ref_offload": False,
            "actor.micro_batch_size_per_device": rows,
            "rollout.gpu_memory_utilization": ENGINE_SHARE,
            "rollout.sleep": True,
        }
    )
    return parse_config(values)


def trainer_seconds(config: Config, model: ModelConfig, mesh: dict[str, int], card: str) -> dict[str, float]:
    """Phase -> seconds. What goes over the network counts with its rate: all, or the sums over `data` alone."""
    rates = linked(CARDS[card], mesh, card)
    seconds = speed.expected_seconds(config, model, mesh, rates, WORK)
    if mesh["data"] > 1 and not card.startswith("tpu-") and mesh["fsdp"] <= HOST:
        shapes = speed.find_shapes(config, mesh["data"] * mesh["fsdp"], WORK)
        sums = speed.exchanged_bytes(model, mesh) - speed.exchanged_bytes(model, mesh | {"data": 1})
        seconds["update_actor"] += shapes.num_micro * sums * (1 / NETWORK - 1 / rates.link)
    return seconds


def linked(card: Card, mesh: dict[str, int], name: str) -> Card:
    """The card with the rate at which it reaches those that it gathers parameters from."""
    is_within = name.startswith("tpu-") or mesh["fsdp"] <= HOST
    return card if is_within else dataclasses.replace(card, link=NETWORK)


def sampling_seconds(config: Config, model: ModelConfig, name: str, card: str, count: int) -> float:
    """By vLLM on the trainer's GPUs; several that share a model count as one that is as much faster.

    On TPUs 0: nobody predicts it.
    """
    if card.startswith("tpu-"):
        return 0.0
    size, one = ENGINE_GPUS[name], CARDS[card]
    engine = dataclasses.replace(one, memory=size * one.memory, matmul=size * one.matmul, hbm=size * one.hbm)
    share = dataclasses.replace(WORK, num_prompts=-(-WORK.num_prompts // (count // size)))
    return gen_seconds(config.rollout, model, engine, share)


def push_seconds(size: int, count: int) -> float:
    """All parameters to every GPU, through NVLink within a host and through the network between hosts."""
    return PUSH_S + size / (PUSH_RATE if count <= HOST else NETWORK)


def short(
    config: Config, model: ModelConfig, mesh: dict[str, int], card: str, seconds: Any, sampling: float
) -> str:
    """What limits the step: the largest of products, exchange and sampling."""
    shapes = speed.find_shapes(config, mesh["data"] * mesh["fsdp"], WORK)
    crosses = not card.startswith("tpu-") and mesh["data"] * mesh["fsdp"] > HOST
    alone = trainer_seconds(config, model, dict(data=1, fsdp=1, tensor=1), card)["update_actor"]
    whole = speed.find_shapes(config, 1, WORK)
    products = alone * shapes.num_micro * shapes.rows / (whole.num_micro * whole.rows)
    sent = max(0.0, seconds["update_actor"] - products)
    parts = {"sampling": sampling, "the network" if crosses else "the links": sent, "products": products}
    name = max(parts, key=lambda part: parts[part])
    return f"{name}: {number(parts[name])} s" + ("" if name != "sampling" else " of decoding")


def number(x: float) -> str:
    """Three digits, and no exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text()))
