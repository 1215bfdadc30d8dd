"""A real metadata service on a real socket, inside the test's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from shardkv.metadata.client import MetaClient
from shardkv.metadata.controller import plan_cluster
from shardkv.metadata.embedded import EmbeddedStore
from shardkv.metadata.leading import LEADER_KEY
from shardkv.metadata.process import lead
from shardkv.metadata.service import MetaService
from shardkv.metadata.store import MetaStore
from shardkv.topology.documents import ClusterDocument, NodeDocument
from shardkv.topology.view import Topology
from shardkv.transport.server import Server
from shardkv.wire.hello import Identity


def cluster_document(cluster_id: str = "c1", nodes: int = 3) -> ClusterDocument:
    return ClusterDocument(cluster_id, nodes, "hash", 4, [])


def node_document(name: str, *, store: str = "s", incarnation: int = 1, pid: int = 1) -> NodeDocument:
    return NodeDocument(name, f"{store}-{name}", incarnation, "127.0.0.1:1", pid)


class MetaWorld:
    """A service that can be stopped and started again on the same or on another store, always on one port."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.cluster_id = "c1"
        self.poisoned = asyncio.Event()
        self.running = False

    async def start(self, *, nodes: int = 3) -> None:
        self.directory.mkdir(exist_ok=True)
        self.store = self.open_store()
        txn = plan_cluster(cluster_document(self.cluster_id, nodes))
        await self.store.txn(txn.compares, txn.puts)
        me = Identity("meta", "meta", self.cluster_id)
        self.service = MetaService(self.store, me=lambda: me, on_poisoned=self.poisoned.set)
        self.server = Server(self.service, me=lambda: me)
        self._following = asyncio.ensure_future(self.service.follow())
        await self.service.view.reached(0)
        self.port = await self.server.listen("127.0.0.1", self.port)
        self._leading = asyncio.ensure_future(lead(self.store, self.service, 5.0, name="meta", address=self.address))
        async with asyncio.timeout(10):
            while self.service.view.get(LEADER_KEY) is None:
                await self.service.view.moved()
        self.running = True

    def open_store(self) -> MetaStore:
        return EmbeddedStore(self.directory)

    async def stop(self) -> None:
        self.running = False
        for task in (self._leading, self._following):
            task.cancel()
        await asyncio.gather(self._leading, self._following, return_exceptions=True)
        self.service.close()
        await self.server.drain(grace_s=1)
        await self.store.aclose()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"


@asynccontextmanager
async def meta_world(directory: Path, *, nodes: int = 3) -> AsyncIterator[MetaWorld]:
    world = MetaWorld(directory)
    await world.start(nodes=nodes)
    try:
        yield world
    finally:
        await world.stop()


@asynccontextmanager
async def meta_client(address: str, *, cluster_id: str | None = None) -> AsyncIterator[MetaClient]:
    client = MetaClient([address], me=lambda: Identity("node", "node-1", cluster_id))
    client.start()
    try:
        yield client
    finally:
        await client.close()


class Follower:
    """Follows the topology in the background; `until` waits for a view that a condition holds for."""

    def __init__(self, client: MetaClient) -> None:
        self.views: list[Topology] = []
        self._news = asyncio.Event()
        self.task = asyncio.get_running_loop().create_task(client.follow(self._take))

    def _take(self, topology: Topology) -> None:
        self.views.append(topology)
        self._news.set()

    async def until(self, holds: Callable[[Topology], object]) -> Topology:
        async with asyncio.timeout(10):
            while not (self.views and holds(self.views[-1])):
                self._news.clear()
                await self._news.wait()
        return self.views[-1]

    async def stop(self) -> None:
        self.running = False
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
