"""What connections cost that do nothing: memory of a node and of a router with 2,000 of them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator

import msgspec
import psutil
import pytest

from shardkv.wire.messages import Op, Request, Write, encode_batch, raw
from tests.cluster.test_fuzz import GREETING, framed
from tests.worlds.cluster import ClusterWorld, cluster_world, until

CONNECTIONS = 2_000
BURST = 100
COST_BYTES_MAX = 50_000_000


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterWorld]:
    options = ("--partition", "range", "--nodes", "1", "--shards", "1")
    config = '[engine]\ndurability = "os"\n'
    with cluster_world(tmp_path_factory.mktemp("idle"), *options, config=config) as found:
        yield found


def answers(peer: socket.socket, count: int) -> None:
    """Read until so many replies came."""
    stream = peer.makefile("rb")
    while count > 0:
        (length,) = struct.unpack(">I", stream.read(4))
        count -= len(msgspec.msgpack.decode(stream.read(length))[1])
    stream.close()


@pytest.mark.parametrize("burst", [0, pytest.param(BURST, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ["node-1", "router-1"])
def test_two_thousand_idle_connections_cost_little(world: ClusterWorld, name: str, burst: int) -> None:
    """Idle from the start, and idle after each, one after the other, had a hundred writes unanswered at once."""
    process, address = psutil.Process(world.pid(name)), world.address_of(name)
    where = (1, 1) if name == "node-1" else (None, None)
    payload = raw(Write(None, None, 1, [b"idle"], [b""], False))
    puts = framed(encode_batch(1, [Request(n, Op.WRITE, 0, *where, None, payload) for n in range(1, burst + 1)]))
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        peers = [stack.enter_context(socket.create_connection(address, timeout=30)) for _ in range(CONNECTIONS)]
        for peer in peers:
            peer.sendall(GREETING)
        for peer in peers:
            answers(peer, 1)
        for peer in peers:
            peer.sendall(puts)
            answers(peer, burst)

        def cost_bytes() -> int:
            return process.memory_info().rss - before

        until(lambda: cost_bytes() < COST_BYTES_MAX, timeout_s=5, what=f"{cost_bytes() / 1e6:.0f} MB are held")
        print(f"{name}: {cost_bytes() / CONNECTIONS:.0f} bytes for each of {CONNECTIONS} connections, burst of {burst}")
        with world.client(timeout=5) as db:
            db.put("beside", "them")
