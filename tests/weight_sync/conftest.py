"""Models that several tests share."""

import functools

import jax
import pytest
import torch

from grpo_jax.weight_sync import buckets


@pytest.fixture(scope="package", autouse=True)
def quick():
    """Compiling is most of what these tests do; unoptimized code takes half as long to make."""
    jax.config.update("jax_disable_most_optimizations", True)
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        # Traced anew for each tensor of each plan; fifty plans are made here.
        patch.setattr(buckets, "abstract_params", functools.cache(buckets.abstract_params))
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Returns `model(family)`."""
    import weight_sync_helpers as helpers

    made = {}

    def model(family):
        if family not in made:
            made[family] = helpers.Model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return model
