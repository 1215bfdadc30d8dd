"""What connections owe each other: turns, and room in the process; and peers too slow with their part."""

from __future__ import annotations

import asyncio
import time

import pytest

from shardkv.limits import MIB, Limits
from shardkv.transport import farewell
from shardkv.transport import server as server_module
from shardkv.transport.outbox import encode_frames
from shardkv.transport.server import Connection
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    ERROR,
    FRAME_REQUESTS_MAX,
    OK,
    Op,
    Request,
    decode_requests,
    encode_batch,
    raw,
    reply_error,
)
from tests.shardkv.transport.test_server import until
from tests.shardkv.transport.test_server_time import Raw, asked, serve


@pytest.fixture(autouse=True)
def quick_sweeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "SWEEP_INTERVAL_S", 0.02)


def many(op: Op, numbers: range) -> list[Request]:
    return [asked(op, request_id=number) for number in numbers]


@pytest.mark.parametrize("frames", [1, 1000])
def test_a_flood_is_worked_in_turns_with_the_others(frames: int) -> None:
    async def main() -> None:
        server, service, flood = await serve()
        other = Raw(flood.port)
        await other.connect()
        done = 0

        def spin(connection: Connection, request: Request, deadline: float | None) -> None:
            nonlocal done
            until_s = time.perf_counter() + 0.0002
            while time.perf_counter() < until_s:
                pass
            done += 1
            connection.reply(request.id, None)

        service.on_request = spin  # type: ignore[method-assign]
        requests = many(Op.STATUS, range(1, 2001))
        size = len(requests) // frames
        data = b"".join(
            encode_frame(encode_batch(0, list(requests[at : at + size]))) for at in range(0, len(requests), size)
        )
        flood.writer.write(data)
        await until(lambda: done)
        began = done
        assert began < 1000, "nobody else got a turn before the flood was over"
        other.send(asked(Op.STATUS))
        assert (await other.reply()).status == OK
        assert done - began < 200, "the other waited for the flood's end"
        for _ in requests:
            assert (await flood.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


@pytest.mark.parametrize(("role", "begun"), [("client", 10), ("router", 50)])
def test_a_client_has_fewer_at_work_at_once_than_a_router(role: str, begun: int) -> None:
    async def main() -> None:
        server, service, first = await serve(Limits(client_requests_in_flight_max=10))
        peer = Raw(first.port)
        peer.reader, peer.writer = await asyncio.open_connection("127.0.0.1", first.port)
        peer.send(Request(0, Op.HELLO, 0, None, None, None, raw(Identity(role, "r").hello())))
        assert (await peer.reply()).status == OK
        peer.send(*many(Op.META_READ, range(1, 51)))
        await until(lambda: len(service.held) == begun)
        await asyncio.sleep(0.02)
        assert len(service.held) == begun
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_frame_of_too_many_requests_is_refused_before_it_is_decoded() -> None:
    async def main() -> None:
        server, _, client = await serve()
        client.send(*many(Op.PING, range(1, FRAME_REQUESTS_MAX + 1)))
        for _ in range(FRAME_REQUESTS_MAX):
            assert (await client.reply()).status == OK
        client.send(*many(Op.PING, range(1, FRAME_REQUESTS_MAX + 2)))
        refused = await client.reply()
        assert (refused.id, refused.status) == (0, ERROR)
        assert str(FRAME_REQUESTS_MAX) in reply_error(refused.payload).message
        assert await client.reader.read() == b""
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_peer_sends_no_frame_of_too_many_requests() -> None:
    requests = many(Op.PING, range(1, 3 * FRAME_REQUESTS_MAX))
    frames = encode_frames(0, list(requests), 100 * MIB)
    decoded = [decode_requests(body)[1] for each in frames for body in FrameDecoder(MIB).feed(each)]
    assert [request.id for batch in decoded for request in batch] == [request.id for request in requests]


def test_a_full_process_refuses_those_who_fill_it_and_serves_the_others() -> None:
    async def main() -> None:
        server, service, flood = await serve(Limits(process_requests_in_flight_max=10))
        modest = Raw(flood.port)
        await modest.connect()
        flood.send(*many(Op.META_READ, range(1, 16)))
        await until(lambda: server.admission.crowded)
        flood.send(asked(Op.META_READ, request_id=99))
        refused = await flood.reply()
        error = reply_error(refused.payload)
        assert (refused.id, error.code) == (99, "overloaded")
        assert 20 <= error.detail["retry_after_ms"] <= 5000
        modest.send(asked(Op.PING))
        assert (await modest.reply()).status == OK
        for connection, request_id in service.held:
            connection.reply(request_id, None)
        for _ in range(15):
            assert (await flood.reply()).status == OK
        await until(lambda: not server.admission.crowded)
        flood.send(asked(Op.PING, request_id=99))
        assert (await flood.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_unfinished_frames_are_finished_one_by_one_when_they_fill_the_process() -> None:
    async def main() -> None:
        server, _, first = await serve(Limits(process_bytes_in_flight_max=8 * MIB))
        clients = [first, *(Raw(first.port) for _ in range(4))]
        for client in clients[1:]:
            await client.connect()
        body = encode_batch(0, [Request(1, Op.PING, 0, None, None, None, raw(bytes(16 * MIB)))])
        for client in clients:
            client.writer.write(encode_frame(body)[:-1])
        await until(lambda: server.admission.crowded)
        await until(lambda: sum(connection._reading for connection in server.connections) == 1)
        assert server.admission.total.bytes < 60 * MIB
        for client in clients:
            client.writer.write(body[-1:])
        for client in clients:
            assert (await client.reply()).status == OK
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_frame_in_drops_is_given_up() -> None:
    async def main() -> None:
        server, _, slow = await serve(Limits(frame_timeout_ms=100))
        frame = encode_frame(encode_batch(0, [asked(Op.PING)]))
        for _ in range(2):
            slow.writer.write(frame)
            assert (await slow.reply()).status == OK
        await asyncio.sleep(0.15)
        slow.writer.write(encode_frame(bytes(2000))[:5])
        for _ in range(1000):
            slow.writer.write(b"\0")
            await asyncio.sleep(0.01)
            if not server.connections:
                break
        else:
            raise AssertionError("a frame that never ends was waited for")
        refused = await slow.reply()
        assert (refused.id, refused.status) == (0, ERROR)
        assert "not complete within 100 ms" in reply_error(refused.payload).message
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_frames_that_keep_coming_are_no_frame_that_never_ends() -> None:
    async def main() -> None:
        server, _, client = await serve(Limits(frame_timeout_ms=60))
        frame = encode_frame(encode_batch(0, [asked(Op.PING)]))
        client.writer.write(frame[:9])
        for _ in range(20):
            client.writer.write(frame[9:] + frame[:9])
            assert (await client.reply()).status == OK
            await asyncio.sleep(0.02)
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_who_takes_nothing_of_what_waits_for_it_is_cut_off() -> None:
    async def main() -> None:
        server, service, client = await serve(Limits(output_timeout_ms=150, frame_bytes_max=MIB))
        transport = client.writer.transport
        transport.pause_reading()  # type: ignore[attr-defined]
        client.send(*many(Op.META_READ, range(1, 16)))
        await until(lambda: len(service.held) == 15)
        for connection, request_id in service.held:
            connection.reply(request_id, bytes(800_000), size_bytes=800_000)
        await until(lambda: service.closed)
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_a_refused_peer_that_does_not_read_why_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(farewell, "LINGER_S", 0.05)

    async def main() -> None:
        server, service, client = await serve(Limits(frame_bytes_max=MIB))
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        client.send(*many(Op.META_READ, range(1, 16)))
        await until(lambda: len(service.held) == 15)
        for connection, request_id in service.held:
            connection.reply(request_id, bytes(800_000), size_bytes=800_000)
        client.writer.write(b"\xff\xff\xff\xff" + bytes(100))
        await until(lambda: server.lingering)
        assert not server.connections
        await until(lambda: not server.lingering)
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_who_is_refused_while_it_sends_can_still_read_why() -> None:
    async def main() -> None:
        server, _, client = await serve()
        client.writer.write(b"\xff\xff\xff\xff" + bytes(8 * MIB))
        await client.writer.drain()
        assert reply_error((await client.reply()).payload).code == "frame_too_large"
        assert await client.reader.read() == b""
        assert not server.connections
        client.writer.close()
        await until(lambda: not server.lingering)
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_replies_nobody_reads_are_bounded_for_the_process_too() -> None:
    async def main() -> None:
        limits = Limits(process_bytes_in_flight_max=8 * MIB, frame_bytes_max=MIB)
        server, service, first = await serve(limits)
        clients = [first, *(Raw(first.port) for _ in range(5))]
        for client in clients[1:]:
            await client.connect()
        for client in clients:
            client.writer.transport.pause_reading()  # type: ignore[attr-defined]
            client.send(*many(Op.META_READ, range(1, 16)))
        await until(lambda: len(service.held) == 90)
        for connection, request_id in service.held:
            connection.reply(request_id, bytes(800_000), size_bytes=800_000)
        await until(lambda: service.closed and not server.admission.unread_too_much)
        assert server.connections
        await server.drain(grace_s=0)

    asyncio.run(main())
