"""Reads that wait one behind the other are answered in one go where nothing stands in the way, and else one by one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from shardkv.errors import DeadlineExceeded, Draining
from shardkv.limits import Limits
from shardkv.transport.server import SINGLY, TOGETHER_MAX, Server
from shardkv.wire.frame import FrameDecoder
from shardkv.wire.messages import (
    NOTHING,
    OK,
    Op,
    RawReply,
    Read,
    ReadReply,
    Reply,
    Request,
    decode_read,
    decode_read_reply,
    decode_replies,
    raw,
    reply_error,
)
from tests.shardkv.transport.test_server import HELLO, SERVER, Echo, frame


class Together(Echo):
    """READ gives the keys back, and says when it was the quick way, which stops before a key that begins with "no"."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[int] = []
        """How many reads were answered in each go."""

    def read_together(self, requests: Sequence[Request], until: float) -> tuple[list[Reply], int]:
        replies = []
        for request in requests:
            (key,) = decode_read(request.payload).keys
            if key.startswith(b"no"):
                break
            replies.append(Reply(request.id, OK, ReadReply([b"quick " + key])))
        self.runs.append(len(replies))
        return replies, 100 * len(replies)


class Talk:
    """A raw connection to a server of a `Together` that said hello."""

    def __init__(self, server: Server, service: Together, reader: asyncio.StreamReader, writer: asyncio.StreamWriter):
        self.server, self.service, self._reader, self._writer = server, service, reader, writer
        self._decoder = FrameDecoder(10**7)

    async def ask(self, *requests: Request, replies: int | None = None) -> list[RawReply]:
        """The replies to requests in one frame, as many as requests unless told."""
        self._writer.write(frame(*requests))
        heard: list[RawReply] = []
        async with asyncio.timeout(10):
            while len(heard) < (len(requests) if replies is None else replies):
                data = await self._reader.read(65536)
                assert data, f"the connection was closed after {heard}"
                heard += [reply for body in self._decoder.feed(data) for reply in decode_replies(body)[1]]
        return heard


@contextlib.asynccontextmanager
async def talk(limits: Limits | None = None) -> AsyncIterator[Talk]:
    service = Together()
    server = Server(service, me=lambda: SERVER, limits=limits or Limits(), read_together=service.read_together)
    port = await server.listen("127.0.0.1", 0)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        talking = Talk(server, service, reader, writer)
        await talking.ask(HELLO)
        yield talking
    finally:
        writer.close()
        await server.drain(grace_s=0)


def reads(*keys: bytes, deadline_ms: int | None = None) -> list[Request]:
    return [
        Request(number, Op.READ, 0, None, None, deadline_ms, raw(Read([key]))) for number, key in enumerate(keys, 1)
    ]


def values(replies: Sequence[RawReply]) -> list[bytes]:
    """The keys that were given back, by whichever way: the quick one is left while the machine is slow."""
    return [decode_read_reply(reply.payload).values[0].removeprefix(b"quick ") for reply in replies]


def quick(replies: Sequence[RawReply]) -> int:
    """How many of the replies came the quick way."""
    return sum(decode_read_reply(reply.payload).values[0].startswith(b"quick ") for reply in replies)


@pytest.mark.parametrize("in_flight", [10, 4096])
def test_many_reads_are_answered_in_few_goes(in_flight: int) -> None:
    async def main() -> None:
        async with talk(Limits(requests_in_flight_max=in_flight)) as peer:
            keys = [b"%d" % number for number in range(3 * TOGETHER_MAX + 5)]
            replies = await peer.ask(*reads(*keys, deadline_ms=60_000))
            assert [reply.id for reply in replies] == [*range(1, len(keys) + 1)]
            assert values(replies) == keys
            assert quick(replies) == sum(peer.service.runs) > 1
            assert len(peer.service.runs) <= quick(replies) // 2

    asyncio.run(main())


def test_what_cannot_be_answered_together_is_handed_over_and_so_are_some_after_it() -> None:
    async def main() -> None:
        async with talk() as peer:
            keys = [b"a", b"b", b"no", *(b"%d" % number for number in range(SINGLY + 9))]
            replies = await peer.ask(*reads(*keys))
            assert values(replies) == keys
            assert quick(replies) <= len(keys) - SINGLY

    asyncio.run(main())


def test_reads_behind_another_request_are_answered_together_later() -> None:
    async def main() -> None:
        async with talk() as peer:
            other = Request(999, Op.PING, 0, None, None, None, NOTHING)
            replies = await peer.ask(other, *reads(b"a", b"b"))
            assert [reply.id for reply in replies] == [999, 1, 2]
            while not quick(replies[1:]):
                replies = [replies[0], *await peer.ask(*reads(b"a", b"b"))]
            assert values(replies[1:]) == [b"a", b"b"]

    asyncio.run(main())


def test_a_read_whose_time_is_over_fails_among_others() -> None:
    async def main() -> None:
        async with talk() as peer:
            late = Request(99, Op.READ, 0, None, None, 0, raw(Read([b"late"])))
            replies = await peer.ask(*reads(b"a", b"b"), late)
            assert values(replies[:2]) == [b"a", b"b"]
            assert isinstance(reply_error(replies[2].payload), DeadlineExceeded)

    asyncio.run(main())


def test_an_id_is_free_again_once_it_is_answered_and_not_before() -> None:
    async def main() -> None:
        async with talk() as peer:
            replies = await peer.ask(*reads(b"a", b"b"), *reads(b"c", b"d"))
            assert values(replies) == [b"a", b"b", b"c", b"d"]
            held = Request(2, Op.META_READ, 0, None, None, None, NOTHING)
            await peer.ask(held, replies=0)
            first, refusal = await peer.ask(*reads(b"a", b"b", b"c"), replies=2)
            assert values([first]) == [b"a"]
            assert "2 is used twice" in reply_error(refusal.payload).message

    asyncio.run(main())


def test_a_server_that_drains_answers_nothing_together() -> None:
    async def main() -> None:
        async with talk() as peer:
            peer.server.draining = True
            replies = await peer.ask(*reads(b"a", b"b", b"c"))
            assert [type(reply_error(reply.payload)) for reply in replies] == [Draining] * 3
            assert peer.service.runs == []

    asyncio.run(main())
