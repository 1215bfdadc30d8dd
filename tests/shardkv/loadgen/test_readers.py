"""What the generator sends is what each server understands, and it takes no wrong answer for a right one."""

from __future__ import annotations

import re

import pytest

from shardkv.errors import InvalidArgument
from shardkv.loadgen.exchange import Exchange, ReplyReader, WrongReply
from shardkv.loadgen.frames import CHECK_EVERY, CTX, FIRST_ID, Frames
from shardkv.loadgen.resp import Resp
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import KeyspaceView
from shardkv.wire.frame import FrameDecoder, encode_frame
from shardkv.wire.messages import (
    OK,
    Kind,
    Op,
    ReadReply,
    Reply,
    Request,
    WriteReply,
    decode_read,
    decode_requests,
    decode_write,
    encode_batch,
    error_reply,
)

KEYS = [b"bench:%010d" % number for number in range(20)]
VALUES = [b"value-%02d\r\n" % number for number in range(20)]
CLOCK = 1 << 60
VERSION = 5 << 40
REFUSED = error_reply(FIRST_ID + 3, InvalidArgument("No."))


def frames_of(*replies: list[Reply]) -> bytes:
    return b"".join(encode_frame(encode_batch(CLOCK, part)) for part in replies)


def read_replies() -> list[Reply]:
    return [Reply(FIRST_ID + index, OK, ReadReply([value])) for index, value in enumerate(VALUES)]


def write_replies() -> list[Reply]:
    return [Reply(FIRST_ID + index, OK, WriteReply(b"\0", VERSION + index, [])) for index in range(len(KEYS))]


def answered_at(reader: ReplyReader, exchange: Exchange, pieces: list[bytes]) -> list[int]:
    """After which of the pieces the exchange was answered."""
    return [index for index, piece in enumerate(pieces) if reader.take(piece, exchange.expected)]


def requests_of(exchange: Exchange) -> list[Request]:
    (body,) = FrameDecoder(1 << 20).feed(exchange.request)
    return decode_requests(body)[1]


def after(exchanges: int, reader: ReplyReader, exchange: Exchange, answer: bytes) -> ReplyReader:
    """The reader when so many exchanges were answered."""
    for _ in range(exchanges):
        assert reader.take(answer, exchange.expected)
    return reader


# What is sent


def test_resp_requests():
    resp = Resp()
    assert resp.set_keys([b"k", b"kk"], [b"v", b""]).request == (
        b"*3\r\n$3\r\nSET\r\n$1\r\nk\r\n$1\r\nv\r\n*3\r\n$3\r\nSET\r\n$2\r\nkk\r\n$0\r\n\r\n"
    )
    assert resp.get_keys([b"k"], [b"v"]).request == b"*2\r\n$3\r\nGET\r\n$1\r\nk\r\n"
    assert resp.greetings() == []
    asked = [exchange.request.split(b"\r\n")[2::2] for exchange in Resp("me", "secret", 3).greetings()]
    assert asked == [[b"AUTH", b"me", b"secret"], [b"SELECT", b"3"]]


def test_requests_to_a_router():
    requests = requests_of(Frames().set_keys(KEYS, VALUES))
    assert [request.id for request in requests] == [FIRST_ID + index for index in range(len(KEYS))]
    assert {(one.op, one.ctx, one.shard, one.epoch) for one in requests} == {(Op.WRITE, CTX, None, None)}
    written = [decode_write(request.payload) for request in requests]
    assert [(one.kinds, one.keys, one.values) for one in written] == [
        (Kind.PUT, [key], [value]) for key, value in zip(KEYS, VALUES, strict=True)
    ]
    assert [decode_read(one.payload).keys for one in requests_of(Frames().get_keys(KEYS, VALUES))] == [
        [key] for key in KEYS
    ]


def test_requests_to_a_node_name_shard_and_epoch():
    shards = [
        ShardDocument(id=4, keyspace="default", start=0, stop=1 << 63, epoch=2, node="node-1"),
        ShardDocument(id=9, keyspace="default", start=1 << 63, stop=None, epoch=7, node="node-1"),
    ]
    view = KeyspaceView("default", "hash", shards)
    placed = [(one.shard, one.epoch) for one in requests_of(Frames(shards=shards).get_keys(KEYS, VALUES))]
    assert placed == [(shard.id, shard.epoch) for shard in map(view.shard_for, KEYS)]
    assert set(placed) == {(4, 2), (9, 7)}


# What comes back

EXCHANGES = {
    "resp set": (Resp(), "set", b"+OK\r\n" * len(KEYS)),
    "resp get": (Resp(), "get", b"".join(b"$%d\r\n%s\r\n" % (len(value), value) for value in VALUES)),
    "frames set": (Frames(), "set", frames_of(write_replies())),
    "frames get": (Frames(), "get", frames_of(read_replies())),
    "frames get, out of order, in three": (
        Frames(), "get", frames_of(read_replies()[12:], read_replies()[:1], read_replies()[1:12])
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize("before", [0, 1])
def test_answers_are_counted_however_they_are_cut(name, before):
    """`before` 1: not the first exchange, so replies of ours are counted rather than decoded."""
    dialect, operation, answer = EXCHANGES[name]
    exchange = dialect.set_keys(KEYS, VALUES) if operation == "set" else dialect.get_keys(KEYS, VALUES)
    for step in (1, 2, 7, len(answer)):
        reader = after(before, dialect.reader(), exchange, answer)
        pieces = [answer[at : at + step] for at in range(0, len(answer), step)]
        assert answered_at(reader, exchange, pieces * 2) == [len(pieces) - 1, 2 * len(pieces) - 1]


def test_a_reader_says_about_how_much_to_read():
    for dialect, operation, answer in EXCHANGES.values():
        exchange = dialect.set_keys(KEYS, VALUES) if operation == "set" else dialect.get_keys(KEYS, VALUES)
        assert len(answer) * 0.7 < exchange.reply_bytes < len(answer) * 1.3


@pytest.mark.parametrize("step", [1, 1000])
@pytest.mark.parametrize("wrong", [b"-OOM no room\r\n", b":1\r\n", b"$-1\r\n"])
def test_wrong_resp_replies_to_a_write(wrong, step):
    reader, exchange = Resp().reader(), Resp().set_keys(KEYS, VALUES)
    answer = b"+OK\r\n" * 3 + wrong
    with pytest.raises(WrongReply, match=re.escape(f"The server answered b'{wrong[:1].decode()}")):
        for at in range(0, len(answer), step):
            assert not reader.take(answer[at : at + step], exchange.expected)


def test_more_resp_replies_than_requests():
    reader, exchange = Resp().reader(), Resp().set_keys(KEYS, VALUES)
    with pytest.raises(WrongReply):
        reader.take(b"+OK\r\n" * (len(KEYS) + 1), exchange.expected)


@pytest.mark.parametrize("wrong", [b"$-1\r\n", b"$10\r\nvalue-99\r\n\r\n", b"-MOVED 1 127.0.0.1:1\r\n"])
def test_wrong_resp_replies_to_a_read(wrong):
    reader, exchange = Resp().reader(), Resp().get_keys(KEYS, VALUES)
    with pytest.raises(WrongReply):
        reader.take(b"$10\r\n%s\r\n" % VALUES[0] + wrong, exchange.expected)


def with_one(replies: list[Reply], index: int, other: Reply) -> bytes:
    return frames_of([*replies[:index], other, *replies[index + 1 :]])


UNKNOWN = Reply(FIRST_ID + 3, OK, WriteReply(b"\3", VERSION, []))
ABSENT = Reply(FIRST_ID + 3, OK, ReadReply([None]))
LONGER = Reply(FIRST_ID + 3, OK, ReadReply([VALUES[3] + b"x"]))
OTHER = Reply(FIRST_ID + 3, OK, ReadReply([VALUES[4]]))


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize(
    ("operation", "answer", "told"),
    [
        ("set", with_one(write_replies(), 3, REFUSED), r"No\."),
        ("set", with_one(write_replies(), 3, UNKNOWN), f"request {FIRST_ID + 3}"),
        ("set", frames_of(write_replies(), [write_replies()[0]]), "20 requests with 21 replies"),
        ("get", with_one(read_replies(), 3, REFUSED), r"No\."),
        ("get", with_one(read_replies(), 3, ABSENT), "None"),
        ("get", with_one(read_replies(), 3, LONGER), "value-03"),
        ("get", b"\xff\xff\xff\xff", "4294967295 bytes"),
        ("get", b"\0\0\0\1\xc1", "not a batch of replys"),
    ],
)
def test_wrong_replies_in_frames(before, operation, answer, told):
    dialect = Frames()
    exchange = dialect.set_keys(KEYS, VALUES) if operation == "set" else dialect.get_keys(KEYS, VALUES)
    right = frames_of(write_replies() if operation == "set" else read_replies())
    reader = after(before, dialect.reader(), exchange, right)
    with pytest.raises(WrongReply, match=told):
        reader.take(answer, exchange.expected)


def test_the_values_of_every_so_many_exchanges_are_compared():
    dialect, exchange = Frames(), Frames().get_keys(KEYS, VALUES)
    counted = after(1, dialect.reader(), exchange, frames_of(read_replies()))
    assert counted.take(with_one(read_replies(), 3, OTHER), exchange.expected)
    reader = after(CHECK_EVERY, dialect.reader(), exchange, frames_of(read_replies()))
    with pytest.raises(WrongReply, match="value-04"):
        reader.take(with_one(read_replies(), 3, OTHER), exchange.expected)
