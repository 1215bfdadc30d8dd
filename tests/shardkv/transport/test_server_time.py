"""What time does to a server's requests and connections: deadlines, late answers, drains, and a sweep that goes on."""

from __future__ import annotations

import asyncio

import pytest

from shardkv.limits import Limits
from shardkv.transport import server as server_module
from shardkv.transport.server import Server
from shardkv.wire.frame import FrameDecoder
from shardkv.wire.messages import (
    ERROR,
    NOTHING,
    OK,
    Op,
    RawReply,
    Request,
    decode_replies,
    reply_error,
)
from tests.shardkv.transport.test_server import HELLO, SERVER, Echo, frame, until


class Raw:
    """A client that chooses its own ids."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.replies: list[RawReply] = []
        self._decoder = FrameDecoder(10**9)

    async def connect(self) -> None:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        self.writer.write(frame(HELLO))
        assert (await self.reply()).status == OK

    def send(self, *requests: Request) -> None:
        self.writer.write(frame(*requests))

    async def reply(self) -> RawReply:
        async with asyncio.timeout(5):
            while not self.replies:
                data = await self.reader.read(65536)
                assert data, "the connection was closed"
                self.replies += [reply for body in self._decoder.feed(data) for reply in decode_replies(body)[1]]
        return self.replies.pop(0)


def asked(op: Op, *, request_id: int = 1, ms: int | None = None) -> Request:
    return Request(request_id, op, 0, None, None, ms, NOTHING)


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_INTERVAL_S", 0.02)


async def serve(limits: Limits | None = None) -> tuple[Server, Echo, Raw]:
    service = Echo()
    server = Server(service, me=lambda: SERVER, limits=limits or Limits())
    client = Raw(await server.listen("127.0.0.1", 0))
    await client.connect()
    return server, service, client


def test_a_late_answer_is_never_taken_for_that_of_another_request() -> None:
    async def main() -> None:
        server, service, client = await serve()
        client.send(asked(Op.META_READ, ms=30))
        assert reply_error((await client.reply()).payload).code == "deadline_exceeded"
        client.send(asked(Op.META_READ))
        refused = await client.reply()
        assert (refused.id, refused.status) == (0, ERROR)
        connection, request_id = service.held[0]
        connection.reply(request_id, b"late")
        assert not client.replies
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_an_id_is_free_again_once_its_work_has_really_ended() -> None:
    async def main() -> None:
        server, service, client = await serve()
        client.send(asked(Op.META_READ, ms=30))
        assert (await client.reply()).status == ERROR
        connection, request_id = service.held[0]
        connection.reply(request_id, b"late")
        client.send(asked(Op.PING))
        reply = await client.reply()
        assert (reply.id, reply.status, bytes(reply.payload)) == (1, OK, bytes(NOTHING))
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_write_that_ran_out_of_time_is_unknown_and_a_read_is_not() -> None:
    async def main() -> None:
        server, service, client = await serve()
        service.on_request = lambda *_: None  # type: ignore[method-assign]
        client.send(asked(Op.WRITE, request_id=1, ms=30), asked(Op.READ, request_id=2, ms=30))
        codes = {reply.id: reply_error(reply.payload).code for reply in [await client.reply(), await client.reply()]}
        assert codes == {1: "outcome_unknown", 2: "deadline_exceeded"}
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_request_that_waited_past_its_deadline_is_not_begun() -> None:
    async def main() -> None:
        server, service, client = await serve(Limits(requests_in_flight_max=1))
        client.send(asked(Op.META_READ, request_id=1), asked(Op.META_READ, request_id=2, ms=50))
        await until(lambda: service.held)
        await asyncio.sleep(0.1)
        connection, request_id = service.held[0]
        connection.reply(request_id, None)
        replies = {reply.id: reply for reply in [await client.reply(), await client.reply()]}
        assert reply_error(replies[2].payload).code == "deadline_exceeded"
        assert len(service.held) == 1
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_drain_waits_until_what_was_answered_is_sent() -> None:
    async def main() -> None:
        server, _, client = await serve()
        client.send(*(asked(Op.SCAN, request_id=number) for number in range(1, 101)))
        (connection,) = server.connections
        transport = connection._transport
        assert transport is not None
        await until(lambda: transport.get_write_buffer_size() and connection.in_flight == 1)
        draining = asyncio.ensure_future(server.drain(grace_s=5))
        for _ in range(100):
            assert (await client.reply()).status == OK
        await draining
        assert transport.get_write_buffer_size() == 0

    asyncio.run(main())


def test_the_drain_does_not_end_before_the_last_byte_left() -> None:
    async def main() -> None:
        server, _, client = await serve()
        client.send(*(asked(Op.SCAN, request_id=number) for number in range(1, 101)))
        (connection,) = server.connections
        transport = connection._transport
        assert transport is not None
        await until(lambda: transport.get_write_buffer_size() and connection.in_flight == 1)
        draining = asyncio.ensure_future(server.drain(grace_s=5))
        await asyncio.sleep(0.05)
        assert not draining.done()
        client.writer.close()
        await draining

    asyncio.run(main())


def test_a_failure_in_one_sweep_does_not_end_all_sweeping() -> None:
    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        server, _, client = await serve()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server_module.Connection, "sweep", lambda connection, now: 1 / 0)
            await asyncio.sleep(0.05)
        client.send(asked(Op.META_READ, ms=30))
        assert reply_error((await client.reply()).payload).code == "deadline_exceeded"
        await server.drain(grace_s=0)

    asyncio.run(main())
