"""Which scheduler an engine has. vLLM takes no part: `tests/vllm/test_scheduler.py` has what needs it."""

import sys

import pytest

from grpo_jax.rollout.vllm.scheduler_choice import choose_scheduler


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    monkeypatch.delenv("VLLM_COMPUTE_NANS_IN_LOGITS", raising=False)
    monkeypatch.delenv("VLLM_RAISE_ON_LOGIT_NANS", raising=False)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("enable_return_routed_experts", True),
        ("aux_output_config", {"enable_return_routed_experts": True}),
        ("return_sampling_mask", True),
        ("speculative_config", {"method": "ngram"}),
        ("per_request_spec_decode_metrics", "summary"),
        ("kv_transfer_config", {"kv_connector": "NixlConnector"}),
        ("kv_offloading_size", 4.0),
        ("kv_events_config", {"enable_kv_cache_events": True}),
        ("ec_transfer_config", {"ec_connector": "x"}),
    ],
)
def test_what_ours_would_lose_gets_vllms_own(argument, value):
    name, why = choose_scheduler({argument: value, "seed": 0}, "0.32.0", is_asynchronous=True)
    assert name is None
    assert why == f"ours would lose what {argument} asks for"


@pytest.mark.parametrize("variable", ["VLLM_COMPUTE_NANS_IN_LOGITS", "VLLM_RAISE_ON_LOGIT_NANS"])
def test_counting_nans_gets_vllms_own(variable, monkeypatch):
    monkeypatch.setenv(variable, "1")
    name, why = choose_scheduler({"return_sampling_mask": True}, "0.32.0", is_asynchronous=True)
    assert name is None
    assert why == f"ours would lose what return_sampling_mask, {variable} asks for"


@pytest.mark.parametrize("version", ["0.26.0", "0.31.4", "0.33.0rc1", "1.0", "0.3.2"])
def test_a_version_that_nobody_tested_gets_vllms_own(version):
    name, why = choose_scheduler({}, version, is_asynchronous=True)
    assert name is None
    assert why == f"ours was tested with 0.25 and 0.32 only, and this is vLLM {version}"


def test_a_tested_version_without_its_parts_gets_vllms_own(monkeypatch):
    """An import that fails ends no engine."""
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "grpo_jax.rollout.vllm.scheduler", raising=False)
    name, why = choose_scheduler({}, "0.32.0", is_asynchronous=True)
    assert name is None
    assert why.startswith("vLLM 0.32.0 lacks what ours derives from (")
