"""Checks the installation, and what a configuration would need.

    python -m grpo_jax.doctor [--json] [--log=FILE]
    python -m grpo_jax.doctor [--hosts] [--json] [--sample] --config=FILE.py [--workdir=DIR]
        [--config.SECTION.KEY=VALUE ...]

Each line says ok, BAD and the command that mends it, or ? where that cannot be told. vLLM, where it is installed
or the configuration asks for it, is imported, and a Ray is started and ended. With --sample the model of the
configuration is loaded, and its engine started, which says a greedy sentence. With --json one JSON object is
printed in place of the lines. With --log=FILE, what pip, an engine or a run has written is read, and what mends it
is said. With --hosts, started on every host as training is, it checks what the hosts must have in common
(docs/hosts.md). Writes nothing that stays.

Exit code 0 when everything is in order, 2 when the configuration or an installed version is not.
"""

import importlib.metadata
import itertools
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_jax.config import KEYS, Config, ConfigError, RolloutSection, unread_keys, unread_warning
from grpo_jax.config.command_line import (
    USAGE,
    Parser,
    config_parser,
    one_line_errors,
    read_command_line,
)
from grpo_jax.run.checks import (
    GIB,
    Check,
    Report,
    check_clock,
    check_coordinator,
    check_disk,
    check_driver,
    check_log,
    check_of,
    reference_reward,
)
from grpo_jax.storage.files import size_text

NUM_TOKENS = 32
"""Of a greedy sample."""
SHOWN = 300
"""Characters of a prompt."""


def check_packages(report: Report) -> None:
    """The version of everything that grpo_jax requires."""
    from packaging.requirements import Requirement

    report.text(f"Python {platform.python_version()} on {platform.platform()}")
    report.values([("python", platform.python_version()), ("platform", platform.platform())])
    for line in importlib.metadata.requires("grpo_jax") or []:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        is_good = version != "missing" and requirement.specifier.contains(version, prereleases=True)
        wanted = f"{requirement.name}{requirement.specifier}"
        found = f"{version} (needs {requirement.specifier})" if requirement.specifier else version
        report.add(Check(requirement.name, is_good, found, "" if is_good else f"pip install -U '{wanted}'"))


def check_devices(report: Report) -> None:
    """Lists the devices and multiplies two matrices on each."""
    import jax
    import jax.numpy as jnp

    from grpo_jax.run.devices import find_devices

    devices = find_devices()
    for check in check_driver([device.platform for device in devices]):
        report.add(check)
    for device in devices:
        ones = jax.device_put(jnp.ones((256, 256)), device)
        total = float((ones @ ones).sum())
        limit = (device.memory_stats() or {}).get("bytes_limit")
        memory = f", {limit / GIB:.0f} GiB for JAX" if limit else ""
        found, is_ok = f"{device.device_kind}{memory}", total == 256.0**3
        mend = "" if is_ok else "it computes wrongly: take it out of use (CUDA_VISIBLE_DEVICES)"
        report.add(Check(f"{device.platform}:{device.id}", is_ok, found, mend))


def check_engines(report: Report, config: Config | None) -> None:
    """Tries the engine of the configuration, or every engine that is installed here.

    Raises: ConfigError: something of it is missing, or has a version that does not work.
    """
    from grpo_jax.rollout import ENGINES, is_installed, try_installation

    if config is not None:
        sections = [config.rollout]
    else:
        every = [RolloutSection(engine=name) for name in ENGINES]
        sections = [section for section in every if is_installed(section)]
    findings = itertools.chain.from_iterable(map(try_installation, sections))
    for number, finding in enumerate(findings):
        if number == 0:
            report.text("Engine")
        report.add(Check(*finding))


def print_config(report: Report, config: Config) -> None:
    """Prints every key: what differs from its default, and what nothing reads."""
    unread = unread_keys(config)
    for name, key in KEYS.items():
        value = config.get(name)
        note = f" (nothing reads it with {unread[name]})" if name in unread else ""
        report.text(f"  {' ' if value == key.default else '*'} {name} = {value!r}{note}")


def check_config(report: Report, config: Config, path: Path, disk: Path) -> None:
    """Reads all that the run would read, and says what it would hold.

    Args:
        path: of a workdir in which this run can be; disk: the one that was named.
    Raises: ConfigError: the first thing that is wrong.
    """
    from grpo_jax.algorithm import load_algorithm, try_functions
    from grpo_jax.model.sharding import num_batch_shards
    from grpo_jax.rewards import make_reward
    from grpo_jax.rollout import memory_rows
    from grpo_jax.run.alarms import first_of_each
    from grpo_jax.run.devices import open_mesh
    from grpo_jax.run.inputs import read_inputs
    from grpo_jax.run.summary import batch_table, doubts, table_lines
    from grpo_jax.run.workdir import Workdir
    from grpo_jax.run.writer import read_metrics

    workdir = Workdir(path)
    inputs = read_inputs(config, workdir)
    algorithm = load_algorithm(config)
    with make_reward(config.reward, max_response_length=config.data.max_response_length) as reward:
        first = inputs.train_prompts[0]
        report.text(f"  first prompt: {first.text[:SHOWN]!r}")
        report.add(Check("data", True, f"{first.prompt_id}: {reference_reward(first, reward)}"))
    mesh = open_mesh(config)
    try_functions(algorithm)
    steps = len(inputs.train_prompts) // config.data.train_batch_size
    rows = batch_table(config, num_data_shards=num_batch_shards(mesh), steps_per_epoch=steps)
    held, checkpoint, weights = _memory_rows(config, mesh)
    rows += held
    existing = next(parent for parent in (disk, *disk.resolve().parents) if parent.exists())
    rows += memory_rows(config.rollout)
    report.values(rows)
    report.text(*table_lines(rows), *doubts(config, config.num_steps(steps)))
    epochs = config.num_steps(steps) / steps
    sizes = {"checkpoint": checkpoint, "weights": weights}
    report.add(check_disk(config, place=existing, num_epochs=epochs, **sizes))
    for step, found in first_of_each(read_metrics(workdir), config):
        report.text(
            f"WARNING: alarm {found.alarm.name} at step {step}: {found.seen}. Remedy: {found.alarm.remedy}."
        )


def _memory_rows(config: Config, mesh: Any) -> tuple[list[tuple[str, str]], int, int]:
    """What `grpo_jax.plan` says in full; bytes of a checkpoint, and of the weights in a folder."""
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
        ("a device holds between steps", f"{size_text(sum(plan.held.values()))} ({', '.join(plan.held)})"),
        ("a device needs in a step", f"{size_text(plan.peak)}; see python -m grpo_jax.plan"),
    ]
    if plan.host:
        rows.append(("the host holds", f"{size_text(sum(plan.host.values()))} ({', '.join(plan.host)})"))
    rows.append(("one checkpoint", size_text(checkpoint)))
    return rows, checkpoint, num_params(model) * (4 if config.model.dtype == "float32" else 2)


def check_sample(report: Report, config: Config) -> None:
    """Loads the model and lets the run's engine say something. Raises: ConfigError: it cannot be loaded."""
    from grpo_jax.rollout import EngineError
    from grpo_jax.rollout.remedies import find_remedy
    from grpo_jax.run.sample import greedy_sample
    from grpo_jax.weight_sync import WeightSyncError

    if config.model.path == "random":
        report.add(Check("sample", True, "none: the model is still to be made"))
        return
    model, engine = config.model, config.rollout
    try:
        sample = greedy_sample(model.path, num_tokens=NUM_TOKENS, dtype=model.dtype, engine=engine)
    except (EngineError, WeightSyncError) as error:
        remedy = find_remedy(str(error))
        mend = remedy.mend if remedy else "docs/troubleshooting.md, vLLM does not start, or fails"
        report.add(Check("sample", False, str(error), mend))
        return
    if sample.difference is None:
        report.add(Check("sample", True, repr(sample.answer)))
        return
    is_close = sample.difference <= engine.probe_threshold
    found = f"{sample.answer!r}; engine and trainer differ by {sample.difference:.2g} nats a token"
    mend = "" if is_close else "python -m grpo_jax.mismatch with the same flags says why"
    report.add(Check("sample", is_close, found, mend))


def _make_parser() -> Parser:
    parser = config_parser("grpo_jax.doctor", __doc__, f"[--log=FILE] [--hosts] [--json] [--sample] {USAGE}")
    parser.add_argument("--log", help="say what a file of pip's, an engine's or a run's messages means")
    parser.add_argument(
        "--hosts", action="store_true", help="of all hosts of a run: start it on each of them"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of the lines")
    parser.add_argument("--sample", action="store_true", help="load the model, and print a greedy sample")
    return parser


def main() -> None:
    with one_line_errors():
        argv, parser = sys.argv[1:], _make_parser()
        if any(flag.partition("=")[0] == "--log" for flag in argv):
            _report_log(parser.parse_args(argv))
            return
        parsed = read_command_line(parser, argv) if [flag for flag in argv if flag != "--json"] else None
        if parsed is not None and parsed[2].hosts:
            from grpo_jax.run.host_check import check_hosts

            check_hosts(*parsed[:2])
            return
        report = Report(is_json="--json" in argv)
        try:
            _check_all(report, parsed)
        except ConfigError as error:
            report.checks.append(check_of(error))
            report.finish()
            raise
        _conclude(report)


def _conclude(report: Report) -> None:
    """Raises: ConfigError: something is wrong."""
    report.finish()
    if report.errors:
        raise report.errors[0]
    if problems := report.problems():
        found = "; ".join(f"{problem.name} {problem.found}" for problem in problems)
        raise ConfigError("installation", found, problems[0].mend)
    report.text("Everything is in order.")


def _report_log(args: Any) -> None:
    """Says what a file of messages means. Raises: ConfigError: it means something that is wrong."""
    if args.config or args.hosts or args.sample:
        raise ConfigError(
            "--log", args.log, "goes with --json alone: a file is read, and nothing else is checked"
        )
    report = Report(is_json=args.json)
    report.add(check_log(Path(args.log)))
    report.finish()
    if problems := report.problems():
        raise ConfigError("--log", args.log, f"{problems[0].found}: {problems[0].mend}")


def _check_all(report: Report, parsed: tuple[Config, Path, Any] | None) -> None:
    """Raises: ConfigError: the first thing that is wrong with the configuration."""
    check_packages(report)
    report.add(check_clock())
    if parsed is not None:
        from grpo_jax.rollout import check_engine
        from grpo_jax.run.devices import prepare_process
        from grpo_jax.run.workdir import Workdir

        prepare_process(parsed[0], None, engine=parsed[0].rollout)  # what JAX will have in the run
    report.text("Devices")
    check_devices(report)
    if coordinator := check_coordinator():
        report.add(coordinator)
    if parsed is not None:
        config, path, _ = parsed
        report.text("Configuration (*: not the default)")
        print_config(report, config)
        if warning := unread_warning(config):
            report.text(warning)
        report.text("What the run would hold")
        has_place = _is_good(report, Workdir(path).check, config)
        has_engine = _is_good(report, check_engine, config.rollout)
        with tempfile.TemporaryDirectory() as elsewhere:
            check_config(report, config, path if has_place else Path(elsewhere) / "run", disk=path)
        if not has_engine:  # which is said above
            return
    check_engines(
        report, parsed[0] if parsed else None
    )  # after what is said at once: vLLM and Ray take a minute
    if parsed is not None and parsed[2].sample:
        check_sample(report, parsed[0])


def _is_good(report: Report, check: Callable[[Any], None], what: Any) -> bool:
    """Whether a check passes without which the others can go on; where not, the report has a line."""
    try:
        check(what)
    except ConfigError as error:
        report.fail(error)
        return False
    return True


if __name__ == "__main__":
    main()
