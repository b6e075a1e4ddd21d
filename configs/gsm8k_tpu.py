"""configs/gsm8k.py for a TPU v5e-16: Qwen2.5-7B-Instruct on 16 chips of 16 GB, which 4 hosts share.

    launch/tpu_pod.sh --config=configs/gsm8k_tpu.py                                 # docs/tpu.md begins at nothing
    python -m grpo_jax.plan --config=configs/gsm8k_tpu.py --device=v5e-16 --compile # anywhere, without a TPU

What differs from configs/gsm8k.py, and why:

- completions are sampled by the local engine: vLLM needs NVIDIA GPUs;
- nothing is kept on the hosts: the state of 7B is 6.7 GB of each chip when 16 share it;
- a layer's results are computed again in the backward pass (`model.remat=full`), in micro-batches of two rows a
  chip: 14.5 GB in all, of the 16.9 that JAX has on a chip. With `model.remat=dots` they do not fit.

Compiled, and never run on a TPU: the memory is the compiler's (docs/tpu.md). On larger chips more rows and
`--config.model.remat=dots` are faster; on another slice, `plan` says what fits.
"""

from pathlib import Path

from ml_collections import ConfigDict

from grpo_jax.config import defaults, load_config


def get_config(variant: str = "") -> ConfigDict:
    """Returns configs/gsm8k.py for a v5e-16; `variant` is "" or "smoke"."""
    config = load_config(Path(__file__).with_name("gsm8k.py"), variant)
    config.logging.experiment_name = config.logging.experiment_name.replace("gsm8k", "gsm8k-tpu")
    if variant == "smoke":
        return config
    config.model.remat = "full"
    config.rollout.update(engine="local", gpu_memory_utilization=defaults().rollout.gpu_memory_utilization)
    config.optim.offload = False
    config.algorithm.ref_offload = False
    config.actor.micro_batch_size_per_device = 2
    return config
