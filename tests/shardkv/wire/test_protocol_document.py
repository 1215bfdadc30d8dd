"""PROTOCOL.md tells the truth: its example parses, its limits and operation numbers are the code's."""

import re
from dataclasses import asdict
from pathlib import Path

import shardkv.wire
from shardkv.limits import DEFAULT_LIMITS
from shardkv.wire.frame import FrameDecoder
from shardkv.wire.messages import (
    Op,
    decode_hello,
    decode_read,
    decode_read_reply,
    decode_replies,
    decode_requests,
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


def test_the_limits_are_the_codes() -> None:
    told = dict(re.findall(r"^\| `(\w+)`[^|]*\| ([\d,]+) \|$", DOCUMENT, re.M))
    assert {name: int(value.replace(",", "")) for name, value in told.items()} == asdict(DEFAULT_LIMITS)


def test_the_operations_are_the_codes() -> None:
    told = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", DOCUMENT, re.M)
    assert {name: int(number) for number, name in told} == {op.name: op.value for op in Op}
