"""What one peer may cost a server: requests in flight, answers it does not read, connections, idleness."""

from __future__ import annotations

import asyncio

import pytest

from shardkv.errors import OutcomeUnknown
from shardkv.limits import MIB, Limits
from shardkv.transport import server as server_module
from shardkv.wire.hello import Identity
from shardkv.wire.messages import OK, Op, Read, Request, raw, reply_error
from tests.shardkv.transport.test_server import until, world
from tests.shardkv.transport.test_server_time import Raw, asked, serve


def test_bytes_in_flight_are_bounded_and_go_on_when_answered() -> None:
    async def main() -> None:
        server, service, client = await serve(Limits(bytes_in_flight_max=100_000))
        for number in range(1, 11):
            client.send(Request(number, Op.META_READ, 0, None, None, None, raw(b"x" * 30_000)))
        await until(lambda: service.held)
        await asyncio.sleep(0.05)
        assert len(service.held) == 4
        answered = 0
        while answered < 10:
            await until(lambda: service.held)
            connection, request_id = service.held.pop(0)
            connection.reply(request_id, None)
            assert (await client.reply()).status == OK
            answered += 1
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_peer_that_reads_late_is_served_no_faster_than_it_reads() -> None:
    async def main() -> None:
        server, service, client = await serve(Limits(output_bytes_max=16 * MIB, frame_bytes_max=MIB))
        value = b"x" * 200_000
        service.on_request = lambda connection, request, deadline: connection.reply(  # type: ignore[method-assign]
            request.id, value, size_bytes=len(value)
        )
        client.send(*(asked(Op.SCAN, request_id=number) for number in range(1, 201)))
        (connection,) = server.connections
        transport = connection._transport
        assert transport is not None
        await until(lambda: transport.get_write_buffer_size())
        await asyncio.sleep(0.05)
        assert transport.get_write_buffer_size() < 10 * MIB
        assert connection._waiting
        for _ in range(200):
            assert (await client.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_peer_that_leaves_too_much_unread_is_closed() -> None:
    async def main() -> None:
        server, service, client = await serve(Limits(output_bytes_max=MIB, frame_bytes_max=MIB))
        client.send(*(asked(Op.META_READ, request_id=number) for number in range(1, 16)))
        await until(lambda: len(service.held) == 15)
        for connection, request_id in service.held:
            connection.reply(request_id, b"x" * 800_000, size_bytes=800_000)
        await until(lambda: service.closed)
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_one_connection_too_many_is_told_so_and_closed() -> None:
    async def main() -> None:
        server, _, first = await serve(Limits(connections_max=1))
        second = Raw(first.port)
        second.reader, second.writer = await asyncio.open_connection("127.0.0.1", first.port)
        assert reply_error((await second.reply()).payload).code == "overloaded"
        assert await second.reader.read() == b""
        first.send(asked(Op.PING))
        assert (await first.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_who_says_nothing_for_long_is_closed_unless_an_answer_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_INTERVAL_S", 0.02)

    async def main() -> None:
        server, service, waiting = await serve(Limits(idle_timeout_ms=80))
        waiting.send(asked(Op.META_READ))
        silent = Raw(waiting.port)
        await silent.connect()
        async with asyncio.timeout(2):
            assert await silent.reader.read() == b""
        await asyncio.sleep(0.1)
        connection, request_id = service.held[0]
        connection.reply(request_id, None)
        assert (await waiting.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_what_a_server_refused_a_connection_for_reaches_those_who_waited() -> None:
    async def main() -> None:
        async with world() as w, w.peer(Identity("client", "test")) as peer:
            waiting = asyncio.create_task(peer.call(Op.META_READ, None, timeout_s=5))
            await until(lambda: w.service.held)
            with pytest.raises(OutcomeUnknown, match="the limit here is 100000 bytes"):
                await peer.call(Op.READ, Read([b"k" * 200_000]), timeout_s=5)
            with pytest.raises(OutcomeUnknown, match="the limit here is 100000 bytes"):
                await waiting

    asyncio.run(main())
