"""Frames decoded in one go with their payloads: nothing but the expected answer is taken."""

from __future__ import annotations

import msgspec
import pytest

from shardkv.client.answers import DecodeAnswer, decode_page_answer, decode_read_answer, decode_write_answer
from shardkv.errors import Overloaded
from shardkv.wire.messages import OK, UNDECODABLE, Page, RawReply, ReadReply, WriteReply, encode_batch, error_reply, raw

EXPECTED = [
    (decode_read_answer, ReadReply([b"v", None], [1, 0])),
    (decode_write_answer, WriteReply(b"\0\1", 7, [])),
    (decode_page_answer, Page([b"k"], [b"v"], b"l", None)),
]


@pytest.mark.parametrize(("decode", "reply"), EXPECTED)
def test_the_expected_answer_is_decoded_whole(decode: DecodeAnswer, reply: msgspec.Struct) -> None:
    body = bytearray(encode_batch(99, [RawReply(5, OK, raw(reply))]))
    clock, (answer,) = decode(memoryview(body))
    body[:] = bytes(len(body))  # as a buffer that is used again
    assert (clock, answer.id, answer.status, answer.payload) == (99, 5, OK, reply)


@pytest.mark.parametrize(("decode", "reply"), EXPECTED)
def test_anything_else_is_left_to_whoever_reads_all_replies(decode: DecodeAnswer, reply: msgspec.Struct) -> None:
    right = RawReply(5, OK, raw(reply))
    for messages in ([error_reply(5, Overloaded("Later."))], [right, right], [], [RawReply(5, OK, raw("well"))]):
        with pytest.raises(UNDECODABLE):
            decode(encode_batch(99, messages))
