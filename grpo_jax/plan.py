"""Prints what a run will take, phase by phase: of each device's memory, and of time; the largest micro-batch too.

    python -m grpo_jax.plan --config=FILE.py [--device=h200] [--num_devices=1] [--config.SECTION.KEY=VALUE ...]
    python -m grpo_jax.plan --config=FILE.py --device=v5e-16 [--compile] [--config.SECTION.KEY=VALUE ...]

DEVICE is h100, h200, b200, a100, a100-40, l40s, tpu-v4, tpu-v5e, tpu-v5p, tpu-v6e, a TPU slice by its name (as
v5e-16, v5p-8, v6e-8), or its memory in GB; without it, the device at hand. Of the model, only config.json is read,
so that a plan can be made before anything is fetched or rented. `grpo_jax.train` logs the same figures and the
real ones beside them. With --compile, the run's programs are compiled for the devices, TPU slices, h100 or h200,
which need not be there. It takes minutes, and what the compiler says stands beside what is counted.

Exit code 0 where all phases fit, 1 where one does not, 2 after a mistake in the command or the configuration.
"""

import math
import sys
from typing import Any

from grpo_jax.config import Config, ConfigError, nearest
from grpo_jax.config.command_line import USAGE, config_parser, one_line_errors, read_command_line
from grpo_jax.storage.files import size_text

GB, MB = 1e9, 1e6


def main(argv: list[str] | None = None) -> None:
    parser = config_parser("grpo_jax.plan", __doc__, f"{USAGE} [--device=h200] [--num_devices=1] [--compile]")
    parser.add_argument("--device", default="", help="name or GB; default: the device at hand")
    parser.add_argument(
        "--num_devices", default="", help="how many of them; default: 1, or those of one slice"
    )
    parser.add_argument("--compile", action="store_true", help="compile the programs, for TPUs, h100 or h200")
    flags = {"device": "--device", "num_devices": "--num_devices", "compile": "--compile"}
    with one_line_errors(flags):
        config, _, args = read_command_line(parser, argv)
        device, num_devices, num_slices = find_devices(args.device, args.num_devices)
        memory = device_bytes(device)
        sizes = mesh_sizes(config, num_devices, num_slices)
        model = read_model(config, device)
        budget = make_budget(config, model, device, memory, sizes)
        target = describe_target(device, num_devices, num_slices) if args.compile else None
        print_plan(budget, memory)
        print_seconds(config, model, device, sizes)
        if target is not None:
            print_compiled(budget, target)
        if budget.plan.peak > budget.limit:
            raise SystemExit(1)


def find_devices(device: str, num_devices: str) -> tuple[str, int, int]:
    """The name of the device, as `device_bytes` takes it, how many there are, and in how many slices.

    Args:   device: its name, or that of a slice; num_devices: "" for those of one slice, else 1.
    Raises: ConfigError: it is no number, or not that of whole slices.
    """
    from grpo_jax.model.cards import find_slice

    if num_devices and (not num_devices.isdecimal() or not 1 <= int(num_devices[:10]) < 2**31):
        raise ConfigError("num_devices", num_devices, "must be a number of devices, at least 1")
    named = find_slice(device)
    if named is None:
        return device, int(num_devices or 1), 1
    number = int(num_devices or named.num_devices)
    if number % named.num_devices:
        rule = f"must be a multiple of {named.num_devices}, the chips of a {device}: more are several slices"
        raise ConfigError("num_devices", num_devices, rule)
    return named.card, number, number // named.num_devices


def device_bytes(name: str) -> int:
    """Memory of a named device, of "N" GB, or of the local device ("").

    Raises: ConfigError: there is no such device, or the local one does not say how much memory it has.
    """
    if not name:
        return _local_memory()
    from grpo_jax.model.cards import CARDS

    if name in CARDS:
        return CARDS[name].memory
    try:
        size = float(name)
        if not 0 < size < math.inf:
            raise ValueError
        return int(size * GB)
    except ValueError:
        names = f"{', '.join(CARDS)}, or a TPU slice as v5e-16"
        rule = f"must be a number of GB or one of {names}{nearest(name, CARDS)}"
        raise ConfigError("device", name, rule) from None


def _local_memory() -> int:
    from grpo_jax.run.devices import find_devices
    from grpo_jax.run.memory import memory_limit

    device = find_devices()[0]
    limit = memory_limit()
    if not limit:
        raise ConfigError("device", "", f"{device.device_kind} does not say its memory: name a device")
    # JAX reports what it may take, by default three quarters.
    return int(limit / 0.75)


def mesh_sizes(config: Config, num_devices: int, num_slices: int = 1) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor, -1 filled in.

    Raises: ConfigError: they do not fit.
    """
    from grpo_jax.model import sharding

    fixed = sharding.fixed_devices(config.mesh)
    if num_devices % fixed:
        raise ConfigError("num_devices", num_devices, f"must be a multiple of the mesh's {fixed}")
    sizes = sharding.mesh_sizes(config.mesh, num_devices)
    sharding.check_slices(sizes[0], num_slices)
    return sizes


def read_model(config: Config, device: str) -> Any:
    """The `ModelConfig` of the run on a device.

    Args:   device: as in `device_bytes`; for a number of GB, the attention kernel is that of an H100.
    Raises: ConfigError: as `inputs.read_model_config`, or the engine does not run on such a device.
    """
    from grpo_jax.model.fused_attention import DEVICE_KINDS, local_device_kind
    from grpo_jax.rollout import check_platform
    from grpo_jax.run.inputs import read_model_config

    kind = DEVICE_KINDS.get(device, DEVICE_KINDS["h100"]) if device else local_device_kind()
    check_platform(config.rollout, kind.platform)
    return read_model_config(config, kind)


def make_budget(config: Config, model: Any, device: str, memory: int, sizes: tuple[int, int, int]) -> Any:
    """The run's `Budget` on a device. Args: as `device_bytes` and `mesh_sizes` take and return them."""
    from grpo_jax.learner.memory import abstract_mesh
    from grpo_jax.rollout import trainer_share
    from grpo_jax.run.memory import Budget

    # On a TPU no engine of another process takes a share, and JAX takes all.
    share = 1.0 if device.startswith("tpu-") else trainer_share(config.rollout)
    return Budget(config, model, abstract_mesh(*sizes), share * memory)


def print_plan(budget: Any, memory: int) -> None:
    from grpo_jax.learner.memory import largest_micro_batch
    from grpo_jax.learner.packing import micro_batch_shape
    from grpo_jax.rollout import push_bytes

    config, limit = budget.config, budget.limit
    sizes = tuple(budget.mesh.shape.values())
    rows, length = micro_batch_shape(config, config.completions_per_update, sizes[0] * sizes[1])
    share = f"{limit / memory:.0%} of it for the trainer: {size_text(limit)}"
    print(f"Device          {size_text(memory)}, {share}")
    print(f"Mesh            data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]}")
    print(f"Micro-batch     {rows // (sizes[0] * sizes[1])} rows of {length:,} tokens on each data shard")
    print_memory(budget)
    most = largest_micro_batch(
        config, budget.model, budget.mesh, limit, push_bytes=push_bytes(config.rollout)
    )
    advice = (
        f"{most} rows: actor.micro_batch_size_per_device={most}" if most else "none: not even one row fits"
    )
    print(f"Largest micro-batch that fits: {advice}")
    if budget.plan.peak > limit:
        print(f"Phase {budget.plan.fullest} does not fit. {budget.advice(budget.plan.fullest)}")


def print_memory(budget: Any) -> None:
    """Tables of a `Budget`."""
    plan = budget.plan
    unit, name_of_unit = (GB, "GB") if plan.peak >= GB else (MB, "MB")
    print(f"Held from step to step, {name_of_unit} a device")
    for name, size in plan.held.items():
        print(f"  {name:<32}{size / unit:>8.2f}")
    if plan.host:
        print(f"Held in the host's memory, {name_of_unit} for all devices")
        for name, size in plan.host.items():
            print(f"  {name:<32}{size / unit:>8.2f}")
    print(f"The most in each phase, {name_of_unit} a device, and what of it is beside what is held")
    for phase, size in plan.phases.items():
        print(f"  {phase:<32}{size / unit:>8.2f}{'' if size <= budget.limit else '   does not fit'}")
        for name, part in plan.beside[phase].items():
            print(f"    {name:<38}{part / unit:>8.2f}")


def print_seconds(config: Config, model: Any, device: str, sizes: tuple[int, int, int]) -> None:
    """The expected seconds of a step, or in one line why there are none. Args: device: as in `device_bytes`."""
    from grpo_jax.learner.memory import abstract_mesh
    from grpo_jax.model.cards import CARDS
    from grpo_jax.rollout import shares_parameters
    from grpo_jax.run.speed import PHASES, Speed

    speed = Speed(config, model, abstract_mesh(*sizes), device if device in CARDS else local_card(device))
    work = speed.planned_work()
    if not (seconds := speed.expected(work)):
        reason = speed.why_unknown or "those of this mesh and this engine have not been measured"
        print(f"Expected seconds of a step: not said, since {reason}")
        return
    rates = "rates measured on one" if CARDS[speed.card].is_measured else "rates by its data sheet"
    print(
        f"Expected seconds of a step on {speed.mesh.size} x {speed.card} ({rates}; every prompt of "
        f"{work.prompt_tokens:,} tokens, every completion of {work.response_tokens:,}; rewards not counted)"
    )
    is_there = {
        "gen": True,
        "old_log_prob": config.needs_old_logprobs,
        "ref": config.uses_reference,
        "update_actor": True,
        "update_weights": True,
    }
    phases = list(filter(is_there.get, PHASES))
    for phase in phases:
        print(f"  {phase:<32}{seconds[phase]:>8.2f}" if phase in seconds else f"  {phase:<32}not predicted")
    is_whole = all(phase in seconds for phase in phases)
    print(f"  {'together' if is_whole else 'those predicted, together':<32}{sum(seconds.values()):>8.2f}")
    if shares_parameters(config.rollout):
        print("The local engine's sampling is not predicted: a run says after three steps what gen takes")


def describe_target(device: str, num_devices: int, num_slices: int) -> Any:
    """The devices to compile for, which are only described. Raises: ConfigError: as `targets.describe`."""
    from grpo_jax.run.targets import describe

    return describe(device, num_devices, num_slices)


def print_compiled(budget: Any, target: Any) -> None:
    """What the compiler says of the run's programs, beside what the plan counts. Args: target: a `Target`."""
    import jax

    from grpo_jax.run.ahead import compile_run

    devices = target.devices
    print(f"Compiling for {len(devices)} x {devices[0].device_kind}: some minutes ...", flush=True)
    try:
        found = compile_run(budget.config, budget.model, devices)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        sys.exit(f"error: a program does not fit, as the compiler says: {reason}")
    print(f"Compiled by {target.compiler} in {found.seconds:.0f} s; nothing was run")
    print("The most in each phase, GB a device: compiled, with what waits meanwhile, and as counted above")
    for phase, size in found.phases.items():
        counted = budget.plan.phases.get(phase)
        if phase == "weight sync":
            print(f"  {phase:<32}{size / GB:>8.2f}   packing alone: counted are the engine's buckets too")
            continue
        beside = f"{counted / GB:>8.2f}{size / counted - 1:>+8.1%}" if counted else "   not counted"
        print(f"  {phase:<32}{size / GB:>8.2f}{beside}{'' if size <= budget.limit else '   does not fit'}")
    print(
        "Each program: GB a device with arguments and results, TFLOP of its products a device, what it holds"
    )
    for program in found.programs:
        facts = program.facts
        held = [f"{count} x {name}" for name, count in facts.kernels.items()]
        held += [f"{one.count} {name} of {one.num_bytes / GB:.2f} GB" for name, one in facts.traffic.items()]
        print(
            f"  {program.name:<16}{program.num_bytes / GB:>8.2f}{facts.flops / 1e12:>10.2f}  {', '.join(held)}"
        )


def local_card(device: str) -> str:
    """The name of the device at hand, where it is the one that is meant and known; else ""."""
    if device:
        return ""
    import jax

    from grpo_jax.model.cards import find_card

    return find_card(jax.devices()[0].device_kind)


if __name__ == "__main__":
    main()
