"""Hostile and broken bodies are refused with the right error, before they cost memory."""

import tracemalloc

import msgpack
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardkv.errors import BY_CODE, InvalidArgument, KeyTooLarge, RemoteProtocolError, ShardKVError
from shardkv.wire.messages import (
    ERROR,
    Op,
    Read,
    Request,
    decode_count,
    decode_delete_range,
    decode_meta_read,
    decode_read,
    decode_replies,
    decode_requests,
    decode_write,
    encode_batch,
    error_reply,
    raw,
    reply_error,
)

NIL_ARRAY_BOMB = b"\x92\x05\xdd\x00\xff\xff\xff" + b"\xc0" * 0xFFFFFF
REQUEST_OPENING = b"\x92\x05\x91\x97\x01\x0a\x00\xc0\xc0\xc0"
NESTED = REQUEST_OPENING + b"\x91" * 1_000_000
MAP_BOMB_PAYLOAD = REQUEST_OPENING + b"\x91\xdd\x00\xff\xff\xff" + b"\x80" * 0xFFFFFF


def test_what_is_encoded_is_decoded() -> None:
    request = Request(9, Op.READ, 1, 4, 2, 250, raw(Read([b"a", b"b"])))
    clock, (found,) = decode_requests(encode_batch(77, [request]))
    assert clock == 77
    assert (found.id, found.op, found.ctx, found.shard, found.epoch, found.deadline_ms) == (9, 10, 1, 4, 2, 250)
    assert decode_read(found.payload).keys == [b"a", b"b"]


def test_the_wire_is_plain_msgpack() -> None:
    body = encode_batch(5, [Request(1, Op.READ, 0, None, None, None, raw(Read([b"k"])))])
    assert msgpack.unpackb(body) == [5, [[1, 10, 0, None, None, None, [[b"k"], False]]]]


@pytest.mark.parametrize("bomb", [NIL_ARRAY_BOMB, NESTED], ids=["array of nil", "deep nesting"])
def test_a_bomb_in_the_envelope_is_refused_without_building_it(bomb: bytes) -> None:
    tracemalloc.start()
    with pytest.raises(RemoteProtocolError, match="not a batch of requests"):
        decode_requests(bomb)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


def test_a_bomb_in_a_payload_is_refused_without_building_it() -> None:
    _, (request,) = decode_requests(MAP_BOMB_PAYLOAD)
    tracemalloc.start()
    with pytest.raises(InvalidArgument, match="payload of a read request is malformed"):
        decode_read(request.payload)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


@given(st.binary(max_size=200))
def test_garbage_raises_nothing_but_protocol_errors(body: bytes) -> None:
    for decode in (decode_requests, decode_replies):
        try:
            decode(body)
        except RemoteProtocolError as error:
            assert error.message.startswith("A frame is not a batch")


@pytest.mark.parametrize("text", [b"\xa2\xff\xfe", b"\xa3\xed\xa0\x80"], ids=["not UTF-8", "surrogate"])
def test_text_that_is_not_utf_8_is_an_invalid_argument(text: bytes) -> None:
    with pytest.raises(InvalidArgument, match="payload of a metaread request is malformed"):
        decode_meta_read(msgspec.Raw(b"\x91" + text))


@given(st.recursive(st.none() | st.integers(-(2**63), 2**63) | st.binary(max_size=20), st.lists, max_leaves=20))
def test_wrong_types_in_a_payload_are_invalid_arguments(value: object) -> None:
    for decode in (decode_read, decode_write, decode_count, decode_delete_range):
        try:
            decode(raw(value))
        except InvalidArgument as error:
            assert "malformed" in error.message


@pytest.mark.parametrize("code", sorted(BY_CODE))
def test_every_error_survives_the_wire(code: str) -> None:
    cls = BY_CODE[code]
    sent = cls.__new__(cls)
    ShardKVError.__init__(sent, "It happened.", detail={"shard": 3}, hint="Do this.")
    _, (reply,) = decode_replies(encode_batch(0, [error_reply(1, sent)]))
    assert reply.status == ERROR
    found = reply_error(reply.payload)
    assert type(found) is cls
    assert (found.message, found.detail, found.hint) == ("It happened.", {"shard": 3}, "Do this.")
    assert str(found) == "It happened. Do this."


def test_an_unknown_code_is_a_plain_error() -> None:
    error = KeyTooLarge("x")
    reply = error_reply(1, error)
    reply.payload.code = "of_the_future"
    _, (found,) = decode_replies(encode_batch(0, [reply]))
    assert type(reply_error(found.payload)) is ShardKVError
