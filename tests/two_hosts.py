"""Two hosts on one machine: network, process and host names of their own, joined by a pair of virtual cards."""

import contextlib
import os
import shutil
import subprocess

import psutil
import pytest

A, B = "10.77.0.1", "10.77.0.2"
ENTER = """
hostname "$1"; shift
mount --make-rprivate /
mount --bind "$1" /etc/hosts; shift
mount -t tmpfs tmpfs /dev/shm
exec "$@"
"""


def need_namespaces():
    """Skips the test where hosts cannot be made."""
    if os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare, for hosts in network namespaces")
    name = f"grpo-jax-try-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    if tried.returncode:
        pytest.skip(f"network namespaces cannot be made here: {tried.stderr.strip()}")


@contextlib.contextmanager
def two_hosts(folder):
    """Yields start(host, command, **env) for the hosts "a" and "b"; at the end all that was started there ends."""
    need_namespaces()
    names = {host: f"grpo-jax-{os.getpid()}-{host}" for host in "ab"}
    cards = {host: f"gj{os.getpid() % 10**7}{host}" for host in "ab"}
    hosts_file = folder / "hosts"
    hosts_file.write_text(f"127.0.0.1 localhost\n{A} host-a\n{B} host-b\n")
    started = []

    def start(host, command, **env):
        enter = ["unshare", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        inside = ["bash", "-c", ENTER, "host", f"host-{host}", str(hosts_file), *map(str, command)]
        log = (folder / f"{len(started)}-{host}.log").open("wb")
        process = subprocess.Popen(
            ["ip", "netns", "exec", names[host], *enter, *inside],
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=os.environ | env,
        )  # fmt: skip
        process.log = folder / f"{len(started)}-{host}.log"
        started.append(process)
        return process

    try:
        for name in names.values():
            subprocess.run(["ip", "netns", "add", name], check=True)
        ip = lambda text: subprocess.run(["ip", *text.split()], check=True)
        ip(f"link add {cards['a']} netns {names['a']} type veth peer name {cards['b']} netns {names['b']}")
        for host, address in (("a", A), ("b", B)):
            ip(f"-n {names[host]} address add {address}/24 dev {cards[host]}")
            ip(f"-n {names[host]} link set {cards[host]} up")
            ip(f"-n {names[host]} link set lo up")
        yield start
    finally:
        for process in started:
            process.kill()  # and with `unshare` the first process of its namespace, and so all
            process.wait()
        for name in names.values():
            subprocess.run(["ip", "netns", "del", name], check=False)


def inner(process):
    """The command that was started on the host, to send signals to."""
    while not (children := psutil.Process(process.pid).children()):
        pass
    return children[0]
