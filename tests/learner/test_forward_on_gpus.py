"""What tests/learner/test_forward.py says of CPUs, where it was not so before."""

import jax.numpy as jnp
import pytest
from test_forward import first_update, is_exactly_where_it_was, random_batch
from tiny_models import tiny_config

from grpo_jax.model.fused_attention import choose_kernel, local_device_kind


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("rows", "remat"), [(4, "dots"), (16, "none"), (16, "dots"), (16, "full")])
def test_zero_is_zero_on_a_gpu(dtype, rows, remat):
    """Rows of 384 tokens of a model as wide as SmolLM2-135M, where two programs were seen to differ by 5e-4."""
    model = tiny_config(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_layers=8, num_heads=9, num_kv_heads=3,
        head_dim=64, dtype=dtype, remat=remat, attention=choose_kernel("auto", dtype, 64, local_device_kind()),
    )  # fmt: skip
    batch = random_batch(model.vocab_size, length=384, rows=32)
    assert is_exactly_where_it_was(first_update(model, batch, (rows, 384)))
