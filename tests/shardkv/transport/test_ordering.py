"""What a pipeline on one key means: nothing by default, the order of sending on a connection that asked for it."""

from __future__ import annotations

import asyncio

import pytest

from shardkv.transport.ordering import KeyOrder
from shardkv.transport.server import Connection, Server
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    OK,
    Hello,
    Op,
    RawReply,
    Read,
    ReadReply,
    Request,
    Scan,
    Write,
    WriteReply,
    decode_hello,
    decode_read,
    decode_read_reply,
    decode_write,
    raw,
)
from tests.shardkv.transport.test_server import SERVER, frame, until
from tests.shardkv.transport.test_server_time import Raw


def read(request_id: int, *keys: bytes) -> Request:
    return Request(request_id, Op.READ, 0, None, None, None, raw(Read(list(keys))))


def write(request_id: int, *keys: bytes, value: bytes = b"v") -> Request:
    payload = raw(Write(None, None, 1, list(keys), [value] * len(keys), False))
    return Request(request_id, Op.WRITE, 0, None, None, None, payload)


def scan(request_id: int) -> Request:
    return Request(request_id, Op.SCAN, 0, None, None, None, raw(Scan(b"", None, False, False, 1, 1, None)))


@pytest.mark.parametrize(
    ("first", "second", "together"),
    [
        (read(1, b"a"), read(2, b"a"), True),
        (read(1, b"a"), write(2, b"a"), False),
        (write(1, b"a"), read(2, b"a"), False),
        (write(1, b"a"), write(2, b"a"), False),
        (write(1, b"a", b"b"), read(2, b"c", b"b"), False),
        (write(1, b"a", b"b"), write(2, b"c", b"d"), True),
        (scan(1), read(2, b"a"), False),
        (write(1, b"a"), scan(2), False),
        (write(1, b"a"), Request(2, Op.PING, 0, None, None, None, raw(None)), True),
        (write(1, b"a"), Request(2, Op.READ, 0, None, None, None, raw("no read")), True),
    ],
)
def test_what_may_be_at_work_together(first: Request, second: Request, together: bool) -> None:
    order = KeyOrder()
    assert order.begin(first)
    assert order.begin(second) is together
    order.ended(first.id)
    assert together or order.begin(second)


def test_nothing_is_left_when_all_was_answered() -> None:
    order = KeyOrder()
    for asked in (write(1, b"a", b"a"), read(2, b"b"), read(3, b"b")):
        assert order.begin(asked)
    for request_id in (3, 1, 2, 77):
        order.ended(request_id)
    assert order.begin(scan(4))
    assert not order._touched
    assert not order._writes


class Held:
    """Writes are applied and answered when the test says so; reads at once."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.held: list[tuple[Connection, Request]] = []

    def on_request(self, connection: Connection, request: Request, deadline: float | None) -> None:
        if request.op == Op.WRITE:
            self.held.append((connection, request))
        else:
            keys = decode_read(request.payload).keys
            connection.reply(request.id, ReadReply([self.values.get(key) for key in keys]))

    def apply(self) -> None:
        connection, request = self.held.pop(0)
        asked = decode_write(request.payload)
        self.values.update(zip(asked.keys, asked.values, strict=True))
        connection.reply(request.id, WriteReply(b"\0", 1, []))

    def on_batch_end(self, connection: Connection) -> None: ...

    def on_closed(self, connection: Connection) -> None: ...


async def connect(port: int, *, ordered: bool) -> tuple[Raw, Hello]:
    client = Raw(port)
    client.reader, client.writer = await asyncio.open_connection("127.0.0.1", port)
    greeting = raw(Identity("client", "raw").hello(ordered=ordered))
    client.writer.write(frame(Request(0, Op.HELLO, 0, None, None, None, greeting)))
    hello: Hello = decode_hello((await client.reply()).payload)
    return client, hello


def value(reply: RawReply) -> bytes | None:
    assert reply.status == OK
    (found,) = decode_read_reply(reply.payload).values
    assert found is None or isinstance(found, bytes)
    return found


PIPELINE = [write(1, b"k", value=b"1"), read(2, b"k"), write(3, b"k", value=b"2"), read(4, b"k"), read(5, b"other")]


def test_by_default_a_read_does_not_wait_for_the_write_before_it() -> None:
    async def main() -> None:
        service = Held()
        server = Server(service, me=lambda: SERVER)
        client, hello = await connect(await server.listen("127.0.0.1", 0), ordered=False)
        assert not hello.ordered
        client.send(*PIPELINE)
        replies = {reply.id: value(reply) for reply in [await client.reply() for _ in range(3)]}
        assert replies == {2: None, 4: None, 5: None}
        assert len(service.held) == 2
        await server.drain(grace_s=0)

    asyncio.run(main())


def test_an_ordered_connection_does_each_key_in_the_order_of_sending() -> None:
    async def main() -> None:
        service = Held()
        server = Server(service, me=lambda: SERVER)
        client, hello = await connect(await server.listen("127.0.0.1", 0), ordered=True)
        assert hello.ordered
        client.send(write(9, b"other"), *PIPELINE)
        seen = []
        for expected in (2, 1):
            await until(lambda count=expected: len(service.held) == count)
            while service.held:
                service.apply()
        for _ in range(6):
            reply = await client.reply()
            seen.append((reply.id, value(reply) if reply.id in (2, 4, 5) else b""))
        assert [one for one in seen if one[0] < 5] == [(1, b""), (2, b"1"), (3, b""), (4, b"2")]
        assert (5, b"v") in seen
        await server.drain(grace_s=0)

    asyncio.run(main())
