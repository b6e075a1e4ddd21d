"""Prints what a run will take of each device's memory, phase by phase, and the largest micro-batch that fits.

    python -m grpo_jax.plan --config=FILE.py [--device=h200] [--num_devices=1] [--config.SECTION.KEY=VALUE ...]

DEVICE is one of those below or its memory in GB; without it, the device at hand. Of the model, only config.json
is read, so that a plan can be made before anything is fetched or rented. `grpo_jax.train` logs the same figure and
the real peak beside it.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import Config, ConfigError, nearest
from grpo_jax.config.command_line import one_line_errors

# Bytes, as the driver reports them.
DEVICE_BYTES = {
    "h100": 81_559 * 2**20,
    "h200": 143_771 * 2**20,
    "b200": 183_359 * 2**20,
    "a100": 81_920 * 2**20,
    "a100-40": 40_960 * 2**20,
    "l40s": 46_068 * 2**20,
    "tpu-v4": 32 * 2**30,
    "tpu-v5e": 16 * 2**30,
    "tpu-v5p": 95 * 2**30,
    "tpu-v6e": 32 * 2**30,
}
GB = 1e9


def main() -> None:
    from grpo_jax.config.config_file import parse_command_line

    with one_line_errors({"device": "--device", "num_devices": "--num_devices"}):
        options, rest = _own_flags(sys.argv[1:])
        config, _ = parse_command_line("grpo_jax.plan", __doc__, rest)
        device = options.get("--device", "")
        memory = device_bytes(device)
        text = options.get("--num_devices", "1")
        if not text.isdigit() or int(text) < 1:
            raise ConfigError("num_devices", text, "must be a number of devices, at least 1")
        sizes = mesh_sizes(config, int(text))
        print_plan(config, read_model(config, device), memory, sizes)


def device_bytes(name: str) -> int:
    """Memory of a named device, of so many GB, or of the one at hand.

    Raises: ConfigError: there is no such device.
    """
    if name in DEVICE_BYTES:
        return DEVICE_BYTES[name]
    try:
        return int(float(name) * GB) if name else _memory_at_hand()
    except ValueError:
        rule = f"must be a number of GB or one of {', '.join(DEVICE_BYTES)}{nearest(name, DEVICE_BYTES)}"
        raise ConfigError("device", name, rule) from None


def _memory_at_hand() -> int:
    import jax

    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if not limit:
        raise ConfigError("device", "", f"{jax.devices()[0].device_kind} does not say how much memory it has")
    # JAX reports what it may take, by default three quarters.
    return int(limit / 0.75)


def mesh_sizes(config: Config, num_devices: int) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor, -1 filled in.

    Raises: ConfigError: they do not fit.
    """
    from grpo_jax.model import sharding

    fixed = sharding.fixed_devices(config.mesh)
    if num_devices % fixed:
        raise ConfigError("num_devices", num_devices, f"must be a multiple of the mesh's {fixed}")
    return sharding.mesh_sizes(config.mesh, num_devices)


def read_model(config: Config, device: str = "") -> Any:
    """Returns the `ModelConfig` of the run, with the attention kernel that it would take on a device.

    Args:   device: as in `device_bytes`; of a number of GB, the kernel of an H100.
    Raises: ConfigError: model.path holds no config.json that is understood, or the device lacks the kernel.
    """
    from grpo_jax.model.config import parse_hf_config, random_model_config
    from grpo_jax.model.fused_attention import DEVICE_KINDS, choose_kernel
    from grpo_jax.model.hf import read_json

    if config.model.path == "random":
        model = random_model_config(config.random_model, config.model)
    else:
        model = parse_hf_config(read_json(Path(config.model.path) / "config.json"), config.model)
    kind = DEVICE_KINDS.get(device, DEVICE_KINDS["h100"]) if device else None
    kernel = choose_kernel(config.model.attention, model.dtype, model.head_dim, kind)
    return dataclasses.replace(model, attention=kernel)


def print_plan(config: Config, model: Any, memory: int, sizes: tuple[int, int, int]) -> None:
    from grpo_jax.learner.batching import micro_batch_shape
    from grpo_jax.learner.memory import abstract_mesh, largest_micro_batch, plan_memory
    from grpo_jax.run.prepare import trainer_share

    mesh = abstract_mesh(*sizes)
    plan = plan_memory(config, model, mesh)
    share = trainer_share(config.rollout)
    limit = share * memory
    rows, length = micro_batch_shape(config, config.completions_per_update, sizes[0] * sizes[1])
    print(f"Device          {memory / GB:.1f} GB, {share:.0%} of it for the trainer: {limit / GB:.1f} GB")
    print(f"Mesh            data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}")
    print(f"Micro-batch     {rows // (sizes[0] * sizes[1])} rows of {length:,} tokens on each data shard")
    print("Held from step to step, GB a device")
    for name, size in plan.held.items():
        print(f"  {name:<18}{size / GB:>8.2f}")
    if plan.host:
        print("Held in the host's memory, GB for all devices")
        for name, size in plan.host.items():
            print(f"  {name:<18}{size / GB:>8.2f}")
    print("The most in each phase, GB a device")
    for name, size in plan.phases.items():
        print(f"  {name:<18}{size / GB:>8.2f}{'' if size <= limit else '   does not fit'}")
    most = largest_micro_batch(config, model, mesh, limit)
    advice = (
        f"{most} rows: actor.micro_batch_size_per_device={most}" if most else "none: not even one row fits"
    )
    print(f"Largest micro-batch that fits: {advice}")
    if not most:
        print(f"Less is taken with {', '.join(ways_to_save(config))}.")


def ways_to_save(config: Config) -> list[str]:
    """What takes less memory and is not set yet, the cheapest first."""
    is_shared = config.rollout.engine == "vllm" and config.rollout.placement == "colocated"
    ways = {
        "optim.offload=True": not config.optim.offload,
        "algorithm.ref_offload=True": config.uses_reference and not config.algorithm.ref_offload,
        "model.remat=full": config.model.remat != "full",
        "more devices in mesh.fsdp": True,
        "rollout.sleep=True": is_shared and not config.rollout.sleep,
        "rollout.placement=separate": is_shared,
        "optim.accumulator_dtype=bfloat16": config.optim.accumulator_dtype != "bfloat16",
    }
    return [way for way, is_open in ways.items() if is_open]


def _own_flags(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """This command's flags, written --FLAG=VALUE, and the rest."""
    own = {}
    rest = []
    for argument in argv:
        flag, equals, value = argument.partition("=")
        if flag in ("--device", "--num_devices") and equals:
            own[flag] = value
        else:
            rest.append(argument)
    return own, rest


if __name__ == "__main__":
    main()
