"""What holds the processes of a run on several hosts together: a small process beside the first of them.

    python -m grpo_jax.run.hub        started by `hosts.py`, never by hand

Each process of the run keeps a connection to it. What the first one says is passed on to the others, and what each
of them says is handed to all; each process tells every second which phase it is in. Where one dies, falls silent,
fails or stands still, all are told, by rank, host and phase.

JAX's own coordination service runs here too. In the first process it would take all others down with it when that
one dies, by an abort in C++ that says nothing.
"""

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

from grpo_jax.config import differences

Message = dict[str, Any]

BYTES = b"B"
"""What a message begins with that is no JSON, and for the others: it is passed on as it is."""
SILENT_S = 16.0
"""A process that says nothing for so long is lost: its host has no power or no network."""
BEAT_S = 1.0
SETTLE_S = 2.0
"""The first process reports what went wrong. It may be about to say so itself; and beats of all shall be fresh."""
HANDSHAKE_S = 10.0
PORT_S = 30.0
"""In which all processes of a run that was interrupted have ended."""


def open_connection(own: socket.socket) -> Connection:
    """A connection for whole messages. The socket is the connection's from now on."""
    own.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    own.settimeout(None)
    return Connection(own.detach())


def receive(connection: Connection, timeout_s: float | None) -> Message:
    """The next message.

    Args:   timeout_s: None: waits for ever.
    Raises: TimeoutError: none came in time; EOFError, OSError: the other end is gone.
    """
    if not connection.poll(timeout_s):
        raise TimeoutError
    data = connection.recv_bytes()
    return {"kind": "bytes", "data": data} if data[:1] == BYTES else json.loads(data)


class Member:
    """One process of the run, as the hub sees it."""

    def __init__(self, connection: Connection, hello: Message):
        self._connection, self._lock = connection, threading.Lock()
        self.hello = hello
        self.rank: int = hello["rank"]
        self.beat: Message = {"phase": "start", "entered": 0, "place": "", "waits": False}
        self.heard = time.monotonic()
        self.is_gone = False

    @property
    def name(self) -> str:
        return f"process {self.rank} on {self.hello['host']}"

    def send(self, data: bytes) -> None:
        """To one that is gone, nothing is sent: whoever reads its connection notices."""
        with self._lock:
            try:
                self._connection.send_bytes(data)
            except OSError:
                self.is_gone = True

    def read(self) -> Message:
        return receive(self._connection, None)


class Hub:
    """Takes `count` members in, and passes messages between them until all have left."""

    def __init__(self, listener: socket.socket, secret: bytes, count: int):
        self._listener, self._secret, self._count = listener, secret, count
        self.members: dict[int, Member] = {}
        self._gathered: dict[int, dict[int, Any]] = {}
        self._lock = threading.Lock()
        self._refusal = ""
        self.differs: int | None = None
        """The process that does not fit to the first one."""
        self._is_complete = self._has_ended = False

    # ---- joining ----

    def gather(self, timeout_s: float) -> str:
        """Takes members in until all are there. Returns: why they cannot work together; "": they can."""
        end = time.monotonic() + timeout_s
        self._listener.settimeout(0.2)
        while len(self.members) < self._count and not self._refusal:
            if time.monotonic() > end:
                missing = [str(rank) for rank in range(self._count) if rank not in self.members]
                here = ", ".join(member.name for member in self.members.values())
                return (
                    f"{len(self.members)} of {self._count} processes had joined after {timeout_s:g} s ({here}); "
                    f"missing: {', '.join(missing)} (JAX_PROCESS_ID); trainer.join_timeout_s waits longer"
                )
            try:
                accepted, _ = self._listener.accept()
            except TimeoutError:
                continue
            threading.Thread(target=self._greet, args=(accepted,), daemon=True).start()
        self._is_complete = True
        return self._refusal or self._mismatch()

    def _greet(self, accepted: socket.socket) -> None:
        """Takes one member in, and reads what it says until it leaves."""
        connection = open_connection(accepted)
        try:
            # A stranger that connects and says nothing keeps this thread, and nobody else.
            deliver_challenge(connection, self._secret)
            answer_challenge(connection, self._secret)
            member = Member(connection, receive(connection, HANDSHAKE_S))
        except Exception:  # a stranger, or one that has given up
            connection.close()
            return
        with self._lock:
            rank, count = member.rank, member.hello["count"]
            if rank in self.members:
                self._refusal = f"{member.name} and {self.members[rank].name} have the same JAX_PROCESS_ID"
            elif count != self._count:
                self._refusal = f"{member.name} has JAX_NUM_PROCESSES={count}, process 0 has {self._count}"
            self.members.setdefault(rank, member)
        self._listen(member)

    def _mismatch(self) -> str:
        first = self.members[0].hello
        for _, member in sorted(self.members.items()):
            for name, version in member.hello["versions"].items():
                if version != first["versions"][name]:
                    self.differs = member.rank
                    return (
                        f"{member.name} has {name} {version}, process 0 on {first['host']} has "
                        f"{first['versions'][name]}: install the same on all hosts"
                    )
            if changed := differences(first["config"], member.hello["config"]):
                self.differs = member.rank
                key, (ours, other) = next(iter(changed.items()))
                return (
                    f"{key} is {ours!r} in process 0 and {other!r} in process {member.rank}: {member.name} has "
                    f"another configuration than process 0 on {first['host']}"
                )
        return ""

    # ---- running ----

    def serve(self) -> None:
        """Returns when all members have left, or are gone."""
        for member in self.members.values():
            member.heard = time.monotonic()
        while not all(member.is_gone for member in self.members.values()):
            time.sleep(BEAT_S / 2)
            self.tell_all({"kind": "beat"})
            for member in self.members.values():
                silent = time.monotonic() - member.heard
                if not member.is_gone and silent > SILENT_S:
                    member.is_gone = True
                    self._lost(member, f"has said nothing for {silent:.0f} s")

    def tell_all(self, message: Message, but: int | None = None) -> None:
        self._pass_on(json.dumps(message).encode(), but)

    def _pass_on(self, data: bytes, but: int | None) -> None:
        for member in self.members.values():
            if not member.is_gone and member.rank != but:
                member.send(data)

    def _listen(self, member: Member) -> None:
        try:
            while True:
                message = member.read()
                member.heard = time.monotonic()
                if message["kind"] == "bye":
                    break
                self._handle(member, message)
        except (EOFError, OSError):
            if not self._is_complete:
                self._refusal = (
                    f"{member.name} (pid {member.hello['pid']}) has died while others were awaited"
                )
            elif not member.is_gone:
                member.is_gone = True
                self._lost(member, "has died")
        member.is_gone = True

    def _handle(self, member: Member, message: Message) -> None:
        kind = message["kind"]
        if kind == "beat":
            member.beat = message
        elif kind == "bytes":
            self._pass_on(message["data"], but=member.rank)
        elif kind == "one of all":
            self._gather(member, message)
        elif kind == "failed":
            self._failed(member, message)
        elif kind == "overdue":
            threading.Thread(target=self._find_laggard, args=(message,), daemon=True).start()

    def _gather(self, member: Member, message: Message) -> None:
        number = message["number"]
        with self._lock:
            values = self._gathered.setdefault(number, {})
            values[member.rank] = message["value"]
            if len(values) < self._count:
                return
            del self._gathered[number]
        self.tell_all({"kind": "all", "number": number, "values": [values[r] for r in range(self._count)]})

    # ---- ending ----

    def speaker(self, but: int | None = None) -> int | None:
        """The first process that is there, which tells people."""
        there = [member.rank for member in self.members.values() if not member.is_gone and member.rank != but]
        return min(there, default=None)

    def _end(self, message: Message, but: int | None = None) -> None:
        """Tells all to end, once. Args: but: the process that has died, or ends by itself."""
        with self._lock:
            if self._has_ended:
                return
            self._has_ended = True
        end = {"kind": "end", "writes_stacks": False, "speaker": self.speaker(but)}
        self.tell_all(end | message, but=but)

    def _lost(self, member: Member, what: str) -> None:
        pid = member.hello["pid"]
        text = f"{member.name} (pid {pid}) {what}"
        self._end({"phase": member.beat["phase"], "text": text, "code": 1}, but=member.rank)

    def _failed(self, member: Member, message: Message) -> None:
        if member.rank:
            time.sleep(SETTLE_S)  # the first process may have failed by the same thing, and says so itself
        text = f"{member.name}: {message['text']}"
        end = {"phase": message["phase"], "text": text, "code": message["code"]}
        # The first process has said itself why it ends, and nobody is to say it again.
        self._end(end if member.rank else end | {"speaker": None}, but=member.rank)

    def _find_laggard(self, overdue: Message) -> None:
        """Says who holds the others up: of those that have come least far, who does not wait."""
        time.sleep(SETTLE_S)
        here = [member for member in self.members.values() if not member.is_gone]
        least = min(member.beat["entered"] for member in here)
        behind = [member for member in here if member.beat["entered"] == least]
        behind = [member for member in behind if not member.beat["waits"]] or behind
        where = "; ".join(f"{m.name} is {m.beat['place']}" for m in behind)
        phase = behind[0].beat["phase"]
        self._end({"phase": phase, "text": f"{overdue['text']}; {where}", "code": 1, "writes_stacks": True})


def listen(address: str, port: int, family: int) -> socket.socket:
    """A listening socket. Raises: OSError: there can be none; a hub that is about to end has `PORT_S` to do so."""
    end = time.monotonic() + PORT_S
    while True:
        try:
            return socket.create_server((address, port), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                raise
            time.sleep(0.5)


def main() -> None:
    """Reads {host, port, secret, count, timeout_s} from stdin; writes {} to stdout once it listens, or {error}."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # Slurm sends them to all processes of a step
    settings = json.loads(sys.stdin.readline())
    address = settings["host"]
    try:
        family = socket.getaddrinfo(address, settings["port"], type=socket.SOCK_STREAM)[0][0]
        listener = listen(address, settings["port"], family)
        with socket.create_server((address, 0), family=family) as probe:
            jax_port = probe.getsockname()[1]
    except OSError as error:
        print(json.dumps({"error": error.strerror or str(error)}), flush=True)
        return
    from jax._src.lib import _jax  # no public name; jax.distributed starts it in the first process alone

    jax_address = f"{f'[{address}]' if ':' in address else address}:{jax_port}"
    # No heartbeats of JAX's own: they end a process in C++, without a word.
    service = _jax.get_distributed_runtime_service(jax_address, settings["count"], heartbeat_timeout=10**7)
    hub = Hub(listener, bytes.fromhex(settings["secret"]), settings["count"])
    print("{}", flush=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    refusal = hub.gather(settings["timeout_s"])
    refused = {"kind": "refused", "text": refusal, "tellers": [hub.speaker(), hub.differs]}
    hub.tell_all(refused if refusal else {"kind": "welcome", "jax_address": jax_address})
    if not refusal:
        hub.serve()
        service.shutdown()


if __name__ == "__main__":
    main()
