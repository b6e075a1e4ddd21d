"""Checks the installation, and what a configuration would need.

    python -m grpo_jax.doctor
    python -m grpo_jax.doctor [--hosts] --config=FILE.py [--workdir=DIR] [--config.SECTION.KEY=VALUE ...]

With --hosts, started on every host as training is, it checks what the hosts must have in common (docs/hosts.md).
Writes nothing that stays.

Exit code 0 when everything is in order, 2 when the configuration or an installed version is not.
"""

import importlib.metadata
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, Config, ConfigError, unread_keys, unread_warning
from grpo_jax.config.command_line import USAGE, config_parser, one_line_errors, read_command_line

GIB = 1 << 30


def check_packages() -> list[str]:
    """Prints the version of everything that grpo_jax requires. Returns what is missing or too old."""
    from packaging.requirements import Requirement

    print(f"Python {platform.python_version()} on {platform.platform()}")
    problems = []
    for line in importlib.metadata.requires("grpo_jax") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        is_good = version != "missing" and requirement.specifier.contains(version, prereleases=True)
        print(f"  {'ok ' if is_good else 'BAD'} {requirement.name} {version} (needs {requirement.specifier})")
        if not is_good:
            problems.append(f"{requirement.name} {version}, needs {requirement.specifier}")
    return problems


def check_devices() -> None:
    """Lists the devices and multiplies two matrices on each."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.run.devices import find_devices

    for device in find_devices():
        ones = jax.device_put(jnp.ones((256, 256)), device)
        total = float((ones @ ones).sum())
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / GIB:.0f} GiB for JAX" if limit else ""
        print(
            f"  {'ok ' if total == 256.0**3 else 'BAD'} {device.platform}:{device.id} {device.device_kind}{memory}"
        )


def print_config(config: Config) -> None:
    """Prints every key: what differs from its default, and what nothing reads."""
    unread = unread_keys(config)
    for name, key in KEYS.items():
        value = config.get(name)
        note = f" (nothing reads it with {unread[name]})" if name in unread else ""
        print(f"  {' ' if value == key.default else '*'} {name} = {value!r}{note}")


def check_config(config: Config, path: Path) -> None:
    """Reads all that the run would read, and prints what it would hold.

    Raises: ConfigError: the first thing that is wrong.
    """
    from grpo_jax.algorithm import load_algorithm, try_functions
    from grpo_jax.model.sharding import num_batch_shards
    from grpo_jax.rewards import make_reward
    from grpo_jax.rollout import check_engine, memory_rows
    from grpo_jax.run.alarms import first_of_each
    from grpo_jax.run.devices import open_mesh
    from grpo_jax.run.inputs import read_inputs
    from grpo_jax.run.summary import batch_table, doubts, table_lines
    from grpo_jax.run.workdir import Workdir
    from grpo_jax.run.writer import read_metrics

    workdir = Workdir(path)
    workdir.check(config)
    check_engine(config.rollout)
    inputs = read_inputs(config, workdir)
    algorithm = load_algorithm(config)
    make_reward(config.reward, max_response_length=config.data.max_response_length).close()
    mesh = open_mesh(config)
    try_functions(algorithm)
    steps = len(inputs.train_prompts) // config.data.train_batch_size
    rows = batch_table(config, num_data_shards=num_batch_shards(mesh), steps_per_epoch=steps)
    rows += _memory_rows(config, mesh)
    existing = next(parent for parent in (path, *path.resolve().parents) if parent.exists())
    rows += memory_rows(config.rollout)
    rows.append(("free disk for the workdir", f"{shutil.disk_usage(existing).free / GIB:.0f} GiB"))
    print(*table_lines(rows), *doubts(config, config.num_steps(steps)), sep="\n")
    for step, found in first_of_each(read_metrics(workdir), config):
        print(
            f"WARNING: alarm {found.alarm.name} at step {step}: {found.seen}. Remedy: {found.alarm.remedy}."
        )


def _memory_rows(config: Config, mesh: Any) -> list[tuple[str, str]]:
    """What `grpo_jax.plan` says in full."""
    from grpo_jax.learner.memory import held_in_all
    from grpo_jax.model.transformer import num_params
    from grpo_jax.run.inputs import read_model_config
    from grpo_jax.run.memory import plan_run

    model = read_model_config(config)
    plan, whole = plan_run(config, model, mesh), held_in_all(config, model)
    checkpoint = sum(
        size
        for part in whole
        for name, size in part.items()
        if name not in ("reference", "frozen parameters")
    )
    rows = [
        ("parameters", f"{num_params(model):,}"),
        ("a device holds between steps", f"{sum(plan.held.values()) / 1e9:.1f} GB ({', '.join(plan.held)})"),
        ("a device needs in a step", f"{plan.peak / 1e9:.1f} GB; see python -m grpo_jax.plan"),
    ]
    if plan.host:
        rows.append(("the host holds", f"{sum(plan.host.values()) / 1e9:.1f} GB ({', '.join(plan.host)})"))
    return [*rows, ("one checkpoint", f"{checkpoint / 1e9:.1f} GB")]


def _parse() -> tuple[Config, Path, Any]:
    """Raises: ConfigError: as `read_command_line`."""
    parser = config_parser("grpo_jax.doctor", __doc__, f"[--hosts] {USAGE}")
    parser.add_argument(
        "--hosts", action="store_true", help="of all hosts of a run: start it on each of them"
    )
    return read_command_line(parser)


def main() -> None:
    with one_line_errors():
        parsed = _parse() if sys.argv[1:] else None
        if parsed is not None and parsed[2].hosts:
            from grpo_jax.run.host_check import check_hosts

            check_hosts(*parsed[:2])
            return
        problems = check_packages()
        if parsed is not None:
            from grpo_jax.run.devices import prepare_process

            prepare_process(parsed[0], None, engine=parsed[0].rollout)  # what JAX will have in the run
        print("Devices")
        check_devices()
        if parsed is not None:
            print("Configuration (*: not the default)")
            print_config(parsed[0])
            if warning := unread_warning(parsed[0]):
                print(warning)
            print("What the run would hold")
            check_config(*parsed[:2])
        if problems:
            raise ConfigError("installation", "; ".join(problems), "run pip install -e . again")
        print("Everything is in order.")


if __name__ == "__main__":
    main()
