"""What every engine offers, whatever it is."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import grpo_jax
from grpo_jax import rollout
from grpo_jax.config import KEYS
from grpo_jax.rollout import ENGINES
from grpo_jax.rollout.vllm.requests import deal_out, make_requests
from grpo_jax.types import Prompt

FUNCTIONS = (
    "check_engine", "share_devices", "trainer_share", "push_bytes", "shares_parameters", "memory_rows",
    "memory_savers", "expected_seconds", "check_devices", "check_platform", "is_installed", "try_installation",
)  # fmt: skip


def test_the_engines_are_those_of_the_configuration():
    assert ENGINES.keys() == set(KEYS["rollout.engine"].choices)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_engine_has_the_same_functions(engine, name):
    theirs = getattr(importlib.import_module(ENGINES[engine]), name)
    parameters = lambda function: list(inspect.signature(function).parameters)
    assert parameters(theirs) == parameters(getattr(rollout, name))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_made_in_the_same_way(engine):
    make = importlib.import_module(ENGINES[engine]).make_engine
    parameters = ["section", "folder", "mesh", "tokenizer", "stop_token_ids", "max_model_len", "lora_push"]
    assert list(inspect.signature(make).parameters) == parameters


def test_the_name_of_the_engine_is_asked_for_in_one_place_only():
    """Elsewhere a new engine would have to be thought of."""
    root = Path(grpo_jax.__file__).parent
    places = [
        str(file.relative_to(root))
        for file in sorted(root.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "engine"
        if ast.unparse(node.value).endswith(("section", "rollout"))
    ]
    places = [place for place in places if not place.startswith("config")]  # its rules over several keys
    assert places == ["rollout/__init__.py"]


# Requests to vLLM engines; what becomes of them is seen in tests/vllm, with real ones


def prompts(lengths):
    return [Prompt(str(i), tuple(range(n)), "", "", "", {}) for i, n in enumerate(lengths)]


def test_each_prompt_has_a_seed_of_its_own():
    requests = make_requests(prompts([3, 1, 2]), seed=5)
    assert [(i, ids) for i, ids, _ in requests] == [(0, [0, 1, 2]), (1, [0]), (2, [0, 1])]
    seeds = [seed for *_, seed in requests]
    assert len(set(seeds)) == 3 and all(0 <= seed < 2**31 for seed in seeds)
    assert make_requests(prompts([3, 1, 2]), seed=5) == requests
    assert [seed for *_, seed in make_requests(prompts([3, 1, 2]), seed=6)] != seeds


def test_prompts_are_dealt_out_by_length():
    requests = make_requests(prompts([9, 30, 150, 12, 60, 7, 33]), seed=3)
    # In the order of their lengths: 2 4 6 1 3 0 5.
    assert deal_out(requests, 2) == {0: {2, 6, 3, 5}, 1: {4, 1, 0}}
    assert deal_out(requests[:1], 2) == {0: {0}, 1: set()}
