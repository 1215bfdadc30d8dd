"""PROTOCOL.md tells the truth: its example parses, its limits and operation numbers are the code's."""

import re
from dataclasses import asdict
from pathlib import Path

import pytest

import shardkv.wire
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.checks import check_write
from shardkv.wire.frame import FrameDecoder
from shardkv.wire.messages import (
    OK,
    Conditions,
    Count,
    CountReply,
    DeleteRange,
    DeleteRangeReply,
    Kind,
    Message,
    Op,
    PayloadDecoder,
    Read,
    ReadReply,
    Write,
    WriteReply,
    decode_count,
    decode_count_reply,
    decode_delete_range,
    decode_delete_range_reply,
    decode_hello,
    decode_read,
    decode_read_reply,
    decode_replies,
    decode_requests,
    decode_write,
    decode_write_reply,
    raw,
)

DOCUMENT = (Path(shardkv.wire.__file__).parent / "PROTOCOL.md").read_text()


def example(name: str) -> bytes:
    (line,) = re.findall(rf"^{name} +((?:[0-9a-f]{{2}} ?)+)$", DOCUMENT, re.M)
    (body,) = FrameDecoder(4096).feed(bytes.fromhex(line))
    return body


def test_the_example_parses() -> None:
    clock, (hello,) = decode_requests(example("hello"))
    assert (clock, hello.id, hello.op) == (1, 0, Op.HELLO)
    assert decode_hello(hello.payload).role == "client"

    clock, (read,) = decode_requests(example("read"))
    assert (clock, read.id, read.op, read.shard, read.deadline_ms) == (2, 7, Op.READ, None, 5000)
    assert decode_read(read.payload).keys == [b"user:1000"]

    clock, (value,) = decode_replies(example("value"))
    assert (clock, value.id, value.status) == (3, 7, 0)
    assert decode_read_reply(value.payload).values == [b"John"]


VERSION = (1 << 40) + 9


@pytest.mark.parametrize(
    ("name", "op", "decode", "meaning"),
    [
        ("get", Op.READ, decode_read, Read([b"stock"], want_versions=True)),
        (
            "swap",
            Op.WRITE,
            decode_write,
            Write(None, Conditions([b"stock"], [VERSION]), Kind.PUT, [b"stock"], [b"40"], False, 60_000),
        ),
        ("incr", Op.WRITE, decode_write, Write(None, None, Kind.INCR, [b"stock"], [b"-3"], False)),
        ("count", Op.COUNT, decode_count, Count(b"s", b"t")),
        ("remove", Op.DELETE_RANGE, decode_delete_range, DeleteRange(b"s", b"t", None)),
    ],
)
def test_the_requests_of_the_second_example_parse(name: str, op: Op, decode: PayloadDecoder, meaning: Message) -> None:
    _, (request,) = decode_requests(example(name))
    assert (request.op, request.deadline_ms, decode(request.payload)) == (op, 5000, meaning)
    assert raw(meaning) == request.payload
    if isinstance(meaning, Write):
        check_write(meaning, DEFAULT_LIMITS)


@pytest.mark.parametrize(
    ("name", "decode", "meaning"),
    [
        ("got", decode_read_reply, ReadReply([b"41"], [VERSION])),
        ("swapped", decode_write_reply, WriteReply(b"\0", VERSION + 1, [])),
        ("sum", decode_write_reply, WriteReply(b"\0", VERSION + 2, [], 37)),
        ("counted", decode_count_reply, CountReply(1, None)),
        ("removed", decode_delete_range_reply, DeleteRangeReply(1, None)),
    ],
)
def test_the_replies_of_the_second_example_parse(name: str, decode: PayloadDecoder, meaning: Message) -> None:
    _, (reply,) = decode_replies(example(name))
    assert (reply.status, decode(reply.payload)) == (OK, meaning)
    assert raw(meaning) == reply.payload


def test_the_limits_are_the_codes() -> None:
    told = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([\d,]+) \|$", DOCUMENT, re.M))
    assert {name: int(value.replace(",", "")) for name, value in told.items()} == asdict(DEFAULT_LIMITS)


def test_the_operations_are_the_codes() -> None:
    told = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", DOCUMENT, re.M)
    assert {name: int(number) for number, name in told} == {op.name: op.value for op in Op}
