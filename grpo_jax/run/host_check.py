"""What the processes of a run find out about one another before they train: `grpo_jax.doctor --hosts`."""

import contextlib
import ipaddress
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from grpo_jax.config import Config, ConfigError
from grpo_jax.model.sharding import place, replicated
from grpo_jax.rollout import shares_parameters
from grpo_jax.run.devices import find_devices, open_mesh, prepare_process
from grpo_jax.run.hangs import watched
from grpo_jax.run.hosts import ADDRESS, CHECKED, COUNT, RANK, Hosts, joined, version_of
from grpo_jax.run.metrics import Timers
from grpo_jax.weight_sync import choose_transport

About = dict[str, Any]
"""What one process says of itself: host, pid, devices, offset_s, trip_s, missing files, workdir (a complaint)."""

CLOCK_S = 1.0
"""Beyond it, times in logs of different hosts cannot be compared, and what is newer is found wrongly."""
TRIPS = 5
FILE_S = 15.0
"""For a file to be seen on another host: network file systems look again after some seconds."""


def check_hosts(config: Config, workdir: Path) -> None:
    """Joins the other processes as training does; the first one prints what they have in common, and what not.

    Raises: ConfigError: they cannot train together; SystemExit: another process has failed.
    """
    if not os.environ.get(ADDRESS):
        rule = f"must be set, and {COUNT} and {RANK}: with --hosts, start it on every host as training is"
        raise ConfigError(ADDRESS, "", rule)
    existed, timers, limit_s = workdir.exists(), Timers(), config.trainer.join_timeout_s
    try:
        with (
            joined(config, workdir) as hosts,
            watched(timers, None, limit_s, "trainer.join_timeout_s") as watch,
            hosts.watched(timers, watch),
        ):
            problems = _look(config, workdir, hosts, timers)
            if problems:
                raise ConfigError("hosts", hosts.count, "; ".join(problems))
    except ConfigError as error:
        hint = (
            f"; {_loopback()}, which other hosts cannot reach" if error.key == COUNT and _loopback() else ""
        )
        raise ConfigError(error.key, error.value, error.rule + hint) from None
    finally:
        if not existed:
            with contextlib.suppress(OSError):  # another process was faster, or has files there
                workdir.rmdir()


def _look(config: Config, workdir: Path, hosts: Hosts, timers: Timers) -> list[str]:
    """Prints the table. Returns: what is wrong, the same in all processes."""
    about: About = {"host": socket.gethostname(), "pid": os.getpid(), "missing": _missing(config)}
    with timers.within("clocks"):
        about["offset_s"], about["trip_s"] = _compare_clocks(hosts)
    with timers.within("workdir"):
        about["workdir"] = _try_workdir(workdir, hosts)
    with timers.within("open_devices"):
        prepare_process(config, None, engine=config.rollout)
        find_devices()
        about["devices"] = [device.device_kind for device in jax.local_devices()]
        everyone = hosts.from_all(about)
    problems = hosts.from_first(lambda: _report(everyone, config, workdir))
    if problems:
        return problems
    with timers.within("sum_over_devices"):
        sent = [device.process_index for device in jax.devices()]
        for device, got in _gather(sent):
            if not np.array_equal(got, sent):
                return [f"what the devices of processes {sent} sent arrived on {device} as {got.tolist()}"]
    shape = dict(open_mesh(config).shape)
    if hosts.is_first:
        _row("mesh", ", ".join(f"{name} {size}" for name, size in shape.items()))
        print("All is well.")
    return []


# ---- what each process looks at ----


def _gather(sent: list[int]) -> list[tuple[jax.Device, np.ndarray]]:
    """(device, int32 [devices of all processes]: what each of them sent) of every device of this process."""
    mesh = Mesh(jax.devices(), ("device",))
    parts = place(np.array(sent, np.int32), NamedSharding(mesh, PartitionSpec("device")))
    received = jax.jit(lambda x: x, out_shardings=replicated(mesh))(parts)
    return [(shard.device, np.asarray(shard.data)) for shard in received.addressable_shards]


def _missing(config: Config) -> list[str]:
    """The files and folders of the configuration that this host does not have."""
    model = [config.model.path] if config.model.path != "random" else []
    return [
        path for path in (*model, *config.data.train_files, *config.data.val_files) if not Path(path).exists()
    ]


def _compare_clocks(hosts: Hosts) -> tuple[float, float]:
    """(this clock less the first process's, how far off that may be), seconds, by the shortest of a few trips."""
    differences, trips = [], []
    for _ in range(TRIPS):
        hosts.wait_for_all()
        begin = time.monotonic()
        hosts.wait_for_all()
        trips.append(time.monotonic() - begin)
        differences.append(-hosts.from_first(time.time) + time.time())
    return min(differences), min(trips)


def _try_workdir(workdir: Path, hosts: Hosts) -> str:
    """Whether each process sees the first one's file, and that one theirs. Returns a complaint, or nothing."""
    token = hosts.from_first(lambda: os.urandom(8).hex())
    files = [workdir / f"doctor-{token}-{rank}" for rank in range(hosts.count)]
    complaint = ""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        files[hosts.rank].write_text(token)
    except OSError as error:
        complaint = f"cannot be written ({error.strerror})"
    hosts.wait_for_all()
    others = [
        rank for rank in (range(hosts.count) if hosts.is_first else [0]) if not _is_seen(files[rank], token)
    ]
    if others and not complaint:
        complaint = f"does not show what process {others[0]} has written there"
    hosts.wait_for_all()
    with contextlib.suppress(OSError):
        files[hosts.rank].unlink()
    return complaint


def _is_seen(file: Path, content: str) -> bool:
    end = time.monotonic() + FILE_S
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == content:
                return True
        if time.monotonic() > end:
            return False
        time.sleep(0.2)


def _loopback() -> str:
    """Says so where the address is one of loopback here; else nothing."""
    host = os.environ.get(ADDRESS, "").rpartition(":")[0].strip("[]")
    try:
        ip = socket.getaddrinfo(host, None)[0][4][0]
    except OSError:
        return ""
    is_loopback = ipaddress.ip_address(str(ip).partition("%")[0]).is_loopback
    return f"{ADDRESS}'s {host} is {ip} on {socket.gethostname()}, a loopback address" if is_loopback else ""


# ---- what the first one says ----


def _report(everyone: Sequence[About], config: Config, workdir: Path) -> list[str]:
    """Prints the table. Returns: what is wrong."""
    _row("versions", "equal: " + ", ".join(f"{name} {version_of(name)}" for name in CHECKED))
    _row("address", f"{os.environ[ADDRESS]}, reached by all" + (f"; {_loopback()}" if _loopback() else ""))
    _row("workdir", str(workdir))
    _row("engines", _engines(config))
    print(f"  {'process':<8} {'host':<24} {'pid':>8}  {'clock':>22}  {'devices':<28} workdir")
    problems = []
    for rank, about in enumerate(everyone):
        complaints = _complaints(about, everyone[0], workdir)
        problems += [f"process {rank} on {about['host']}: {complaint}" for complaint in complaints]
        clock = f"{1000 * about['offset_s']:+.1f} ms, ± {1000 * about['trip_s']:.1f}" if rank else "0"
        seen = about["workdir"] or "shared, writable"
        devices = _counted(about["devices"])
        print(f"  {rank:<8} {about['host']:<24} {about['pid']:>8}  {clock:>22}  {devices:<28} {seen}")
    return problems


def _complaints(about: About, first: About, workdir: Path) -> list[str]:
    found = []
    if about["workdir"]:
        found.append(f"--workdir={workdir} {about['workdir']}")
    if about["devices"] != first["devices"]:
        here, there = _counted(about["devices"]), _counted(first["devices"])
        found.append(f"has {here}, process 0 has {there}: all need the same devices")
    if abs(about["offset_s"]) > CLOCK_S:
        found.append(f"its clock is {about['offset_s']:+.1f} s off: set it (NTP)")
    if about["missing"]:
        found.append(f"has no {', '.join(about['missing'])}")
    return found


def _counted(kinds: Sequence[str]) -> str:
    return " + ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)) or "no device"


def _engines(config: Config) -> str:
    section = config.rollout
    if shares_parameters(section):
        return "on the trainer's own devices, nothing to be sent"
    ray = f"Ray at {section.ray_address}" if section.ray_address else "a Ray of the first process's host"
    trainer = jax.default_backend()
    transport = choose_transport(section, trainer=trainer, engine_on_gpu=trainer == "gpu")
    return f"{section.placement}, {ray}; weights by {transport} from the first process"


def _row(name: str, text: str) -> None:
    print(f"  {name:<10} {text}")
