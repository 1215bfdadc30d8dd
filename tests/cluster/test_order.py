"""What a pipeline of requests on one key means, at a real node and through a real router, with and without order."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from shardkv.wire.hello import Identity
from shardkv.wire.messages import OK, Op, Read, Request, Scan, Write, encode_batch, raw
from tests.worlds.cluster import ClusterWorld, cluster_world

TARGETS = ["node-1", "router-1"]
APART = [b"0", b"a", b"g", b"m", b"s", b"z"]
"""In shards of both nodes, in both modes."""
SHARD, EPOCH = 1, 1
ROUNDS = 100


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ("--partition", "range", "--nodes", "1", "--shards", "1")
    with cluster_world(tmp_path_factory.mktemp("order"), *options) as found:
        yield found


@pytest.fixture(scope="module", params=["hash", "range"])
def spread(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    """Two nodes with two shards each."""
    options = ("--partition", request.param, "--nodes", "2", "--shards", "4")
    with cluster_world(tmp_path_factory.mktemp(request.param), *options) as found:
        yield found


class Pipeline:
    """A raw connection on which everything is sent at once."""

    def __init__(self, world: ClusterWorld, name: str, *, ordered: bool) -> None:
        self._where = (SHARD, EPOCH) if name.startswith("node") else (None, None)
        self._socket = socket.create_connection(world.address_of(name), timeout=20)
        self._answers = self._socket.makefile("rb")
        greeting = raw(Identity("client", "pipeline").hello(ordered=ordered))
        self._send([Request(0, Op.HELLO, 0, None, None, None, greeting)])
        ((_, status, hello),) = self._replies()
        assert (status, hello[7]) == (OK, ordered)

    def run(self, asked: list[tuple[Op, Any]]) -> list[tuple[int, Any]]:
        """Send all in one frame; (index, payload) of the replies as they come."""
        self._send([Request(n + 1, op, 0, *self._where, None, raw(body)) for n, (op, body) in enumerate(asked)])
        found: list[tuple[int, Any]] = []
        while len(found) < len(asked):
            for request_id, status, payload in self._replies():
                assert status == OK, payload
                found.append((request_id - 1, payload))
        return found

    def close(self) -> None:
        self._answers.close()
        self._socket.close()

    def _send(self, requests: list[Request]) -> None:
        body = encode_batch(1, list(requests))
        self._socket.sendall(struct.pack(">I", len(body)) + body)

    def _replies(self) -> list[Any]:
        (length,) = struct.unpack(">I", self._answers.read(4))
        return list(msgspec.msgpack.decode(self._answers.read(length))[1])


def put(key: bytes, value: bytes) -> tuple[Op, Any]:
    return Op.WRITE, Write(None, None, 1, [key], [value], False)


def get(*keys: bytes) -> tuple[Op, Any]:
    return Op.READ, Read(list(keys))


@pytest.mark.parametrize("name", TARGETS)
def test_on_an_ordered_connection_each_request_sees_those_before_it(world: ClusterWorld, name: str) -> None:
    asked: list[tuple[Op, Any]] = []
    for number in range(ROUNDS):
        value = b"%d" % number
        asked += [put(b"a", value), get(b"a"), put(b"b", value), get(b"b", b"a")]
    asked.append((Op.SCAN, Scan(b"a", b"c", False, False, 10, 1000, [(SHARD, EPOCH)])))
    pipeline = Pipeline(world, name, ordered=True)
    replies = pipeline.run(asked)
    pipeline.close()
    payloads = dict(replies)
    for number in range(ROUNDS):
        value = b"%d" % number
        assert payloads[4 * number + 1][0] == [value]
        assert payloads[4 * number + 3][0] == [value, value]
    assert payloads[4 * ROUNDS][:2] == [[b"a", b"b"], [value, value]]
    on_a = [index for index, _ in replies if index % 4 < 2]
    assert on_a == sorted(on_a), "replies to one key keep the order of the requests"


def test_on_an_ordered_connection_to_a_router_order_holds_over_shards_and_nodes(spread: ClusterWorld) -> None:
    asked: list[tuple[Op, Any]] = []
    for number in range(ROUNDS):
        value = b"%d" % number
        asked += [(Op.WRITE, Write(None, None, 1, list(APART), [value] * len(APART), False)), get(*APART)]
        asked += [put(key, value + b"+") for key in APART] + [get(*APART)]
        asked.append((Op.SCAN, Scan(b"0", None, False, False, 10, 1000, None)))
    pipeline = Pipeline(spread, "router-1", ordered=True)
    payloads = dict(pipeline.run(asked))
    pipeline.close()
    step = len(asked) // ROUNDS
    for number in range(ROUNDS):
        value = b"%d" % number
        assert payloads[step * number + 1][0] == [value] * len(APART)
        assert payloads[step * number + step - 2][0] == [value + b"+"] * len(APART)
        assert payloads[step * number + step - 1][:2] == [APART, [value + b"+"] * len(APART)]


@pytest.mark.parametrize("name", TARGETS)
def test_by_default_requests_under_way_together_have_no_order(world: ClusterWorld, name: str) -> None:
    key, old = b"c", b"old"
    pipeline = Pipeline(world, name, ordered=False)
    pipeline.run([put(key, old)])
    values = [b"%d" % number for number in range(ROUNDS)]
    asked = [request for value in values for request in (put(key, value), get(key))]
    replies = dict(pipeline.run(asked))
    seen = [replies[index][0][0] for index in range(1, len(asked), 2)]
    assert set(seen) <= {old, *values}
    assert seen[0] == old, "a read does not wait for the sync of the write before it"
    ((_, last),) = pipeline.run([get(key)])
    assert last[0][0] in values, "what was acknowledged is seen by what is sent afterwards"
    pipeline.close()
