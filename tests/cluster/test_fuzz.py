"""Anything at all as hello and frames, at a real node and a real router: one error and a close, or still well-behaved.

Inputs are conversations: good ones with bytes or msgpack structure changed, lengths lied about, noise between, cut into
writes anywhere. `fuzz_corpus/` holds single ones whose names say what they are: `first-*` is sent instead of a hello,
`then-*` after one. What must hold: the process lives, logs no traceback and does not grow; other connections get
right answers; the reply stream is whole frames, and an error of the protocol is its last reply.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardkv.wire.frame import FrameDecoder
from shardkv.wire.messages import (
    FRAME_REQUESTS_MAX,
    MAGIC,
    PROTOCOL_VERSION,
    TOKEN_LANE_BYTES,
    Op,
    decode_replies,
    reply_error,
)
from tests.cluster.test_hostile_peers import unharmed
from tests.worlds.cluster import ClusterWorld, cluster_world

MIB = 1 << 20
TARGETS = ["node-1", "router-1"]
CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").iterdir())
DEFAULT_INPUTS = 150
LONG_INPUTS = 11_000
"""For each target."""
WARM_UP = 100
GROWTH_BYTES_MAX = 16 * MIB
ANSWER_S = 5.0
PROTOCOL_ERRORS = {"protocol_remote", "frame_too_large", "version_mismatch", "cluster_mismatch"}
SHARD, EPOCH = 1, 1

encode = msgspec.msgpack.encode


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ("--partition", "range", "--nodes", "1", "--shards", "2")
    config = '[limits]\nhello_timeout_ms = 1000\nframe_timeout_ms = 1000\n[engine]\ndurability = "os"\n'
    with cluster_world(tmp_path_factory.mktemp("fuzz"), *options, config=config) as found:
        yield found


# Conversations


def framed(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


HELLO = [MAGIC, PROTOCOL_VERSION, "client", "fuzz", None, 0, None, False]
GREETING = framed(encode([1, [[0, Op.HELLO, 0, None, None, None, HELLO]]]))
PING = framed(encode([1, [[2**40, Op.PING, 0, None, None, None, None]]]))

keys = st.sampled_from([b"fuzz", b"fuzz-2", b"fx", b""])
some_keys = st.lists(keys, max_size=3)
tokens = st.none() | st.builds(
    lambda lane, number, again: [lane, number, again],
    st.sampled_from([b"l" * TOKEN_LANE_BYTES, b"m" * TOKEN_LANE_BYTES, b"short"]),
    st.integers(0, 5),
    st.booleans(),
)
conditions = st.none() | st.builds(lambda key, version: [[key], [version]], keys, st.sampled_from([0, 1, 2**64 - 1]))
writes = st.builds(
    lambda token, when, kind, key, value, existed, ttl: [token, when, kind, [key], [value], existed, ttl],
    tokens,
    conditions,
    st.sampled_from([1, 2, 5, b"\1", b"\2"]),
    keys,
    st.sampled_from([b"", b"v", b"7", bytes(5000)]),
    st.booleans(),
    st.sampled_from([None, None, 1, 10**6]),
)
spans = st.lists(st.tuples(st.sampled_from([SHARD, SHARD, 2, 77]), st.just(EPOCH), st.integers(0, 3)), max_size=2)
operations = st.one_of(
    st.tuples(st.just(Op.READ), st.builds(lambda found, *flags: [found, *flags], some_keys, *[st.booleans()] * 2)),
    st.tuples(st.just(Op.READ), st.builds(lambda found, of: [found, False, False, of], some_keys, spans)),
    st.tuples(st.just(Op.WRITE), writes),
    st.tuples(st.just(Op.WRITE), st.builds(lambda write, of: [*write, of], writes, spans)),
    st.builds(
        lambda start, stop, flags, limit: (Op.SCAN, [start, stop, *flags, limit, 1000, [[SHARD, EPOCH]]]),
        keys,
        st.none() | keys,
        st.tuples(st.booleans(), st.booleans()),
        st.integers(0, 5),
    ),
    st.builds(lambda start, stop, partial: (Op.COUNT, [start, stop, partial]), keys, st.none() | keys, st.booleans()),
    st.builds(lambda start, stop, limit: (Op.DELETE_RANGE, [start, stop, limit]), keys, keys, st.none() | st.just(2)),
    st.builds(lambda cluster, revision: (Op.ROUTES, [cluster, revision]), st.none() | st.text(), st.integers(0, 9)),
    st.tuples(st.just(Op.CONTEXT), st.just([1, "default", None, None])),
    st.tuples(st.sampled_from([Op.PING, Op.STATUS, Op.META_READ, Op.META_TXN, Op.META_WATCH, 99]), st.none()),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 7, 255, 2**31, 2**63 - 1, -(2**63), 2**64 - 1]),
    st.floats(),
    st.binary(max_size=20),
    st.text(max_size=10),
    st.sampled_from([[], {}, [[[[]]]], {"a": {"b": None}}, [None] * 70, b"x" * 70_000, msgspec.msgpack.Ext(5, b"e")]),
)


@st.composite
def batches(draw: st.DrawFn) -> list[Any]:
    """A good frame's structure, as lists."""
    requests = []
    for number, (op, payload) in enumerate(draw(st.lists(operations, min_size=1, max_size=4))):
        node = draw(st.booleans())
        ms = draw(st.sampled_from([None, 1, 1000]))
        request_id = draw(st.just(number + 1) | st.integers(0, 3))
        ctx = draw(st.sampled_from([0, 0, 0, 1]))
        requests.append([request_id, op, ctx, SHARD if node else None, EPOCH if node else None, ms, payload])
    return [1, requests]


def places(tree: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """The paths to everything inside nested lists."""
    found = [path] if path else []
    if isinstance(tree, list):
        for index, item in enumerate(tree):
            found += places(item, (*path, index))
    return found


@st.composite
def restructured(draw: st.DrawFn, trees: st.SearchStrategy[list[Any]]) -> bytes:
    """A structure with one to three of its parts replaced, left out or doubled."""
    tree = deepcopy(draw(trees))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree) or [(0,)]))
        parent: Any = tree
        for index in path[:-1]:
            parent = parent[index]
        if not parent:
            break
        match draw(st.sampled_from(["replace", "drop", "double", "wrap"])):
            case "replace":
                parent[path[-1]] = deepcopy(draw(scalars))
            case "drop":
                del parent[path[-1]]
            case "double":
                parent.insert(path[-1], deepcopy(parent[path[-1]]))
            case "wrap":
                parent[path[-1]] = [parent[path[-1]]]
    return encode(tree)


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> bytes:
    """A body with a few bytes changed, put in or left out."""
    body = bytearray(draw(bodies))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(body) - 1)))
        match draw(st.sampled_from(["change", "insert", "delete", "cut"])):
            case "change":
                body[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "insert":
                body[at:at] = draw(st.binary(min_size=1, max_size=8))
            case "delete":
                del body[at : at + draw(st.integers(1, 8))]
            case "cut":
                del body[at:]
    return bytes(body)


@st.composite
def lying(draw: st.DrawFn, bodies: st.SearchStrategy[bytes]) -> bytes:
    """A frame whose length is not that of its body."""
    body = draw(bodies)
    length = draw(st.sampled_from([0, 1, len(body) - 1, len(body) + 1, 4096, 1 << 24, 2**32 - 1]))
    return struct.pack(">I", max(0, length)) + body


good_bodies = batches().map(encode)
frames = st.one_of(
    good_bodies.map(framed),
    restructured(batches()).map(framed),
    damaged(good_bodies).map(framed),
    lying(good_bodies),
    st.binary(max_size=40),
)
hellos = st.builds(lambda: [1, [[0, Op.HELLO, 0, None, None, None, list(HELLO)]]])
ordered_greeting = framed(encode([1, [[0, Op.HELLO, 0, None, None, None, [*HELLO[:-1], True]]]]))
greetings = st.one_of(
    st.just(GREETING),
    st.just(GREETING),
    st.just(ordered_greeting),
    restructured(hellos).map(framed),
    damaged(hellos.map(encode)).map(framed),
    lying(hellos.map(encode)),
)


@st.composite
def conversations(draw: st.DrawFn) -> list[bytes]:
    """What is sent, write by write."""
    data = draw(greetings) + b"".join(draw(st.lists(frames, max_size=3))) + PING
    cuts = sorted(draw(st.lists(st.integers(0, len(data)), max_size=3)))
    return [data[start:stop] for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True)]


# What must hold


def converse(where: tuple[str, int], writes: list[bytes]) -> None:
    """Send the writes, hang up, read to the end, and judge what came."""
    heard = bytearray()
    with socket.create_connection(where, timeout=ANSWER_S) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for data in writes:
            peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        while data := peer.recv(1 << 20):
            heard += data
    decoder = FrameDecoder(64 * MIB)
    replies = [reply for body in decoder.feed(bytes(heard)) for reply in decode_replies(body)[1]]
    assert not decoder.buffered, "the reply stream ends inside a frame"
    errors = [reply_error(reply.payload).code if reply.status else "" for reply in replies]
    refusals = [number for number, code in enumerate(errors) if code in PROTOCOL_ERRORS and not replies[number].id]
    assert refusals in ([], [len(replies) - 1]), errors


class Victim:
    """A process under attack, with a well-behaved client beside it."""

    def __init__(self, world: ClusterWorld, name: str) -> None:
        self._where = world.address_of(name)
        self._process = psutil.Process(world.pid(name))
        self._db = world.client(timeout=10)
        self._logs = sorted((world.data_dir / "logs").glob("*.log"))
        self._tracebacks = self._count_tracebacks()
        self._inputs = 0
        self._warm_bytes = 0

    def attack(self, writes: list[bytes]) -> None:
        converse(self._where, writes)
        self._inputs += 1
        if self._inputs == WARM_UP:
            self._warm_bytes = self._process.memory_info().rss
        if self._inputs % 50 == 0:
            value = os.urandom(8)
            self._db.put("0-healthy", value)
            assert self._db.get("0-healthy") == value

    def check(self) -> None:
        self._db.close()
        assert self._inputs > WARM_UP
        grown = self._process.memory_info().rss - self._warm_bytes
        assert grown < GROWTH_BYTES_MAX, f"grown by {grown / MIB:.1f} MiB in {self._inputs} inputs"
        assert self._count_tracebacks() == self._tracebacks

    def _count_tracebacks(self) -> int:
        return sum(log.read_text().count("Traceback") for log in self._logs)


def fuzz(world: ClusterWorld, name: str, inputs: int, *, derandomize: bool) -> None:
    with unharmed(world, deletes=True):
        victim = Victim(world, name)

        @settings(
            max_examples=inputs,
            deadline=None,
            derandomize=derandomize,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(conversations())
        def attack(writes: list[bytes]) -> None:
            victim.attack(writes)

        attack()
        victim.check()


@pytest.mark.parametrize("name", TARGETS)
def test_no_conversation_does_harm(world: ClusterWorld, name: str) -> None:
    fuzz(world, name, DEFAULT_INPUTS, derandomize=True)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_twenty_thousand_conversations_do_no_harm(world: ClusterWorld, name: str) -> None:
    fuzz(world, name, LONG_INPUTS, derandomize=False)


@pytest.mark.parametrize("name", TARGETS)
def test_the_corpus_does_no_harm(world: ClusterWorld, name: str) -> None:
    assert CORPUS
    with unharmed(world):
        victim = Victim(world, name)
        for _ in range(1 + WARM_UP // len(CORPUS)):
            for path in CORPUS:
                data = path.read_bytes()
                greeting = [] if path.name.startswith("first-") else [GREETING]
                victim.attack([*greeting, data])
                victim.attack([*greeting, *(data[at : at + 1] for at in range(min(len(data), 200))), data[200:]])
        victim.check()


# The corpus


def corpus() -> dict[str, bytes]:
    """What the files of `fuzz_corpus` hold; `python -m tests.cluster.test_fuzz` writes them."""

    def one(*request: Any) -> bytes:
        return framed(encode([1, [list(request)]]))

    head = b"\x92\x01\x91\x97\x05\x0a\x00\xc0\xc0\xc0"
    greeting = encode([1, [[0, Op.HELLO, 0, None, None, None, HELLO]]])
    return {
        "first-http-request": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        "first-tls-client-hello": bytes.fromhex("1603010200010001fc0303") + bytes(500),
        "first-redis-ping": b"*1\r\n$4\r\nPING\r\n",
        "first-nothing": b"",
        "first-length-of-4-gib": b"\xff\xff\xff\xff",
        "first-length-just-over-the-hello-limit": struct.pack(">I", 4097) + bytes(64),
        "first-half-a-length": b"\x00\x00",
        "first-hello-cut-short": framed(greeting)[:-3],
        "first-hello-with-bytes-after-it": framed(greeting + b"more"),
        "first-hello-of-version-9": framed(greeting.replace(b"shardkv\x01", b"shardkv\x09")),
        "first-hello-of-another-cluster": one(0, Op.HELLO, 0, None, None, None, [*HELLO[:4], "other", 0, None, False]),
        "first-hello-of-no-known-role": one(
            0, Op.HELLO, 0, None, None, None, [MAGIC, 1, "admin", "x", None, 0, None, 0]
        ),
        "first-hello-not-utf8": framed(greeting.replace(b"fuzz", b"\xff\xfe\xff\xfe")),
        "first-hello-twice-in-one-frame": framed(encode([1, [[0, 0, 0, None, None, None, HELLO]] * 2])),
        "first-read-before-any-hello": one(7, Op.READ, 0, SHARD, EPOCH, None, [[b"fuzz"]]),
        "then-empty-frame": framed(b""),
        "then-thousand-empty-frames": framed(b"") * 1000,
        "then-thousand-empty-batches": framed(encode([1, []])) * 1000,
        "then-second-hello": framed(greeting),
        "then-clock-of-minus-one": framed(encode([-1, []])),
        "then-clock-beyond-64-bits": framed(b"\x92\xcf" + b"\xff" * 8 + b"\x90"),
        "then-array-of-4-thousand-million-requests": framed(b"\x92\x01\xdd\xff\xff\xff\xff"),
        "then-one-request-too-many": framed(b"\x92\x01\xdd" + struct.pack(">I", FRAME_REQUESTS_MAX + 1) + bytes(64)),
        "then-bytes-of-4-gib": framed(head + b"\xc6\xff\xff\xff\xff"),
        "then-3000-nested-arrays": framed(b"\x91" * 3000 + b"\xc0"),
        "then-payload-of-1500-nested-maps": framed(head + b"\x81\x01" * 1500 + b"\xc0"),
        "then-payload-of-3000-nested-arrays": framed(head + b"\x91" * 3000 + b"\xc0"),
        "then-map-with-one-key-twice": framed(head + b"\x82\x01\x02\x01\x03"),
        "then-nan-as-id": framed(encode([1, [[float("nan"), Op.PING, 0, None, None, None, None]]])),
        "then-one-id-for-two-requests": framed(encode([1, [[5, Op.SCAN, 0, None, None, None, None]] * 2])),
        "then-id-of-the-hello": one(0, Op.READ, 0, SHARD, EPOCH, None, [[b"fuzz"]]),
        "then-ids-at-the-ends": framed(
            encode([1, [[number, Op.PING, 0, None, None, None, None] for number in (-(2**63), 2**64 - 1)]])
        ),
        "then-deadline-of-zero": one(5, Op.READ, 0, SHARD, EPOCH, 0, [[b"fuzz"]]),
        "then-deadline-of-minus-one": one(5, Op.READ, 0, SHARD, EPOCH, -1, [[b"fuzz"]]),
        "then-deadline-of-ages": one(5, Op.READ, 0, SHARD, EPOCH, 2**64 - 1, [[b"fuzz"]]),
        "then-shard-of-minus-one": one(5, Op.READ, 0, -1, -1, None, [[b"fuzz"]]),
        "then-context-nobody-registered": one(5, Op.READ, 77, SHARD, EPOCH, None, [[b"fuzz"]]),
        "then-operation-of-minus-one": one(5, -1, 0, None, None, None, None),
        "then-read-of-10001-keys": one(5, Op.READ, 0, SHARD, EPOCH, None, [[b"k"] * 10_001]),
        "then-write-with-fewer-values-than-keys": one(
            5, Op.WRITE, 0, SHARD, EPOCH, None, [None, None, 1, [b"fuzz"] * 2, [b"v"], True]
        ),
        "then-write-of-kind-3": one(5, Op.WRITE, 0, SHARD, EPOCH, None, [None, None, 3, [b"fuzz"], [b"v"], True]),
        "then-delete-with-a-value": one(5, Op.WRITE, 0, SHARD, EPOCH, None, [None, None, 2, [b"fuzz"], [b"v"], True]),
        "then-scan-the-wrong-way-round": one(
            5, Op.SCAN, 0, None, None, None, [b"b", b"a", False, False, 1, 1000, [[SHARD, EPOCH]]]
        ),
        "then-scan-of-a-shard-twice": one(
            5, Op.SCAN, 0, None, None, None, [b"", None, False, False, 1, 1000, [[SHARD, EPOCH]] * 2]
        ),
        "then-frame-that-never-ends": struct.pack(">I", 1 << 20) + bytes(100),
        "then-length-just-over-the-limit": struct.pack(">I", 32 * MIB + 1),
    }


def test_the_corpus_is_what_its_names_say() -> None:
    assert {path.name: path.read_bytes() for path in CORPUS} == corpus()


if __name__ == "__main__":
    for name, data in corpus().items():
        (Path(__file__).parent / "fuzz_corpus" / name).write_bytes(data)
