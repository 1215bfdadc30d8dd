"""A client of a router's inside, which asks through the real service and server, and nodes that answer like nodes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from shardkv.errors import ShardKVError
from shardkv.limits import DEFAULT_LIMITS
from shardkv.transport.peer import Peer
from shardkv.transport.server import Connection, Server
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    OK,
    Message,
    Op,
    PartialReadReply,
    RawReply,
    Read,
    ReadReply,
    Request,
    Write,
    WriteReply,
    decode_any,
    decode_read,
    decode_shared_read,
    decode_shared_write,
    decode_write,
    problem_of,
    raw,
    reply_error,
)
from shardkv_router.service import RouterService
from tests.router.world import Node, RouterWorld, router_world, until


def echo(node: Node, connection: Connection, request: Request) -> None:
    """A read finds the keys as their values, a write is applied."""
    if request.shard is None:
        connection.reply(request.id, of_all(node, request, lambda shard, epoch: None))
    elif request.op == Op.READ:
        connection.reply(request.id, ReadReply([*decode_read(request.payload).keys]))
    else:
        connection.reply(request.id, WriteReply(b"\0", 1, []))


def of_all(node: Node, request: Request, problem: Callable[[int, int], ShardKVError | None]) -> Message:
    """What a node says to its share of a request: as `echo`, but for the shards and epochs it has a problem with."""
    asked = (decode_shared_read if request.op == Op.READ else decode_shared_write)(request.payload)
    found = [(shard, count, problem(shard, epoch)) for shard, epoch, count in asked.shards]
    refused = [error is not None for _, count, error in found for _ in range(count)]
    problems = [problem_of(shard, error) for shard, _, error in found if error is not None]
    if request.op == Op.WRITE:
        return WriteReply(bytes(2 * one for one in refused), None, problems)
    values = [None if no else key for key, no in zip(asked.keys, refused, strict=True)]
    versions = [0 if no else len(key) for key, no in zip(asked.keys, refused, strict=True)]
    return PartialReadReply(
        values, versions if asked.want_versions else None, [place for place, no in enumerate(refused) if no], problems
    )


def key_of(request: Request) -> bytes:
    decode = decode_read if request.op == Op.READ else decode_write
    key: bytes = decode(request.payload).keys[0]
    return key


def asked_for(node: Node) -> list[bytes]:
    return [key_of(request) for request in node.asked]


def read(key: bytes) -> tuple[Op, msgspec.Raw]:
    return Op.READ, raw(Read([key]))


def write(key: bytes) -> tuple[Op, msgspec.Raw]:
    return Op.WRITE, raw(Write(None, None, 1, [key], [b"v"], False))


class Client:
    """Sends through the router and keeps what came of each request."""

    def __init__(self, peer: Peer, world: RouterWorld) -> None:
        self.peer = peer
        self.world = world

    def send(self, *asked: tuple[Op, msgspec.Raw], timeouts_s: list[float] | None = None) -> list[list[Any]]:
        """All in one frame. What comes of each is appended to its list."""
        came: list[list[Any]] = [[] for _ in asked]
        now = self.world.loop.time()
        for number, (op, payload) in enumerate(asked):
            deadline = now + (timeouts_s[number] if timeouts_s else 5)
            self.peer.send(op, payload, on_reply=came[number].append, deadline=deadline)
        return came


def told(came: list[Any]) -> Any:
    """What the one reply says: its payload, or the error."""
    (reply,) = came
    assert isinstance(reply, RawReply)
    return decode_any(reply.payload) if reply.status == OK else reply_error(reply.payload)


async def all_told(came: list[list[Any]]) -> list[Any]:
    await until(lambda: all(came))
    await asyncio.sleep(0.05)
    return [told(one) for one in came]


@contextlib.asynccontextmanager
async def client_of(*nodes: Node, shards: int = 2, **options: int) -> AsyncIterator[Client]:
    """Keys before b"b" are of shard 1 on the first node, the next letters of the shards after it, round robin."""
    for node in nodes:
        node.answers = echo
    async with router_world(*nodes, shards=shards, **options) as world:

        async def nothing() -> None:
            return None

        service = RouterService(world.forwarder, world.scanner, DEFAULT_LIMITS, nothing)
        service.update(world.topology)
        me = Identity("router", "router-1")
        server = Server(service, me=lambda: me, begin_together=service.begin_together)
        port = await server.listen("127.0.0.1", 0)
        peer = Peer([f"127.0.0.1:{port}"], me=lambda: Identity("client", "c"))
        peer.start()
        await peer.wait_connected(5)
        try:
            yield Client(peer, world)
        finally:
            await peer.close()
            await server.drain(grace_s=0)
