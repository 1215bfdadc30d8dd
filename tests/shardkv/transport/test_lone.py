"""Requests of several connections, each alone on its own, share a turn of the loop, and are answered as if not."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from shardkv.errors import DeadlineExceeded, OutcomeUnknown
from shardkv.limits import Limits
from shardkv.transport.lone import reply_to_all
from shardkv.transport.server import Connection, Server, wall_ms
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.messages import (
    OK,
    Op,
    RawReply,
    Read,
    Reply,
    Request,
    decode_any,
    decode_read_reply,
    decode_replies,
    encode_batch,
    raw,
    reply_error,
)
from tests.shardkv.transport.test_read_together import Together
from tests.shardkv.transport.test_server import HELLO, SERVER

CLOCK = wall_ms() << 16
CALLERS = 20


class Answering(Together):
    """Answers writes with their payload, those of one go in one go, soon after; not those that say "no".

    What is heard while nothing else is, or is not taken together, is answered with "alone".
    """

    def write_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> bool:
        if any(decode_any(request.payload) == "no" for request in requests):
            return False
        self.runs.append(len(requests))
        replies = [Reply(request.id, OK, request.payload) for request in requests]
        asyncio.get_running_loop().call_soon(reply_to_all, list(askers), replies)
        return True

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.op == Op.WRITE:
            connection.reply(request.id, "alone")
        elif request.op == Op.READ:
            connection.reply(request.id, raw([[b"alone"], None]))
        else:
            super().on_request(connection, request, deadline)


class Silent(Answering):
    """Never answers a write that is begun together."""

    def write_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> bool:
        return True


class Broken(Answering):
    """Fails when it is asked for more than one read at once."""

    def read_together(self, requests: Sequence[Request], until: float) -> tuple[list[Reply], int]:
        raise ValueError("broken")


class Caller:
    """A raw connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self.writer = reader, writer
        self._decoder = FrameDecoder(10**7)

    def send(self, *requests: Request) -> None:
        self.writer.write(encode_frame(encode_batch(CLOCK, requests)))

    async def replies(self, count: int = 1) -> list[RawReply]:
        heard: list[RawReply] = []
        async with asyncio.timeout(10):
            while len(heard) < count:
                data = await self._reader.read(65536)
                assert data, f"the connection was closed after {heard}"
                heard += [reply for body in self._decoder.feed(data) for reply in decode_replies(body)[1]]
        return heard


@contextlib.asynccontextmanager
async def callers(
    make: Callable[[], Answering] = Answering, limits: Limits | None = None
) -> AsyncIterator[tuple[list[Caller], Answering, Server]]:
    service = make()
    server = Server(
        service,
        me=lambda: SERVER,
        limits=limits or Limits(),
        read_together=service.read_together,
        write_together=service.write_together,
    )
    port = await server.listen("127.0.0.1", 0)
    made = [Caller(*await asyncio.open_connection("127.0.0.1", port)) for _ in range(CALLERS)]
    try:
        for caller in made:
            caller.send(HELLO)
            await caller.replies()
        yield made, service, server
    finally:
        for caller in made:
            caller.writer.close()
        await server.drain(grace_s=0)


def read(number: int, key: bytes) -> Request:
    return Request(number, Op.READ, 0, None, None, None, raw(Read([key])))


def write(number: int, what: object, deadline_ms: int | None = None) -> Request:
    return Request(number, Op.WRITE, 0, None, None, deadline_ms, raw(what))


async def values(made: Sequence[Caller]) -> list[bytes | None]:
    return [decode_read_reply((await caller.replies())[0].payload).values[0] for caller in made]


async def together(made: Sequence[Caller], request_of: Callable[[int], Request]) -> None:
    """Have every caller send its request within one turn of the loop, as far as the system lets us."""
    for number, caller in enumerate(made):
        caller.send(request_of(number))
    await asyncio.sleep(0)


def test_lone_reads_share_a_turn_and_each_gets_its_own_answer() -> None:
    async def main() -> None:
        async with callers() as (made, service, _):
            for first in range(0, 500, 100):
                await together(made, lambda number, first=first: read(first + number, b"%d" % number))
                for number, value in enumerate(await values(made)):
                    assert value in (b"alone", b"quick %d" % number)
            assert max(service.runs) > 1

    asyncio.run(main())


def test_lone_writes_share_a_turn_and_each_gets_its_own_answer() -> None:
    async def main() -> None:
        async with callers() as (made, service, _):
            for first in range(0, 500, 100):
                await together(made, lambda number, first=first: write(first + number, number))
                replies = [(await caller.replies())[0] for caller in made]
                assert [reply.id for reply in replies] == [first + number for number in range(CALLERS)]
                for number, reply in enumerate(replies):
                    assert decode_any(reply.payload) in ("alone", number)
            assert max(service.runs) > 1

    asyncio.run(main())


def test_what_the_quick_way_does_not_take_is_answered_alone() -> None:
    async def main() -> None:
        async with callers() as (made, _, _):
            await together(made, lambda number: read(number, b"no" if number == 3 else b"%d" % number))
            found = await values(made)
            assert found[3] == b"alone"
            assert all(value in (b"alone", b"quick %d" % number) for number, value in enumerate(found))
            await together(made, lambda number: write(number, "no"))
            replies = [(await caller.replies())[0] for caller in made]
            assert [decode_any(reply.payload) for reply in replies] == ["alone"] * CALLERS

    asyncio.run(main())


def test_other_requests_and_frames_of_several_keep_their_way_beside_lone_ones() -> None:
    async def main() -> None:
        async with callers() as (made, _, _):
            for number, caller in enumerate(made):
                if number % 3 == 0:
                    caller.send(read(1, b"a"), read(2, b"b"), read(3, b"c"))
                elif number % 3 == 1:
                    caller.send(Request(1, Op.PING, 0, None, None, None, raw(None)))
                else:
                    caller.send(read(1, b"a"))
            for number, caller in enumerate(made):
                replies = await caller.replies(3 if number % 3 == 0 else 1)
                assert sorted(reply.id for reply in replies) == ([1, 2, 3] if number % 3 == 0 else [1])
                assert all(reply.status == OK for reply in replies)

    asyncio.run(main())


def test_a_malformed_frame_among_lone_ones_ends_its_own_connection_alone() -> None:
    async def main() -> None:
        async with callers() as (made, _, _):
            bad, *good = made
            body = encode_batch(CLOCK, [read(1, b"a")])
            bad.writer.write(encode_frame(body[:11] + b"\xc1" + body[12:]))
            await together(good, lambda number: read(number, b"%d" % number))
            assert (await bad.replies())[0].status != OK
            for number, value in enumerate(await values(good)):
                assert value in (b"alone", b"quick %d" % number)

    asyncio.run(main())


def test_when_the_quick_way_fails_each_is_answered_by_itself() -> None:
    async def main() -> None:
        async with callers(Broken) as (made, _, _):
            for first in range(0, 300, 100):
                await together(made, lambda number, first=first: read(first + number, b"%d" % number))
                assert await values(made) == [b"alone"] * CALLERS

    asyncio.run(main())


def test_a_caller_that_left_disturbs_no_other() -> None:
    async def main() -> None:
        async with callers() as (made, _, server):
            await together(made, lambda number: write(number, number))
            made[0].writer.transport.abort()
            for number, caller in enumerate(made[1:], 1):
                assert decode_any((await caller.replies())[0].payload) in ("alone", number)
            async with asyncio.timeout(10):
                while len(server.connections) > CALLERS - 1:
                    await asyncio.sleep(0.01)

    asyncio.run(main())


def test_a_lone_request_that_is_not_answered_ends_at_its_deadline() -> None:
    async def main() -> None:
        async with callers(Silent) as (made, _, _):
            await together(made, lambda number: write(number, number, deadline_ms=50))
            replies = [(await caller.replies())[0] for caller in made]
            unanswered = [reply for reply in replies if reply.status != OK]
            assert unanswered
            for reply in unanswered:
                assert isinstance(reply_error(reply.payload), OutcomeUnknown | DeadlineExceeded)

    asyncio.run(main())
