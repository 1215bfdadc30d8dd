"""The life of a node process: open the store, register, serve what the topology says, drain, close.

Invariants: nothing is served before the store is recovered, this start is registered and the topology was read
after that; a node that learns of a later start of itself ends; a poisoned store ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass

from shardkv.errors import DeadlineExceeded, ShardKVError, StoreMismatch, UnavailableError
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import Limits
from shardkv.metadata.client import MetaClient
from shardkv.metadata.register import register_node
from shardkv.programs import EXIT_OK, advertised, port_problem
from shardkv.topology.documents import CLUSTER_KEY, ClusterDocument, NodeDocument, decode_document
from shardkv.topology.view import Topology
from shardkv.transport.loop import run_program, run_until
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity
from shardkv_node.changes.fences import FenceFile
from shardkv_node.changes.housekeeping import Housekeeping
from shardkv_node.changes.reporting import Reporting
from shardkv_node.changes.serving import MoveService
from shardkv_node.changes.settling import Settler
from shardkv_node.changes.site import Site
from shardkv_node.changes.views import Views
from shardkv_node.committer import Committer
from shardkv_node.engine.options import Options
from shardkv_node.engine.store import Store
from shardkv_node.identity import NodeIdentity
from shardkv_node.ownership import Ownership
from shardkv_node.service import NodeService

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 5.0
TICK_S = 1.0
CLUSTER_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSettings:
    """What the command line and the configuration say about one node process."""

    name: str
    meta: list[str]
    data_dir: str
    bind: str
    port: int
    advertise: str | None
    engine: Options
    limits: Limits
    fence_abort_ms: int = 2_000
    """A shard that is fenced for longer has its change given up."""


class NodeProcess:
    """One run of a node. `run(stop)` returns the exit code."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._fatal: asyncio.Future[ShardKVError] = self._loop.create_future()
        self._identity = NodeIdentity(settings.data_dir, settings.name)
        self._clock = HybridClock()
        self._store = Store.open(os.path.join(settings.data_dir, "store"), settings.engine, post=self._post)
        _log_recovery(self._store)
        self._meta = MetaClient(settings.meta, me=self.me, limits=settings.limits)
        self._ownership = Ownership(settings.name)
        self._committer = Committer(self._store, on_fatal=self._end, limits=settings.limits)
        self._housekeeping = self._changes(settings)
        self._moves = MoveService(self._housekeeping.source_of)
        self._reporting = Reporting(self._housekeeping, self._store, self._ownership, self.me)
        service = NodeService(
            self._store,
            self._ownership,
            self._committer,
            settings.limits,
            more=self._moves.handlers,
            report=self._reporting.status,
            on_gone=self._housekeeping.on_gone,
        )
        self._server = Server(
            service,
            me=self.me,
            limits=settings.limits,
            clock=self._clock,
            read_together=service.read_together,
            write_together=service.write_together,
        )

    def _changes(self, settings: NodeSettings) -> Housekeeping:
        """What carries out this node's duties."""
        views = Views()
        site = Site(
            me=self.me,
            store=self._store,
            ownership=self._ownership,
            committer=self._committer,
            fences=FenceFile(settings.data_dir),
            views=views,
            settler=Settler(self._meta, views, lambda txn, revision: housekeeping.note_applied(txn, revision)),
            limits=settings.limits,
            incoming=os.path.join(settings.data_dir, "incoming"),
            fence_abort_s=settings.fence_abort_ms / 1000,
        )
        housekeeping = Housekeeping(site)
        return housekeeping

    def _post(self, work: Callable[[], None]) -> None:
        """Run `work` on the loop; called from the store's own threads."""
        self._loop.call_soon_threadsafe(work)

    def me(self) -> Identity:
        """Who this process is, as far as it is known by now."""
        return Identity("node", self._identity.name, self._identity.cluster_id, self._identity.incarnation)

    async def run(self, stop: asyncio.Event) -> int:
        """Serve until `stop` is set. Raises ShardKVError when it cannot start, or when the store is poisoned."""
        try:
            await run_until(stop, self._serve(), self._housekeeping.run(), self._broken(), self._tick())
            await self._server.drain(grace_s=DRAIN_GRACE_S)
            log.info("node_drained name=%s", self._settings.name)
            return EXIT_OK
        finally:
            await self._moves.close()
            await self._housekeeping.close()
            await self._meta.close()
            self._store.close()

    def _end(self, error: ShardKVError) -> None:
        if not self._fatal.done():
            self._fatal.set_result(error)

    async def _broken(self) -> None:
        """Raises the error that ended this node, when there is one."""
        raise await self._fatal

    async def _serve(self) -> None:
        """Register this start, then follow the topology for good."""
        settings = self._settings
        self._identity.begin()
        try:
            port = await self._server.listen(settings.bind, settings.port)
        except OSError as error:
            raise port_problem(error, settings.bind, settings.port) from error
        self._meta.start()
        self._identity.join(await self._cluster_id(), self._identity.incarnation)
        await register_node(
            self._meta,
            NodeDocument(
                name=settings.name,
                store_id=self._store.store_id.hex(),
                incarnation=self._identity.incarnation,
                address=advertised(settings.bind, port, settings.advertise),
                pid=os.getpid(),
                host=socket.gethostname(),
                start_id=self._identity.start_id,
            ),
            self._identity.start_ids,
        )
        self._identity.registered()
        log.info("node_registered name=%s incarnation=%d port=%d", settings.name, self._identity.incarnation, port)
        await self._meta.follow(self._follow)

    async def _tick(self) -> None:
        """Let the store retry background work that failed, and end the node when a sync or flush poisoned the store."""
        while True:
            await asyncio.sleep(TICK_S)
            self._store.tick()
            self._reporting.measure()
            refusal = self._store.write_refusal()
            if refusal is not None and self._store.health.poisoned:
                self._end(refusal)

    async def _cluster_id(self) -> str:
        """The id of the cluster the metadata store belongs to, waiting for it as long as it takes."""
        while True:
            with contextlib.suppress(UnavailableError, DeadlineExceeded):
                for entry in (await self._meta.read(CLUSTER_KEY)).entries:
                    document = decode_document(entry.key, entry.value) if entry.value is not None else None
                    if isinstance(document, ClusterDocument):
                        return document.cluster_id
            await asyncio.sleep(CLUSTER_PAUSE_S)

    def _follow(self, topology: Topology) -> None:
        known = topology.nodes.get(self._settings.name)
        if known is not None and known.incarnation > self._identity.incarnation:
            self._end(
                StoreMismatch(
                    f"A later start ({known.incarnation}) of node {self._settings.name} is registered; this is start "
                    f"{self._identity.incarnation}."
                )
            )
            return
        self._housekeeping.show(topology)


def _log_recovery(store: Store) -> None:
    """Say in the log what opening the store found, above all what was dropped."""
    report = store.recovery
    log.info(
        "store_opened created=%s term=%d segments=%d writes_replayed=%d swept=%d",
        report.created,
        store.term,
        report.segments,
        report.writes_replayed,
        len(report.swept),
    )
    for tail in report.torn_tails:
        log.warning(
            "torn_tail_dropped path=%s offset=%d bytes=%d problem=%r", tail.path, tail.offset, tail.bytes, tail.problem
        )


def run_node(settings: NodeSettings) -> int:
    """Run a node until SIGTERM and return its exit code. Raises ShardKVError."""

    async def main(stop: asyncio.Event) -> int:
        return await NodeProcess(settings).run(stop)

    return run_program(main)
