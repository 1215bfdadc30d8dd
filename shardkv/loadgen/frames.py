"""Our own protocol as a load speaks it, to a router or straight to a node. Pure.

Replies come in any order and are counted, not decoded: those of an exchange are alike in size and begin alike, so a
frame of n of them has a known length and n places that look so. A frame that does not add up, and every frame of
each CHECK_EVERY-th exchange, is decoded and compared in full.

Invariant: an error, or a value of another size, never passes for an answer.
"""

from __future__ import annotations

from collections.abc import Sequence

from shardkv.errors import ShardKVError
from shardkv.limits import DEFAULT_LIMITS
from shardkv.loadgen.exchange import Exchange, WrongReply
from shardkv.topology.documents import ShardDocument
from shardkv.topology.view import KeyspaceView
from shardkv.wire.frame import HEADER_BYTES, FrameDecoder, encode_frame
from shardkv.wire.hello import Identity
from shardkv.wire.messages import (
    OK,
    Context,
    Kind,
    Op,
    RawReply,
    Read,
    ReadReply,
    Reply,
    Request,
    Write,
    WriteReply,
    WriteResult,
    decode_any,
    decode_read_reply,
    decode_replies,
    decode_write_reply,
    encode,
    encode_batch,
    raw,
    reply_error,
)

CTX = 1
FIRST_ID = 1 << 16
"""Ids from here on take five bytes, as those of a connection that has been in use for a while; they are used again
by the next exchange."""
DEADLINE_MS = 5_000
"""What our clients ask for by default."""
CHECK_EVERY = 64
_CLOCK = 1 << 56
"""As long as any clock and long past, so that it moves none."""
_CLOCK_BYTES = 9
_SOME_VERSION = 1 << 40


class Expected:
    """The replies to an exchange: how many, and what each must be. `values` None: of writes."""

    __slots__ = ("count", "marker", "reply_bytes", "values")

    def __init__(self, count: int, sample: Reply, varies: bytes, values: Sequence[bytes] | None) -> None:
        """`varies`: what of the sample, beside its id, is not the same in all replies."""
        shown = encode(sample)
        self.count = count
        self.reply_bytes = len(shown)
        self.marker = shown[_ID_END : shown.index(varies, _ID_END)]
        self.values = values


_ID_END = 1 + 5
"""A reply begins with the array's byte and its id."""
_WRITTEN = Reply(FIRST_ID, OK, WriteReply(bytes((WriteResult.APPLIED,)), _SOME_VERSION, []))
_VERSION = encode(_SOME_VERSION)[1:]


class FrameReader:
    """Counts the replies on one connection."""

    __slots__ = ("_answered", "_decoder", "_exchanges")

    def __init__(self) -> None:
        self._decoder = FrameDecoder(DEFAULT_LIMITS.frame_bytes_max)
        self._answered = 0
        self._exchanges = 0

    def take(self, data: bytes, expected: Expected) -> bool:
        try:
            for body in self._decoder.feed(data):
                self._answered += self._count(body, expected)
        except ShardKVError as error:
            raise WrongReply(f"The server answered: {error.message}") from error
        if self._answered < expected.count:
            return False
        if self._answered > expected.count:
            raise WrongReply(f"The server answered {expected.count} requests with {self._answered} replies.")
        self._answered = 0
        self._exchanges += 1
        return True

    def _count(self, body: bytes, expected: Expected) -> int:
        if self._exchanges % CHECK_EVERY:
            count = body.count(expected.marker)
            if len(body) == 1 + _CLOCK_BYTES + (1 if count < 16 else 3) + count * expected.reply_bytes:
                return count
        return check_replies(body, expected)


def check_replies(body: bytes, expected: Expected) -> int:
    """How many replies the body holds. Raises WrongReply unless each is what it must be."""
    replies = decode_replies(body)[1]
    for reply in replies:
        if reply.status != OK:
            raise reply_error(reply.payload)
        if not _is_right(reply, expected):
            raise WrongReply(f"The server answered request {reply.id} with {decode_any(reply.payload)!r}.")
    return len(replies)


def _is_right(reply: RawReply, expected: Expected) -> bool:
    if reply.id < FIRST_ID:
        return True
    if expected.values is not None:
        index = reply.id - FIRST_ID
        return index < expected.count and decode_read_reply(reply.payload).values == [expected.values[index]]
    written: WriteReply = decode_write_reply(reply.payload)
    return written.results == bytes((WriteResult.APPLIED,)) and not written.problems


class Frames:
    """A router; with `shards` a node that owns these shards of a hash keyspace."""

    def __init__(self, keyspace: str = "default", shards: Sequence[ShardDocument] | None = None) -> None:
        self._keyspace = keyspace
        self._view = None if shards is None else KeyspaceView(keyspace, "hash", shards)

    def greetings(self) -> list[Exchange]:
        hello = raw(Identity("client", "bench").hello())
        context = raw(Context(CTX, self._keyspace, None, None))
        requests = [
            Request(0, Op.HELLO, 0, None, None, None, hello),
            Request(1, Op.CONTEXT, 0, None, None, None, context),
        ]
        expected = Expected(1, _WRITTEN, _VERSION, None)
        return [Exchange(_frame([request]), expected, 4096) for request in requests]

    def set_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        writes = [
            self._request(index, Op.WRITE, key, Write(None, None, Kind.PUT, [key], [value], want_existed=False))
            for index, (key, value) in enumerate(zip(keys, values, strict=True))
        ]
        return _exchange(writes, Expected(len(keys), _WRITTEN, _VERSION, None))

    def get_keys(self, keys: Sequence[bytes], values: Sequence[bytes]) -> Exchange:
        reads = [self._request(index, Op.READ, key, Read([key])) for index, key in enumerate(keys)]
        sample = Reply(FIRST_ID, OK, ReadReply([values[0]]))
        return _exchange(reads, Expected(len(keys), sample, values[0], values))

    def reader(self) -> FrameReader:
        return FrameReader()

    def _request(self, index: int, op: Op, key: bytes, payload: Read | Write) -> Request:
        shard = None if self._view is None else self._view.shard_for(key)
        shard_id, epoch = (None, None) if shard is None else (shard.id, shard.epoch)
        return Request(FIRST_ID + index, op, CTX, shard_id, epoch, DEADLINE_MS, raw(payload))


def _exchange(requests: list[Request], expected: Expected) -> Exchange:
    reply_bytes = HEADER_BYTES + _CLOCK_BYTES + 4 + expected.count * expected.reply_bytes
    return Exchange(_frame(requests), expected, reply_bytes)


def _frame(requests: list[Request]) -> bytes:
    return encode_frame(encode_batch(_CLOCK, requests))
