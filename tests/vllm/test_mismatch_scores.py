"""`grpo_jax.mismatch` with the real vLLM: its own scores, and its output head in float32."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import vllm_helpers as helpers

from grpo_jax.config import Config
from grpo_jax.model.hf import inspect_folder
from grpo_jax.rollout import with_float32_head
from grpo_jax.run import mismatch
from grpo_jax.run.mismatch_report import difference

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def found(models):
    """In bfloat16, with a second engine whose head is in float32."""
    base, replace = Config(), dataclasses.replace
    config = replace(
        base,
        data=replace(base.data, max_prompt_length=40, max_response_length=24, train_batch_size=4),
        actor=replace(base.actor, micro_batch_size_per_device=4),
        model=replace(base.model, dtype="bfloat16", attention="plain"),
        rollout=helpers.section(),
    )
    folder = inspect_folder(models["qwen2-tied"], config.model).with_config(dtype=jnp.dtype(jnp.bfloat16))
    second = with_float32_head(config.rollout)
    prompts, mesh = helpers.prompts([5, 33, 12, 40]), helpers.mesh_of()
    return mismatch.compare(config, folder, helpers.NumberTokenizer(), prompts, mesh, float32_head=second)


def test_every_program_is_measured(found):
    assert not found.missing
    assert {mismatch.SAMPLED, mismatch.GIVEN, mismatch.GIVEN_HEAD, mismatch.TRUTH} < set(found.logprobs)
    assert len({values.shape for values in found.logprobs.values()}) == 1


def test_a_head_in_float32_takes_away_the_rounding_of_logits(found):
    """vLLM's logits have 8 bits otherwise: between 4 and 8 they lie 2^-5 apart, and are rounded by at most 2^-6.

    So is, on average, the sum that they are divided by. All else is the same in both engines.
    """
    given, with_head = found.logprobs[mismatch.GIVEN], found.logprobs[mismatch.GIVEN_HEAD]
    assert difference(given, with_head).nats > 1e-4
    assert np.abs(given - with_head).max() < 2 * 2**-6
