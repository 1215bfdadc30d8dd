"""The life of a router process: learn the topology, register, serve clients, drain.

Invariant: it takes no client before it has seen a topology with a placed keyspace, so a client that can connect can
be served. Losing the metadata store afterwards stops nothing but news.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from dataclasses import dataclass
from typing import Any

import msgspec

from shardkv.errors import ShardKVError
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import Limits
from shardkv.metadata.client import MetaClient
from shardkv.metadata.register import register_router, sign_off_router
from shardkv.programs import EXIT_OK, advertised, port_problem
from shardkv.topology.documents import RouterDocument
from shardkv.topology.view import Topology
from shardkv.transport.loop import run_program, run_until
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity
from shardkv_router.forwarding import Forwarder
from shardkv_router.links import NodeLinks
from shardkv_router.options import RouterOptions
from shardkv_router.scanning import Scanner
from shardkv_router.service import RouterService
from shardkv_router.status import cluster_status

log = logging.getLogger(__name__)

DRAIN_GRACE_S = 5.0
SIGN_OFF_TIMEOUT_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSettings:
    """What the command line and the configuration say about one router process."""

    name: str
    meta: list[str]
    bind: str
    port: int
    advertise: str | None
    reuse_port: bool
    """Share the port with the other routers of this machine; each then has one of its own as well."""
    options: RouterOptions
    limits: Limits


class RouterProcess:
    """One run of a router. `run(stop)` returns the exit code."""

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._topology = Topology()
        self._placed = asyncio.Event()
        self._registered: int | None = None
        """The store's revision of this router's registration."""
        clock = HybridClock()
        self._meta = MetaClient(settings.meta, me=self.me, limits=settings.limits)
        self._links = NodeLinks(me=self.me, limits=settings.limits, clock=clock, on_usable=self._node_usable)
        self._forwarder = Forwarder(self._links, settings.options, settings.limits)
        scanner = Scanner(self._links, self._forwarder, settings.options)
        self._service = RouterService(self._forwarder, scanner, settings.limits, self._status, self._ask_meta)
        self._server = Server(
            self._service,
            me=self.me,
            limits=settings.limits,
            clock=clock,
            begin_together=self._service.begin_together,
        )

    def me(self) -> Identity:
        """Who this process is, as far as it is known by now."""
        cluster = self._topology.cluster
        return Identity("router", self._settings.name, cluster.cluster_id if cluster else None)

    async def run(self, stop: asyncio.Event) -> int:
        """Serve until `stop` is set. Raises ShardKVError at start-up."""
        self._meta.start()
        try:
            await run_until(stop, self._meta.follow(self._follow), self._serve())
            self._forwarder.drain()
            await self._server.drain(grace_s=DRAIN_GRACE_S)
            await self._sign_off()
            return EXIT_OK
        finally:
            await self._links.close()
            await self._meta.close()

    async def _serve(self) -> None:
        settings = self._settings
        await self._placed.wait()
        own_port = await self._listen(0, reuse_port=False) if settings.reuse_port else 0
        port = await self._listen(settings.port, reuse_port=settings.reuse_port)
        own_port = own_port or port
        self._registered = await register_router(
            self._meta,
            RouterDocument(
                name=settings.name,
                address=advertised(settings.bind, own_port, settings.advertise),
                pid=os.getpid(),
            ),
        )
        log.info("router_serving name=%s port=%d own_port=%d", settings.name, port, own_port)

    async def _sign_off(self) -> None:
        """Take this router's address back; when the store is away the address just stays listed."""
        if self._registered is None:
            return
        with contextlib.suppress(ShardKVError):
            name = self._settings.name
            await sign_off_router(self._meta, name, self._registered, timeout_s=SIGN_OFF_TIMEOUT_S)

    async def _listen(self, port: int, *, reuse_port: bool) -> int:
        try:
            return await self._server.listen(self._settings.bind, port, reuse_port=reuse_port)
        except OSError as error:
            raise port_problem(error, self._settings.bind, port) from error

    def _follow(self, topology: Topology) -> None:
        self._topology = topology
        self._links.update(topology)
        self._service.update(topology)
        self._forwarder.update(topology)
        if topology.keyspaces:
            self._placed.set()

    def _node_usable(self) -> None:
        self._forwarder.retry_parked()

    async def _ask_meta(self, asked: msgspec.Raw, timeout_s: float) -> msgspec.Raw:
        return await self._meta.admin(asked, timeout_s=timeout_s)

    async def _status(self) -> dict[str, Any]:
        counts = {op.name.lower(): count for op, count in self._service.counts.items()}
        mine = {
            "name": self._settings.name,
            "requests": counts,
            "parked": self._forwarder.parked,
            "connections": len(self._server.connections),
        }
        return await cluster_status(self._topology, self._links, mine, meta_connected=self._meta.connected)


def run_router(settings: RouterSettings) -> int:
    """Run a router until SIGTERM and return its exit code. Raises ShardKVError."""

    async def main(stop: asyncio.Event) -> int:
        return await RouterProcess(settings).run(stop)

    return run_program(main)
