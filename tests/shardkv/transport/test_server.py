"""A real server on loopback, and peers that behave and misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator

import pytest

from shardkv.errors import (
    BatchTooLarge,
    ClusterMismatch,
    DeadlineExceeded,
    Draining,
    OutcomeUnknown,
    RemoteProtocolError,
    ShardKVError,
    UnavailableError,
    UnknownOperation,
)
from shardkv.limits import Limits
from shardkv.transport.peer import Peer
from shardkv.transport.server import Connection, Server, unknown_operation
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    ERROR,
    NOTHING,
    Op,
    RawReply,
    Read,
    ReadReply,
    Request,
    decode_read,
    decode_read_reply,
    decode_replies,
    encode_batch,
    raw,
    reply_error,
)

LIMITS = Limits(frame_bytes_max=100_000, requests_in_flight_max=10, hello_timeout_ms=300)
SERVER = Identity("node", "node-1", "cluster-a", 7)


class Echo:
    """READ gives the keys back; META_READ is never answered; SCAN answers with more than a frame holds."""

    def __init__(self) -> None:
        self.held: list[tuple[Connection, int]] = []
        self.closed = 0

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.op == Op.READ:
            connection.reply(request.id, ReadReply(list(decode_read(request.payload).keys)))
        elif request.op == Op.META_READ:
            self.held.append((connection, request.id))
        elif request.op == Op.SCAN:
            connection.reply(request.id, b"x" * 200_000)
        elif request.op == Op.STATUS:
            raise ZeroDivisionError
        else:
            raise unknown_operation(request.op)

    def on_batch_end(self, connection: Connection) -> None: ...

    def on_closed(self, connection: Connection) -> None:
        self.closed += 1


class World:
    def __init__(self, server: Server, service: Echo, port: int) -> None:
        self.server, self.service, self.port = server, service, port

    @contextlib.asynccontextmanager
    async def peer(self, me: Identity | None = None, expected: Identity | None = None) -> AsyncIterator[Peer]:
        identity = me or Identity("client", "test")
        peer = Peer([f"127.0.0.1:{self.port}"], me=lambda: identity, expected=expected)
        peer.start()
        try:
            yield peer
        finally:
            await peer.close()

    async def say(self, data: bytes, *, after_hello: bool = False) -> list[RawReply]:
        """What a raw connection hears until it is closed."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        if after_hello:
            writer.write(frame(HELLO))
            await reader.readexactly(int.from_bytes(await reader.readexactly(4), "big"))
        writer.write(data)
        async with asyncio.timeout(5):
            heard = await reader.read()
        writer.close()
        return [reply for body in FrameDecoder(10**6).feed(heard) for reply in decode_replies(body)[1]]


@contextlib.asynccontextmanager
async def world() -> AsyncIterator[World]:
    service = Echo()
    server = Server(service, me=lambda: SERVER, limits=LIMITS)
    port = await server.listen("127.0.0.1", 0)
    try:
        yield World(server, service, port)
    finally:
        await server.drain(grace_s=0)


def frame(*requests: Request) -> bytes:
    return encode_frame(encode_batch(0, list(requests)))


HELLO = Request(0, Op.HELLO, 0, None, None, None, raw(Identity("client", "raw").hello()))


def read(request_id: int, key: bytes = b"k") -> Request:
    return Request(request_id, Op.READ, 0, None, None, None, raw(Read([key])))


async def until(condition: object, timeout_s: float = 5) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # type: ignore[operator]
            await asyncio.sleep(0.005)


def test_calls_are_answered_each_with_its_own_reply() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            keys = [b"%d" % number for number in range(200)]
            replies = await asyncio.gather(*(peer.call(Op.READ, Read([key]), timeout_s=5) for key in keys))
            assert [decode_read_reply(reply).values for reply in replies] == [[key] for key in keys]
            assert peer.remote is not None
            assert (peer.remote.name, peer.remote.incarnation) == ("node-1", 7)

    asyncio.run(main())


def test_a_bug_or_an_unknown_operation_costs_one_request_only() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            with pytest.raises(UnknownOperation, match="Operation 31"):
                await peer.call(Op.META_TXN, None, timeout_s=5)
            with pytest.raises(ShardKVError, match="ZeroDivisionError"):
                await peer.call(Op.STATUS, None, timeout_s=5)
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING

    asyncio.run(main())


def test_a_cancelled_call_never_gives_its_reply_to_the_next() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            cancelled = asyncio.create_task(peer.call(Op.META_READ, None, timeout_s=5))
            await until(lambda: w.service.held)
            cancelled.cancel()
            connection, request_id = w.service.held[0]
            connection.reply(request_id, ReadReply([b"late"]))
            reply = await peer.call(Op.READ, Read([b"mine"]), timeout_s=5)
            assert decode_read_reply(reply).values == [b"mine"]

    asyncio.run(main())


def test_no_answer_is_a_deadline_and_a_cut_is_an_unknown_outcome() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            with pytest.raises(DeadlineExceeded):
                await peer.call(Op.META_READ, None, timeout_s=0.05)
            waiting = asyncio.create_task(peer.call(Op.META_READ, None, timeout_s=5))
            await until(lambda: len(w.service.held) == 2)
            w.service.held[0][0].close()
            with pytest.raises(OutcomeUnknown, match="broke before the answer came"):
                await waiting
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING, "the peer mends itself"

    asyncio.run(main())


def test_nobody_there_is_unavailable_with_the_reason() -> None:
    async def main() -> None:
        async with world() as w:
            port = w.port
        peer = Peer([f"127.0.0.1:{port}"], me=lambda: Identity("client", "test"))
        peer.start()
        with pytest.raises(UnavailableError, match=f"Cannot connect to 127.0.0.1:{port}"):
            await peer.call(Op.PING, None, timeout_s=0.3)
        await peer.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("me", "expected", "error", "words"),
    [
        (Identity("router", "r", "cluster-b"), None, ClusterMismatch, "belongs to cluster cluster-b"),
        (Identity("router", "r"), Identity("node", "node-2"), RemoteProtocolError, "met the node 'node-1'"),
        (Identity("router", "r"), Identity("meta", ""), RemoteProtocolError, "Expected the meta"),
        (Identity("stranger", "r"), None, RemoteProtocolError, "does not speak"),
    ],
)
def test_wrong_peers_refuse_each_other(me: Identity, expected: Identity, error: type, words: str) -> None:
    async def main() -> None:
        async with world() as w, w.peer(me, expected) as peer:
            with pytest.raises(error, match=words):
                await peer.call(Op.PING, None, timeout_s=0.3)

    asyncio.run(main())


HELLO_OF_VERSION_9 = Request(0, 0, 0, None, None, None, raw(["shardkv", 9, "client", "x", None, 0, None, False]))


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "frame_too_large"),
        (struct.pack(">I", 2**32 - 1), "frame_too_large"),
        (struct.pack(">I", 4097) + b"x" * 10, "frame_too_large"),
        (encode_frame(b"\xc1\xff"), "protocol_remote"),
        (encode_frame(b""), "protocol_remote"),
        (encode_frame(b"\x91" * 4000), "protocol_remote"),
        (frame(read(1)), "protocol_remote"),
        (frame(Request(0, 0, 0, None, None, None, raw([1, 2]))), "protocol_remote"),
        (frame(HELLO_OF_VERSION_9), "version_mismatch"),
        (b"\x00\x00", "protocol_remote"),
        (b"", "protocol_remote"),
    ],
)
def test_a_peer_that_breaks_the_rules_gets_one_error_and_is_closed(data: bytes, code: str) -> None:
    async def main() -> None:
        async with world() as w:
            replies = await w.say(data)
            assert [(reply.id, reply.status) for reply in replies] == [(0, ERROR)]
            assert reply_error(replies[0].payload).code == code
            async with w.peer() as peer:
                assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING, "others are not disturbed"

    asyncio.run(main())


def test_the_rules_hold_after_the_hello_too() -> None:
    async def main() -> None:
        async with world() as w:
            for rest in (
                struct.pack(">I", 100_001),
                encode_frame(b"\xc0"),
                frame(HELLO),
                frame(*(Request(5, Op.META_READ, 0, None, None, None, NOTHING) for _ in range(2))),
            ):
                replies = await w.say(rest, after_hello=True)
                assert (replies[-1].id, replies[-1].status) == (0, ERROR), rest[:20]

    asyncio.run(main())


def test_a_connection_over_its_limit_is_not_read_until_half_is_answered() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            await peer.wait_connected(5)
            answers: list[object] = []
            for _ in range(40):
                peer.send(Op.META_READ, NOTHING, on_reply=answers.append)
                await asyncio.sleep(0.002)
            held = w.service.held
            assert len(held) < 40
            while len(answers) < 40:
                await until(lambda: held or len(answers) == 40)
                for connection, request_id in [held.pop() for _ in range(len(held))]:
                    connection.reply(request_id, None)
                await asyncio.sleep(0)

    asyncio.run(main())


def test_a_reply_that_fits_no_frame_is_an_error_that_says_so() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            with pytest.raises(BatchTooLarge, match="a frame holds 100000"):
                await peer.call(Op.SCAN, None, timeout_s=5)
            assert await peer.call(Op.PING, None, timeout_s=5) == NOTHING

    asyncio.run(main())


def test_a_drain_refuses_new_requests_and_waits_for_those_in_flight() -> None:
    async def main() -> None:
        async with world() as w, w.peer() as peer:
            waiting = asyncio.create_task(peer.call(Op.META_READ, None, timeout_s=5))
            await until(lambda: w.service.held)
            draining = asyncio.create_task(w.server.drain(grace_s=5))
            await until(lambda: w.server.draining)
            with pytest.raises(Draining):
                await peer.call(Op.READ, Read([b"k"]), timeout_s=5)
            connection, request_id = w.service.held[0]
            connection.reply(request_id, ReadReply([b"done"]))
            assert decode_read_reply(await waiting).values == [b"done"]
            await draining
            assert not w.server.connections

    asyncio.run(main())
