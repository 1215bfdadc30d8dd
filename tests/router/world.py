"""A router's inside against nodes played by the test: real links, real sockets, answers as the test wants them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import msgspec

from shardkv.errors import ShardKVError
from shardkv.hybrid_clock import HybridClock
from shardkv.limits import DEFAULT_LIMITS, Limits
from shardkv.topology.documents import (
    KeyspaceDocument,
    NodeDocument,
    Partition,
    ShardDocument,
    TopologyBound,
    encode_document,
)
from shardkv.topology.view import KeyspaceView, Topology
from shardkv.transport.server import Connection, Server
from shardkv.wire.hello import Identity
from shardkv.wire.messages import Op, Page, Read, Request, Scan, Write, WriteReply, decode_scan, raw
from shardkv_router.forwarding import Forwarder
from shardkv_router.links import NodeLinks
from shardkv_router.options import RouterOptions
from shardkv_router.part import Part
from shardkv_router.ranges import Ranges
from shardkv_router.scanning import Scanner

Answer = Callable[["Node", Connection, Request], None]


def reply_ok(node: Node, connection: Connection, request: Request) -> None:
    """What a healthy node says: writes applied, a scan finds one row per shard asked about."""
    if request.op == Op.SCAN:
        asked: Scan = decode_scan(request.payload)
        shards = [shard for shard, _ in asked.shards or []]
        keys = sorted((b"%c" % (96 + shard) for shard in shards), reverse=asked.reverse)
        connection.reply(request.id, Page(keys, keys, None, shards))
    elif request.op == Op.WRITE:
        connection.reply(request.id, WriteReply(b"\0", 1, []))
    else:
        connection.reply(request.id, node.name)


def hold(node: Node, connection: Connection, request: Request) -> None:
    """Never answer by itself."""


def refuse(error: ShardKVError) -> Answer:
    return lambda node, connection, request: connection.fail(request.id, error)


class Node:
    """A node on a port of its own; `answers` says what it does with each request, `asked` what it was asked."""

    def __init__(self, name: str, limits: Limits = DEFAULT_LIMITS) -> None:
        self.name = name
        self.limits = limits
        self.port = 0
        self.advertised: int | None = None
        self.answers: Answer = reply_ok
        self.asked: list[Request] = []
        self.connection: Connection | None = None
        self.server: Server | None = None

    async def start(self) -> None:
        me = Identity("node", self.name)
        self.server = Server(self, me=lambda: me, limits=self.limits)
        self.port = await self.server.listen("127.0.0.1", self.port)

    async def stop(self) -> None:
        if self.server is not None:
            await self.server.drain(grace_s=0)
        self.server = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.advertised or self.port}"

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        self.connection = connection
        self.asked.append(request)
        self.answers(self, connection, request)

    def on_batch_end(self, connection: Connection) -> None: ...

    def on_closed(self, connection: Connection) -> None: ...


class RouterWorld:
    """Links, forwarder and scanner of a router. Shard 1 is on node-1, shard 2 on node-2, and so on round robin."""

    def __init__(self, nodes: list[Node], options: RouterOptions, partition: Partition) -> None:
        self.nodes = nodes
        self.partition: Partition = partition
        me = Identity("router", "router-1")
        self.links = NodeLinks(me=lambda: me, limits=DEFAULT_LIMITS, clock=HybridClock(), on_usable=self._usable)
        self.forwarder = Forwarder(self.links, options)
        self.scanner = Scanner(self.links, self.forwarder, options)
        self.ranges = Ranges(self.forwarder)
        self.loop = asyncio.get_running_loop()
        self.topology = Topology()

    def _usable(self) -> None:
        self.forwarder.retry_parked()

    def follow(self, *, epoch: int = 1, owners: dict[int, str] | None = None, shards: int = 2) -> None:
        """A newer topology."""
        documents: dict[str, msgspec.Struct] = {"keyspaces/default": KeyspaceDocument("default", self.partition)}
        for node in self.nodes:
            documents[f"nodes/{node.name}"] = NodeDocument(node.name, "s", 1, node.address, 1)
        starts: list[Any] = (
            [2**64 * number // shards for number in range(shards)]
            if self.partition == "hash"
            else [b"", *(b"%c" % (97 + number) for number in range(1, shards))]
        )
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], None], strict=True)):
            owner = (owners or {}).get(number + 1, self.nodes[number % len(self.nodes)].name)
            documents[f"shards/{number + 1}"] = ShardDocument(number + 1, "default", start, stop, epoch, owner)
        self.put(documents)

    def view(self) -> KeyspaceView:
        """The keyspace as it is now."""
        return self.topology.keyspace("default")

    def replace(self, parents: list[int], children: dict[int, tuple[TopologyBound, TopologyBound | None, str]]) -> None:
        """Shards were split or merged: (start, stop, owner) of each child, by id."""
        epoch = 1 + max(self.topology.shards[parent].epoch for parent in parents)
        documents: dict[str, msgspec.Struct | None] = {f"shards/{parent}": None for parent in parents}
        for child, (start, stop, owner) in children.items():
            shard = ShardDocument(child, "default", start, stop, epoch, owner, parents=parents)
            documents[f"shards/{child}"] = shard
        self.put(documents)

    def put(self, documents: Mapping[str, msgspec.Struct | None]) -> None:
        """A newer topology, in which these documents are others; None: gone."""
        entries = [
            (key, None if document is None else encode_document(document)) for key, document in documents.items()
        ]
        self.topology = self.topology.with_entries(self.topology.revision + 1, entries)
        self.links.update(self.topology)
        self.forwarder.update(self.topology)

    async def connected(self) -> None:
        await until(lambda: all(self.links.usable(node.name) for node in self.nodes))

    def send(self, op: Op, *, shard: int = 1, timeout_s: float | None = 5, payload: msgspec.Raw | None = None) -> Sent:
        sent = Sent()
        if payload is None:
            payload = raw(Read([b"k"]) if op == Op.READ else Write(None, None, 1, [b"k"], [b"v"], False))
        deadline = None if timeout_s is None else self.loop.time() + timeout_s
        sent.part = Part(op, payload, shard, deadline, sent.take)
        self.forwarder.send(sent.part)
        return sent

    async def page(
        self,
        *,
        reverse: bool = False,
        start: bytes = b"",
        stop: bytes | None = None,
        timeout_s: float | None = 5,
        limit: int = 100,
        partial: bool = False,
    ) -> Page:
        scan = Scan(start, stop, reverse, False, limit, 1 << 20, None, partial)
        deadline = None if timeout_s is None else self.loop.time() + timeout_s
        return await self.scanner.page(lambda: self.topology, "default", scan, deadline)


class Sent:
    """A part that was sent; `answers` must end up with exactly one."""

    part: Part

    def __init__(self) -> None:
        self.answers: list[msgspec.Raw | ShardKVError] = []

    def take(self, answer: msgspec.Raw | ShardKVError) -> None:
        self.answers.append(answer)

    async def answer(self, timeout_s: float = 5) -> msgspec.Raw | ShardKVError:
        await until(lambda: self.answers, timeout_s)
        await asyncio.sleep(0.03)
        assert len(self.answers) == 1, "a part ended twice"
        return self.answers[0]


@contextlib.asynccontextmanager
async def router_world(
    *nodes: Node, partition: Partition = "range", shards: int = 2, through: int | None = None, **options: int
) -> AsyncIterator[RouterWorld]:
    """`through`: the port of a proxy by which the router reaches the first node, which runs already."""
    for node in nodes[through is not None :]:
        await node.start()
    nodes[0].advertised = through
    world = RouterWorld(list(nodes), RouterOptions(**options), partition)
    world.follow(shards=shards)
    await world.connected()
    try:
        yield world
    finally:
        await world.links.close()
        for node in nodes:
            await node.stop()


def run(story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await story()

    asyncio.run(bounded())


async def until(condition: Callable[[], object], timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)
