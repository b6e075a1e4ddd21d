"""What the devices of a run cannot compute of its configuration."""

import pytest
from config_helpers import gsm8k

from grpo_jax.config import ConfigError
from grpo_jax.model.fused_attention import DEVICE_KINDS, DeviceKind
from grpo_jax.run.inputs import read_model_config

CHANGES = {"model.path": "random", "lora.rank": 4, "lora.push": "adapter", "model.dtype": "float32"}


@pytest.mark.parametrize(
    ("device", "changes"),
    [
        (DeviceKind("cpu"), {}),  # vLLM's products on CPUs are plain ones
        (DEVICE_KINDS["h200"], {"model.dtype": "bfloat16"}),
        (DEVICE_KINDS["h200"], {"lora.push": "merged"}),
        (DEVICE_KINDS["h200"], {"lora.rank": 0}),
    ],
)
def test_adapters_alone(device, changes):
    assert read_model_config(gsm8k(**CHANGES | changes), device)


def test_adapters_alone_in_float32_on_a_gpu():
    rule = r"lora\.push='adapter': needs model\.dtype=bfloat16 or float16 on GPUs.*: choose merged"
    with pytest.raises(ConfigError, match=rule):
        read_model_config(gsm8k(**CHANGES), DEVICE_KINDS["h200"])
