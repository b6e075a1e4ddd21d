"""The processes of a run at work for its engines.

The first process has the engines: it alone talks to them. The others do what it asks for: they take part in
packing the weights, which no process holds whole, and by NCCL they send them together. Where the engines are on
the trainer's own devices, each process has a node of Ray for those on its host, and sends to them.

    first process     `Crew` asks all, `CrewSender` makes a push of it
    the others        `Member` does
"""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from grpo_jax.config import RolloutSection
from grpo_jax.rollout.base import EngineError
from grpo_jax.rollout.shared import Channel
from grpo_jax.rollout.vllm.cargo import Cargo
from grpo_jax.rollout.vllm.local_ray import RayNode
from grpo_jax.rollout.vllm.processes import GONE_S, are_gone, end
from grpo_jax.types import Params
from grpo_jax.weight_sync import Sender, make_sender, num_parts
from grpo_jax.weight_sync.wire import CHECK_S, Destination, WeightSyncError

STOP = {"task": "stop"}
"""The first process has failed in a task. Whoever waits within it is to wait no longer."""
LOOK_S = 0.05  # between two looks whether engines are gone


@dataclasses.dataclass(frozen=True)
class Crew:
    """All processes, as the first one sees them."""

    channel: Channel
    tell: Callable[[dict[str, Any]], bool]
    """Tells the others what to do; False: they no longer listen."""
    is_spread: bool
    """Whether each process has the engines on its own devices; else the first one has a way to all of them."""

    def places(self, num_replicas: int) -> list[int]:
        """The process of each engine, in their order: as many for each, the first ones one more."""
        count = self.channel.count if self.is_spread else 1
        least, more = divmod(num_replicas, count)
        return [rank for rank in range(count) for _ in range(least + (rank < more))]

    def ask(
        self,
        task: str,
        own: Callable[[], Any] = lambda: None,
        check: Callable[[], None] = lambda: None,
        **details: Any,
    ) -> list[Any]:
        """Has all processes do a task of `Member`, this one by `own`. Returns what each says, in their order.

        Args: check: raises where the task cannot end. It is called in a thread: this process may wait in `own` for
            another one that waits for what does not come.

        Raises: WeightSyncError: another one has failed. What `own` or `check` raises comes first.
        """
        if not self.tell({"task": task, "details": details}):
            return [own()]
        nothing: Any = None
        with _watching(check, lambda: self.tell(STOP)) as stop:
            try:
                value = own()
            except BaseException as error:
                stop(error)
                self.channel.from_all(nothing)
                raise
            answers = self.channel.from_all(nothing)[1:]
        for answer in answers:
            if answer["error"]:
                raise WeightSyncError(answer["error"])
        return [value, *(answer["value"] for answer in answers)]


@contextlib.contextmanager
def _watching(
    check: Callable[[], None], tell: Callable[[], Any]
) -> Iterator[Callable[[BaseException], None]]:
    """Calls `check` now and then, in a thread, and raises at the end what it has raised.

    Yields: `stop(error)`, which notes why all are to stop, and tells them; once. A check that fails does so too.
    """
    is_over, lock = threading.Event(), threading.Lock()
    failure: list[BaseException] = []

    def stop(error: BaseException) -> None:
        with lock:
            if not failure:
                failure.append(error)
                tell()

    def watch() -> None:
        while not is_over.wait(CHECK_S):
            try:
                check()
            except Exception as error:
                return stop(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        is_over.set()
        thread.join()  # what it tells comes before what is told next
    if failure:
        raise failure[0]


class CrewSender:
    """See `Sender`. Every process packs, and those that have engines send."""

    def __init__(
        self,
        crew: Crew,
        transport: str,
        cargo: str,
        own: Sender,
        engines: Sequence[Sequence[dict[int, int]]],
    ):
        """Args:
        transport: as `make_sender`; cargo: its method; own: the sender of this process.
        engines: of each process, the first one's first, for each of its engines: its `processes.family`.
        """
        self._crew, self._own, self._engines = crew, own, engines
        self._transport, self._cargo = transport, cargo
        self._all_send = crew.is_spread or bool(own.uids)
        self.uids = own.uids

    def links(self) -> list[dict[str, Any] | None]:
        """See `Sender.links`."""
        if not self._all_send:
            return self._own.links()
        engines = [[list(family.items()) for family in of_process] for of_process in self._engines]
        every = self._crew.ask(
            "open",
            self._own.links,
            transport=self._transport,
            cargo=self._cargo,
            engines=engines,
            uids=list(self.uids),
        )
        return [link for links in every for link in links]

    def connect(self, check: Callable[[], None]) -> None:
        """See `Sender.connect`."""
        self._each("connect", lambda: self._own.connect(check), check)

    def reset(self, check: Callable[[], None]) -> None:
        """See `Sender.reset`."""
        self._each("reset", lambda: self._own.reset(check))

    def send(self, buckets: Iterator[Any], check: Callable[[], None]) -> None:
        """See `Sender.send`."""

        def send() -> None:
            try:
                self._own.send(buckets, check)
            finally:
                for _ in buckets:  # the others pack all of them, whatever has happened here
                    pass

        self._crew.ask("send", send, check, cargo=self._cargo)

    def give_up(self) -> None:
        """See `Sender.give_up`."""
        self._each("give_up", self._own.give_up)

    def close(self) -> None:
        """See `Sender.close`."""
        self._each("close_sender", self._own.close)

    def _each(self, task: str, own: Callable[[], None], check: Callable[[], None] = lambda: None) -> None:
        """Has every process that has a sender do something with it. Args: check: as `Crew.ask`."""
        if self._all_send:
            self._crew.ask(task, own, check)
        else:
            own()


class Member:
    """A process other than the first one: `member(command, params)` does what `Crew.ask` asks for."""

    def __init__(
        self,
        channel: Channel,
        section: RolloutSection,
        make_cargos: Callable[[int], Sequence[Cargo | None]],
        mesh: Mesh,
    ):
        """Args: make_cargos: (parts of a bucket) -> all that may be pushed."""
        self._channel, self._section, self._mesh = channel, section, mesh
        self._make_cargos = make_cargos
        self._set_cargos(1)
        self._ray: RayNode | None = None
        self._sender: Sender | None = None
        self._processes: dict[int, int] = {}
        self._params: Params = None

    def __call__(self, command: Mapping[str, Any], params: Params) -> None:
        """Args: params: the weights that are pushed."""
        if command == STOP:  # what it was to end has ended
            return
        self._params = params
        answer = {"value": None, "error": ""}
        try:
            answer["value"] = getattr(self, command["task"])(**command["details"])
        except (WeightSyncError, EngineError, OSError) as error:
            answer["error"] = f"process {self._channel.rank}, {self._channel.address}: {error}"
        finally:
            self._params = None
        self._channel.from_all(answer)

    # ---- tasks ----

    def join_ray(self, address: str, token: str, folder: str, options: Mapping[str, list[str]]) -> None:
        """Has this process's host join the run's Ray. Args: options: of `ray start`, by the process's rank."""
        own = options.get(str(self._channel.rank))
        if own is not None:
            self._ray = RayNode(
                [*own, f"--node-ip-address={self._channel.address}"],
                address=address,
                token=token,
                folder=Path(folder),
                gpus="",
                timeout_s=self._section.start_timeout_s,
            )

    def check_ray(self, timeout_s: float) -> None:
        """See `LocalRay.check`."""
        if self._ray is not None:
            self._ray.check(timeout_s)

    def open(
        self, transport: str, cargo: str, engines: Sequence[Sequence[list[list[int]]]], uids: Sequence[str]
    ) -> list[dict[str, Any] | None]:
        """Opens a sender to the engines here, or to all engines where all send to them.

        Args:
        transport, uids: as `make_sender`; cargo: its method.
        engines: of each process, for each of its engines, the `processes.family` of that as pairs.

        Returns: what `Sender.links` does, for the engines here.
        """
        self.close_sender()
        self._set_cargos(num_parts(transport, self._mesh))
        here = engines[self._channel.rank]
        self._processes = {pid: start for family in here for pid, start in family}
        count = sum(map(len, engines)) if uids else len(here)
        if not count:
            return []
        destinations = [Destination(self._section.tensor_parallel_size)] * count
        layout, timeout_s = self._cargos[cargo].plan.layout, self._section.timeout_s
        self._sender = make_sender(
            transport, layout, self._mesh, destinations, timeout_s=timeout_s, uids=uids
        )
        return self._sender.links() if here else []

    def connect(self) -> None:
        """See `Sender.connect`."""
        if self._sender is not None:
            self._sender.connect(self._check)

    def reset(self) -> None:
        """See `Sender.reset`."""
        if self._sender is not None:
            self._sender.reset(lambda: None)

    def send(self, cargo: str) -> None:
        """Packs all buckets, and sends them to the engines here until the first process says `stop`."""
        packed = (flat for _, flat, _ in self._cargos[cargo].pack(self._params, self._mesh))
        try:
            if self._sender is not None:
                self._sender.send(packed, self._check)
        finally:
            for _ in packed:
                pass

    def _check(self) -> None:
        """The first process knows how the engines are, and what time it is."""
        if self._channel.is_called:
            raise WeightSyncError("the first process gave this push up")

    def _set_cargos(self, num_parts: int) -> None:
        cargos = self._make_cargos(num_parts)
        self._cargos = {cargo.method: cargo for cargo in cargos if cargo is not None}

    def give_up(self) -> None:
        """See `Sender.give_up`."""
        if self._sender is not None:
            self._sender.give_up()

    def close_sender(self) -> None:
        """See `Sender.close`."""
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()

    def end_engine(self, rank: int, processes: list[tuple[int, int]]) -> None:
        """Kills what is left of an engine beside process `rank`. Args: processes: `processes.family`, as pairs."""
        if rank == self._channel.rank:
            end(dict(processes))

    # ---- the end ----

    def close(self) -> None:
        """Ends what is here, once the first process has ended the engines, or after a while."""
        limit = time.monotonic() + GONE_S
        while not are_gone(self._processes) and time.monotonic() < limit:
            time.sleep(LOOK_S)
        end(self._processes)
        self.close_sender()
        if self._ray is not None:
            self._ray.close()
