"""Peers that break the rules, on the sockets of all three kinds of process: refused in words, and nobody else suffers.

Every test ends with `unharmed`: the same processes run, none was restarted, what was written before is still there.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import psutil
import pytest

from shardkv import Client
from shardkv.errors import ShardKVError
from shardkv.wire.messages import (
    MAGIC,
    NOTHING,
    PROTOCOL_VERSION,
    Context,
    Hello,
    MetaWatch,
    Op,
    Read,
    Request,
    Scan,
    Write,
    encode_batch,
    raw,
)
from tests.worlds.cluster import ClusterWorld, cluster_world, until

MIB = 1 << 20
FRAME_BYTES_MAX = 32 * MIB
ANSWER_S = 5.0
HELLO_TIMEOUT_S = 0.5
CONFIG = """
[limits]
hello_timeout_ms = 500
"""
PROCESSES = ["router-1", "node-1", "meta"]
SHARD, EPOCH = 1, 1
"""The first shard; the one node owns it."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    with cluster_world(
        tmp_path_factory.mktemp("hostile"), "--partition", "range", "--nodes", "1", "--shards", "2", config=CONFIG
    ) as found:
        yield found


@pytest.fixture(autouse=True)
def nobody_suffers(world: ClusterWorld) -> Iterator[None]:
    with unharmed(world):
        yield


@contextlib.contextmanager
def unharmed(world: ClusterWorld, *, deletes: bool = False) -> Iterator[None]:
    """Nothing in here may end a process or lose what was written before, unless it `deletes` ranges."""
    value = os.urandom(8)
    with world.client(timeout=10) as db:
        db.put_many({b"0-before": value, b"z-before": value})
        before = lives(world)
        yield
        found = db.get_many([b"0-before", b"z-before"])
        assert deletes or found == {b"0-before": value, b"z-before": value}
        db.put("after", value)
        assert lives(world) == before


def lives(world: ClusterWorld) -> dict[str, tuple[int, float, int]]:
    """Which process each name is, and how often it was restarted."""
    return {
        name: (record["pid"], psutil.Process(record["pid"]).create_time(), record["restarts"])
        for name, record in world.records().items()
    }


class Stranger:
    """A raw connection to one process of the cluster."""

    def __init__(self, world: ClusterWorld, name: str, *, greet: bool) -> None:
        self.socket = socket.create_connection(world.address_of(name), timeout=ANSWER_S)
        self._answers = self.socket.makefile("rb")
        if greet:
            self.socket.sendall(hello())
            assert self.answer()[:2] == [0, 0]

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self.socket.close()

    def send(self, op: int, payload: Any, *, request_id: int = 7, **fields: Any) -> None:
        self.socket.sendall(frame(encode_batch(1, [request(op, payload, request_id=request_id, **fields)])))

    def ask(self, op: int, payload: Any, **fields: Any) -> list[Any]:
        """One request and its reply: [id, status, payload]."""
        self.send(op, payload, **fields)
        return self.answer()

    def refusal(self, op: int, payload: Any, **fields: Any) -> tuple[str, str]:
        """Code and message of the error a request must get."""
        _, status, error = self.ask(op, payload, **fields)
        assert status == 1, error
        return error[0], error[1]

    def answer(self) -> list[Any]:
        """The next reply, which must be alone in its frame."""
        header = self._answers.read(4)
        assert len(header) == 4, "the connection was closed without a word"
        (length,) = struct.unpack(">I", header)
        _, [reply] = msgspec.msgpack.decode(self._answers.read(length))
        return list(reply)

    def closed(self) -> bool:
        """Whether the other side closed, once everything was read. Raises TimeoutError when it does not."""
        with contextlib.suppress(ConnectionError):
            while self._answers.read(65536):
                pass
        return True


def request(op: int, payload: Any, *, request_id: int = 7, ctx: int = 0, node: bool = False, ms: Any = None) -> Request:
    """`node`: say which shard is meant, as a router does."""
    body = payload if isinstance(payload, msgspec.Raw) else raw(payload)
    return Request(request_id, op, ctx, SHARD if node else None, EPOCH if node else None, ms, body)


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


def hello(*, magic: str = MAGIC, protocol: int = PROTOCOL_VERSION, role: str = "client", cluster: Any = None) -> bytes:
    greeting = Hello(magic, protocol, role, "stranger", cluster, 0, None, False)
    return frame(encode_batch(1, [request(Op.HELLO, greeting, request_id=0)]))


def is_sentence(message: str) -> bool:
    return message[:1].isupper() and message.endswith(".") and "Error(" not in message and "Traceback" not in message


# What is not the protocol

NESTED = b"\x91" * 3000 + b"\xc0"
REQUEST_HEAD = b"\x92\x01\x91\x97\x05\x0a\x00\xc0\xc0\xc0"
PING = encode_batch(1, [request(Op.PING, NOTHING)])
BROKEN = {
    "garbage": b"\xff" + random.Random(1).randbytes(3000),
    "http": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "tls": bytes.fromhex("1603010200010001fc0303") + bytes(500),
    "giant length": b"\xff\xff\xff\xff",
    "just over the limit": struct.pack(">I", FRAME_BYTES_MAX + 1),
    "empty frame": frame(b""),
    "not a batch": frame(msgspec.msgpack.encode({"op": "get"})),
    "truncated batch": frame(PING[:-3]),
    "more than a batch": frame(PING + b"more"),
    "nested batch": frame(NESTED),
    "nested request": frame(b"\x92\x01\x91" + NESTED),
    "nested payload": frame(REQUEST_HEAD + NESTED),
    "nested maps": frame(REQUEST_HEAD + b"\x81\x01" * 1500 + b"\xc0"),
    "array of 4 thousand millions": frame(b"\x92\x01\xdd\xff\xff\xff\xff"),
    "bytes of 4 GiB": frame(REQUEST_HEAD + b"\xc6\xff\xff\xff\xff"),
    "id that is no number": frame(msgspec.msgpack.encode([1, [["seven", 2, 0, None, None, None, None]]])),
}


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("greet", [False, True], ids=["before hello", "after hello"])
def test_what_is_not_the_protocol_gets_one_sentence_and_is_closed(world: ClusterWorld, name: str, greet: bool) -> None:
    for what, sent in BROKEN.items():
        with Stranger(world, name, greet=greet) as stranger:
            stranger.socket.sendall(sent)
            request_id, status, error = stranger.answer()
            assert (request_id, status) == (0, 1), what
            assert error[0] in {"protocol_remote", "frame_too_large"}, what
            assert is_sentence(error[1]), f"{what}: {error[1]}"
            assert stranger.closed()


@pytest.mark.parametrize("name", PROCESSES)
def test_a_deep_payload_of_megabytes_is_refused(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        stranger.socket.sendall(frame(REQUEST_HEAD + b"\x91" * (4 * MIB) + b"\xc0"))
        assert "nested too deeply" in stranger.answer()[2][1]


@pytest.mark.parametrize("name", PROCESSES)
def test_only_a_good_hello_opens_a_connection(world: ClusterWorld, name: str) -> None:
    greetings = {
        hello(magic="redis"): "protocol_remote",
        hello(protocol=2): "version_mismatch",
        hello(role="admin"): "protocol_remote",
        hello(role="router", cluster="another"): "cluster_mismatch",
        frame(PING): "protocol_remote",
        frame(encode_batch(1, [request(Op.READ, Read([b"0-before"]))])): "protocol_remote",
        frame(encode_batch(1, [request(Op.HELLO, [1], request_id=0)])): "protocol_remote",
    }
    for sent, code in greetings.items():
        with Stranger(world, name, greet=False) as stranger:
            stranger.socket.sendall(sent)
            _, status, error = stranger.answer()
            assert (status, error[0]) == (1, code)
            assert is_sentence(error[1])
            assert stranger.closed()
    with Stranger(world, name, greet=True) as stranger:
        stranger.socket.sendall(hello())
        assert stranger.answer()[2][0] == "protocol_remote"
        assert stranger.closed()


@pytest.mark.parametrize("name", PROCESSES)
def test_half_a_frame_and_a_vanished_peer_disturb_nobody(world: ClusterWorld, name: str) -> None:
    for greet in (False, True):
        for part in (PING[:1], frame(PING)[:2], frame(PING)[:-1], struct.pack(">I", 4000) + bytes(100)):
            with Stranger(world, name, greet=greet) as stranger:
                stranger.socket.sendall(part)
            with Stranger(world, name, greet=greet) as stranger:
                stranger.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                stranger.socket.sendall(part)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_frame_in_single_bytes_is_understood(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        for number in frame(PING):
            stranger.socket.sendall(bytes([number]))
        assert stranger.answer()[:2] == [7, 0]


# Requests that are none

BAD_REQUESTS: dict[str, tuple[int, Any, str]] = {
    "unknown operation": (99, None, "unknown_operation"),
    "negative operation": (-1, None, "unknown_operation"),
    "huge operation": (2**64 - 1, None, "unknown_operation"),
    "metadata operation": (Op.META_READ, [""], "unknown_operation"),
    "read of nothing": (Op.READ, None, "invalid_argument"),
    "read of a map": (Op.READ, {"keys": []}, "invalid_argument"),
    "read of text": (Op.READ, [["text"]], "invalid_argument"),
    "empty key": (Op.READ, [[b""]], "invalid_key"),
    "long key": (Op.READ, [[bytes(65537)]], "key_too_large"),
    "too many keys": (Op.READ, [[b"k"] * 10_001], "batch_too_large"),
    "millions of keys": (Op.READ, [[b"k"] * 1_000_001], "invalid_argument"),
    "fewer kinds than keys": (Op.WRITE, [None, None, b"\1", [b"a", b"b"], [b"", b""], True], "invalid_argument"),
    "more kinds than keys": (Op.WRITE, [None, None, b"\1\1\1", [b"a", b"b"], [b"", b""], True], "invalid_argument"),
    "unknown kind": (Op.WRITE, [None, None, 3, [b"a"], [b"v"], True], "invalid_argument"),
    "huge kind": (Op.WRITE, [None, None, 2**64 - 1, [b"a"], [b"v"], True], "invalid_argument"),
    "fewer values than keys": (Op.WRITE, [None, None, 1, [b"a"], [], True], "invalid_argument"),
    "write of nothing": (Op.WRITE, [None, None, 1, [], [], True], "invalid_argument"),
    "large value": (Op.WRITE, [None, None, 1, [b"a"], [bytes(16 * MIB + 1)], True], "value_too_large"),
    "a good put beside a bad one": (
        Op.WRITE,
        [None, None, 1, [b"0-before", b""], [b"lost", b""], True],
        "invalid_key",
    ),
    "too many puts": (Op.WRITE, [None, None, 1, [b"0-before"] * 10_001, [b"lost"] * 10_001, True], "batch_too_large"),
    "strange token": (Op.WRITE, [[1, 2], None, 1, [b"a"], [b"v"], True], "invalid_argument"),
    "conditions": (Op.WRITE, [None, [1], 1, [b"a"], [b"v"], True], "invalid_argument"),
    "no conditions": (Op.WRITE, [None, [[], []], 1, [b"a"], [b"v"], True], "invalid_argument"),
    "fewer versions than keys": (Op.WRITE, [None, [[b"a"], []], 1, [b"a"], [b"v"], True], "invalid_argument"),
    "negative version": (Op.WRITE, [None, [[b"a"], [-1]], 1, [b"a"], [b"v"], True], "invalid_argument"),
    "condition on no key": (Op.WRITE, [None, [[b""], [0]], 1, [b"a"], [b"v"], True], "invalid_key"),
    "too many conditions": (
        Op.WRITE,
        [None, [[b"a"] * 10_001, [0] * 10_001], 1, [b"a"], [b"v"], True],
        "batch_too_large",
    ),
    "failed condition": (Op.WRITE, [None, [[b"0-before"], [0]], 2, [b"0-before"], [b""], True], "condition_failed"),
    "endless time to live": (Op.WRITE, [None, None, 1, [b"a"], [b"v"], True, 2**63], "invalid_argument"),
    "no time to live": (Op.WRITE, [None, None, 1, [b"a"], [b"v"], True, 0], "invalid_argument"),
    "delete with a time to live": (Op.WRITE, [None, None, 2, [b"a"], [b""], True, 5], "invalid_argument"),
    "incr by text": (Op.WRITE, [None, None, 5, [b"a"], [b"one"], True], "invalid_argument"),
    "incr by too much": (Op.WRITE, [None, None, 5, [b"a"], [b"1" * 30], True], "invalid_argument"),
    "incr of several": (Op.WRITE, [None, None, 5, [b"a", b"b"], [b"1", b"1"], True], "invalid_argument"),
    "incr among puts": (Op.WRITE, [None, None, b"\5\1", [b"a", b"b"], [b"1", b"1"], True], "invalid_argument"),
    "incr of text": (Op.WRITE, [None, None, 5, [b"0-before"], [b"1"], True], "invalid_number"),
    "versions of what": (Op.READ, [[b"a"], 7], "invalid_argument"),
    "count of nothing": (Op.COUNT, None, "invalid_argument"),
    "count backwards": (Op.COUNT, [b"b", b"a"], "invalid_range"),
    "count from a long key": (Op.COUNT, [bytes(70_000), None], "key_too_large"),
    "delete of a range backwards": (Op.DELETE_RANGE, [b"b", b"a", None], "invalid_range"),
    "delete of a range of no keys": (Op.DELETE_RANGE, [b"", None, 0], "invalid_argument"),
    "delete of a range of fewer keys": (Op.DELETE_RANGE, [b"", None, -1], "invalid_argument"),
    "delete of a range without a limit's place": (Op.DELETE_RANGE, [b"", None], "invalid_argument"),
    "scan of no rows": (Op.SCAN, [b"", None, False, False, 0, 1000, [[SHARD, EPOCH]]], "invalid_argument"),
    "scan of fewer rows": (Op.SCAN, [b"", None, False, False, -1, 1000, [[SHARD, EPOCH]]], "invalid_argument"),
    "scan in no bytes": (Op.SCAN, [b"", None, False, False, 1, 0, [[SHARD, EPOCH]]], "invalid_argument"),
    "scan backwards": (Op.SCAN, [b"b", b"a", False, False, 1, 1000, [[SHARD, EPOCH]]], "invalid_range"),
    "scan from a long key": (Op.SCAN, [bytes(70_000), None, False, False, 1, 1, [[SHARD, EPOCH]]], "key_too_large"),
}


@pytest.mark.parametrize("name", ["router-1", "node-1"])
def test_a_bad_request_is_refused_and_the_connection_stays(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        for what, (op, payload, expected) in BAD_REQUESTS.items():
            code, message = stranger.refusal(op, payload, node=name == "node-1")
            assert code == expected, f"{what}: {message}"
            assert is_sentence(message), f"{what}: {message}"
        assert stranger.ask(Op.PING, NOTHING)[1] == 0


def test_a_node_answers_only_for_the_shards_and_epochs_it_owns(world: ClusterWorld) -> None:
    with Stranger(world, "node-1", greet=True) as stranger:
        for shard, epoch in [(None, None), (0, 1), (77, 1), (-1, 1), (2**64 - 1, 1), (1, None), (1, 0), (1, 2**63)]:
            asked = Request(7, Op.WRITE, 0, shard, epoch, None, raw(Write(None, None, 1, [b"0-before"], [b""], False)))
            stranger.socket.sendall(frame(encode_batch(1, [asked])))
            _, status, error = stranger.answer()
            assert (status, error[0]) in {(1, "wrong_shard"), (1, "stale_epoch")}
        unowned: list[list[tuple[int, int]] | None] = [None, [], [(SHARD, EPOCH), (77, 1)], [(SHARD, 9)]]
        for shards in unowned:
            assert stranger.ask(Op.SCAN, Scan(b"", None, False, False, 1, 1000, shards))[1] == 1


@pytest.mark.parametrize("name", PROCESSES)
def test_clocks_and_ids_at_their_limits_are_borne(world: ClusterWorld, name: str) -> None:
    for clock in (0, -(2**63), 2**64 - 1):
        with Stranger(world, name, greet=True) as stranger:
            for request_id in (0, -(2**63), 2**64 - 1):
                stranger.socket.sendall(frame(encode_batch(clock, [request(Op.PING, NOTHING, request_id=request_id)])))
                assert stranger.answer() == [request_id, 0, None]


@pytest.mark.parametrize("name", ["router-1", "node-1"])
def test_an_unregistered_context_and_an_unknown_keyspace_are_refused(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        if name == "router-1":
            assert stranger.refusal(Op.READ, Read([b"0-before"]), ctx=9)[0] == "invalid_argument"
            assert stranger.ask(Op.CONTEXT, Context(5, "nowhere", None, None))[1] == 0
            code, message = stranger.refusal(Op.READ, Read([b"0-before"]), ctx=5)
            assert code == "unknown_keyspace"
            assert "nowhere" in message
        assert stranger.refusal(Op.CONTEXT, ["x"])[0] == "invalid_argument"


def test_the_longest_deadline_gets_an_answer(world: ClusterWorld) -> None:
    with Stranger(world, "router-1", greet=True) as stranger:
        stranger.socket.settimeout(0.5)
        assert stranger.ask(Op.READ, Read([b"0-before"]), ms=2**64 - 1)[0] == 7


def test_a_watch_from_an_impossible_revision_is_refused_in_words(world: ClusterWorld) -> None:
    with Stranger(world, "meta", greet=True) as stranger:
        _, _, reply = stranger.ask(Op.META_WATCH, MetaWatch(2**64 - 1, 10))
        assert reply[0] != "protocol_local"


@pytest.mark.parametrize("name", PROCESSES)
def test_text_that_is_not_utf8_is_refused_in_words(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        code, message = stranger.refusal(Op.CONTEXT, msgspec.Raw(b"\x94\x05\xa2\xff\xfe\xc0\xc0"))
        assert code == "invalid_argument", message


@pytest.mark.parametrize("name", PROCESSES)
def test_a_hello_that_is_not_utf8_is_refused_in_words(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=False) as stranger:
        stranger.socket.sendall(hello().replace(b"stranger", b"\xff\xfetrange"))
        assert stranger.answer()[2][0] == "protocol_remote"


# Peers that say nothing, or too little


def test_who_never_says_hello_is_dropped(world: ClusterWorld) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Stranger(world, name, greet=False)) for name in PROCESSES * 2]
        for half in strangers[:3]:
            half.socket.sendall(hello()[:10])
        for stranger in strangers:
            assert "No hello came" in stranger.answer()[2][1]
            assert stranger.closed()


def test_a_hello_in_drops_is_dropped_too(world: ClusterWorld) -> None:
    with contextlib.ExitStack() as stack:
        waiting = {name: stack.enter_context(Stranger(world, name, greet=False)) for name in PROCESSES}
        end = time.monotonic() + 5 * HELLO_TIMEOUT_S
        for number in hello()[:-1]:
            for name, slow in list(waiting.items()):
                slow.socket.sendall(bytes([number]))
                if select.select([slow.socket], [], [], 0.02)[0]:
                    assert slow.answer()[2][0] == "protocol_remote"
                    del waiting[name]
            if time.monotonic() > end or not waiting:
                break
        assert not waiting, f"still waiting for the end of the hello: {list(waiting)}"


@pytest.mark.parametrize("name", PROCESSES)
def test_who_stops_sending_is_let_go(world: ClusterWorld, name: str) -> None:
    with Stranger(world, name, greet=True) as stranger:
        stranger.socket.shutdown(socket.SHUT_WR)
        assert stranger.closed()


@pytest.mark.parametrize("name", PROCESSES)
def test_five_hundred_connections_at_once(world: ClusterWorld, name: str) -> None:
    with contextlib.ExitStack() as stack:
        strangers = [stack.enter_context(Stranger(world, name, greet=True)) for _ in range(500)]
        for stranger in strangers:
            stranger.send(Op.PING, NOTHING)
        assert all(stranger.answer()[1] == 0 for stranger in strangers)
        with world.client(timeout=5) as db:
            assert db.get("0-before")


# Peers that never read


class Memory:
    """The largest resident size of each process while this runs."""

    def __init__(self, world: ClusterWorld) -> None:
        self._processes = {name: psutil.Process(world.pid(name)) for name in PROCESSES}
        self._start = self._now()
        self._most = dict(self._start)
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()

    def grown_bytes(self) -> int:
        """By how much the process that grew most did so."""
        return max(self._most[name] - self._start[name] for name in PROCESSES)

    def _now(self) -> dict[str, int]:
        return {name: process.memory_info().rss for name, process in self._processes.items()}

    def _watch(self) -> None:
        while not self._ending.wait(0.005):
            self._most = {name: max(size, self._most[name]) for name, size in self._now().items()}


@pytest.fixture(scope="module")
def megabyte(world: ClusterWorld) -> bytes:
    """A key with a value of 1 MiB."""
    with world.client(timeout=10) as db:
        db.put("0-megabyte", random.Random(2).randbytes(MIB))
    return b"0-megabyte"


@pytest.mark.parametrize("name", ["router-1", "node-1"])
def test_hundreds_of_big_gets_nobody_reads_are_not_kept(world: ClusterWorld, name: str, megabyte: bytes) -> None:
    asked = [request(Op.READ, Read([megabyte]), request_id=number, node=name == "node-1") for number in range(1, 601)]
    with Memory(world) as memory, Stranger(world, name, greet=True) as greedy, world.client(timeout=20) as db:
        greedy.socket.settimeout(0.2)
        with contextlib.suppress(TimeoutError, ConnectionError):
            for some in asked:
                greedy.socket.sendall(frame(encode_batch(1, [some])))
        assert db.get("0-before")
    assert memory.grown_bytes() < 250 * MIB, f"{memory.grown_bytes() // MIB} MiB"


def test_hundreds_of_big_gets_in_one_frame_are_not_kept(world: ClusterWorld, megabyte: bytes) -> None:
    asked = [request(Op.READ, Read([megabyte]), request_id=number) for number in range(1, 601)]
    with Memory(world) as memory, Stranger(world, "router-1", greet=True) as greedy, world.client(timeout=20) as db:
        greedy.socket.sendall(frame(encode_batch(1, asked)))
        assert db.get("0-before")
    assert memory.grown_bytes() < 250 * MIB, f"{memory.grown_bytes() // MIB} MiB"


def test_a_slow_reader_gets_all_it_asked_for(world: ClusterWorld, megabyte: bytes) -> None:
    with Stranger(world, "router-1", greet=True) as slow, world.client(timeout=5) as db:
        for number in range(1, 41):
            slow.send(Op.READ, Read([megabyte]), request_id=number)
        answered: set[int] = set()
        while len(answered) < 40:
            answered |= {reply[0] for reply in some_replies(slow)}
            assert db.get("0-before")
        assert answered == set(range(1, 41))


def some_replies(stranger: Stranger) -> list[Any]:
    header = stranger._answers.read(4)
    assert len(header) == 4, "a slow reader was cut off"
    _, replies = msgspec.msgpack.decode(stranger._answers.read(struct.unpack(">I", header)[0]))
    return list(replies)


def test_one_read_of_a_large_value_many_times_is_refused_cheaply(world: ClusterWorld, megabyte: bytes) -> None:
    with Memory(world) as memory, Stranger(world, "router-1", greet=True) as greedy:
        code, _ = greedy.refusal(Op.READ, Read([megabyte] * 300))
        assert code == "batch_too_large"
    assert memory.grown_bytes() < 150 * MIB, f"{memory.grown_bytes() // MIB} MiB"


def test_contexts_of_a_megabyte_are_not_kept(world: ClusterWorld) -> None:
    with Memory(world) as memory, Stranger(world, "router-1", greet=True) as greedy:
        for number in range(1, 201):
            greedy.ask(Op.CONTEXT, Context(number, "k" * MIB, None, None))
    assert memory.grown_bytes() < 100 * MIB, f"{memory.grown_bytes() // MIB} MiB"


@pytest.mark.parametrize("op", [Op.READ, Op.SCAN])
def test_one_greedy_peer_does_not_hold_up_the_others(world: ClusterWorld, op: Op, megabyte: bytes) -> None:
    scan = Scan(megabyte, None, False, False, 1 << 40, 1 << 40, None)
    payload = Read([megabyte]) if op == Op.READ else scan
    asked = [request(op, payload, request_id=number) for number in range(1, 601)]
    answered = 0

    def read_all() -> None:
        nonlocal answered
        with contextlib.suppress(OSError, AssertionError, ValueError):
            while answered < len(asked):
                answered += len(some_replies(greedy))

    with world.client(timeout=20) as db, Stranger(world, "router-1", greet=True) as greedy:
        db.get("0-before")
        reading = threading.Thread(target=read_all, daemon=True)
        reading.start()
        greedy.socket.sendall(frame(encode_batch(1, asked)))
        until(lambda: answered)
        before = answered
        db.get("0-before")
        db.get("0-before")
        assert answered - before < 150, "two gets waited for hundreds of replies to another"
        greedy.socket.shutdown(socket.SHUT_RDWR)
        reading.join()


# Noise


def send_noise(world: ClusterWorld, seed: int) -> None:
    """Good requests with a few bytes changed at random, at every process."""
    rng = random.Random(seed)
    good = [
        encode_batch(1, [request(op, payload, node=node)])
        for node in (False, True)
        for op, payload in (
            (Op.READ, Read([b"0-before", b"z-before"])),
            (Op.SCAN, Scan(b"a", b"z", True, False, 5, 1000, [(SHARD, EPOCH)])),
            (Op.CONTEXT, Context(1, "default", None, None)),
            (Op.STATUS, None),
            (Op.META_READ, ["nodes/"]),
            (Op.META_WATCH, MetaWatch(0, 1)),
        )
    ]
    for name in PROCESSES:
        for _ in range(150):
            body = bytearray(rng.choice(good))
            for _ in range(rng.randrange(1, 4)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            with Stranger(world, name, greet=True) as stranger, contextlib.suppress(ConnectionError):
                stranger.socket.sendall(frame(bytes(body)) + frame(PING))


def test_noise_does_no_harm(world: ClusterWorld) -> None:
    send_noise(world, 3)
    with world.client(timeout=5) as db:
        assert db.ping() < 5000


def test_noise_leaves_no_traceback_in_the_logs(world: ClusterWorld) -> None:
    logs = sorted((world.data_dir / "logs").glob("*.log"))
    before = [log.read_text().count("Traceback") for log in logs]
    send_noise(world, 4)
    with world.client(timeout=5) as db:
        db.ping()
    assert [log.read_text().count("Traceback") for log in logs] == before


def test_a_client_of_a_port_that_talks_nonsense_says_so() -> None:
    """The other way round: our client against something that is no router."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def talk() -> None:
            with contextlib.suppress(OSError):
                while True:
                    peer, _ = listener.accept()
                    with peer:
                        peer.sendall(b"220 mail.example ESMTP\r\n")

        threading.Thread(target=talk, daemon=True).start()
        start = time.monotonic()
        with Client(f"127.0.0.1:{port}", timeout=0.4) as db, pytest.raises(ShardKVError) as caught:
            db.get("key")
        assert time.monotonic() - start < 3
        assert f"127.0.0.1:{port}" in str(caught.value)
