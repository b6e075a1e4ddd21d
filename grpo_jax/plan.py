"""Prints what a run will take of each device's memory, phase by phase, and the largest micro-batch that fits.

    python -m grpo_jax.plan --config=FILE.py [--device=h200] [--num_devices=1] [--config.SECTION.KEY=VALUE ...]

DEVICE is one of those below or its memory in GB; without it, the device at hand. Of the model, only config.json
is read, so that a plan can be made before anything is fetched or rented. `grpo_jax.train` logs the same figure and
the real peak beside it.
"""

from typing import Any

from grpo_jax.config import Config, ConfigError, nearest
from grpo_jax.config.command_line import USAGE, config_parser, one_line_errors, read_command_line

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
    parser = config_parser("grpo_jax.plan", __doc__, f"{USAGE} [--device=h200] [--num_devices=1]")
    parser.add_argument("--device", default="", help="name or GB; default: the device at hand")
    parser.add_argument("--num_devices", default="1", help="how many of them")
    with one_line_errors({"device": "--device", "num_devices": "--num_devices"}):
        config, _, args = read_command_line(parser)
        if not args.num_devices.isdigit() or int(args.num_devices) < 1:
            raise ConfigError("num_devices", args.num_devices, "must be a number of devices, at least 1")
        memory = device_bytes(args.device)
        sizes = mesh_sizes(config, int(args.num_devices))
        print_plan(config, read_model(config, args.device), memory, sizes)


def device_bytes(name: str) -> int:
    """Memory of a named device, of "N" GB, or of the local device ("").

    Raises: ConfigError: there is no such device, or the local one does not say how much memory it has.
    """
    if not name:
        return _local_memory()
    if name in DEVICE_BYTES:
        return DEVICE_BYTES[name]
    try:
        return int(float(name) * GB)
    except ValueError:
        rule = f"must be a number of GB or one of {', '.join(DEVICE_BYTES)}{nearest(name, DEVICE_BYTES)}"
        raise ConfigError("device", name, rule) from None


def _local_memory() -> int:
    import jax

    from grpo_jax.run.memory import memory_limit

    limit = memory_limit()
    if not limit:
        raise ConfigError(
            "device", "", f"{jax.devices()[0].device_kind} does not say its memory: name a device"
        )
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


def read_model(config: Config, device: str) -> Any:
    """The `ModelConfig` of the run on a device.

    Args:   device: as in `device_bytes`; for a number of GB, the attention kernel is that of an H100.
    Raises: ConfigError: as `inputs.read_model_config`.
    """
    from grpo_jax.model.fused_attention import DEVICE_KINDS
    from grpo_jax.run.inputs import read_model_config

    return read_model_config(config, DEVICE_KINDS.get(device, DEVICE_KINDS["h100"]) if device else None)


def print_plan(config: Config, model: Any, memory: int, sizes: tuple[int, int, int]) -> None:
    from grpo_jax.learner.memory import abstract_mesh, largest_micro_batch
    from grpo_jax.learner.packing import micro_batch_shape
    from grpo_jax.rollout import push_bytes, trainer_share
    from grpo_jax.run.memory import Budget

    share = trainer_share(config.rollout)
    limit = share * memory
    budget = Budget(config, model, abstract_mesh(*sizes), limit)
    rows, length = micro_batch_shape(config, config.completions_per_update, sizes[0] * sizes[1])
    print(f"Device          {memory / GB:.1f} GB, {share:.0%} of it for the trainer: {limit / GB:.1f} GB")
    print(f"Mesh            data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}")
    print(f"Micro-batch     {rows // (sizes[0] * sizes[1])} rows of {length:,} tokens on each data shard")
    print_memory(budget)
    most = largest_micro_batch(config, model, budget.mesh, limit, push_bytes=push_bytes(config.rollout))
    advice = (
        f"{most} rows: actor.micro_batch_size_per_device={most}" if most else "none: not even one row fits"
    )
    print(f"Largest micro-batch that fits: {advice}")
    if budget.plan.peak > limit:
        print(f"Phase {budget.plan.fullest} does not fit. {budget.advice(budget.plan.fullest)}")


def print_memory(budget: Any) -> None:
    """Tables of a `Budget`."""
    plan = budget.plan
    print("Held from step to step, GB a device")
    for name, size in plan.held.items():
        print(f"  {name:<32}{size / GB:>8.2f}")
    if plan.host:
        print("Held in the host's memory, GB for all devices")
        for name, size in plan.host.items():
            print(f"  {name:<32}{size / GB:>8.2f}")
    print("The most in each phase, GB a device, and what of it is beside what is held")
    for phase, size in plan.phases.items():
        print(f"  {phase:<32}{size / GB:>8.2f}{'' if size <= budget.limit else '   does not fit'}")
        for name, part in plan.beside[phase].items():
            print(f"    {name:<38}{part / GB:>8.2f}")


if __name__ == "__main__":
    main()
