"""What devices cannot compute."""

import pytest
from config_helpers import gsm8k

from grpo_jax.config import ConfigError
from grpo_jax.run.devices import check_push


@pytest.mark.parametrize(
    ("platform", "changes", "is_refused"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),  # vLLM's products on CPUs are plain ones
        ("cuda", {"model.dtype": "bfloat16"}, False),
        ("cuda", {"lora.push": "merged"}, False),
        ("cuda", {"lora.rank": 0}, False),
    ],
)
def test_adapters_alone_in_float32_on_a_gpu(platform, changes, is_refused):
    config = gsm8k(**{"lora.rank": 4, "lora.push": "adapter", "model.dtype": "float32"} | changes)
    if not is_refused:
        check_push(config, platform)
        return
    with pytest.raises(
        ConfigError, match=r"lora\.push='adapter': needs model\.dtype=bfloat16 or float16 on GPUs"
    ):
        check_push(config, platform)
