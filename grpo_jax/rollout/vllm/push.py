"""A push: the trainer's parameters to all engines through one transport, and proof that they arrived."""

import logging
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from grpo_jax.rollout.base import EngineError
from grpo_jax.rollout.vllm.cargo import Cargo
from grpo_jax.rollout.vllm.cluster import root_cause
from grpo_jax.rollout.vllm.crew import Crew, CrewSender
from grpo_jax.rollout.vllm.replicas import Replica, Replicas, call_errors, is_refusal
from grpo_jax.types import Params
from grpo_jax.weight_sync import Sender, make_sender
from grpo_jax.weight_sync.wire import Destination, Relay, compare_checksums, piece_checksums

logger = logging.getLogger(__name__)

DISCONNECT_S = 30.0  # for an engine to close its end of the transport


class WeightPusher:
    """The trainer's end of the transport. It is opened by the first push, and by the first one after a restart."""

    def __init__(
        self,
        replicas: Replicas,
        cargo: Cargo,
        mesh: Mesh,
        *,
        transport: str,
        workers_per_engine: int,
        timeout_s: float,
        crew: Crew | None = None,
    ):
        """Args:
        transport: "ipc", "nccl" or "host".
        timeout_s: what one push may take.
        crew: all processes of the run; None: there are no others.
        """
        self._replicas, self._cargo, self._mesh = replicas, cargo, mesh
        self._transport, self._workers_per_engine = transport, workers_per_engine
        self._timeout_s, self._crew = timeout_s, crew
        self._sender: Sender | None = None

    def push(self, params: Params, version: int) -> None:
        """Sends parameters to every engine and compares checksums.

        Raises:
            WeightSyncError: they did not arrive as they were sent.
            EngineError: the engines cannot take these parameters at all.
            call_errors: an engine failed.
        """
        try:
            self._push(params, version)
        except BaseException:
            self.disconnect()
            raise

    def _push(self, params: Params, version: int) -> None:
        sender = self._connect()
        sender.reset(self._replicas.make_check("did not prepare for the weights"))
        take = lambda actor: getattr(actor, self._cargo.method).remote(version, self._timeout_s)
        calls = [take(replica.actor) for replica in self._replicas]
        blocks: list[jax.Array] = []
        buckets = self._cargo.pack(params, self._mesh)
        check = self._replicas.make_check("did not take the weights", calls)
        sender.send(_noting(buckets, blocks), check)
        layout = self._cargo.plan.layout
        sent = [
            piece_checksums(np.asarray(sums), pieces)
            for sums, pieces in zip(blocks, layout.buckets, strict=True)
        ]
        for workers in self._replicas.results(calls, "push"):
            for received in workers:
                compare_checksums(layout, sent, received)

    def disconnect(self) -> None:
        """Closes the transport: a push has failed, engines were replaced, or everything ends.

        The engines close their ends first. One that does not is killed: what it has open may be freed here.
        """
        if self._sender is None:
            return
        sender, self._sender = self._sender, None
        sender.give_up()
        calls = [replica.actor.disconnect.remote(DISCONNECT_S) for replica in self._replicas]
        for replica, failure in zip(
            self._replicas, self._replicas.failures(calls, DISCONNECT_S), strict=True
        ):
            if failure is not None:
                logger.warning(
                    "engine %d does not let go of the last push and is ended: %s",
                    replica.number, root_cause(failure)[0],
                )  # fmt: skip
                self._replicas.kill(replica.number)
        sender.close()

    def _connect(self) -> Sender:
        """Opens the transport, unless it is open."""
        if self._sender is not None:
            return self._sender
        transport, layout = self._transport, self._cargo.plan.layout
        sender = self._sender = (
            self._make_sender()
        )  # from now on `disconnect` closes it, if what follows fails
        calls = [
            replica.actor.connect.remote(
                transport, link, layout.to_dict(), self._timeout_s, adapters=self._cargo.adapters
            )
            for replica, link in zip(self._replicas, sender.links(), strict=True)
        ]
        sender.connect(self._replicas.make_check("did not join the trainer's group", calls))
        try:
            self._replicas.results(calls, "connect")
        except call_errors() as error:
            if not is_refusal(error):
                raise
            raise EngineError(f"engine cannot take the weights: {root_cause(error)[0]}") from error
        logger.info(
            "weights go to the engine(s) by %s, %d buckets of at most %d MiB",
            transport, len(layout.buckets), -(-layout.bucket_bytes // 2**20),
        )  # fmt: skip
        return sender

    def _make_sender(self) -> Sender:
        is_spread = self._crew is not None and self._crew.is_spread
        here = [self._destination(replica) for replica in self._replicas if not (is_spread and replica.place)]
        layout, timeout_s = self._cargo.plan.layout, self._timeout_s
        sender = make_sender(self._transport, layout, self._mesh, here, timeout_s=timeout_s)
        if self._crew is None:
            return sender
        engines: list[list[dict[int, int]]] = [[] for _ in range(self._crew.channel.count)]
        for replica in self._replicas:
            engines[replica.place].append(replica.processes)
        return CrewSender(self._crew, self._transport, self._cargo.method, sender, engines)

    def _destination(self, replica: Replica) -> Destination:
        actor, timeout_s = replica.actor, self._timeout_s
        relay = Relay(
            prepare=lambda: actor.prepare_relay.remote(),
            bring=lambda number, bucket: actor.relay.remote(number, bucket, timeout_s),
        )
        return Destination(self._workers_per_engine, None if replica.is_local else relay)


def _noting(
    buckets: Iterator[tuple[Any, jax.Array, jax.Array]], blocks: list[jax.Array]
) -> Iterator[jax.Array]:
    """Yields the buckets and appends their checksums to `blocks`. Args: buckets: as from `pack_buckets`."""
    for _, flat, sums in buckets:
        sums.copy_to_host_async()
        blocks.append(sums)
        yield flat
        del flat  # before the next one is made
