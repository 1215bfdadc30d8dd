"""Requests that wait one behind the other are begun in one go, within the limits, and answered later in any order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

from shardkv.errors import DeadlineExceeded, LocalProtocolError
from shardkv.limits import Limits
from shardkv.transport.server import TOGETHER_MAX, Connection, Server
from shardkv.wire.messages import OK, Context, Op, RawReply, Read, Request, raw, reply_error
from tests.shardkv.transport.test_read_together import Talk, Together, reads
from tests.shardkv.transport.test_server import HELLO, SERVER


class Later(Together):
    """Answers what was begun together when told, the last first."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[tuple[Connection, int, int]] = []
        """Connection, id and context of each request."""
        self.broken = False

    def begin_together(
        self, askers: Sequence[Connection], requests: Sequence[Request], deadlines: Sequence[float | None]
    ) -> Callable[[], None]:
        def begin() -> None:
            if self.broken:
                raise ValueError("broken")
            self.runs.append(len(requests))
            self.begun += [(asker, one.id, one.ctx) for asker, one in zip(askers, requests, strict=True)]

        return begin

    def answer(self) -> None:
        begun, self.begun = self.begun, []
        for connection, request_id, _ in reversed(begun):
            connection.reply_together([RawReply(request_id, OK, raw(request_id))])


@contextlib.asynccontextmanager
async def talk(limits: Limits | None = None) -> AsyncIterator[tuple[Talk, Later]]:
    service = Later()
    server = Server(service, me=lambda: SERVER, limits=limits or Limits(), begin_together=service.begin_together)
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        talking = Talk(server, service, reader, writer)
        await talking.ask(HELLO)
        yield talking, service
    finally:
        writer.close()
        await server.drain(grace_s=0)


async def begun(service: Later, count: int) -> None:
    async with asyncio.timeout(10):
        while len(service.begun) < count:
            await asyncio.sleep(0.001)


def test_no_more_are_begun_than_may_be_open() -> None:
    async def main() -> None:
        async with talk(Limits(requests_in_flight_max=10)) as (peer, service):
            asked = reads(*(b"%d" % number for number in range(25)))
            await peer.ask(*asked, replies=0)
            heard: list[int] = []
            for count in (10, 10, 5):
                await begun(service, count)
                await asyncio.sleep(0.01)
                assert len(service.begun) == count
                service.answer()
                heard += [reply.id for reply in await peer.ask(replies=count)]
            assert sorted(heard) == [request.id for request in asked]

    asyncio.run(main())


def test_a_long_line_is_begun_in_few_goes() -> None:
    async def main() -> None:
        async with talk() as (peer, service):
            count = 3 * TOGETHER_MAX
            await peer.ask(*reads(*(b"%d" % number for number in range(count))), replies=0)
            heard = 0
            while heard < count:
                await begun(service, 2)
                waiting = len(service.begun)
                service.answer()
                heard += len(await peer.ask(replies=waiting))
            assert len(service.runs) <= count // 8

    asyncio.run(main())


def test_what_is_begun_together_is_of_one_context() -> None:
    async def main() -> None:
        async with talk() as (peer, service):
            for ctx in (1, 2):
                await peer.ask(Request(100 + ctx, Op.CONTEXT, 0, None, None, None, raw(Context(ctx, "k", None, None))))
            asked = reads(*(b"%d" % number for number in range(8)))
            for request in asked:
                request.ctx = 1 if request.id <= 4 else 2
            await peer.ask(*asked, replies=0)
            await begun(service, 8)
            assert service.runs == [4, 4]
            assert [ctx for _, _, ctx in service.begun] == [1] * 4 + [2] * 4

    asyncio.run(main())


def test_an_answer_after_the_time_is_over_is_not_heard() -> None:
    async def main() -> None:
        async with talk() as (peer, service):
            late, in_time = reads(b"a", b"b")
            late.deadline_ms = 50
            (reply,) = await peer.ask(late, in_time, replies=1)
            assert reply.id == late.id
            assert isinstance(reply_error(reply.payload), DeadlineExceeded)
            service.answer()
            (reply,) = await peer.ask(replies=1)
            assert (reply.id, reply.status) == (in_time.id, OK)

    asyncio.run(main())


def test_a_bug_of_the_service_leaves_nobody_waiting() -> None:
    async def main() -> None:
        async with talk() as (peer, service):
            service.broken = True
            replies = await peer.ask(*reads(b"a", b"b", b"c"))
            assert [reply.id for reply in replies] == [1, 2, 3]
            assert all(isinstance(reply_error(reply.payload), LocalProtocolError) for reply in replies)

    asyncio.run(main())


def test_an_id_used_twice_ends_the_connection() -> None:
    async def main() -> None:
        async with talk() as (peer, service):
            await peer.ask(*reads(b"a", b"b"), replies=0)
            await begun(service, 2)
            again = Request(2, Op.READ, 0, None, None, None, raw(Read([b"c"])))
            (reply,) = await peer.ask(again, replies=1)
            assert reply.id == 0
            assert "used twice" in reply_error(reply.payload).message

    asyncio.run(main())
